"""train_motion.py: metrics, frames, polylines, every reader, the toy's traffic. CPU, offline.

python -m pytest tests/test_motion.py -q        # LLMBLOCK_DATA=DIR adds DIR/motion
"""

import csv
import json
import math
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

SMALL = "--workers 0 --device cpu --precision fp32".split()
REAL = Path(os.environ.get("LLMBLOCK_DATA", "/nowhere")) / "motion"
HEAD = "TIMESTAMP,TRACK_ID,OBJECT_TYPE,X,Y,CITY_NAME".split(",")
TOY, LANES = tm.draw_toy(40, 0), tm.TOY_TYPES[1]  # (40, 6, 50, 2) and (40, 9, 20, 2), types (9)
NO_LANES = np.zeros((0, 20, 2)), np.zeros(0, dtype=int)
needs_data = pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="no LLMBLOCK_DATA")
torch.set_num_threads(1)


def make(tracks, lanes=NO_LANES[0], kinds=LANES, heading=None):
    """A scene of an AGENT, OTHERS and lanes."""
    types = np.array([0] + [2] * (len(tracks) - 1))
    return tm.make_scene(tracks, types, lanes, kinds[: len(lanes)], 20, heading)


def scenes_of(*scenes):
    return tm.Scenes(**tm.pack(scenes))


TOYS = scenes_of(*map(make, *TOY))
META = {"line": tm.fit_line(TOYS).tolist()}


def same(a, b, atol=0.0):
    pairs = zip(a, b, strict=True)
    return all(np.shape(x) == np.shape(y) and np.allclose(x, y, 0, atol, True) for x, y in pairs)


def moved(x, angle=0.7):
    c, s = math.cos(angle), math.sin(angle)
    return x @ np.array([[c, s], [-s, c]]) + (5000, -3000)


def seen_from_the_first(places, turn):
    """The places (n + 1, 2) but the first, where the complex number turn leads along x."""
    z = np.asarray(places) @ [1, 1j]
    z = (z[1:] - z[0]) * abs(turn) / turn
    return np.stack([z.real, z.imag], axis=1)


def forecast(scenes, kind="none"):
    model = tm.build_model(tm.parse_args(SMALL), kind, 0, META).eval()
    with torch.no_grad():
        return list(zip(*model(scenes.batch(torch.arange(len(scenes)))[0]), strict=True))


# ---------------------------------------------------------------- metrics


def test_the_mode_that_ends_nearest_is_measured():
    errors = torch.tensor([[[0, 0, 3], [4, 4, 2]], [[1, 1, 2.001], [0, 0, 9]]])  # (B, k, T)
    future = torch.arange(12.0).view(2, 3, 2)
    measured = tm.displacement(future[:, None] + errors[..., None] * torch.eye(2)[0], future)
    expected = [[10 / 3, 2, 0], [4.001 / 3, 2.001, 1]]  # the smallest averages: 1 and 3
    assert torch.allclose(measured, torch.tensor(expected), atol=1e-5)
    at_and_beyond = torch.tensor([[[[0, 2.0]]], [[[0, 2 + 1e-6]]]])
    assert tm.displacement(at_and_beyond, torch.zeros(2, 1, 2))[:, 2].tolist() == [0, 1]
    metrics = {"minADE6": 2.334, "minFDE6": 2.0, "MR6": 50.0}
    assert tm.as_metrics(torch.tensor([4.668, 4, 1]), 2, 6) == metrics


def test_the_mode_that_ends_nearest_learns():
    g = torch.Generator().manual_seed(0)
    modes, confidence = (torch.randn(s, generator=g) for s in ((5, 6, 30, 2), (5, 6)))
    future, k = torch.zeros(5, 30, 2), modes[:, :, -1].norm(dim=-1).argmin(1)
    outputs = modes.requires_grad_(), confidence.requires_grad_()
    loss = tm.compute_loss(lambda x: outputs, (torch.zeros(5), future))
    loss.backward()
    assert torch.equal(modes.grad.abs().sum((2, 3)) > 0, torch.eye(6)[k] > 0)
    pull = (confidence.softmax(1) - torch.eye(6)[k]) / 5
    assert torch.allclose(confidence.grad, pull, atol=1e-6)
    assert (modes.grad * modes)[range(5), k].min() >= 0  # to the future, here 0


def test_evaluate_equals_a_loop_over_the_scenes():
    class Model(nn.Module):
        def forward(self, x):  # goes on as in one of the last steps; any feature is the confidence
            return x[:, 0, -6:, None, 2:4] * torch.arange(1, 31)[:, None], x[:, 0, :6, 1]

    sums = {"6": np.zeros(3), "1": np.zeros(3)}
    for start, future in zip(TOYS.starts, TOYS.future.tolist(), strict=True):
        places, modes = TOYS.points[start].tolist(), []
        for (x0, y0), (x1, y1) in zip(places[-7:-1], places[-6:], strict=True):
            way = [((x1 - x0) * t, (y1 - y0) * t) for t in range(1, 31)]
            modes.append([math.dist(p, q) for p, q in zip(way, future, strict=True)])
        first = np.argmax([y for _, y in places[:6]])
        for k, some in (("6", modes), ("1", [modes[first]])):
            error = min(some, key=lambda e: e[-1])
            sums[k] += sum(error) / 30, error[-1], 100 * (error[-1] > 2)
    metrics = tm.evaluate(Model(), [TOYS], tm.parse_args([*SMALL, "--batch-size", "7"]))
    for k in "61":
        means = [metrics[name + k] for name in ("minADE", "minFDE", "MR")]
        assert means == pytest.approx(sums[k] / 40, abs=2e-3)
    assert metrics["minADE6"] < metrics["minADE1"] and 0 < metrics["MR6"] < metrics["MR1"]


def test_baselines_forecast_their_own_motion_exactly():
    scale, t = np.reshape([50, 9, 2], (3, 1, 1)), np.arange(-19, 31)[:, None] / 10
    start, speed, gain = np.random.default_rng(0).normal(0, scale, (3, 300, 2))[:, :, None]
    for bend in (0, 1):
        scenes = scenes_of(*(make(x[None]) for x in start + speed * t + bend * gain * t**2 / 2))
        for name, modes in tm.baselines(scenes, tm.fit_line(scenes)).items():
            errors = tm.displacement(modes, scenes.future)[:, 1]
            exact = bend == 0 or name != "constant velocity"
            assert errors.max() < 0.1 if exact else errors.median() > 3


# ---------------------------------------------------------------- scenes


def test_the_frame_is_that_of_the_target():
    tracks, lanes = TOY[0][3], TOY[1][3]
    points, types, future = scene = make(tracks, lanes)
    assert not points[0, 19].any() and points[0, 9, 0] < -1 and abs(points[0, 9, 1]) < 1e-5
    turn = (tracks[0, 19] - tracks[0, 9]) @ [1, 1j]
    assert same([future], [seen_from_the_first(tracks[0, 19:], turn)], 1e-4)
    by_hand = [seen_from_the_first([tracks[0, 19], *lane], turn) for lane in lanes]
    assert same(points[-9:], by_hand, 1e-4) and (types[-9:] == LANES).all()
    for angle in (0.7, -2.9):
        other = make(moved(tracks, angle), moved(lanes, angle))
        assert same(other, scene, 1e-4)
        assert same(forecast(scenes_of(other))[0], forecast(scenes_of(scene))[0], 1e-3)
    left = make(tracks, heading=math.atan2(turn.imag, turn.real) + math.pi / 2)
    assert same([left[2]], [future @ np.array([[0, -1], [1, 0]])], 1e-4)


@pytest.mark.parametrize("kind", ["none", "pretrained"])
def test_order_and_padding_do_not_change_a_forecast(kind):
    (tracks, lanes), order = (x[3] for x in TOY), np.random.default_rng(0).permutation(9)
    scene = make(tracks, lanes)
    mixed = make(tracks[[0, 4, 2, 5, 1, 3]], lanes[order], LANES[order])
    crowd = make(np.tile(tracks, (9, 1, 1)), lanes)
    assert not same([mixed[0]], [scene[0]], 1) and len(crowd[0]) > 40
    [alone], [again] = forecast(scenes_of(scene), kind), forecast(scenes_of(mixed), kind)
    padded, other = forecast(scenes_of(scene, crowd), kind)
    assert same(again, alone, 1e-4) and same(padded, alone, 1e-4)
    assert not same(other, alone, 1e-2) and other[0].isfinite().all()


def test_polylines_are_these_vectors():
    t, tracks, lanes = np.arange(50.0), np.full((7, 50, 2), np.nan), np.zeros((3, 20, 2))
    tracks[0] = np.stack([t - 19, 0 * t], axis=1)
    for i in (0, 1, 2, 4, 5):
        tracks[1, i] = 30 + i / 2, 4
    tracks[2, 7] = 5, 5  # seen once
    tracks[3], tracks[4], tracks[5], tracks[5, :20] = (0, 55.9), (0, 56.1), (0, 5), (0, 57)
    tracks[6, ::2] = 5, 6  # never twice in a row
    lanes[:] = np.stack([t - 9, 0 * t], axis=1)[:20]
    lanes[..., 1] += np.array([[-3], [64.9], [65.1]])
    types = np.array([0, 2, 2, 1, 2, 2, 2]), np.array([tm.INTERSECTION, tm.LANE, tm.LANE])
    scene = tm.make_scene(moved(tracks, 2), types[0], moved(lanes, 2), types[1], 20)
    scenes = scenes_of(make(TOY[0][3], TOY[1][3]), scene)

    expected = torch.zeros(5, 19, 7)
    for i in range(19):
        gap = [30 + i / 2, 4, 0.5, 0, i / 18, 2, 1] if i in (0, 1, 4) else [0] * 7
        crossing = [i - 9, -3, 1, 0, i / 18, tm.INTERSECTION, 1]
        rows = [i - 19, 0, 1, 0, i / 18, 0, 1], gap, [0, 55.9, 0, 0, i / 18, 1, 1], crossing
        expected[:, i] = torch.tensor([*rows, [i - 9, 64.9, 1, 0, i / 18, tm.LANE, 1]])
    for hide, hidden in (([], []), (["lanes"], [3, 4]), (["agents"], [1, 2])):
        x, future = scenes.batch(torch.tensor([1, 0]), hide)
        wanted = expected.clone()
        wanted[hidden] = 0
        assert torch.allclose(x[0, :5], wanted, atol=1e-3) and not x[0, 5:].any()
    assert x.shape[1] > 5 and same(future, [scene[2], TOYS.future[3]])


def test_the_type_of_a_track_that_begins_late_counts():
    tracks, forecasts = TOY[0][3].copy(), []
    tracks[1, :5] = np.nan
    for kind in ("OTHERS", "pedestrian"):
        types = np.array([0, tm.TYPES.index(kind), 2, 2, 2, 2])
        forecasts += forecast(scenes_of(tm.make_scene(tracks, types, *NO_LANES, 20)))
    assert not same(*forecasts, 1e-4)


def test_scenes_are_mirrored_turned_and_scaled_as_a_whole_and_the_generator_decides():
    def epoch(seed):
        args, gen = tm.parse_args([*SMALL, "--batch-size", "8"]), torch.Generator()
        return list(tm.train_batches({"train": TOYS}, args, gen.manual_seed(seed)))

    def plane(x):  # (..., 2) as x + iy
        return torch.complex(x[..., 0].double(), x[..., 1].double())

    found, flips, factors = [], [], []
    for x, future in epoch(0):
        for vectors, way in zip(x, plane(future), strict=True):
            fits = []  # way = factor * original, or its mirror image
            for i, original in enumerate(plane(TOYS.future)):
                for flip, z in ((1, original), (-1, original.conj())):
                    factor = (way * z.conj()).sum() / z.abs().square().sum()
                    fits.append(((way - factor * z).abs().max().item(), i, flip, factor))
            error, i, flip, factor = min(fits, key=lambda fit: fit[0])
            (original,), _ = TOYS.batch(torch.tensor([i]))
            for first in (0, 2):  # places and steps
                z = plane(original[..., first : first + 2])
                moved = factor * (z if flip == 1 else z.conj())
                assert (plane(vectors[: len(z), :, first : first + 2]) - moved).abs().max() < 1e-4
            assert error < 1e-4 and torch.equal(vectors[: len(original), :, 4:], original[..., 4:])
            found, flips, factors = [*found, i], [*flips, flip], [*factors, factor]
    factors = torch.stack(factors)
    assert sorted(found) == list(range(40)) != found and 8 < flips.count(1) < 32
    assert 0.9 < factors.abs().min() < 0.95 < 1.05 < factors.abs().max() < 1.1
    assert 0.05 < factors.angle().std() < 0.2
    for (x, future), (y, again), (_, other) in zip(epoch(0), epoch(0), epoch(1), strict=True):
        assert x.equal(y) and future.equal(again) and not future.equal(other)


# ---------------------------------------------------------------- files


def write(path, content):
    """Rows of a CSV, or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(content) if isinstance(content, str) else csv.writer(file).writerows(content)
    return path


def rows_of(tracks, city="PIT"):
    """The rows of an Argoverse 1 CSV. By its name the target comes last."""
    rows, ids, kinds = [HEAD], "945678", ["AGENT"] + ["OTHERS"] * 5
    for t, i in np.argwhere(np.isfinite(tracks).all(2).T):
        rows.append([315970000 + t / 10, ids[i], kinds[i], *tracks[i, t], city])
    return rows


def write_map(path, lanes, kinds=LANES):
    """A vector map of Argoverse 1."""
    tag, nodes, ways = '<tag k="{}" v="{}"/>'.format, "", ""
    for i, (lane, kind) in enumerate(zip(lanes, kinds, strict=True)):
        ways += f'<way lane_id="{9604854 + i}">' + tag("has_traffic_control", False)
        ways += tag("turn_direction", "NONE") + tag("is_intersection", kind == tm.INTERSECTION)
        ways += tag("l_neighbor_id", None) + tag("r_neighbor_id", 9604855)
        for k, (x, y) in enumerate(lane):
            nodes += f'<node id="{i}{k:03}" x="{x}" y="{y}"/>\n'
            ways += f'<nd ref="{i}{k:03}"/>'
        ways += tag("predecessor", 9604856) + "</way>\n"
    return write(path, f"<ArgoverseVectorMap>{nodes}{ways}</ArgoverseVectorMap>")


def read(path, maps=(), steps=(20, 30)):
    scenes = tm.read_or_skip(steps, (path, maps))
    return scenes and scenes[0]


def test_a_csv_and_its_map_give_the_scene(tmp_path):
    tracks, lanes = TOY[0][3].copy(), TOY[1][3]
    tracks[1, 4:7], tracks[2, 25:], tracks[3, :18] = np.nan, np.nan, np.nan
    scene, rows = make(tracks, lanes), rows_of(tracks)
    xml = write_map(tmp_path / "x_PIT_vector_map.xml", lanes)
    first = read(write(tmp_path / "a.csv", rows), [xml])
    assert same(first, scene, 1e-4)
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(len(rows)) if i]
    assert same(read(write(tmp_path / "b.csv", [HEAD, *mixed]), [xml]), first)
    there = write_map(tmp_path / "y_PIT_vector_map.xml", moved(lanes))
    assert same(read(write(tmp_path / "c.csv", rows_of(moved(tracks))), [xml, there]), scene, 1e-4)
    elsewhere = write(tmp_path / "d.csv", rows_of(tracks, city="MIA"))
    assert same(read(elsewhere, [xml]), make(tracks), 1e-4)
    alone = write(tmp_path / "e.csv", rows_of(tracks[:1]))
    assert same(read(alone), make(tracks[:1]), 1e-4)


LAST, EARLY = 315970000 + 49 / 10, 315970000 + 12 / 10
CHANGES = [  # what becomes of the rows of a scene, and what is said of it; "" if it does no harm
    (lambda rows: rows + rows[7:9], ""),
    (lambda rows: rows + [[EARLY, "4", "OTHERS", "nan", 1, "PIT"]], ""),  # where it was not seen
    (lambda rows: [r for r in rows if r[2] != "AGENT"], "0 tracks are the target"),
    (lambda rows: rows + [[LAST, "z", "AGENT", 1, 1, "PIT"]], "2 tracks are the target"),
    (lambda rows: [r for r in rows if r[0] != LAST], "49 time steps"),
    (lambda rows: rows + [[9, *rows[1][1:]]], "51 time steps"),
    (lambda rows: rows + [[*rows[9][:3], 0, 0, "PIT"]], "at two places at once"),
    (lambda rows: rows[:-6] + [[*r[:3], "nan", *r[4:]] for r in rows[-6:]], "all the future"),
    (lambda rows: [r for r in rows if r[:2] != [EARLY, "9"]], "not seen in the last second"),
    (lambda rows: rows + [["x", *rows[1][1:]]], "ValueError: "),
    (lambda rows: rows + [rows[9][:2]], "TypeError: "),
    (lambda rows: rows + [[LAST, "z", "TRUCK", 1, 1, "PIT"]], "unknown object types {'TRUCK'}"),
    (lambda rows: [r[:5] for r in rows], "KeyError: 'CITY_NAME'"),
    (lambda rows: rows[:1], "0 time steps"),
    (lambda rows: "", "0 time steps"),
    (lambda rows: "\0" * 9, ""),
]


def test_broken_scenes_are_skipped_and_odd_ones_are_not(tmp_path, capsys):
    tracks = TOY[0][3].copy()
    tracks[1, 12] = np.nan
    good = read(write(tmp_path / "good.csv", rows_of(tracks)))
    for i, (change, found) in enumerate(CHANGES):
        path = write(tmp_path / "a.csv", change(rows_of(tracks)))
        scene, said = read(path), capsys.readouterr().err
        if i < 2:
            assert same(scene, good) and not said
        else:
            assert scene is None and said.startswith(f"skipped {path}: ") and found in said
    path.write_bytes(b"\xff")
    assert read(path) is None and read(tmp_path / "missing.csv") is None


def test_lanes_are_evenly_spaced_in_every_format(tmp_path):
    def points(xs, ys):
        return [{"x": x, "y": y, "z": 7.0} for x, y in zip(xs, ys, strict=True)]

    lines, kinds = [[(0, 0), (3, 0), (3, 6)], [(0, 1), (2, 1), (9, 1)]], [tm.INTERSECTION, tm.LANE]
    xml = write_map(tmp_path / "a.xml", lines, kinds)
    corner = {"centerline": points([0, 3, 3], [0, 0, 6]), "is_intersection": True}
    sides = {"left_lane_boundary": points([0, 2, 9], [2, 2, 2]), "is_intersection": False}
    sides["right_lane_boundary"] = points([0, 7, 8, 9], [0, 0, 0, 0])
    lanes = {"lane_segments": {"1": corner | {"left_lane_boundary": []}, "2": sides}}
    for path in (xml, write(tmp_path / "a.json", json.dumps(lanes))):
        (first, second), types = tm.read_map(path, 10)
        assert same(first, [(x, 0) for x in range(4)] + [(3, y) for y in range(1, 7)], 1e-9)
        assert same(second, [(x, 1) for x in range(10)], 1e-9) and types.tolist() == kinds


def test_a_scene_of_argoverse2(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tracks, rows = np.random.default_rng(0).normal(size=(3, 110, 2)).cumsum(axis=1), []
    tracks[1, :30] = np.nan
    names, kinds = ["77", "AV", "101"], ["cyclist", "vehicle", "bus"]
    for t, i in np.argwhere(np.isfinite(tracks).all(2).T).tolist():
        row = {"track_id": names[i], "object_type": kinds[i], "timestep": t, "heading": t / 100 + i}
        row |= {f"position_{k}": tracks[i, t, j] for j, k in enumerate("xy")}
        rows.append(row | {"focal_track_id": "77"})

    def scene(rows):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "scenario_a.parquet")
        return read(tmp_path / "scenario_a.parquet", [], tm.STEPS["argoverse2"])

    types = np.array([tm.TYPES.index(kind) for kind in ("cyclist", "bus", "AV")])
    expected = tm.make_scene(tracks[[0, 2, 1]], types, np.zeros((0, 50, 2)), NO_LANES[1], 50, 0.49)
    assert same(scene(rows), expected) and expected[2].shape == (60, 2)
    now = next(r for r in rows if r["timestep"] == 49)
    for key, value, found in [
        ("timestep", 110, "time steps 0 to 110"), ("timestep", -1, "time steps -1 to 109"),
        ("heading", math.nan, ""), ("position_x", math.nan, "not seen"),
        ("track_id", "78", "not seen"), ("focal_track_id", "101", "2 tracks are the target"),
        ("object_type", "tree", "unknown object types {'tree'}"),
    ]:  # fmt: skip
        assert scene([r | {key: value} if r is now else r for r in rows]) is None
        said = capsys.readouterr().err
        assert said.startswith(f"skipped {tmp_path}/scenario_a.parquet: ") and found in said
    assert scene([{k: v for k, v in r.items() if k != "heading"} for r in rows]) is None
    path = write(tmp_path / "b.parquet", "PAR1")
    assert read(path, [], tm.STEPS["argoverse2"]) is None


# ---------------------------------------------------------------- directories


def test_others_are_targets_of_scenes_that_are_theirs(tmp_path):
    """As if the file said of one after the other that he is the AGENT."""
    tracks, lanes = TOY[0][3].copy(), TOY[1][3]
    tracks[1, 40], tracks[2, 3] = np.nan, np.nan  # one is lost later, one was not seen once
    tracks[3] = tracks[3, :1] + np.random.default_rng(0).normal(0, 0.01, (50, 2))  # one is parked
    maps = [write_map(tmp_path / "x_PIT_vector_map.xml", lanes)]
    rows = rows_of(tracks)
    scenes = tm.read_scene(write(tmp_path / "0.csv", rows), maps, 20, 30, True)
    assert same(scenes[0], read(tmp_path / "0.csv", maps)) and len(scenes) == 4
    for scene, target in zip(scenes[1:], "578", strict=True):  # not the lost 4, the parked 6
        kinds = {target: "AGENT"}
        own = [HEAD] + [[t, i, kinds.get(i, "OTHERS"), *more] for t, i, _, *more in rows[1:]]
        points, types, future = read(write(tmp_path / f"{target}.csv", own), maps)
        np.testing.assert_array_equal(future, scene[2])
        np.testing.assert_array_equal(points[0], scene[0][0])
        assert scene[1][0] == tm.AGENT and (scene[1][1:] != tm.AGENT).all()
        every = [
            np.column_stack([t, p.reshape(len(p), -1)]) for p, t, _ in (scene, (points, types, 0))
        ]
        every = [np.nan_to_num(x, nan=1e6) for x in every]  # neighbours may stand in another order
        a, b = (x[np.lexsort(x.T)] for x in every)
        np.testing.assert_allclose(a, b, atol=1e-4)


def write_root(root, n=12, agents=6):
    """n scenes of train, two of val, and the map."""
    for i in range(n + 2):
        split = "train" if i < n else "val"
        write(root / split / f"data/{i}.csv", rows_of(TOY[0][i % 40, :agents]))
    lanes = TOY[1][:14].reshape(-1, 20, 2)
    return write_map(root / "maps/a_PIT_10314_vector_map.xml", lanes, np.tile(LANES, 14))


def flags(root, *argv):
    own = ["--data", "argoverse1", "--root", root, "--out", root / "runs"]
    return [*SMALL, *map(str, [*own, *argv])]


def load(root, *argv):
    """All tensors of train, val and test: points, types, counts, future, starts; and again."""
    data = tm.load_data(tm.parse_args(flags(root, *argv)))
    return [x for y in (data["train"], *data["val"], *data["test"]) for x in vars(y).values()]


def test_scenes_are_read_once(tmp_path, monkeypatch):
    xml = write_root(tmp_path)
    maps, copy = ["--map", xml.parent], write(tmp_path / "b_PIT_.xml", xml.read_text())
    first = load(tmp_path, *maps)
    assert list(map(len, first[2::5])) == [11, 1, 2] and (first[1] >= tm.LANE).any()
    assert same(load(tmp_path, *maps, "--out", tmp_path / "b", "--workers", 2), first)

    def refuse(*args, **kwargs):
        raise AssertionError("is read")

    monkeypatch.setattr(tm, "DataLoader", refuse)
    assert same(load(tmp_path, *maps, "--workers", 1), first)
    for argv in ([], ["--map", copy], [*maps, "--limit", 3]):
        with pytest.raises(AssertionError, match="is read"):
            load(tmp_path, *argv)
    for path in (tmp_path / "train/data/4.csv", tmp_path / "val/data/12.csv", xml):
        content, time = path.read_bytes(), path.stat().st_mtime_ns
        for more, later in ((b" ", 0), (b"", 10**9)):
            path.write_bytes(content + more)
            os.utime(path, ns=(time, time + later))
            with pytest.raises(AssertionError, match="is read"):
                load(tmp_path, *maps)
        os.utime(path, ns=(time, time))
    assert same(load(tmp_path, *maps), first)


def test_mistakes_are_named_and_leave_no_checkpoint(tmp_path, monkeypatch):
    xml = write_root(tmp_path, agents=1)
    far = write_map(tmp_path / "far_PIT_vector_map.xml", TOY[1][0] + 1e5)
    city = write(tmp_path / "city/x_MIA_vector_map.xml", xml.read_text())
    cut = write(tmp_path / "cut_PIT_vector_map.xml", xml.read_text()[:5000])
    bare = write(tmp_path / "bare/log_map_archive_PIT_.json", '{"lane_segments": {"1": {}}}')
    write(tmp_path / "av2/train/a/scenario_a.parquet", "")
    for argv, found in [
        (["--root", tmp_path / "no"], f"{tmp_path}/no is not laid out like argoverse1: "),
        (["--data", "argoverse2"], f"{tmp_path} is not laid out like argoverse2: "),
        (["--map", tmp_path / "no"], f"--map {tmp_path}/no holds no"),
        (["--map", cut], f"--map {cut} is no map: "),
        (["--map", bare.parent], f"--map {bare} is no map: "),
        (["--map", far], f"--map {far} has no lane near"),
        (["--map", city.parent], f"--map {city.parent} has no lane near"),
    ]:
        with pytest.raises(UserError) as caught:
            tm.main(flags(tmp_path, *argv))
        assert str(caught.value).startswith(found)
    monkeypatch.setattr(tm, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install pyarrow"):
        tm.main(flags(tmp_path / "av2", "--data", "argoverse2"))
    assert {p.parent.name for p in tmp_path.rglob("*.pt")} == {"cache"}


def test_one_broken_scene_is_skipped_and_many_are_an_error(tmp_path, capsys):
    write_root(tmp_path, n=222, agents=1)
    write(tmp_path / "train/data/0.csv", "")
    assert list(map(len, load(tmp_path)[2::5])) == [199, 22, 2]
    assert "train: 1 of 200 samples are broken and were skipped" in capsys.readouterr().err
    for i in (7, 8):
        write(tmp_path / f"train/data/{i}.csv", "")
    with pytest.raises(UserError, match="train: 3 of 200 samples are broken, more than 1%"):
        tm.main(flags(tmp_path))
    assert capsys.readouterr().err.count(f"skipped {tmp_path}/train/data/") == 3
    assert not list(tmp_path.rglob("last.pt"))


# ---------------------------------------------------------------- real scenes


def linked(root, split):
    for name in ("train", "val"):
        (root / name).symlink_to(split)
    return root


@needs_data
def test_real_scenes_equal_their_rows_and_go_on_as_published():
    paths, scenes = list((REAL / "argoverse1/val/data").glob("*.csv")), []
    for path in paths + list((REAL / "argoverse1/as_downloaded").glob("*.csv")):
        rows = [r.split(",") for r in path.read_text().split("\n") if ",AGENT," in r]  # in order
        places = [(float(x), float(y)) for *_, x, y, _ in rows]
        scenes.append(read(path))
        turn = (np.array(places[19]) - places[9]) @ [1, 1j]
        assert same([scenes[-1][2]], [seen_from_the_first(places[19:], turn)], 1e-3)
    scenes = scenes_of(*scenes[: len(paths)])
    modes = tm.baselines(scenes, tm.fit_line(scenes))["constant velocity"]
    errors = tm.displacement(modes, scenes.future).mean(0)
    assert len(modes) == 300 and errors[:2].tolist() == pytest.approx([2.8, 6.4], abs=0.05)


@needs_data
def test_the_real_scenario_of_argoverse2(tmp_path):
    parquet, tracks = pytest.importorskip("pyarrow.parquet"), {}
    root = linked(tmp_path, REAL / "argoverse2_scenario/val")
    [(path, maps)] = tm.find_scenes(tm.parse_args(flags(root, "--data", "argoverse2")))[1]
    points, types, future = read(path, maps, tm.STEPS["argoverse2"])
    for row in parquet.read_table(path).to_pylist():
        track = tracks.setdefault((row["track_id"] != row["focal_track_id"], row["track_id"]), {})
        track[row["timestep"]] = row
    focal, near = tracks[min(tracks)], []
    places = [(focal[t]["position_x"], focal[t]["position_y"]) for t in range(49, 110)]
    assert same([future], [seen_from_the_first(places, np.exp(1j * focal[49]["heading"]))], 1e-3)
    for track in tracks.values():
        there = {t: (r["position_x"], r["position_y"]) for t, r in track.items() if t < 50}
        if any(t + 1 in there and math.dist(p, places[0]) < 56 for t, p in there.items()):
            near.append(next(iter(track.values()))["object_type"])
    agents = [tm.TYPES[kind] for kind in types if kind < tm.LANE]
    assert sorted(agents) == sorted(near) and agents[0] == focal[49]["object_type"]
    assert points.shape == (len(types), 50, 2) and len(types) - len(agents) > 20


@needs_data
def test_real_scenes_lie_on_their_maps(tmp_path):
    logs, folder = REAL / "argoverse2_sensor_logs", REAL / "argoverse1/val/data"
    found = load(linked(tmp_path, REAL / "argoverse2_windows/val"), "--map", logs)
    for types, counts in zip(found[1::5], found[2::5], strict=True):
        assert all((x >= tm.LANE).any() for x in types.split(counts.tolist()))
    listed = json.loads((REAL / "argoverse1/on_map_3b3570b4.json").read_text())["val"]
    [path] = logs.glob("3b3570b4*/map/log_map_archive*.json")
    for n in listed:
        points, types, _ = read(folder / f"{n}.csv", [path])
        lanes = points[types >= tm.LANE].astype(float)
        steps, places = np.diff(lanes, axis=1), (lanes[:, 1:] + lanes[:, :-1]) / 2
        along = steps[..., 0] / np.linalg.norm(steps, axis=-1)
        assert along[np.linalg.norm(places, axis=-1) < 5].max() > 0.98  # the target leads along x
    others = [p for p in sorted(folder.glob("*.csv")) if ",PIT" in p.read_text()]
    assert len(listed) == 10 and len(others) == 148
    assert not any((read(p, [path])[1] >= tm.LANE).any() for p in others)


# ---------------------------------------------------------------- the toy, and learning


def beside(places, line):
    """How far places (..., 2) are from a line (m, 2), and how far along it, at its ends NaN."""
    start, step = line[:-1], np.diff(line, axis=0)
    length = np.linalg.norm(step, axis=1)
    s = ((places[..., None, :] - start) * step).sum(-1) / length  # (..., m - 1)
    foot = s.clip(0, length)[..., None] * (step / length[:, None])
    off = np.linalg.norm(places[..., None, :] - start - foot, axis=-1)
    s[s[..., 0] < 0, 0] = s[s[..., -1] > length[-1], -1] = np.nan
    s += length.cumsum() - length
    return off.min(-1), np.take_along_axis(s, off.argmin(-1)[..., None], -1)[..., 0]


def test_the_toy_keeps_to_its_lanes_and_its_distance_and_takes_every_branch():
    tracks, lanes = tm.draw_toy(300, 3)
    for seed, equal in ((3, True), (4, False)):
        assert np.array_equal(tm.draw_toy(300, seed)[0], tracks) == equal
    for k, most in ((1, 2), (10, 18)):  # metres in k steps; the outer lane of a bend is longer
        way = np.linalg.norm(tracks[:, :, k:] - tracks[:, :, :-k], axis=-1)
        assert way.max() < most
    assert 12 < way[:, [1, 2, 4, 5]].max() < 14.3

    changes, branches, gaps = 0, np.zeros(3), []
    for ways, lines in zip(tracks, lanes, strict=True):
        off, s = beside(ways[4:], lines[8])  # they cross
        assert ((off < 0.3) | np.isnan(s)).all()
        off, s = map(np.stack, zip(*(beside(ways[:4], x) for x in lines[:8]), strict=True))
        for i, j in ((0, 1), (0, 2), (1, 2)):  # on the right lane in front of the fork
            gaps += abs(s[0, i] - s[0, j])[(off[0, i] < 0.3) & (off[0, j] < 0.3)].tolist()
        lane, between = off.argmin(0), off.reshape(4, 2, 4, 50).sum(1).min(0)  # both (4, 50)
        off, s = (np.take_along_axis(x, lane[None], 0)[0] for x in (off, s))
        there = np.logical_and.accumulate(np.isfinite(s), axis=1)  # not yet at an end
        assert (off < 0.3)[1:][there[1:]].all() and (between < 3.5 + 0.4)[there].all()
        changes += (off > 1)[0][there[0]].any()  # the target, between two lanes
        beyond = there[:, -1] & (lane[:, -1] > 1) & (s[:, -1] > 8)  # the fork
        branches += np.bincount(lane[beyond, -1] // 2 - 1, minlength=3)
    assert 45 < changes < 105 and branches.sum() > 200
    assert ((branches - branches.mean()) ** 2 / branches.mean()).sum() < 18
    assert len(gaps) > 10_000 and np.nanmin(gaps) > 4.5 - 0.3  # metres: a car's length, and noise


def learn(data, hide, out, *argv):
    """Metrics of the test scenes when all is seen, and when this is hidden."""
    args = tm.parse_args([*SMALL, "--out", str(out), *argv])
    tm.train(args, "none", 0, data)
    model = tm.build_model(args, "none", 0, data["meta"])
    tm.load(out / "motion-toy-micro/none-s0/best.pt", model)
    seen = tm.evaluate(model, data["test"], args)
    args.hide = [hide]
    return seen, tm.evaluate(model, data["test"], args)


def test_the_toy_is_learned_and_needs_lanes_and_agents(tmp_path):
    argv = ["--limit", "2000", "--epochs", "8"]
    data = tm.load_data(tm.parse_args([*SMALL, *argv]))
    seen, no_lanes = learn(data, "lanes", tmp_path, *argv)
    _, no_agents = learn(data, "agents", tmp_path, *argv)
    scenes = data["test"][0]
    straight = tm.baselines(scenes, torch.tensor(data["meta"]["line"]))["constant velocity"]
    straight = tm.displacement(straight, scenes.future)[:, 0].mean()
    assert seen["minADE6"] < straight / 2 and seen["minADE6"] < 0.7 * seen["minADE1"]
    assert no_lanes["minFDE6"] > 1.03 * seen["minFDE6"]
    assert no_agents["minADE6"] > 1.05 * seen["minADE6"]
    assert no_agents["minADE1"] > 1.2 * seen["minADE1"]


def test_following_another_car_is_learned(tmp_path):
    t, scenes = np.arange(-19, 31) / 10, []
    for gap, speed in np.random.default_rng(0).uniform((10, 2), (40, 18), (1300, 2)):
        tracks = np.zeros((2, 50, 2))
        tracks[:, :, 0] = np.where(t < 0, 10, speed) * t, gap + speed * t
        scenes.append(make(tracks))
    train, test = scenes_of(*scenes[:1000]), [scenes_of(*scenes[1000:])]
    meta = {"line": tm.fit_line(train).tolist()}
    data = {"train": train, "val": test, "test": test, "meta": meta, "sizes": ""}
    seen, hidden = learn(data, "agents", tmp_path, "--epochs", "4")
    assert hidden["minADE6"] > 3 * seen["minADE6"] and hidden["minADE1"] > 2 * seen["minADE1"]
