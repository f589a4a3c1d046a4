"""visualize.py: measures against hand-worked examples, the model's own numbers, all six scripts.

python -m pytest tests/test_visualize.py -q     # LLMBLOCK_DATA=DIR adds DIR/masks
"""

import functools
import json
import math
import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import visualize as vis  # noqa: E402
from llmblock import UserError  # noqa: E402

torch.set_num_threads(1)
TASKS = {name: import_module(f"train_{name}") for name in vis.SEE}
SMALL = "--epochs 1 --limit 24 --batch-size 8 --workers 0 --device cpu --precision fp32".split()
for script in TASKS.values():  # the same toy data again and again: drawn once
    script.draw_toy = functools.cache(script.draw_toy)
TASKS["vqa"].draw_toy3d = functools.cache(TASKS["vqa"].draw_toy3d)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A function that gives the runs of a script, trained once."""
    out = tmp_path_factory.mktemp("runs")

    @functools.cache
    def train(name, *flags):
        TASKS[name].main([*SMALL, "--out", str(out / name / "".join(flags)), *flags])
        return next(iter((out / name / "".join(flags)).glob(f"{name}-*")))

    return train


# ---------------------------------------------------------------- measures


def test_magnitude_by_hand():
    x = torch.tensor([[0.0, 0.0], [12.0, 16.0], [0.0, 0.0], [4.0, 0.0]])  # the mean is (4, 4)
    far = [math.sqrt(32), math.sqrt(64 + 144), math.sqrt(32), 4.0]
    want = [(d - 4) / (far[1] - 4) for d in far]
    torch.testing.assert_close(vis.magnitude(x), torch.tensor(want))
    torch.testing.assert_close(vis.magnitude(torch.stack([x, 3 * x])), torch.tensor([want] * 2))


def test_frequency_by_hand():
    # Of channels (a, b) the transform is (a + b, a - b): phases are 0, or pi where negative.
    x = torch.tensor([[2.0, 1.0], [5.0, 1.0], [1.0, 2.0], [2.0, 1.0]])  # phases: one (0, pi)
    want = [0.0, 0.0, 1.0, 0.0]  # pi/4, pi/4, 3 pi/4, pi/4 from the mean
    torch.testing.assert_close(vis.frequency(x), torch.tensor(want))
    x = torch.tensor([[2.0, 1.0], [-5.0, -1.0], [1.0, 2.0]])  # (0, 0), (pi, pi), (0, pi)
    a, b, c = ((p[0] - math.pi / 3, p[1] - 2 * math.pi / 3) for p in
               ((0, 0), (math.pi, math.pi), (0, math.pi)))  # fmt: skip
    a, b, c = (math.hypot(*p) for p in (a, b, c))
    want = torch.tensor([1.0, (b - c) / (a - c), 0.0])
    torch.testing.assert_close(vis.frequency(x), want)


def test_frequency_takes_the_mean_of_all_tokens_and_not_of_a_grids_columns():
    x = torch.randn(3, 4, 8)  # (H, W, D): the printed code of the paper averages over H
    wrong = torch.fft.fft(x, dim=-1).angle()
    wrong = vis.unit((wrong - wrong.mean(0)).norm(dim=-1).flatten())
    assert not torch.allclose(vis.frequency(x.view(12, 8)), wrong, atol=0.05)


def test_constant_tokens_have_no_heat():
    x = torch.ones(2, 5, 4)
    assert vis.magnitude(x).tolist() == [[0.0] * 5] * 2


def test_iou_and_average_precision_by_hand():
    heat, mask = torch.tensor([[0.9, 0.6, 0.2, 0.15]]), torch.tensor([[True, False, True, False]])
    assert vis.iou(heat, mask, 0.5).item() == pytest.approx(1 / 3)
    # Above 0.1 are all, IoU 2/4; above 0.2 (not at it) two, 1/3; above 0.6 one, 1/2.
    best, half, ap = vis.scores(heat, mask)[0].tolist()
    assert best == pytest.approx(50) and half == pytest.approx(100 / 3)
    assert ap == pytest.approx(100 * (1 + 2 / 3) / 2)
    low = torch.tensor([[0.9, 0.12, 0.2, 0.05]])  # above 0.1 are three, 2/3
    assert vis.scores(low, mask)[0, 0].item() == pytest.approx(200 / 3)
    nothing = torch.zeros(1, 4)
    assert vis.scores(nothing, mask)[0].tolist() == [0.0, 0.0, 50.0]  # all alike: the share


def test_average_precision_is_the_area_under_the_steps():
    gen = torch.Generator().manual_seed(0)
    heat = torch.rand(20, 30, generator=gen).mul(10).round() / 10  # with ties
    mask = torch.rand(20, 30, generator=gen) < 0.3
    mask[:, 0] = True
    for row, truth, got in zip(heat, mask, vis.average_precision(heat, mask), strict=True):
        area, recall = 0.0, 0.0
        for t in sorted(set(row.tolist()), reverse=True):  # sum of (R_n - R_n-1) P_n
            found = row >= t
            right = (found & truth).sum().item()
            area += (right / truth.sum().item() - recall) * right / found.sum().item()
            recall = right / truth.sum().item()
        assert got.item() == pytest.approx(area, abs=1e-6)


def test_students_t():
    for df, want in ((1, 12.706), (2, 4.303), (9, 2.262), (29, 2.045), (999, 1.962)):
        assert vis.t95(df) == pytest.approx(want, abs=6e-4)
    assert vis.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)


def test_padding_has_no_heat_and_changes_none():
    gen = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, 7, 6, generator=gen), torch.rand(2, 7, generator=gen)
    real = torch.arange(7) < torch.tensor([[7], [4]])
    maps = vis.heat_maps({"host": x}, weights, real, 0)
    alone = vis.heat_maps({"host": x[1:, :4]}, weights[1:, :4], None, 0)
    assert list(maps) == ["host magnitude", "host frequency", "host attention-map"]
    for name in maps:
        torch.testing.assert_close(maps[name][1, :4], alone[name][0])
        assert not maps[name][1, 4:].any()


# ---------------------------------------------------------------- the model's own numbers


@pytest.mark.parametrize("kind", ["none", "mlp", "pretrained"])
def test_stages_are_those_of_the_forward_pass(trained, kind):
    run = trained("image", "--block", "none", "mlp", "pretrained") / f"{kind}-s0" / "best.pt"
    script, args, saved, model = vis.open_run(run, ["--limit", "24"])
    x = script.normalise(script.load_data(args)["test"][0].x[:4])
    through = {}
    model.llm.register_forward_hook(lambda m, inputs, y: through.update(host=inputs[0], out=y))
    output, stages, weights, real = vis.look(script, args, model, (x,))
    with torch.no_grad():
        assert torch.equal(output, model(x)) and real is None
        assert torch.equal(stages["host"], through["host"])
        assert torch.equal(stages.get("proj_out", stages["host"]), through["out"])
        last = model.blocks[-1]  # once more, by hand
        h = model.embed(x).flatten(2).transpose(1, 2)
        h = torch.cat([model.cls.expand(4, -1, -1), h], dim=1) + model.pos
        h = last.norm1(model.blocks[:-1](h))
        q, k, _ = last.qkv(h).view(4, 37, 3, last.heads, -1).permute(2, 0, 3, 1, 4)
        logits = torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k) / q.shape[-1] ** 0.5
    torch.testing.assert_close(weights, logits.softmax(-1).sum(1))
    names = {"none": ["host"], "mlp": ["host", "proj_in", "proj_out"]}
    assert list(stages) == names.get(kind, ["host", "proj_in", "attention", "ffn", "proj_out"])


def test_padding_is_not_attended_to(trained):
    run = trained("motion", "--block", "none", "pretrained") / "none-s0/best.pt"
    script, args, saved, model = vis.open_run(run, ["--limit", "24"])
    x, _ = script.load_data(args, saved["meta"])["test"][0].batch(torch.arange(24))
    _, _, weights, real = vis.look(script, args, model, (x,))
    assert torch.equal(real, x[..., 6].any(-1)) and not real.all()
    assert not weights[~real].any() and (weights[real] > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.full((24,), 1.0 * model.blocks[-1].heads))


def test_looking_leaves_the_model_as_it_was(trained):
    run = trained("image", "--block", "none", "mlp", "pretrained") / "pretrained-s0/best.pt"
    script, args, _, model = vis.open_run(run, [])
    attend = torch.nn.functional.scaled_dot_product_attention
    x = torch.randn(2, 3, 36, 36)
    vis.look(script, args, model, (x,))
    assert torch.nn.functional.scaled_dot_product_attention is attend
    assert not model.llm._forward_pre_hooks


@pytest.mark.parametrize("name", ["image", "video"])
def test_masked_toys_are_test_data(name):
    script = TASKS[name]
    args = script.parse_args(["--workers", "0"])
    n, masked = vis.find_masked(script, args, None, None)
    x, y, mask = masked(torch.arange(20))
    assert n >= 500 and mask.dtype == torch.bool and mask.shape == (*x.shape[:2], *x.shape[3:])
    test = script.load_data(args)["test"][0]
    clips = test.clips if name == "video" else test.x[:, None]
    for clip, label in zip(x, y, strict=True):
        same = (clips == clip).flatten(1).all(1).nonzero()
        assert len(same) == 1 and int(test.y[same.item()]) == int(label)
    grid, patch = vis.on_tokens(script, args, mask), script.MODELS["micro"]["patch"]
    step, side = (2 if name == "video" else 1), mask.shape[-1] // patch
    for k, (frame, row, column) in enumerate(np.ndindex(mask.shape[1] // step, side, side)):
        part = mask[:, frame * step :][:, :step, row * patch :, column * patch :]
        share = part[..., :patch, :patch].float().mean((1, 2, 3))
        assert torch.equal(grid[:, k], share >= 0.5)


def test_perfect_heat_scores_100_and_by_chance_far_less(trained, monkeypatch):
    run = trained("image", "--block", "none", "mlp", "pretrained") / "none-s0/best.pt"
    script, args, _, model = vis.open_run(run, [])
    n, masked = vis.find_masked(script, args, None, None)
    truth = vis.on_tokens(script, args, masked(torch.arange(50))[2])
    good = truth.any(1) & ~truth.all(1)
    monkeypatch.setattr(vis, "heat_maps", lambda *seen: {"host magnitude": truth[good].float()})
    found = vis.measure_masks(script, args, model, masked, 50)["host magnitude"]
    assert found.shape == (int(good.sum()), 6) and (found[:, :3] == 100).all()
    assert (found[:, 3:].mean(0) < 50).all()


# ---------------------------------------------------------------- results


def result(kind, seed, top1, **more):
    llm = None if kind == "none" else "lm/small"
    return {"kind": kind, "llm": llm, "layers": llm and [3], "seed": seed,
            "metrics": {"top1": top1, "top5": 99.0}, "params_trainable": 1234 + seed,
            "params_frozen": 5 * (kind != "none"),
            "gflops_per_sample": 0.5, "samples_per_s": 100.0} | more  # fmt: skip


def test_results_table_by_hand():
    rows = [result("pretrained", s, x) for s, x in ((0, 72.0), (1, 70.0), (2, 74.0))]
    rows += [result("none", s, x) for s, x in ((0, 70.0), (1, 69.0), (2, 71.0), (3, 90.0))]
    lines = [line.strip("| ").split(" | ") for line in vis.results_table(rows).splitlines()]
    assert lines[0][:6] == ["block", "LLM", "layers", "seeds", "top1", "top5"]
    assert lines[2][0] == "none" and "75.00 ± 10.03" in lines[2]
    # Differences by seed 2, 1, 3: mean 2, deviation 1, so 4.303 / sqrt(3).
    assert lines[3][:7] == [
        "pretrained", "small", "[3]", "3", "72.00 ± 2.00", "99.00 ± 0.00", "+2.00 ± 2.48"
    ]  # fmt: skip
    assert lines[2][6] == ""  # it has no difference to itself
    assert [line[7:] for line in lines[2:]] == [
        ["1,237", "0", "0.5", "100"], ["1,236", "5", "0.5", "100"]]  # fmt: skip
    with pytest.raises(UserError, match="two runs are of block none"):
        vis.results_table([rows[-1], rows[-1]])


def test_a_single_seed_has_no_interval():
    table = vis.results_table([result("none", 0, 70.0), result("random", 0, 71.5)])
    assert "+1.50 |" in table and "±" not in table and "nan" not in table


def test_tables_of_masks_by_hand():
    """One seed: the interval is over images. Several: over seeds."""

    def run(mean):  # of four images, deviation 2
        x = mean + torch.tensor([-3.0, -1.0, 1.0, 3.0]) * 2 / math.sqrt(20 / 3)
        return torch.stack([x, x + 1, x + 2, x / 10, x / 10, x / 10], dim=1)

    arms = {"none": [{"host magnitude": run(50.0)}]}
    arms["random"] = [{"host magnitude": run(m), "ffn magnitude": run(m)} for m in (10.0, 20.0)]
    tables = vis.mask_tables(arms)
    assert "| host | magnitude | 50.0 ± 3.2 (5.0) | 15.0 ± 63.5 (1.5) |" in tables
    assert "| ffn | magnitude |  | 17.0 ± 63.5 (1.5) |" in tables  # average precision


# ---------------------------------------------------------------- masks in files


def write(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(x, dtype=np.uint8)).save(path)


def test_masks_in_files(tmp_path):
    picture, mask = np.zeros((20, 30, 3)), np.zeros((20, 30))
    picture[:, 15:], mask[:, 15:], mask[:5, :5] = 200, 7, 3
    write(tmp_path / "test/a.png", picture)
    write(tmp_path / "testannot/a.png", mask)
    write(tmp_path / "test/alone.png", picture)
    pairs = vis.find_pairs(tmp_path)
    assert [(a.name, b.parent.name) for a, b in pairs] == [("a.png", "testannot")]
    x, y, found = vis.read_masked(pairs, [0], 20, None)
    assert x.shape == (1, 1, 3, 20, 20) and y.tolist() == [-1] and found.shape == (1, 1, 20, 20)
    assert torch.equal(found[0, 0, 10:], x[0, 0, 0, 10:] > 100)  # cropped alike, from the middle
    assert not vis.read_masked(pairs, [0], 20, [3])[2][..., 10:].any()
    rgb = np.stack([mask * 0 + 1000 % 256, mask * 0 + 1000 // 256, mask * 0], axis=-1)
    rgb[10:] = (44, 1, 0)  # class 300 of ImageNet-S; the rest is to be ignored
    write(tmp_path / "testannot/a.png", rgb)
    found = vis.read_masked(pairs, [0], 20, None)[2][0, 0]
    assert found[10:].all() and not found[:10].any()
    assert vis.read_masked(pairs, [0], 20, [300])[2][0, 0, 10:].all()


def test_bad_masks_are_named(tmp_path):
    write(tmp_path / "images/a.png", np.zeros((8, 8, 3)))
    with pytest.raises(UserError, match="1 images and 0 masks"):
        vis.find_pairs(tmp_path)
    write(tmp_path / "masks/a.png", np.zeros((8, 9)))
    pairs = vis.find_pairs(tmp_path)
    with pytest.raises(UserError, match="8 pixels wide, its mask 9"):
        vis.read_masked(pairs, [0], 8, None)
    (tmp_path / "masks/a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png or its mask"):
        vis.read_masked(pairs, [0], 8, None)


# ---------------------------------------------------------------- as a user

RUNS = [(name,) for name in ("pointcloud", "video", "motion", "vqa", "retrieval")]
RUNS += [("vqa", "--data", "toy3d"), ("vqa", "--data", "toy3d", "--objects"), ("vqa", "--blind")]


@pytest.mark.parametrize("name, flags", [(name, flags) for name, *flags in RUNS])
def test_pictures_of_every_script(trained, tmp_path, name, flags, capsys):
    runs = trained(name, "--block", "none", "pretrained", *flags)
    vis.main([str(runs), "--n", "3", "--out", str(tmp_path), "--workers", "0"])
    data = flags[1] if "--data" in flags else "toy2d" if name == "vqa" else "toy"
    group = f"{name}-{data}-micro"
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        f"{group}-{what}.png" for what in ("compare", "curves", "none-s0", "pretrained-s0")
    ]
    sizes = [Image.open(tmp_path / f"{group}-{kind}-s0.png") for kind in ("none", "pretrained")]
    assert sizes[1].width > 1200 and sizes[0].height > 3 * 60
    printed = capsys.readouterr().out
    assert "| pretrained | tiny_llm | [3] | 1 |" in printed
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    kinds = ["none", "pretrained"]
    assert [r["kind"] for r in numbers["results"]] == kinds
    assert {r["block"] for r in numbers["masks"]} == (set(kinds) if name == "video" else set())


def test_a_picture_shows_what_it_says(trained, tmp_path):
    """Heat where it is, input above nothing: the tile of a mask is bright where the mask is."""
    run = trained("image", "--block", "none", "mlp", "pretrained") / "none-s0"
    vis.main([str(run), "--n", "1", "--out", str(tmp_path)])
    picture = np.asarray(Image.open(tmp_path / "image-toy-micro-none-s0.png").convert("L"))
    args = TASKS["image"].parse_args([])
    mask = vis.on_tokens(TASKS["image"], args, vis.find_masked(TASKS["image"], args, None, None)[1](
        torch.arange(1))[2]).view(6, 6)  # fmt: skip
    width, top = 112 + 4, 40 + 16 + 2
    tile = picture[top : top + 112, width + 2 : width + 2 + 112]
    for i, j in ((i, j) for i in range(6) for j in range(6)):
        part = tile[i * 112 // 6 + 3 : (i + 1) * 112 // 6 - 3,
                    j * 112 // 6 + 3 : (j + 1) * 112 // 6 - 3]  # fmt: skip
        assert (part.mean() > 120) == bool(mask[i, j])


def test_tables_of_masks(trained, tmp_path, capsys):
    runs = trained("image", "--block", "none", "mlp", "pretrained")
    vis.main([str(runs / "none-s0"), str(runs / "pretrained-s0/best.pt"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("| stage | measure | none | pretrained |") == 3
    rows = json.loads((tmp_path / "numbers.json").read_text())["masks"]
    assert {r["block"]: len([x for x in rows if x["block"] == r["block"]]) for r in rows} == {
        "none": 3, "pretrained": 11}  # fmt: skip
    assert all(r["images"] >= 500 for r in rows)
    first = next(r for r in rows if r["tokens"] == "host magnitude")
    assert f"| host | magnitude | {first['iou_best']:.1f} ± " in printed
    assert f"({first['iou_best_by_chance']:.1f})" in printed


WRONG = {
    "no/such/run": "no/such/run",
    "EMPTY": "holds no run",
    "tests/tiny_llm/config.json": "damaged or no checkpoint",
    "WEIGHTS": "was not written by a training script",
    "RUN --n 0": "--n must be",
    "RUN --masks EMPTY": "0 images and 0 masks",
    "RUN --root": "expected one argument",
    "RUN --llm no/such/llm": "no/such/llm",
}


@pytest.mark.parametrize("argv", WRONG)
def test_mistakes_are_one_line(trained, tmp_path, capsys, argv):
    (tmp_path / "empty").mkdir()
    torch.save({"model": {}, "task": "../evil"}, tmp_path / "weights.pt")
    runs = trained("image", "--block", "none", "mlp", "pretrained")
    places = {"RUN": runs / "pretrained-s0", "EMPTY": tmp_path / "empty",
              "WEIGHTS": tmp_path / "weights.pt"}  # fmt: skip
    out = tmp_path / "out"
    try:
        vis.main([*(str(places.get(word, word)) for word in argv.split()), "--out", str(out)])
        raise AssertionError("nothing was wrong")
    except UserError as e:
        error = str(e)
    except SystemExit as e:
        assert e.code == 2
        error = capsys.readouterr().err
    assert WRONG[argv] in error and not out.exists()


DATA = Path(os.environ.get("LLMBLOCK_DATA", "none")) / "masks"


@pytest.mark.skipif(not DATA.is_dir(), reason="LLMBLOCK_DATA is not set")
@pytest.mark.parametrize("folder, values", [("camvid_objects", []), ("camvid", ["8", "9", "10"])])
def test_real_masks(trained, tmp_path, folder, values, capsys):
    run = trained("image", "--block", "none", "mlp", "pretrained") / "pretrained-s0"
    few = ["--foreground", *values] if values else []
    vis.main([str(run), "--masks", str(DATA / folder), *few, "--n", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "numbers.json").read_text())["masks"]
    assert len(rows) == 11 and all(r["images"] > 60 for r in rows)
    assert all(0 < r["iou_best"] < 100 for r in rows)
