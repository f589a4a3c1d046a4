"""train_pointcloud.py: groups, layouts, Point-BERT. LLMBLOCK_DATA=DIR adds DIR/pointcloud."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_pointcloud as pc
from llmblock import UserError

CLOUDS = torch.randn(3, 256, 3, generator=torch.Generator().manual_seed(0)) + 0.3
SCANOBJECTNN = [f"scanobjectnn --variant {name}" for name in ("bg", "obj", "t50")]
NAMES = ["chair", "night_stand", "airplane"]


def arguments(*argv):
    args = pc.parse_args(["--workers", "0", "--device", "cpu", *map(str, argv)])
    args.classes = pc.SURFACES
    return args


def farthest_by_hand(cloud, n):
    points = cloud.tolist()
    picked = [0]
    while len(picked) < n:
        gaps = [min(math.dist(point, points[j]) for j in picked) for point in points]
        picked.append(gaps.index(max(gaps)))
    return cloud[picked]


def test_groups_equal_a_search_by_hand():
    x = 0.9 + 0.001 * CLOUDS[:, :90]  # so close that fast distances would be wrong
    centres, groups = pc.group_points(x, 7, 9)
    for cloud, places, group in zip(x, centres, groups, strict=True):
        assert torch.equal(places, farthest_by_hand(cloud, 7))
        for place, points in zip(places, group, strict=True):
            offsets = cloud - place
            nearest = offsets.norm(dim=1).argsort()[:9]
            assert torch.allclose(points, offsets[nearest], atol=1e-7)


def test_training_stretches_and_shifts_and_test_clouds_stay():
    line = np.linspace(-1, 1, 300)[:, None] * [1, 1, 1]
    train = pc.Clouds(arguments(), [(line, 0)], True)
    x = torch.stack([train[seed, 0][0] for seed in range(300)])  # (300, 256, 3)
    length = (x.amax(1) - x.amin(1)) / 2 * 3**0.5  # 1 before it was stretched
    assert 0.6 < length.min() < 0.7 and 1.4 < length.max() < 1.51
    assert -0.25 < x.mean(1).min() < -0.18 and 0.18 < x.mean(1).max() < 0.25
    test = pc.Clouds(arguments(), [(np.random.randn(320, 3), 0)], False)
    cloud = test.tensors[0][0]
    assert len(cloud) == 300 and torch.equal(test[7, 0][0], cloud[:256])
    assert torch.allclose(cloud[:9], farthest_by_hand(cloud, 9))


def test_accuracy_equals_a_count_by_hand():
    x = np.zeros((10, 256, 3))
    x[:, 0, 0] = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]  # what the model says
    y = [0, 1, 2, 0, 1, 0, 0, 0, 0, 1]  # six are right
    args = arguments("--batch-size", "4", "--data", "scanobjectnn")  # its clouds stay as they are
    model = nn.Module()
    model.forward = lambda x: F.one_hot(x.sum((1, 2)).long(), 3)
    clouds = pc.Clouds(args, list(zip(x, y, strict=True)), False)
    assert pc.evaluate(args, model, clouds) == {"acc": 60.0}


def write_h5(path, x, y):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.importorskip("h5py").File(path, "w") as file:
        file["data"] = x
        file["label"] = np.array(y, np.uint8)


def write_tree(root, layout):
    """20 clouds of train and 10 of test. Those of one class are the same: {split: (3, 256, 3)}."""
    shapes = {"train": CLOUDS, "test": CLOUDS.flip(0, 2) - 2}
    for split, n in (("train", 20), ("test", 10)):
        y = np.arange(n) % 3
        x = shapes[split][y].numpy()
        if layout == "txt":
            ids = [f"{NAMES[label]}_{n}{i:02}" for i, label in enumerate(y)]
            for name, cloud in zip(ids, x, strict=True):
                path = root / name.rpartition("_")[0] / f"{name}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savetxt(path, np.hstack([cloud, cloud]), delimiter=",")
            for stem, k in (("modelnet10", 2), ("modelnet40", n)):
                (root / f"{stem}_{split}.txt").write_text("\n".join(ids[:k]))
                (root / f"{stem}_shape_names.txt").write_text("\n".join(NAMES[:k]))
        elif layout == "h5":
            write_h5(root / f"ply_data_{split}0.h5", x[:4], y[:4, None])
            write_h5(root / f"ply_data_{split}1.h5", x[4:], y[4:, None])
            (root / "shape_names.txt").write_text("\n".join(NAMES))
        else:  # the other variants hold nothing but zeros
            stem = "training_objectdataset" if split == "train" else "test_objectdataset"
            files = {"bg": f"main_split/{stem}.h5", "obj": f"main_split_nobg/{stem}.h5"}
            files["t50"] = f"main_split/{stem}_augmentedrot_scale75.h5"
            for variant, file in files.items():
                write_h5(root / file, x * layout.endswith(variant), y)
    return shapes


@pytest.mark.parametrize("layout", ["txt", "h5", *SCANOBJECTNN])
def test_every_layout_gives_its_classes_labels_and_clouds(tmp_path, layout):
    shapes = write_tree(tmp_path, layout)
    args = arguments("--root", tmp_path, "--data", *layout.split())
    data = pc.load_data(args)
    assert args.sizes == {"train": 18, "val": 2, "test": 10}
    assert args.classes == (NAMES if layout in ("txt", "h5") else [str(i) for i in range(15)])
    for split, clouds in data.items():
        x = shapes["test" if split == "test" else "train"]
        if layout in ("txt", "h5"):  # into the unit sphere; ScanObjectNN stays as it is
            x = x - x.mean(1, keepdim=True)
            x = x / x.norm(dim=2).amax(1)[:, None, None]
        assert torch.allclose(clouds.tensors[0], x[clouds.tensors[1]], atol=1e-5)
    assert data["test"].tensors[1].bincount().tolist() == [4, 3, 3]
    args.points = 512
    with pytest.raises(UserError, match="too few points in a cloud"):
        pc.load_data(args)


@pytest.mark.parametrize("layout, file, text, words", [  # without text, the file is removed
    (SCANOBJECTNN[0], "main_split/test_objectdataset.h5", "", "main_split/test"),
    ("txt", "chair/chair_1000.txt", "1,2,3\n4,x,6\n", "chair_1000.txt"),
    ("txt", "chair/chair_1000.txt", "1,nan,3\n" * 256, "NaN"),
    ("h5", "ply_data_train0.h5", "no h5", "ply_data_train0.h5"),
    ("h5", "shape_names.txt", "chair night_stand", "a class without a name"),
])  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, layout, file, text, words):
    write_tree(tmp_path, layout)
    (tmp_path / file).unlink()
    if text:
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"cannot use .*{tmp_path}.*{words}"):
        pc.load_data(arguments("--root", tmp_path, "--data", *layout.split()))


def test_real_clouds(real):
    pytest.importorskip("h5py")
    args = arguments("--data", "h5", "--root", real / "pointcloud/dales5_hdf5")
    test = pc.load_data(args)["test"]
    assert args.classes == ["building", "car", "fence", "pole", "tree"]
    assert args.sizes == {"train": 269, "val": 30, "test": 100}
    assert test.tensors[1].bincount().tolist() == [20] * 5


def publish(path, prefix, **changes):
    """A file as Point-BERT's, of random weights. Changes replace tensors, None omits them."""
    w = {}
    for name, t in pc.build_model(arguments(), "none", 0).state_dict().items():
        scale = t[0].numel() ** -0.5 if t.ndim > 1 else 1
        w[name] = (scale * torch.rand(t.shape) + 0.3 * (t.ndim == 1)).to(t.dtype)
    published = {prefix + name: t for name, t in (w | changes).items() if t is not None}
    state = {"base_model": published, "metrics": {"acc": np.float64(0.9)}}
    torch.save(state, path, _use_new_zipfile_serialization=prefix == "module.")
    if prefix != "module.":  # as old as Point-BERT.pth: NumPy's module had another name
        path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    return w


def published_logits(w, x):
    def linear(name, x):  # or a 1x1 convolution
        return F.linear(x, w[f"{name}.weight"].flatten(1), w[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (64,), w[f"{name}.weight"], w[f"{name}.bias"])

    def convolutions(name, x):  # (B, G, M, channels)
        norm = [w[f"{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        hidden = F.batch_norm(linear(f"{name}.0", x).flatten(0, 2), *norm).relu()
        return linear(f"{name}.3", hidden).unflatten(0, x.shape[:3])

    centres, groups = pc.group_points(x, 16)
    points = convolutions("encoder.first_conv", groups)
    whole = points.amax(2, keepdim=True).expand_as(points)
    x = convolutions("encoder.second_conv", torch.cat([whole, points], dim=3)).amax(2)
    x = linear("reduce_dim", x)  # (B, G, D)
    pos = linear("pos_embed.2", F.gelu(linear("pos_embed.0", centres)))
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1)
    pos = torch.cat([w["cls_pos"].expand(len(x), -1, -1), pos], dim=1)
    for i in range(3):
        block = f"blocks.blocks.{i}"
        x = x + pos
        qkv = F.linear(norm(f"{block}.norm1", x), w[f"{block}.attn.qkv.weight"])
        q, k, v = (t.unflatten(2, (4, 16)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
        attention = (q @ k.mT / 16**0.5).softmax(3)  # (B, heads, N, N)
        x = x + linear(f"{block}.attn.proj", (attention @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + linear(f"{block}.mlp.fc2", hidden)
    x = norm("norm", x)
    x = torch.cat([x[:, 0], x[:, 1:].amax(1)], dim=1)
    return linear("cls_head_finetune.3", linear("cls_head_finetune.0", x).relu())


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["module.", "module.transformer_q."])
def test_a_published_file_gives_the_published_logits(tmp_path, prefix, capsys):
    fresh = pc.build_model(arguments(), "none", 0).state_dict()
    head = {name: w for name, w in fresh.items() if name.startswith("cls_head")}
    tuned = prefix == "module."  # Point-BERT.pth, with the other prefix, has no head
    w = publish(tmp_path / "a.pth", prefix, **({} if tuned else dict.fromkeys(head)))
    args = arguments("--init", tmp_path / "a.pth")
    logits = pc.build_model(args, "none", 0).eval()(CLOUDS)
    expected = published_logits(w if tuned else w | head, CLOUDS)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert logits.std(0).mean() > 1e-3 and f"head: {tuned}" in capsys.readouterr().out
    publish(tmp_path / "a.pth", prefix, **{"reduce_dim.weight": torch.zeros(3, 5)})
    with pytest.raises(UserError, match="in another shape"):
        pc.build_model(args, "none", 0)
