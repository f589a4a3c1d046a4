"""Pictures and tables: the numbers behind them. CPU, offline.

python -m pytest tests/test_visualize.py -q
"""

import json
import runpy
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import visualize as vis  # noqa: E402
from llmblock import UserError  # noqa: E402

TOYS = "image pointcloud video motion retrieval vqa-toy2d vqa-toy3d".split()
ATTENTION = {"image": "blocks.2.attn", "video": "blocks.2.attn", "motion": "block.self_attn"}
ATTENTION |= {"pointcloud": "blocks.blocks.2.attn"}  # the others: METER's
SMALL = ["--limit", "8", "--epochs", "1", "--batch-size", "8", "--workers", "0"]


@pytest.fixture(scope="module", params=TOYS)
def toy(request, tmp_path_factory):
    task, _, data = request.param.partition("-")
    argv = [*SMALL, "--data", data or "toy", "--out", str(tmp_path_factory.mktemp(request.param))]
    import_module(f"train_{task}").main([*argv, "--block", "none", "pretrained"])
    return task, next(Path(argv[-1]).iterdir())


@pytest.fixture(autouse=True)
def few_masks(monkeypatch):
    toys = vis.masked_toys
    monkeypatch.setattr(vis, "masked_toys", lambda *args: islice(toys(*args), 10))


def test_stages_and_attention_are_those_of_the_forward_pass(toy):
    name, folder = toy
    path = folder / "pretrained-s0" / "best.pt"
    script = import_module(f"train_{name}")
    args = script.parse_args(["--eval", str(path), "--limit", "8", "--device", "cpu"])
    test = script.load_data(args)["test"]
    model = script.build_model(args, "pretrained", 0).eval()
    model.load_state_dict(vis.read(path)["model"])
    inputs, _ = vis.prepare(script, args, model, script.collate([test[1, 1]]))
    stages, weights = vis.look(model, inputs)
    seen = {}
    layer = model.llm.layers[-1]
    attention = model.get_submodule(ATTENTION.get(name, "fusion.image_layers.1.self_attn"))
    before = {"host": model.llm, "proj_in": layer, "attention": layer.post_attention_layernorm}
    for stage, module in (before | {"x": attention}).items():
        module.register_forward_pre_hook(lambda m, args, s=stage: seen.update({s: args[0][0]}))
    for stage, module in {"ffn": layer, "proj_out": model.llm}.items():
        module.register_forward_hook(lambda m, args, y, s=stage: seen.update({s: y[0]}))
    with torch.no_grad():
        model(*inputs)
    for stage in ["host", "proj_in", "attention", "ffn", "proj_out"]:
        torch.testing.assert_close(stages[stage], seen[stage])
    # the attention once more, head by head
    D = seen["x"].shape[1]
    own = dict(attention.named_parameters())
    weight = own.get("qkv.weight", own.get("in_proj_weight"))
    bias = own.get("qkv.bias", own.get("in_proj_bias", torch.zeros(3 * D)))
    if name == "video":
        bias = torch.cat([attention.q_bias, torch.zeros(D), attention.v_bias])
    qkv = seen["x"] @ weight.T + bias
    rows = 0
    for part in torch.arange(D).chunk(4):  # micro models have four heads
        logits = (qkv[:, part] @ qkv[:, D + part].T / len(part) ** 0.5).exp()
        rows = rows + logits / logits.sum(1, keepdim=True) / 4
    torch.testing.assert_close(weights, rows.mean(0) if name == "video" else rows[0])


def test_heat_and_its_scores_by_hand():
    x = torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])  # the first one is CLS
    maps = vis.heat_maps("image", {"host": x}, torch.tensor([5.0, 1.0, 2.0, 3.0]))
    assert maps["host attention"].tolist() == [0, 0.5, 1]
    # distances to the mean (0, 1): sqrt 2, sqrt 2, 2
    assert maps["host magnitude"].tolist() == pytest.approx([0, 0, 1])
    # phases of a + b and a - b: (0, 0), (pi, pi), (0, pi); their mean is (1, 2) pi / 3
    assert maps["host frequency"].tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    assert len(vis.heat_maps("motion", {"host": x}, x[:, 0])["host magnitude"]) == 4  # no CLS
    heat = torch.tensor([1.0, 0.62, 0.55, 0.0])
    mask = torch.tensor([True, False, True, False])
    # 1 of 1 as hot as the first is right, 2 of 3 as the third; above 0.5 there are 3, 2 are right
    assert vis.score(heat, mask) == pytest.approx((100 * (1 + 2 / 3) / 2, 100 * 2 / 3))
    assert vis.score(heat, ~mask) == pytest.approx((100 * (1 / 2 + 2 / 4) / 2, 100 / 3))
    assert vis.score(torch.ones(4), mask) == pytest.approx((50, 50))  # ties are found together


def result(kind, seed, value, layers=(3,)):
    r = {"task": "image", "data": "toy", "model": "micro", "epochs": 3, "lr": 0.002, "proj_lr": 1.0}
    r |= {"kind": kind, "llm": "tiny_llm", "layers": layers if kind != "none" else None}
    return r | {"seed": seed, "metrics": {"top1": value, "top5": 99.0}}


def test_a_table_by_hand_from_result_lines(tmp_path, capsys):
    rows = [result("none", s, x) for s, x in ((0, 70.0), (1, 69.0), (2, 71.0), (3, 90.0))]
    rows += [result("pretrained", s, x) for s, x in ((0, 72.0), (1, 70.0), (2, 74.0))]
    rows += [result("pretrained", 0, 50.0, layers=[1, 2]), result("random", 7, 50.0)]
    (tmp_path / "a.jsonl").write_text("".join(f"RESULT {json.dumps(row)}\n" for row in rows))
    vis.main([str(tmp_path / "a.jsonl")])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "image toy micro, 3 epochs, lr 0.002"
    cells = [[cell.strip() for cell in line[2:-1].split("|")] for line in lines[2:]]
    assert cells[2] == ["none", "", "", "", "4", "75.00 ± 10.03", "99.00 ± 0.00", ""]
    # differences by seed 2, 1, 3: mean 2, deviation 1, so 4.303 / sqrt(3)
    assert cells[3][2:] == ["3", "1.0", "3", "72.00 ± 2.00", "99.00 ± 0.00", "+2.00 ± 2.48"]
    assert cells[4][2:] == ["1 2", "1.0", "1", "50.00", "99.00", "-20.00"]
    assert cells[5][0] == "random" and cells[5][-1] == ""  # `none` has no such seed


def test_a_checkpoint_of_every_task_has_its_picture(toy, tmp_path, capsys):
    name, folder = toy
    vis.main([str(folder), "--limit", "3", "--out", str(tmp_path)])
    names = {path.name.removeprefix(f"{folder.name}-") for path in tmp_path.iterdir()}
    assert names == {"none-s0.png", "pretrained-3-tiny_llm-s0.png", "compare.png"}
    printed = capsys.readouterr().out
    assert "| pretrained | tiny_llm | 3 | 1.0 | 1 |" in printed
    assert ("| ffn | frequency | pretrained-3 tiny_llm |" in printed) == (name == "image")
    picture = np.asarray(Image.open(next(tmp_path.glob("*tiny_llm-s0.png"))))
    for column in np.array_split(picture[60:], 12, axis=1):  # every tile shows something
        assert column[: len(column) // 3, 6:-6].std() > 5


def test_arms_of_different_layers_are_kept_apart(tmp_path, capsys):
    for i in "12":
        import_module("train_image").main([*SMALL, "--layers", i, "--out", str(tmp_path / i)])
    vis.main([str(tmp_path), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for i in "12":
        assert (tmp_path / f"image-toy-micro-pretrained-{i}-tiny_llm-s0.png").exists()
        assert f"| pretrained | tiny_llm | {i} | 1.0 | 1 |" in printed
        assert f"| host | magnitude | pretrained-{i} tiny_llm |" in printed


def test_masks_of_a_directory(tmp_path, capsys):
    import_module("train_image").main([*SMALL, "--block", "none", "--out", str(tmp_path)])
    argv = [str(tmp_path), "--masks", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(UserError, match="no images/NAME with masks/NAME"):
        vis.main(argv)
    picture = np.zeros((36, 36, 3), np.uint8)
    picture[:18] = 255
    for folder, pixels in (("images", picture), ("masks", picture[..., 0] // 85)):  # 0 and 3
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    vis.main(argv)
    assert "| host | magnitude | none |" in capsys.readouterr().out
    [(x, mask)] = vis.masked_photos(import_module("train_image"), 36, tmp_path)
    assert torch.equal(mask[0] > 0, x[0] > 127) and mask.max() == 1
    Image.fromarray(picture).save(tmp_path / "images/b.png")
    with pytest.raises(UserError, match="b.png"):  # it has no mask
        vis.main(argv)


@pytest.mark.parametrize("wrong", ["no/such/run", "tests", "README.md", "tests/no.jsonl"])
def test_a_wrong_path_is_one_line(wrong, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["visualize.py", wrong])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path("visualize.py", run_name="__main__")
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert wrong in printed.err and not printed.out
