"""train_pointcloud.py: sampling and grouping, every layout, Point-BERT's weights. CPU, offline.

python -m pytest tests/test_pointcloud.py -q    # LLMBLOCK_DATA=DIR adds DIR/pointcloud
"""

import math
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train_pointcloud as pc  # noqa: E402
from llmblock import UserError  # noqa: E402

torch.set_num_threads(1)
NAMES = ["chair", "night_stand", "airplane"]


def arguments(*argv):
    args = pc.parse_args(["--workers", "0", "--device", "cpu", *map(str, argv)])
    args.classes = pc.SURFACES
    return args


def of_layout(layout, root):
    data = [layout] if layout in ("txt", "h5") else ["scanobjectnn", "--variant", layout]
    return ["--root", root, "--data", *data]


def clouds_of(n, P=256):
    return torch.randn(n, P, 3, generator=torch.Generator().manual_seed(0)) + 0.3


def farthest_by_hand(cloud, n):
    picked = [0]
    while len(picked) < n:
        gaps = [min(math.dist(point, cloud[j]) for j in picked) for point in cloud]
        picked.append(gaps.index(max(gaps)))
    return picked


# ---------------------------------------------------------------- the model
def test_groups_equal_a_search_by_hand():
    x = 0.9 + 0.001 * clouds_of(2, 90)  # so close that fast distances would be wrong
    centres, groups = pc.group_points(x, 7, 9)
    for cloud, centre, group in zip(x.tolist(), centres.tolist(), groups.tolist(), strict=True):
        assert centre == [cloud[i] for i in farthest_by_hand(cloud, 7)]
        for place, points in zip(centre, group, strict=True):
            seen = [[a - b for a, b in zip(point, place, strict=True)] for point in cloud]
            expected = sorted(seen, key=lambda point: math.hypot(*point))[:9]
            assert torch.allclose(torch.tensor(points), torch.tensor(expected), atol=1e-7)


def test_the_order_of_the_points_plays_no_role_but_clouds_do():
    model = pc.build_model(arguments(), "pretrained", 0).eval()
    x = clouds_of(3)
    order = [0, *(1 + torch.randperm(255)).tolist()]  # sampling starts at the first point
    with torch.no_grad():
        assert torch.allclose(model(x[:, order]), model(x), atol=1e-4)
        assert model(x).std(0).mean() > 1e-3


def test_places_stay_fp32_under_bf16():
    model = pc.build_model(arguments(), "none", 0).eval()
    inputs = []
    outputs = []
    model.blocks["blocks"][0].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model.blocks["blocks"][0].attn.register_forward_hook(lambda m, x, y: outputs.append(y.dtype))
    with torch.no_grad():
        model(clouds_of(2))
        with torch.autocast("cpu", torch.bfloat16):
            model(clouds_of(2))
    assert outputs == [torch.float32, torch.bfloat16] and torch.equal(*inputs)


def test_batchnorm_is_over_all_gpus(monkeypatch):
    def norms(args):
        model = pc.build_model(args, "pretrained", 0)
        return [type(m) for m in model.modules() if "BatchNorm" in type(m).__name__]

    args = arguments()
    assert norms(args) == [nn.BatchNorm1d] * 2
    monkeypatch.setattr(pc, "WORLD", 2)
    assert norms(args) == [nn.BatchNorm1d] * 2  # on CPUs
    args.device = "cuda"
    assert norms(args) == [nn.SyncBatchNorm] * 2


# ---------------------------------------------------------------- loss and metrics
def test_training_draws_points_stretches_and_shifts():
    line = np.arange(300.0)[:, None] * [1, 1, 1]  # equally spaced points
    clouds = pc.Clouds(arguments(), [(line, 0)], True)
    gap = clouds.tensors[0][0].diff(dim=0).mean(0)
    x = torch.stack([clouds[seed, 0][0].sort(0)[0] for seed in range(300)])
    scale = x.diff(dim=1).amin(1) / gap  # (300, 3): some neighbours are always drawn together
    places = ((x - x[:, :1]) / scale[:, None] / gap).round().int()[..., 0]
    assert x.shape == (300, 256, 3) and places.diff(dim=1).min() == 1  # no point twice
    assert len(places.unique(dim=0)) == 300 and torch.equal(clouds[7, 0][0], clouds[7, 0][0])
    assert 0.66 < scale.min() < 0.68 and 1.48 < scale.max() < 1.51
    assert (scale[:, 0] - scale[:, 1]).abs().mean() > 0.2  # each axis on its own
    assert -0.25 < x.mean(1).min() < -0.18 and 0.18 < x.mean(1).max() < 0.25
    test = pc.Clouds(arguments(), [(line[:280], 0)], False)
    assert torch.equal(test[7, 0][0], test.tensors[0][0, :256])  # the first, as they are


def test_accuracy_equals_a_count_by_hand():
    x = np.zeros((10, 256, 3))
    x[:, 0, 0] = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]  # what the model says
    y = [0, 1, 2, 0, 1, 0, 0, 0, 0, 1]  # six are right
    args = arguments("--batch-size", "4", "--data", "scanobjectnn")  # its clouds stay as they are
    model = nn.Module()
    model.forward = lambda x: F.one_hot(x.sum((1, 2)).long(), 3)
    clouds = pc.Clouds(args, list(zip(x, y, strict=True)), False)
    assert pc.evaluate(args, model, clouds) == {"acc": 60.0}


# ---------------------------------------------------------------- data
def test_toy_clouds():
    data = pc.load_data(arguments("--limit", "150"))
    assert {name: len(clouds) for name, clouds in data.items()} == dict.fromkeys(data, 150)
    for clouds in data.values():
        assert set(clouds.tensors[1].tolist()) == set(range(8))  # all classes in all splits
    everything = torch.cat([clouds.tensors[0] for clouds in data.values()])
    assert len({cloud.numpy().tobytes() for cloud in everything}) == 450
    assert torch.allclose(everything.norm(dim=2).amax(1), torch.ones(450), atol=1e-5)
    assert np.array_equal(pc.draw_toy(3, 256)[0], pc.draw_toy(3, 256)[0])


def write_h5(path, clouds, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.importorskip("h5py").File(path, "w") as file:
        file["data"] = clouds.astype(np.float32)
        file["label"] = np.array(labels).astype(np.uint8)


def write_tree(root, layout):
    """Random clouds in one of the layouts: {split: (clouds, labels)}."""
    rng = np.random.default_rng(0)
    written = {}
    for split, n in (("train", 12), ("test", 6)):
        xs = rng.normal(5, 3, (n, 320, 3)).astype(np.float32)
        ys = np.arange(n) % 3
        written[split] = (xs, ys)
        if layout == "txt":
            ids = [f"{NAMES[y]}_{len(split)}{i:03}" for i, y in enumerate(ys)]
            for x, y, name in zip(xs, ys, ids, strict=True):
                (root / NAMES[y]).mkdir(parents=True, exist_ok=True)
                np.savetxt(root / NAMES[y] / f"{name}.txt", np.hstack([x, x]), "%.9g", ",")
            for stem, k in (("modelnet10", 2), ("modelnet40", n)):
                (root / f"{stem}_{split}.txt").write_text("\n".join(ids[:k]) + "\n")
                (root / f"{stem}_shape_names.txt").write_text("\n".join(NAMES[:k]) + "\n")
        elif layout == "h5":
            write_h5(root / f"ply_data_{split}0.h5", xs[:4], ys[:4, None])
            write_h5(root / f"ply_data_{split}1.h5", xs[4:], ys[4:, None])
            (root / "shape_names.txt").write_text("\n".join(NAMES) + "\n")
        else:  # the other variants hold nothing but zeros
            split = {"train": "training"}.get(split, split)
            for variant, path in {
                "bg": f"main_split/{split}_objectdataset.h5",
                "obj": f"main_split_nobg/{split}_objectdataset.h5",
                "t50": f"main_split/{split}_objectdataset_augmentedrot_scale75.h5",
            }.items():
                write_h5(root / path, xs * (layout == variant), ys)
    return written


@pytest.mark.parametrize("layout", ["txt", "h5", "bg", "obj", "t50"])
def test_every_layout_gives_its_classes_labels_and_clouds(tmp_path, layout):
    written = write_tree(tmp_path, layout)
    args = arguments(*of_layout(layout, tmp_path))
    data = pc.load_data(args)
    assert args.sizes == {"train": 10, "val": 2, "test": 6}
    assert args.classes == (NAMES if layout in ("txt", "h5") else [str(i) for i in range(15)])
    found = {"train": [*data["train"].tensors, *data["val"].tensors], "test": data["test"].tensors}
    for split, (xs, ys) in written.items():
        xs = torch.from_numpy(xs)
        if layout in ("txt", "h5"):  # into the unit sphere; ScanObjectNN stays as it is
            xs = xs - xs.mean(1, keepdim=True)
            xs = xs / xs.norm(dim=2).amax(1)[:, None, None]
        expected = [x[farthest_by_hand(x.tolist(), 20)] for x in xs]
        got = torch.cat(found[split][::2])
        assert got.shape[1] == 300  # to draw 256 of them in training
        for x, y in zip(got, torch.cat(found[split][1::2]), strict=True):
            same = [torch.allclose(x[:20], e, atol=1e-5) for e in expected]
            assert sum(same) == 1 and ys[same.index(True)] == y


def damage(path, text):
    return lambda root: (root / path).write_text(text)


@pytest.mark.parametrize(
    "layout, change, words",
    [
        ("txt", shutil.rmtree, "_test.txt"),
        ("h5", shutil.rmtree, "ply_data_test"),
        ("t50", shutil.rmtree, "main_split"),
        ("txt", lambda root: (root / "chair/chair_5000.txt").unlink(), "chair_5000.txt"),
        ("txt", damage("chair/chair_5000.txt", "1,2,3\n4,x,6\n"), "chair_5000.txt"),
        ("txt", damage("modelnet40_shape_names.txt", "chair airplane"), "night_stand"),
        ("h5", damage("ply_data_train0.h5", "no h5"), "ply_data_train0.h5"),
        ("h5", damage("shape_names.txt", "chair night_stand"), "a class without a name"),
        ("h5", lambda root: write_nan(root / "ply_data_test0.h5"), "NaN"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, layout, change, words):
    root = tmp_path / "data"
    write_tree(root, layout)
    change(root)
    argv = ["--out", tmp_path / "out", "--workers", "0", *of_layout(layout, root)]
    with pytest.raises(UserError, match=words) as caught:
        pc.main([*map(str, argv)])
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)
    assert not (tmp_path / "out").exists()


def write_nan(path):
    write_h5(path, np.full((4, 320, 3), np.nan), [0, 1, 2, 0])


def test_too_few_points_and_no_h5py(tmp_path, monkeypatch):
    write_tree(tmp_path, "txt")
    with pytest.raises(UserError, match="320 points in a cloud"):
        pc.load_data(arguments(*of_layout("txt", tmp_path), "--points", "512"))
    (tmp_path / "ply_data_test0.h5").write_text("")
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    with pytest.raises(UserError, match="ply_data_test0.h5.*h5py"):
        pc.load_data(arguments(*of_layout("h5", tmp_path)))


# ---------------------------------------------------------------- Point-BERT's published weights
def publish(path, prefix="module.transformer_q.", old_numpy=False, **changes):
    """Random weights, by default as in Point-BERT.pth. Changes replace tensors, None omits them.
    (published_logits holds the published names.)"""
    w = {}
    torch.manual_seed(1)
    for name, t in pc.build_model(arguments(), "none", 0).state_dict().items():
        if t.ndim > 1:
            w[name] = torch.randn(t.shape) / t[0].numel() ** 0.5
        elif name.endswith(("weight", "var", "tracked")):
            w[name] = (1 + torch.rand(t.shape)).to(t.dtype)
        else:
            w[name] = 0.2 * torch.randn(t.shape)
        if name.startswith("cls_head_finetune") and "transformer_q" in prefix:
            del w[name]
    w = {name: t for name, t in (w | changes).items() if t is not None}
    tensors = {prefix + name: t for name, t in w.items()}
    tensors["module.transformer_k.cls_pos"] = torch.zeros(1, 1, 64)
    tensors["module.dvae.encoder.first_conv.0.weight"] = torch.zeros(16, 3, 1)
    torch.save({"base_model": tensors, "metrics": {"acc": np.float64(0.9)}}, path)
    if old_numpy:  # the name of NumPy's module when the published file was written
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, data in parts.items():
                file.writestr(name, data.replace(b"numpy._core.", b"numpy.core."))
    return w


def published_logits(w, centres, groups):
    """Point-BERT's forward pass as it was published, with attention written out."""

    def layer(name, x):
        f = F.conv1d if w[f"{name}.weight"].ndim == 3 else F.linear
        return f(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def conv(name, x):  # (B * G, channels, M)
        stats = [w[f"{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return layer(f"{name}.3", F.batch_norm(layer(f"{name}.0", x), *stats).relu())

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    points = conv("encoder.first_conv", groups.flatten(0, 1).transpose(1, 2))
    whole = points.amax(2, keepdim=True).expand_as(points)
    x = conv("encoder.second_conv", torch.cat([whole, points], dim=1)).amax(2)
    x = layer("reduce_dim", x).unflatten(0, centres.shape[:2])  # (B, G, D)
    pos = layer("pos_embed.2", F.gelu(layer("pos_embed.0", centres)))
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1)
    pos = torch.cat([w["cls_pos"].expand(len(x), -1, -1), pos], dim=1)
    for block in (f"blocks.blocks.{i}" for i in range(3)):
        x = x + pos
        qkv = layer(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(2, (4, -1)).transpose(1, 2) for y in qkv)  # (B, h, N, D/h)
        seen = (q @ k.transpose(2, 3) / 4).softmax(-1) @ v  # 4 is the root of D/h
        x = x + layer(f"{block}.attn.proj", seen.transpose(1, 2).flatten(2))
        x = x + layer(
            f"{block}.mlp.fc2", F.gelu(layer(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        )
    x = norm("norm", x)
    x = torch.cat([x[:, 0], x[:, 1:].amax(1)], dim=1)
    return layer("cls_head_finetune.3", layer("cls_head_finetune.0", x).relu())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_fine_tuned_file_gives_the_published_logits(tmp_path, prefix):
    w = publish(tmp_path / "a.pth", prefix)
    args = arguments("--init", tmp_path / "a.pth")
    x = clouds_of(3)
    with torch.no_grad():
        logits = pc.build_model(args, "none", 0).eval()(x)
    expected = published_logits(w, *pc.group_points(x, 16))
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4) and expected.std(0).mean() > 0.05
    assert not any("qkv.bias" in name for name in w)
    args.classes = args.classes[:5]  # then the head is a new one
    assert len(pc.build_model(args, "none", 0).cls_head_finetune[3].weight) == 5


@pytest.mark.parametrize("old_numpy", [True, False])
def test_point_bert_fills_the_host_alone(tmp_path, old_numpy, capsys):
    w = publish(tmp_path / "a.pth", old_numpy=old_numpy)
    model = pc.build_model(arguments("--init", tmp_path / "a.pth"), "pretrained", 0)
    own = model.state_dict()
    filled = {name for name in own if name in w and torch.equal(own[name], w[name])}
    rest = {name for name in own if name.startswith(("llm.", "cls_head_finetune."))}
    assert filled | rest == set(own) and not filled & rest
    assert "head: False" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [
        ({"cls_pos": None}, "lacks cls_pos"),
        ({"blocks.blocks.1.attn.proj.bias": None}, "lacks blocks.blocks.1.attn.proj.bias"),
        ({"reduce_dim.weight": torch.zeros(3, 5)}, "lacks reduce_dim.weight, or has it in another"),
        ({"reduce_dim.weight": 7}, "cannot use .*a.pth"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, words):
    publish(tmp_path / "a.pth", **change)
    with pytest.raises(UserError, match=words):
        pc.build_model(arguments("--init", tmp_path / "a.pth"), "none", 0)


def test_eval_needs_neither_train_nor_the_file_of_weights(tmp_path):
    write_tree(tmp_path / "data", "txt")
    publish(tmp_path / "a.pth")
    argv = [*of_layout("txt", tmp_path / "data"), "--init", tmp_path / "a.pth", "--epochs", 1]
    argv += ["--batch-size", 4, "--out", tmp_path, "--workers", 0, "--device", "cpu"]
    [trained] = pc.main([*map(str, argv)])
    (tmp_path / "a.pth").unlink()
    (tmp_path / "data/modelnet40_train.txt").unlink()
    best = tmp_path / "pointcloud-txt-micro/pretrained-s0/best.pt"
    [tested] = pc.main(["--eval", str(best), "--root", str(tmp_path / "data")])
    assert tested["metrics"] == trained["metrics"]


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="LLMBLOCK_DATA is not set")
def test_real_clouds_are_the_same_in_two_layouts(tmp_path):
    pytest.importorskip("h5py")
    root = Path(os.environ["LLMBLOCK_DATA"]) / "pointcloud"
    shutil.unpack_archive(root / "dales5_normal_resampled.tar.gz", tmp_path)
    counts = []
    for layout, folder in (
        ("h5", root / "dales5_hdf5"),
        ("txt", tmp_path / "dales5_normal_resampled"),
    ):
        args = arguments("--points", 1024, *of_layout(layout, folder))
        data = pc.load_data(args)
        assert args.classes == ["building", "car", "fence", "pole", "tree"]
        assert args.sizes == {"train": 269, "val": 30, "test": 100}
        counts.append(data["test"].tensors[1].bincount().tolist())
    assert counts[0] == counts[1]
