"""train_motion.py: metrics, the target's frame, polylines, files of Argoverse, the toy. CPU.

python -m pytest tests/test_motion.py -q        # LLMBLOCK_DATA=DIR adds DIR/motion
"""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_motion as tm  # noqa: E402
from llmblock import UserError  # noqa: E402

REAL = Path(os.environ.get("LLMBLOCK_DATA", "/nowhere")) / "motion"
needs_data = pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="no LLMBLOCK_DATA")
HEAD = "TIMESTAMP,TRACK_ID,OBJECT_TYPE,X,Y,CITY_NAME".split(",")
torch.set_num_threads(1)


def parse(*argv):
    return tm.parse_args(["--workers", "0", *map(str, argv)])


def scene_of(tracks, lanes):
    return tm.make_scene(tracks, lanes, 20, 30)


def forecast(scenes, kind="none"):
    """[(trajectories, confidences)] of scenes in one batch, by a model that was never trained."""
    model = tm.build_model(parse(), kind, 0).eval()
    data = tm.Scenes(scenes, mirror=False)
    agents, lanes, _ = tm.collate([data[0, i] for i in range(len(scenes))])
    with torch.no_grad():
        return list(zip(*model(agents, lanes), strict=True))


def same(a, b, atol=1e-4):
    pairs = zip(a, b, strict=True)
    return all(x.shape == y.shape and np.allclose(x, y, 0, atol, True) for x, y in pairs)


# ---------------------------------------------------------------- metrics and loss
class Fixed(nn.Module):
    """A model that always gives the same answer."""

    def forward(self, agents, lanes):
        return self.answer


def test_metrics_by_hand():
    """Two scenes, three trajectories, two steps. The best one ends nearest: its average error
    counts, also where another's is smaller."""
    errors = torch.tensor([[[1, 3.0], [9, 1], [0, 2]], [[7, 4], [8, 8], [2, 5]]])  # (B, K, T)
    p = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.3, 0.6]])
    model = Fixed()
    model.answer = torch.stack([0 * errors, errors], dim=-1), p.log()
    scene = [np.zeros(shape, np.complex64) for shape in ((1, 20), (1, 20), 2)]
    metrics = tm.evaluate(parse(), model, tm.Scenes([scene, scene], mirror=False))
    expected = {"minADE6": (5 + 5.5) / 2, "minFDE6": (1 + 4) / 2, "MR6": 50, "MR1": 100}
    expected |= {"minADE1": (2 + 3.5) / 2, "minFDE1": (3 + 5) / 2}
    expected |= {"brier-minFDE6": (1 + 0.8**2 + 4 + 0.9**2) / 2}
    assert metrics == pytest.approx(expected)
    assert next(iter(metrics)) == "minADE6" and tm.BEST is min


def test_only_the_trajectory_that_ends_nearest_learns():
    modes = torch.randn(5, 6, 30, 2, requires_grad=True)
    confidence = torch.randn(5, 6, requires_grad=True)
    model = Fixed()
    model.answer = modes, confidence
    tm.compute_loss(parse(), model, [torch.zeros(5, 30, 2)] * 3).backward()
    winner = nn.functional.one_hot(modes[:, :, -1].norm(dim=-1).argmin(1), 6)
    assert torch.equal(modes.grad.abs().sum((2, 3)) > 0, winner > 0)
    torch.testing.assert_close(confidence.grad, (confidence.softmax(1) - winner).detach() / 5)


# ---------------------------------------------------------------- scenes
def test_translating_and_rotating_a_scene_changes_nothing():
    tracks, lanes = tm.draw_toy(3)
    scene = scene_of(tracks, lanes)
    assert scene[0][0, -1] == 0 and scene[0][0, -11].real < -1 and abs(scene[0][0, -11].imag) < 1e-5
    for angle in (0.7, -2.9):
        other = scene_of(*[x * np.exp(1j * angle) + 5000 - 3000j for x in (tracks, lanes)])
        assert same(other, scene) and same(forecast([other])[0], forecast([scene])[0], 1e-3)
    t = np.arange(-19, 31) / 10
    drift = (10 * t + 1j * np.maximum(t, 0))[None] * np.exp(2j)  # to the left, from now on
    assert scene_of(drift, lanes)[2][-1] == pytest.approx(30 + 3j, abs=1e-4)


@pytest.mark.parametrize("kind", ["none", "pretrained"])
def test_order_and_padding_change_nothing_but_gaps_do(kind):
    tracks, lanes = tm.draw_toy(3)
    tracks = np.concatenate([tracks, tracks[1:] + 5j])
    alone = forecast([scene_of(tracks, lanes)], kind)[0]
    mixed = scene_of(tracks[[0, 2, 1]], lanes[[2, 0, 1]])
    crowd = scene_of(np.tile(tracks, (9, 1)), np.tile(lanes + 3j, (9, 1)))
    padded, other = forecast([mixed, crowd], kind)
    assert same(padded, alone) and not same(other, alone, 1e-3) and other[0].isfinite().all()
    tracks[1, 5:15] = tm.UNSEEN
    gap = forecast([scene_of(tracks, lanes)], kind)[0]
    assert not same(gap, alone, 1e-5) and gap[0].isfinite().all()


def test_what_is_far_away_is_not_seen():
    t = np.arange(50.0)
    lane = np.linspace(-100, 90, 20)
    tracks = np.stack([t - 19, 0 * t + 64j, 0 * t + 66j, t * 0 + 5j, t - 19 + 3j])
    tracks[3, ::2] = tm.UNSEEN  # never twice in a row
    agents, lanes, _ = scene_of(tracks, np.stack([lane, lane + 64j, lane + 65j]))
    assert agents[:, -1].tolist() == [0, 64j, 3j]
    assert len(lanes) == 2 and np.array_equal(np.isfinite(lanes[0]), abs(lane) < 65)


def test_scenes_are_mirrored_as_a_whole_and_the_seed_decides():
    scene = [x + 1j for x in scene_of(*tm.draw_toy(5))]
    plain = tm.Scenes([scene], mirror=False)[0, 0]
    flipped = [x * torch.tensor([1, -1]) for x in plain]
    data = tm.Scenes([scene], mirror=True)
    sides = [same(data[seed, 0], flipped) for seed in range(40)]
    assert all(same(data[i, 0], flipped if sides[i] else plain) for i in range(40))
    assert 8 < sum(sides) < 32


# ---------------------------------------------------------------- files
def write_csv(path, tracks, start=0.0, city="PIT", change=list):
    """A sequence of Argoverse 1, changed. By its name, the target comes last."""
    rows = []
    for step, i in np.argwhere(np.isfinite(tracks).T):
        kind = "AGENT" if i == 0 else "OTHERS"
        place = tracks[i, step]
        rows.append([start + step / 10, "945678"[i], kind, place.real, place.imag, city])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEAD, *change(rows)])
    return path


def write_map(path, lanes):
    """A map of Argoverse 1, or of Argoverse 2 with sides a metre beside the centre lines."""
    xml = ""
    segments = {}
    for i, lane in enumerate(lanes):
        nodes = [f'<node id="{i}-{k}" x="{z.real}" y="{z.imag}"/>' for k, z in enumerate(lane)]
        ends = [f'<nd ref="{i}-{k}"/>' for k in range(len(lane))]
        xml += "".join([*nodes, f'<way lane_id="{i}"><tag k="x" v="y"/>', *ends, "</way>"])
        left, right = [[{"x": z.real, "y": z.imag} for z in lane + d] for d in (1j, -1j)]
        segments[i] = {"left_lane_boundary": left, "right_lane_boundary": right}
    text = {".xml": f"<map>{xml}</map>", ".json": json.dumps({"lane_segments": segments})}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text[path.suffix])
    return path


def make_root(root, n=20):
    """n sequences of train, later ones with smaller numbers; two of val; their map."""
    for i in range(n + 2):
        tracks, lanes = tm.draw_toy(i)
        write_csv(root / ("train" if i < n else "val") / f"data/{i}.csv", tracks, -60.0 * i)
    write_map(root / "maps/a_PIT_10314_vector_map.xml", lanes)
    return ["--data", "argoverse1", "--root", root, "--out", root / "runs"]


@pytest.mark.parametrize("suffix", ["xml", "json"])
def test_a_csv_and_its_map_give_the_scene(suffix, tmp_path):
    tracks, _ = tm.draw_toy(3)
    tracks[1, 4:7] = tm.UNSEEN
    corner = np.array([0, 15, 15 + 4j])  # its 20 points are a metre apart
    lanes = np.array([[*range(16), 15 + 1j, 15 + 2j, 15 + 3j, 15 + 4j]])
    maps = [write_map(tmp_path / f"x_PIT_map.{suffix}", [corner])]
    path = write_csv(tmp_path / "a.csv", tracks, change=lambda rows: rows[::-1])
    found = tm.read_scene(path, maps)
    assert same(found[0], tracks) and same(found[1], lanes)
    found = tm.read_scene(write_csv(tmp_path / "b.csv", tracks, city="MIA"), maps)
    assert found[1].shape == (0, 20)


def test_validation_is_later_than_train(tmp_path, capsys):
    args = parse(*make_root(tmp_path), "--map", tmp_path / "maps")
    data = tm.load_data(args)
    assert args.sizes == {"test": 2, "train": 18, "val": 2}
    expected = [scene_of(*tm.draw_toy(i))[2] for i in (1, 0)]  # the last in time
    assert same([scene[2] for scene in data["val"].scenes], expected)
    errors = []
    for agents, lanes, future in data["test"].scenes:
        assert len(lanes) == 3
        errors.append([abs(z + agents[0, 9] * (t + 1) / 10) for t, z in enumerate(future)])
    last = np.mean(errors, axis=0)[-1]
    assert f"minADE1 {np.mean(errors):.2f}, minFDE1 {last:.2f}" in capsys.readouterr().out


BROKEN = [  # what becomes of the rows of a sequence, and what is said of it
    (lambda rows: [r for r in rows if r[2] != "AGENT"], "0 agents are the target"),
    (lambda rows: rows[:-2], "not seen throughout"),
    (lambda rows: [*rows, [2.0, "9", "AGENT", "nan", 1, "PIT"]], "not seen throughout"),
    (lambda rows: [*rows, ["x", *rows[1][1:]]], "ValueError: could not convert"),
    (lambda rows: [r[:4] for r in rows], "TypeError: "),
]


@pytest.mark.parametrize("change, words", BROKEN)
def test_a_broken_sequence_is_named(change, words, tmp_path):
    argv = make_root(tmp_path)
    path = write_csv(tmp_path / "train/data/7.csv", tm.draw_toy(0)[0], change=change)
    with pytest.raises(UserError, match=f"cannot use {path}: .*{words}"):
        tm.load_data(parse(*argv))


def test_wrong_paths_and_maps_are_named(tmp_path, monkeypatch):
    argv = make_root(tmp_path)
    far = write_map(tmp_path / "far_PIT_vector_map.xml", [np.arange(1e5, 1e5 + 9)])
    bare = write_map(tmp_path / "bare/log_map_archive_PIT_.json", [])
    cut = tmp_path / "cut_PIT_vector_map.xml"
    cut.write_text("<ArgoverseVectorMap><node")
    scenario = tmp_path / "val/a/scenario_a.parquet"
    scenario.parent.mkdir()
    scenario.write_text("PAR1")
    for more, words in [
        (["--root", tmp_path / "no"], f"cannot use {tmp_path}/no: .*val/data/"),
        (["--data", "argoverse2"], f"cannot use {scenario}: "),
        (["--map", tmp_path / "no"], f"--map {tmp_path}/no: no map"),
        (["--map", far], f"--map {far}: no map"),
        (["--map", cut], f"cannot use {cut}: ParseError"),
        (["--map", bare.parent], f"cannot use {bare}: "),
    ]:
        with pytest.raises(UserError, match=words):
            tm.main(list(map(str, [*argv, *more])))
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(UserError, match="pyarrow"):
        tm.load_data(parse(*argv, "--data", "argoverse2"))
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- Argoverse 2, real data
@needs_data
def test_the_real_scenario_of_argoverse2():
    parquet = pytest.importorskip("pyarrow.parquet")
    args = parse("--data", "argoverse2", "--root", REAL / "argoverse2_scenario")
    [path] = tm.find_scenes(args, "val")
    tracks, lanes = tm.read_scene(path, [])
    agents, near, future = tm.make_scene(tracks, lanes, 50, 60)
    rows = parquet.read_table(path).to_pylist()
    focal = [row for row in rows if row["track_id"] == row["focal_track_id"]]
    places = np.array([complex(row["position_x"], row["position_y"]) for row in focal])
    assert same([tracks[0]], [places]) and len(tracks) == len({row["track_id"] for row in rows})
    # where the car points is where it went, and the lanes' mean sides are the file's centre lines
    expected = (places[50:] - places[49]) * np.exp(-1j * focal[49]["heading"])
    assert abs(future - expected).max() < 0.05 * abs(expected).max() and len(near) > 20
    segments = json.loads(next(path.parent.glob("*.json")).read_text())["lane_segments"]
    for lane, segment in zip(lanes, segments.values(), strict=True):
        centre = [complex(p["x"], p["y"]) for p in segment["centerline"]]
        assert abs(lane[[0, -1]] - [centre[0], centre[-1]]).max() < 0.5


@needs_data
def test_real_sequences_lie_on_their_map():
    [path] = REAL.glob("argoverse2_sensor_logs/3b3570b4*/map/log_map_archive*.json")
    for n in json.loads((REAL / "argoverse1/on_map_3b3570b4.json").read_text())["val"]:
        file = REAL / f"argoverse1/val/data/{n}.csv"
        _, lanes, _ = scene_of(*tm.read_scene(file, [path]))
        steps = np.diff(lanes)[abs(lanes[:, 1:]) < 5]
        assert (steps / abs(steps)).real.max() > 0.98  # the target goes along a lane
