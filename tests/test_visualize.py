"""visualize.py: the numbers behind its pictures, its tables."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from test_sizes import ROOT

import visualize as vis
from llmblock import run

TOYS = "image pointcloud video motion retrieval vqa-toy2d vqa-toy3d".split()
ATTENTIONS = ("blocks.2.attn", "block.self_attn", "image_layers.1.self_attn")  # a host has one
SMALL = ["--limit", "8", "--epochs", "1", "--batch-size", "8", "--workers", "0", "--out"]


@pytest.mark.parametrize("toy", TOYS)
def test_every_map_is_of_its_stage_and_has_its_tile(toy, tmp_path):
    task, _, data = toy.partition("-")
    script = import_module(f"train_{task}")
    script.main([*SMALL, str(tmp_path), "--data", data or "toy"])
    (path,) = tmp_path.rglob("best.pt")
    args = script.parse_args(["--eval", str(path), "--limit", "8", "--device", "cpu"])
    test = script.load_data(args)["test"]
    model = script.build_model(args, "pretrained", 0).eval()
    _, inputs, paint = vis.prepare(script, args, model, test, 1)
    stages, weights = vis.look(task, model, inputs)
    seen = {}
    layer = model.llm.layers[-1]
    (attention,) = [m for name, m in model.named_modules() if name.endswith(ATTENTIONS)]
    before = {"host": model.llm, "proj_in": layer, "attention": layer.post_attention_layernorm}
    for stage, module in (before | {"x": attention}).items():
        module.register_forward_pre_hook(lambda m, args, s=stage: seen.update({s: args[0][0]}))
    for stage, module in {"ffn": layer, "proj_out": model.llm}.items():
        module.register_forward_hook(lambda m, args, y, s=stage: seen.update({s: y[0]}))
    model(*inputs)
    maps = vis.heat_maps(task, stages, weights)
    for stage in set(seen) - {"x"}:
        torch.testing.assert_close(stages[stage], seen[stage])
        x = seen[stage][0 if task in ("video", "motion") else 1 :]  # the others have a CLS token
        assert maps[f"{stage}, magnitude"].argmax() == (x - x.mean(0)).norm(dim=1).argmax()
    # the attention once more, head by head
    D = seen["x"].shape[1]
    own = dict(attention.named_parameters())
    bias = own.get("qkv.bias", own.get("in_proj_bias", torch.zeros(3 * D)))  # video's is 0 yet
    qkv = seen["x"] @ own.get("qkv.weight", own.get("in_proj_weight")).T + bias
    rows = 0
    for part in torch.arange(D).chunk(4):  # micro models have four heads
        rows += (qkv[:, part] @ qkv[:, D + part].T / len(part) ** 0.5).softmax(1) / 4
    torch.testing.assert_close(weights, rows.mean(0) if task == "video" else rows[0])
    assert len({paint(heat).tobytes() for heat in [None, *maps.values()]}) == 12  # tiles


def test_heat_scores_and_pictures_by_hand():
    x = torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])  # the first one is CLS
    maps = vis.heat_maps("image", {"host": x}, torch.tensor([5.0, 1.0, 2.0, 3.0]))
    assert maps["host, attention map"].tolist() == [0, 0.5, 1]
    # distances to the mean (0, 1): sqrt 2, sqrt 2, 2
    assert maps["host, magnitude"].tolist() == pytest.approx([0, 0, 1])
    # phases of a + b and a - b: (0, 0), (pi, pi), (0, pi); their mean is (1, 2) pi / 3
    assert maps["host, frequency"].tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    # 1 of 1 as hot as the first is right, 2 of 3 as the third; above 0.5 are 3, with 2 right
    heat = torch.tensor([1.0, 0.62, 0.55, 0.0])
    scores = vis.score(heat, torch.tensor([True, False, True, False]))
    assert scores == pytest.approx((500 / 6, 200 / 3))
    # an agent 20 m to the left of the target's way is hot, a lane on its right cold; a pixel is 1 m
    agent = torch.tensor([[[-20.0, 20.0], [-10.0, 20.0]]])
    tile = vis.paint_traffic(agent, agent * torch.tensor([1, -1]), torch.tensor([1.0, 0.0]), 80)
    assert tile.getpixel((13, 20)) == (255,) * 3 and tile.getpixel((13, 60)) == (0,) * 3


def test_a_table_by_hand_from_result_lines(tmp_path, capsys):
    same = {"task": "image", "data": "toy", "model": "micro", "epochs": 3, "lr": 0.1, "llm": "tiny"}
    lines = ""
    for kind, layers, proj_lr, values in [
        ("none", None, 1.0, {0: 70.0, 1: 69.0, 2: 71.0, 3: 90.0}),
        ("pretrained", [3], 1.0, {2: 74.0, 1: 70.0, 0: 72.0}),
        ("pretrained", [1, 2], 1.0, {0: 50.0}),
        ("pretrained", [3], 0.1, {7: 50.0}),
    ]:
        arm = same | {"kind": kind, "layers": layers, "proj_lr": proj_lr}
        for seed, value in values.items():
            lines += f"RESULT {json.dumps(arm | {'seed': seed, 'metrics': {'top1': value}})}\n"
    (tmp_path / "a.jsonl").write_text(lines)
    vis.main([str(tmp_path / "a.jsonl")])
    # differences by seed 2, 1, 3: mean 2, deviation 1, so 4.303 / sqrt(3)
    assert capsys.readouterr().out.strip().splitlines()[4:] == [
        "| none |  |  |  | 0 1 2 3 | 75.00 ± 10.03 |  |",
        "| pretrained | tiny | 3 | 1.0 | 2 1 0 | 72.00 ± 2.00 | +2.00 ± 2.48 |",
        "| pretrained | tiny | 1 2 | 1.0 | 0 | 50.00 | -20.00 |",
        "| pretrained | tiny | 3 | 0.1 | 7 | 50.00 |  |",  # `none` has no such seed
    ]


def test_runs_of_other_settings_are_other_arms_and_masks_find_images(tmp_path, capsys):
    picture = np.zeros((36, 36, 3), np.uint8)
    picture[:18] = 255
    for name, pixels in (("images", picture), ("masks", picture[..., 0] // 85)):  # 0 and 3
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    [(x, mask)] = vis.find_masked(import_module("train_image"), 36, tmp_path)
    assert torch.equal(mask[0] > 0, x[0] > 127) and mask.max() == 1
    flags = ["--limit", "2", "--masks", str(tmp_path), "--out", str(tmp_path / "figures")]
    for other in ("--layers=1", "--layers=2", "--proj-lr=0.1", "--lr=0.1"):
        argv = f"{tmp_path / other} {other} --block none pretrained".split()
        import_module("train_image").main([*SMALL, *argv])
        vis.main([*map(str, tmp_path.rglob(f"{other}/*/pretrained-s0")), *flags])
    assert len(list((tmp_path / "figures").iterdir())) == 8  # samples and curves of each
    vis.main([str(tmp_path), *flags])
    printed = capsys.readouterr().out.rpartition("RESULT")[2]
    for arm in ("layers 1, proj-lr 1.0", "layers 2, proj-lr 1.0", "layers 3, proj-lr 0.1"):
        assert printed.count(f"pretrained, lr 0.002, epochs 1, tiny_llm, {arm} |") == 11  # maps
    assert printed.count("is left out") == 2 and "| none |  |  |  | 0 |" in printed


@pytest.mark.parametrize("wrong", ["no/such/run", "tests", "README.md", "tests/no.jsonl"])
def test_a_wrong_path_is_one_line(wrong, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        run(lambda: vis.main([wrong]))
    printed = capsys.readouterr()
    assert wrong in printed.err and printed.err.count("\n") == 1 and not printed.out
