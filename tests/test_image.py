"""train_image.py: DeiT's model and recipe, class folders, the toy. CPU, offline.

python -m pytest tests/test_image.py -q         # LLMBLOCK_DATA=DIR adds DIR/images/cifar10
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train_image  # noqa: E402
from llmblock import KINDS, UserError  # noqa: E402

SMALL = ["--limit", "32", "--epochs", "1", "--batch-size", "16", "--workers", "0"]
torch.set_num_threads(1)


def make_folder(root, split, classes=("cat", "dog"), n=20):
    """Class folders of plain images of several sizes, one brightness per class."""
    for i, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for j in range(n):
            colour = (60 + 120 * i + j, 100, 100)
            Image.new("RGB", (40 + j, 50), colour).save(root / split / name / f"{j}.jpg")
    return root


def run(out, *argv):
    return train_image.main([*SMALL, "--out", str(out), *argv])


def test_every_kind_runs_and_reports(tmp_path, capsys):
    results = run(tmp_path, "--seeds", "3", "4", "--block", *KINDS)
    printed = capsys.readouterr().out
    assert printed.count("RESULT {") == 2 * len(KINDS)
    assert [(r["kind"], r["seed"]) for r in results] == [(k, s) for s in (3, 4) for k in KINDS]
    frozen = {r["kind"] for r in results if r["params_frozen"]}
    assert frozen == {"random", "shuffled", "pretrained"}
    rows = [line.split() for line in printed.strip().splitlines()[-2 * len(KINDS) :]]
    top1 = [r["metrics"]["top1"] for r in results if r["kind"] == "mlp"]
    expected = torch.tensor(top1)
    row = next(row for row in rows if row[:2] == ["mlp", "top1"])
    assert float(row[2]) == pytest.approx(expected.mean().item(), abs=0.01)
    assert float(row[4]) == pytest.approx(expected.std().item(), abs=0.01)


def test_published_weights_give_the_logits_of_transformers(tmp_path):
    """A file with DeiT's names and random values, against transformers' own ViT with the same."""
    config = ViTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_labels=12,
                       intermediate_size=256, image_size=36, patch_size=6,
                       layer_norm_eps=1e-6)  # fmt: skip
    vit = ViTForImageClassification(config).eval()
    for p in vit.parameters():
        p.data = 0.2 * torch.randn_like(p) + (p.data.mean() > 0.9)
    names = {
        "vit.embeddings.cls_token": "cls_token", "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "classifier": "head",
        "vit.layernorm": "norm", "vit.layers": "blocks", "vit.encoder.layer": "blocks",
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj",
        "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }  # fmt: skip
    weights, qkv = {}, {}
    for name, w in vit.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        block, part = name.rpartition("attention")[0], name.rpartition(".")[2]
        for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
            if f".{letter}_proj." in name or f".{word}." in name:
                qkv.setdefault(f"{block}attn.qkv.{part}", {})[letter] = w
                name = None
                break
        if name:
            weights[name] = w
    for name, parts in qkv.items():
        weights[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    torch.save({"model": weights}, tmp_path / "deit.pth")
    args = train_image.parse_args(["--init", str(tmp_path / "deit.pth")])
    args.classes = list("abcdefghijkl")
    model = train_image.build_model(args, "none", 0).eval().double()
    x = torch.randn(2, 3, 36, 36).double()
    torch.testing.assert_close(model(x), vit.double()(x).logits, rtol=0, atol=1e-9)

    args.classes = list("abc")  # another head starts anew
    fresh = train_image.build_model(args, "pretrained", 0)
    assert fresh.head.weight.shape == (3, 64)
    assert torch.equal(fresh.blocks[2].mlp.fc1.weight, weights["blocks.2.mlp.fc1.weight"])
    del weights["blocks.1.norm1.bias"]
    torch.save({"model": weights}, tmp_path / "deit.pth")
    with pytest.raises(UserError, match="lacks blocks.1.norm1.bias"):
        train_image.build_model(args, "none", 0)


def test_top1_and_top5_equal_a_count_by_hand_among_the_classes_present():
    args = train_image.parse_args(["--limit", "40", "--batch-size", "16"])
    images = train_image.load_data(args)["test"]
    model = train_image.build_model(args, "none", 0)
    torch.nn.init.normal_(model.head.weight)
    images.present = [0, 1, 2, 3, 4, 5, 7]
    top1 = top5 = 0
    for i in range(40):
        x, label = images[0, i]
        with torch.no_grad():
            logits = model.eval()(train_image.normalise(x[None]))[0]
        ranking = sorted(images.present, key=lambda k: -logits[k].item())
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
    expected = {"top1": 100 * top1 / 40, "top5": 100 * top5 / 40}
    assert train_image.evaluate(args, model, images) == pytest.approx(expected)


def test_toy_masks_cover_the_shapes_and_only_the_shapes():
    labels = set()
    for index in range(60):
        image, label, mask = train_image.draw_toy(index, 36)
        labels.add(label)
        colour = torch.tensor(list(train_image.COLOURS.values()))[label // 4]
        pixels = train_image.v2.functional.pil_to_tensor(image).permute(1, 2, 0).float()
        distance = (pixels - colour).abs().amax(-1)
        inside = train_image.v2.functional.pil_to_tensor(mask)[0].bool()
        assert distance[inside].max() <= 20 < distance[~inside].mean()
        assert 0.05 < inside.float().mean() < 0.7
    assert labels == set(range(12))


def test_class_folders(tmp_path, capsys):
    root = make_folder(make_folder(tmp_path / "data", "train"), "val")
    argv = ["--data", "folder", "--root", str(root)]
    run(tmp_path / "runs", *argv, "--block", "none")
    best = str(tmp_path / "runs/image-folder-micro/none-s0/best.pt")
    # Any folder of class folders is a test set; the classes go by name, not by number.
    other = make_folder(tmp_path / "other", "", ["dog"])
    tested = train_image.main(["--eval", best, "--root", str(other), *argv[:2]])[0]
    assert tested["metrics"]["top1"] == 100  # nothing else competes
    make_folder(tmp_path / "new", "", ["bird"])
    with pytest.raises(UserError, match="class bird is not one of the model's"):
        train_image.main(["--eval", best, "--data", "folder", "--root", str(tmp_path / "new")])
    for i in range(10):
        (root / f"train/dog/{i}.jpg").unlink()
    with pytest.raises(UserError, match="has sizes"):
        run(tmp_path / "runs", *argv, "--block", "none")
    make_folder(root, "train", ["bee"])  # labels are those of train, also where val lacks a class
    args = train_image.parse_args([*argv, "--limit", "4"])
    data = train_image.load_data(args)
    assert args.classes == ["bee", "cat", "dog"] and data["test"].present == [1, 2]
    assert [label for _, label in data["test"].pairs] == [1, 1, 2, 2]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_named_in_one_line(workers, tmp_path):
    root = make_folder(make_folder(tmp_path / "data", "train"), "val")
    (root / "train/cat/7.jpg").write_bytes(b"no image")
    argv = ["train_image.py", *SMALL, "--data", "folder", "--root", root, "--workers", workers]
    script = [sys.executable, *map(str, argv), "--out", str(tmp_path / "runs")]
    process = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2 and lines[-1].startswith("error: cannot use")
    assert "7.jpg" in lines[-1] and "Traceback" not in process.stderr


def test_epochs_0_tests_what_is_there(tmp_path):
    result = run(tmp_path, "--epochs", "0", "--block", "none")[0]
    assert result["metrics"]["top1"] < 40 and not list(tmp_path.iterdir())


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="LLMBLOCK_DATA is not set")
def test_real_photos_with_a_real_llm(tmp_path):
    data = Path(os.environ["LLMBLOCK_DATA"])
    argv = ["--data", "folder", "--root", str(data / "images/cifar10"), "--limit", "320"]
    argv += ["--llm", str(data / "lm/smollm2-135m-instruct"), "--epochs", "2"]
    result = run(tmp_path, *argv)[0]
    assert result["params_frozen"] == 3_540_096 and result["metrics"]["top1"] > 15
