"""train_motion.py: metrics, frame, readers, the toy. LLMBLOCK_DATA=DIR adds DIR/motion."""

import csv
import json

import numpy as np
import pytest
import torch
from torch import nn

import train_motion as tm
from llmblock import UserError


def parse(*argv):
    return tm.parse_args(["--workers", "0", "--device", "cpu", *map(str, argv)])


def scene_of(tracks, lanes):
    return tm.make_scene(tracks, lanes, 20, 30)


def forecast(*scenes):
    """[(trajectories, confidences)] of scenes in one batch, by a model that was never trained."""
    model = tm.build_model(parse(), "pretrained", 0).eval()
    data = tm.Scenes(scenes, mirror=False)
    agents, lanes, _ = tm.collate([data[0, i] for i in range(len(scenes))])
    with torch.no_grad():
        return list(zip(*model(agents, lanes), strict=True))


def same(a, b, atol=1e-4):
    pairs = zip(a, b, strict=True)
    return all(x.shape == y.shape and np.allclose(x, y, 0, atol, True) for x, y in pairs)


def test_metrics_by_hand():
    # The best trajectory ends nearest: its average error counts, also where another's is smaller.
    errors = torch.tensor([[[1, 3.0], [9, 1], [0, 2]], [[7, 4], [8, 8], [2, 5]]])  # (B, K, T)
    p = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.3, 0.6]])
    model = nn.Module()
    model.forward = lambda agents, lanes: (torch.stack([0 * errors, errors], dim=-1), p.log())
    scene = [np.zeros(shape, np.complex64) for shape in ((1, 20), (1, 20), 2)]
    metrics = tm.evaluate(parse(), model, tm.Scenes([scene, scene], mirror=False))
    expected = {"minADE6": (5 + 5.5) / 2, "minFDE6": (1 + 4) / 2, "MR6": 50, "MR1": 100}
    expected |= {"minADE1": (2 + 3.5) / 2, "minFDE1": (3 + 5) / 2}
    expected |= {"brier-minFDE6": (1 + 0.8**2 + 4 + 0.9**2) / 2}
    assert metrics == pytest.approx(expected)
    assert next(iter(metrics)) == "minADE6" and tm.BEST is min


def test_translating_and_rotating_a_scene_changes_nothing():
    tracks, lanes = tm.draw_toy(3)
    scene = scene_of(tracks, lanes)
    assert scene[0][0, -1] == 0 and scene[0][0, -11].real < -1 and abs(scene[0][0, -11].imag) < 1e-5
    other = scene_of(*[x * np.exp(2.9j) + 5000 - 3000j for x in (tracks, lanes)])
    assert same(other, scene) and same(forecast(other)[0], forecast(scene)[0], 1e-3)
    t = np.arange(-19, 31) / 10
    drift = (10 * t + 1j * np.maximum(t, 0))[None] * np.exp(2j)  # to the left, from now on
    assert scene_of(drift, lanes)[2][-1] == pytest.approx(30 + 3j, abs=1e-4)


def test_order_and_padding_change_nothing_but_gaps_do():
    tracks, lanes = tm.draw_toy(3)
    tracks = np.concatenate([tracks, tracks[1:] + 5j])
    [alone] = forecast(scene_of(tracks, lanes))
    mixed = scene_of(tracks[[0, 2, 1]], lanes[[2, 0, 1]])
    crowd = scene_of(np.tile(tracks, (9, 1)), np.tile(lanes + 3j, (9, 1)))
    padded, other = forecast(mixed, crowd)
    assert same(padded, alone) and not same(other, alone, 1e-3) and other[0].isfinite().all()
    tracks[1, 5:15] = tm.UNSEEN
    [gap] = forecast(scene_of(tracks, lanes))
    assert not same(gap, alone, 1e-5) and gap[0].isfinite().all()


def test_toy_targets_take_any_road_and_the_speed_of_the_car_in_front():
    roads = []
    for i in range(30):
        tracks, lanes = tm.draw_toy(i)
        speeds = 10 * abs(np.diff(tracks[:, -2:])).flatten()
        assert speeds[0] == pytest.approx(speeds[1], rel=0.05)
        away = abs(lanes - tracks[0, -1])  # (3, 20): from where the target ends
        roads.append(away.min(axis=1).argmin())
        assert away.min() < 3 and abs(tracks[0, :20].imag).max() < 1e-9  # so far straight on
    assert set(roads) == {0, 1, 2}
    assert not {*tm.find_scenes(parse(), "train")} & {*tm.find_scenes(parse(), "val")}


def write_csv(path, tracks, start=0.0, city="PIT", change=list):
    """A sequence of Argoverse 1, changed. By its name, the target comes last."""
    rows = []
    for step, i in np.argwhere(np.isfinite(tracks).T):
        place = tracks[i, step]
        kind = "OTHERS" if i else "AGENT"
        rows.append([start + step / 10, "945678"[i], kind, place.real, place.imag, city])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        head = "TIMESTAMP,TRACK_ID,OBJECT_TYPE,X,Y,CITY_NAME".split(",")
        csv.writer(file).writerows([head, *change(rows)])
    return path


def write_map(path, lane):
    """A map of Argoverse 1, or of Argoverse 2 with sides a metre beside the centre line."""
    if path.suffix == ".xml":
        nodes = [f'<node id="{k}" x="{z.real}" y="{z.imag}"/>' for k, z in enumerate(lane)]
        ends = [f'<nd ref="{k}"/>' for k in range(len(lane))]
        path.write_text(f"<map>{''.join(nodes)}<way>{''.join(ends)}</way></map>")
    else:
        left, right = [[{"x": z.real, "y": z.imag} for z in lane + d] for d in (1j, -1j)]
        segment = {"left_lane_boundary": left, "right_lane_boundary": right}
        path.write_text(json.dumps({"lane_segments": {"0": segment}}))
    return path


@pytest.fixture
def argv(tmp_path):
    """20 sequences of train, later ones with smaller numbers; two of val, straight on."""
    for i in range(22):
        tracks = tm.draw_toy(i)[0] if i < 20 else np.arange(50)[None] + 0j
        write_csv(tmp_path / ("train" if i < 20 else "val") / f"data/{i}.csv", tracks, -60.0 * i)
    return ["--data", "argoverse1", "--root", tmp_path]


@pytest.mark.parametrize("suffix", ["xml", "json"])
def test_a_csv_and_its_map_give_the_scene(suffix, tmp_path):
    tracks, _ = tm.draw_toy(3)
    tracks[1, 4:7] = tm.UNSEEN
    corner = np.array([0, 15, 15 + 4j])  # its 20 points are a metre apart
    lanes = np.array([[*range(16), 15 + 1j, 15 + 2j, 15 + 3j, 15 + 4j]])
    maps = [write_map(tmp_path / f"x_PIT_map.{suffix}", corner)]
    path = write_csv(tmp_path / "a.csv", tracks, change=lambda rows: rows[::-1])
    assert same(tm.read_scene(path, maps), [tracks, lanes])
    other = write_csv(tmp_path / "b.csv", tracks, city="MIA")
    assert tm.read_scene(other, maps)[1].shape == (0, 20)


def test_validation_is_later_than_train(argv, capsys):
    args = parse(*argv)
    data = tm.load_data(args)
    assert args.sizes == {"test": 2, "train": 18, "val": 2}
    expected = [scene_of(*tm.draw_toy(i))[2] for i in (1, 0)]  # the last in time
    assert same([scene[2] for scene in data["val"].scenes], expected)
    assert "constant velocity: minADE1 0.00, minFDE1 0.00" in capsys.readouterr().out


@pytest.mark.parametrize("change, words", [
    (lambda rows: [r for r in rows if r[2] != "AGENT"], "0 agents are the target"),
    (lambda rows: rows[:-2], "not seen throughout"),
    (lambda rows: [*rows, [2.0, "9", "AGENT", "nan", 1, "PIT"]], "not seen throughout"),
])  # fmt: skip
def test_a_broken_sequence_is_named(change, words, argv, tmp_path):
    path = write_csv(tmp_path / "train/data/7.csv", tm.draw_toy(0)[0], change=change)
    with pytest.raises(UserError, match=f"cannot use {path}: .*{words}"):
        tm.load_data(parse(*argv))


def test_wrong_paths_and_maps_are_named(argv, tmp_path):
    far = write_map(tmp_path / "far_PIT_vector_map.xml", np.arange(1e5, 1e5 + 9))
    cut = tmp_path / "cut_PIT_vector_map.xml"
    cut.write_text("<ArgoverseVectorMap><node")
    wrong = {("--root", tmp_path / "no"): f"cannot use {tmp_path}/no: .*val/data/"}
    wrong |= {("--map", far): f"--map {far}: no map", ("--map", cut): "PIT_vector_map.xml: Parse"}
    for more, words in wrong.items():
        with pytest.raises(UserError, match=words):
            tm.load_data(parse(*argv, *more))


def test_real_data(real):
    parquet = pytest.importorskip("pyarrow.parquet")
    root = real / "motion"
    args = parse("--data", "argoverse2", "--root", root / "argoverse2_scenario")
    [path] = tm.find_scenes(args, "val")
    tracks, _ = tm.read_scene(path, [])
    rows = parquet.read_table(path).to_pylist()
    focal = [row for row in rows if row["track_id"] == row["focal_track_id"]]
    places = np.array([complex(row["position_x"], row["position_y"]) for row in focal])
    assert same([tracks[0]], [places]) and len(tracks) == len({row["track_id"] for row in rows})
    # real sequences of Argoverse 1 lie on the map of Argoverse 2: the target goes along a lane
    [path] = root.glob("argoverse2_sensor_logs/3b3570b4*/map/log_map_archive*.json")
    for n in json.loads((root / "argoverse1/on_map_3b3570b4.json").read_text())["val"]:
        _, lanes, _ = scene_of(*tm.read_scene(root / f"argoverse1/val/data/{n}.csv", [path]))
        steps = np.diff(lanes)[abs(lanes[:, 1:]) < 5]
        assert (steps / abs(steps)).real.max() > 0.98
