"""train_image.py: DeiT, class folders, the toy. LLMBLOCK_DATA=DIR adds DIR/images/cifar10."""

import subprocess
import sys
from statistics import mean, stdev

import pytest
import torch
from PIL import Image
from test_video import as_published
from transformers import ViTConfig, ViTForImageClassification

import train_image
from llmblock import KINDS, UserError

SMALL = ["--limit", "32", "--epochs", "1", "--batch-size", "16", "--workers", "0"]


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


def test_every_kind_and_seed_has_a_result_and_they_make_a_table(tmp_path, capsys):
    results = run(tmp_path, "--seeds", "3", "4", "--block", *KINDS)
    assert [(r["kind"], r["seed"]) for r in results] == [(k, s) for s in (3, 4) for k in KINDS]
    table = " ".join(capsys.readouterr().out.split())
    for kind in KINDS:
        top1 = [r["metrics"]["top1"] for r in results if r["kind"] == kind]
        assert f"{kind} top1 {mean(top1):.2f} ± {stdev(top1):.2f}" in table


@torch.no_grad()
def test_published_weights_give_the_logits_of_transformers(tmp_path):
    """A file with DeiT's names and random values, against transformers' own ViT with the same."""
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        image_size=36, patch_size=6, num_labels=12, layer_norm_eps=1e-6,
    )  # fmt: skip
    vit = ViTForImageClassification(config).eval()
    for p in vit.parameters():
        p.copy_(0.2 * torch.randn_like(p) + (p.mean() > 0.9))
    weights = as_published(vit, norm=vit.vit.layernorm)
    weights["cls_token"] = vit.vit.embeddings.cls_token
    weights["pos_embed"] = vit.vit.embeddings.position_embeddings
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
    assert train_image.evaluate(args, model, images) == {"top1": 2.5 * top1, "top5": 2.5 * top5}


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
        box = inside[inside.any(1)][:, inside.any(0)]
        h, w = box.shape
        corner_centre_full = box[-1, 0].item(), box[h // 2, w // 2].item(), box.sum() > 0.6 * h * w
        looks = [
            (False, True, True),
            (True, False, True),
            (True, True, False),
            (False, True, False),
        ]
        assert corner_centre_full == looks[label % 4]  # disc, frame, triangle, cross
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
    make_folder(root, "train", ["bee"])  # labels are those of train, also where val lacks a class
    with pytest.raises(UserError, match="has classes"):
        run(tmp_path / "runs", *argv, "--block", "none")
    args = train_image.parse_args([*argv, "--limit", "4"])
    data = train_image.load_data(args)
    assert args.classes == ["bee", "cat", "dog"] and data["test"].present == [1, 2]
    assert [label for _, label in data["test"].pairs] == [1, 1, 2, 2]


def test_an_image_that_a_worker_cannot_read_is_named_in_one_line(tmp_path):
    root = make_folder(make_folder(tmp_path / "data", "train"), "val")
    (root / "train/cat/7.jpg").write_bytes(b"no image")
    argv = [*SMALL, "--data", "folder", "--root", root, "--workers", "1", "--out", tmp_path]
    script = [sys.executable, train_image.__file__, *map(str, argv)]
    process = subprocess.run(script, capture_output=True, text=True)
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2 and lines[-1].startswith("error: cannot use")
    assert "7.jpg" in lines[-1] and "Traceback" not in process.stderr


def test_epochs_0_tests_what_is_there(tmp_path):
    result = run(tmp_path, "--epochs", "0", "--block", "none")[0]
    assert result["metrics"]["top1"] < 40 and not list(tmp_path.iterdir())


def test_real_photos_with_a_real_llm(real, tmp_path):
    argv = ["--data", "folder", "--root", str(real / "images/cifar10"), "--limit", "320"]
    argv += ["--llm", str(real / "lm/smollm2-135m-instruct"), "--epochs", "2"]
    result = run(tmp_path, *argv)[0]
    assert result["params_frozen"] == 3_540_096 and result["metrics"]["top1"] > 15
