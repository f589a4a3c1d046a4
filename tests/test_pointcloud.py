"""train_pointcloud.py: sampling, grouping, every layout, Point-BERT's weights. CPU, offline.

python -m pytest tests/test_pointcloud.py -q    # LLMBLOCK_DATA=DIR adds DIR/pointcloud
"""

import datetime
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train_pointcloud as pc  # noqa: E402
from llmblock import UserError  # noqa: E402

SMALL = ["--points", "256", "--workers", "0", "--device", "cpu"]
LAYOUTS = ("off", "txt", "h5", "bg", "obj", "t50")  # the last three of ScanObjectNN
torch.set_num_threads(1)


def arguments(*argv):
    return pc.parse_args([*SMALL, *map(str, argv)])


def of_layout(layout, root):
    data = (layout,) if layout in LAYOUTS[:3] else ("scanobjectnn", "--variant", layout)
    return arguments("--root", root, "--data", *data)


def make_model(args, kind="pretrained"):
    return pc.build_model(args, kind, 0, {"classes": list(pc.TOY)})


def uneven(counts):
    """Chi-square against equal counts: of 8 counts it is beyond 30 once in 10,000 draws."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()


def farthest_by_hand(cloud, n):
    """Farthest-point sampling as it is defined, one distance after another."""
    picked = [max(range(len(cloud)), key=lambda i: math.hypot(*cloud[i]))]
    while len(picked) < n:
        gaps = [min(math.dist(p, cloud[j]) for j in picked) for p in cloud]
        picked.append(gaps.index(max(gaps)))
    return picked


@pytest.mark.parametrize("seed", range(4))
def test_farthest_points_equal_a_search_by_hand(seed):
    x = torch.randn(3, 50, 3, generator=torch.Generator().manual_seed(seed)) + 0.3
    picked = pc.farthest_points(x, 12)
    assert picked.tolist() == [farthest_by_hand(cloud.tolist(), 12) for cloud in x]
    twice = torch.cat([x, x.flip(1)], dim=1)  # every point two times
    for clouds in zip(x, twice, picked, pc.farthest_points(twice, 12), strict=True):
        assert torch.equal(clouds[0][clouds[2]], clouds[1][clouds[3]])
    assert pc.farthest_points(twice, 60).max() < 100  # more than there are different ones


def test_groups_are_the_nearest_points_seen_from_their_centre():
    x = 0.9 + 0.001 * torch.randn(2, 90, 3, generator=torch.Generator().manual_seed(0))
    for cloud, centres, groups in zip(x.tolist(), *pc.group(x, 7, 9), strict=True):
        assert centres.tolist() == [cloud[i] for i in farthest_by_hand(cloud, 7)]
        for centre, found in zip(centres.tolist(), groups.tolist(), strict=True):
            seen = [[a - b for a, b in zip(point, centre, strict=True)] for point in cloud]
            nearest = sorted(seen, key=lambda p: math.hypot(*p))[:9]
            found = sorted(found, key=lambda p: math.hypot(*p))
            assert torch.allclose(torch.tensor(found), torch.tensor(nearest), atol=1e-7)


def test_the_order_of_the_points_plays_no_role():
    model, x = make_model(arguments()).eval(), pc.draw_toy(4, 0, 256)[0]

    def run(x):
        return model.reduce(model.pointnet(pc.group(x, model.G, model.K)[1])), model(x)

    with torch.no_grad():
        expected = run(x)
        for seed in range(3):
            g = torch.Generator().manual_seed(seed)
            mixed = torch.stack([cloud[torch.randperm(256, generator=g)] for cloud in x])
            for a, b in zip(run(mixed), expected, strict=True):
                assert torch.allclose(a, b, atol=1e-5)
    assert all(y.std(0).mean() > 1e-3 for y in expected)  # but different clouds differ


def test_toy_clouds_labels_and_parts():
    x, y, part = pc.draw_toy(400, 0, 256)
    assert len(pc.TOY) >= 8 and y.unique().tolist() == list(range(len(pc.TOY)))
    assert torch.allclose(x.norm(dim=-1).amax(1), torch.ones(400))
    assert x.mean(1).abs().max() < 1e-5
    beside = part.gather(1, (torch.cdist(x, x) + 9 * torch.eye(256)).argmin(2))
    for label, parts in enumerate(pc.TOY.values()):
        assert part[y == label].unique().tolist() == list(range(len(parts)))
        same = (beside == part)[y == label].float().mean()  # as at the nearest other point
        assert same > 0.8  # by chance 0.27 to 0.65
    again, other = (pc.draw_toy(400, seed, 256) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(again, (x, y, part), strict=True))
    assert not torch.equal(other[0], x)


def test_toy_is_split_into_three_without_a_common_cloud():
    data = pc.load_data(arguments())
    splits = data["train"], data["val"][0], data["test"][0]
    assert [len(split) for split in splits] == [3600, 400, 2000]
    assert len({x.numpy().tobytes() for split in splits for x, _ in split}) == 6000
    assert data["meta"] == {"classes": list(pc.TOY)}


# ---------------------------------------------------------------- files


def write_off(path, corners, faces, header="OFF\n{} {} 0\n"):
    rows = [*corners, *([len(face), *face] for face in faces)]
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header.format(len(corners), len(faces)) + text + "\n")
    return path


def test_meshes_are_sampled_uniformly_by_area(tmp_path):
    """A large and a small right triangle, one above the other."""
    corners = [(0, 0, 0), (3, 0, 0), (0, 3, 0), (0, 0, 5), (1, 0, 5), (0, 1, 5)]
    x = pc.read_off(write_off(tmp_path / "a.off", corners, [(0, 1, 2), (3, 4, 5)]))
    small = x[:, 2] > 1
    assert x.shape == (8192, 3) and torch.allclose(x[:, 2], 5 * small.double())
    assert abs(small.sum() - 819) < 5 * 27  # a tenth, five standard deviations
    for points, side in ((x[~small], 3), (x[small], 1)):
        u, v = points[:, 0] / side, points[:, 1] / side
        assert u.min() >= 0 and v.min() >= 0 and (u + v).max() < 1 + 1e-9
        corner = [(u > 0.5).sum(), (v > 0.5).sum(), (u + v < 0.5).sum()]
        assert uneven([*corner, len(u) - sum(corner)]) < 30  # a quarter is in the middle


def test_faces_of_four_corners_and_a_header_on_the_line_of_the_counts(tmp_path):
    corners = [(0, 0, 1), (4, 0, 1), (4, 2, 1), (0, 2, 1)]
    x = pc.read_off(write_off(tmp_path / "a.off", corners, [(0, 1, 2, 3)]))
    assert torch.allclose(x[:, 2], torch.ones(len(x), dtype=x.dtype))
    cells = x[:, 0].long() * 2 + x[:, 1].long()  # 4 x 2 of equal area
    assert len(cells.bincount()) == 8 and uneven(cells.bincount()) < 30
    torch.manual_seed(5)
    assert torch.equal(pc.read_off(tmp_path / "a.off"), x)  # the same in every call
    triangles = [(0, 1, 2), (0, 2, 3)]
    glued = write_off(tmp_path / "b" / "a.off", corners, triangles, "OFF{} {} 0\n")
    assert glued.read_text().startswith("OFF4 2 0\n") and torch.equal(pc.read_off(glued), x)


def test_broken_meshes_are_skipped(tmp_path, capsys):
    head, path = "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n", tmp_path / "a.off"
    broken = ["", "OFF", head + "3 0 1", head + "3 0 1 3", head + "3 a b c"]
    broken += [head.replace("3 1 0", "3 0 0"), head.replace("OFF", "PLY") + "3 0 1 2"]
    for text in broken:
        path.write_text(text)
        assert pc.read_cloud(256, (path, 7))[1] == -1
        assert capsys.readouterr().err.startswith(f"skipped {path}: ")
    path.write_text(head + "3 0 1 2")
    assert pc.read_cloud(256, (path, 7))[1] == 7


def test_a_mesh_that_ends_within_its_last_face_is_skipped(tmp_path):
    write_off(tmp_path / "a.off", [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)], [(0, 1, 2, 3)])
    text = (tmp_path / "a.off").read_text()
    (tmp_path / "a.off").write_text(text.removesuffix("3\n"))
    assert pc.read_cloud(256, (tmp_path / "a.off", 7))[1] == -1


def test_one_broken_cloud_is_reported_and_many_are_an_error(tmp_path, capsys):
    write_tree(tmp_path, "off")
    first, second, *_ = tmp_path.glob("*/test/*.off")
    first.write_text(first.read_text()[:200])
    data = pc.load_data(of_layout("off", tmp_path))
    assert len(data["test"][0]) == 5 and all(y >= 0 for _, y in data["test"][0])
    assert "test: 1 of 6 samples are broken and were skipped" in capsys.readouterr().err
    second.write_text("")
    with pytest.raises(UserError, match="2 of 6 samples are broken, more than 1%"):
        pc.load_data(of_layout("off", tmp_path))


def test_only_larger_clouds_are_reduced_and_smaller_ones_are_broken():
    sizes = {255: -1, 256: 256, 280: 280, 300: 300, 1000: 300}
    clouds = [torch.randn(n, 3) + 4 for n in sizes]
    read = [pc.read_cloud(256, (cloud, 7)) for cloud in clouds]
    assert [len(x) if y == 7 else y for x, y in read] == list(sizes.values())
    x = clouds[1] - clouds[1].mean(0)  # in its own order
    assert torch.allclose(read[1][0], x / x.norm(dim=1).max(), atol=1e-6)
    clouds[1][0, 0] = torch.nan
    assert pc.read_cloud(256, (clouds[1], 7))[1] == -1


def write_h5(path, clouds, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.importorskip("h5py").File(path, "w") as file:
        file["data"], file["label"] = clouds.astype(np.float32), labels.astype(np.uint8)


def write_tree(root, layout):
    """Random clouds in one of the layouts: class names, and {split: [(cloud, label)]}."""
    names, g, written = ["chair", "night_stand", "airplane"], np.random.default_rng(0), {}
    names = {"off": sorted(names), "txt": names, "h5": names}.get(layout, pc.SCANOBJECTNN.split())
    for split, n in (("train", 12), ("test", 6)):
        xs = (5 + 3 * g.normal(size=(n, 320, 3))).astype(np.float32)
        ys = np.arange(n) % len(names)
        written[split] = list(zip(xs, ys, strict=True))
        if layout == "off":
            for i, (x, y) in enumerate(written[split]):
                path = root / names[y] / split / f"{names[y]}_{i:04}.off"
                write_off(path, x[:30].tolist(), np.arange(30).reshape(10, 3))
                written[split][i] = pc.read_off(path), y
        elif layout == "txt":
            ids = [f"{names[y]}_{len(split)}{i:03}" for i, y in enumerate(ys)]
            for x, y, name in zip(xs, ys, ids, strict=True):
                (root / names[y]).mkdir(parents=True, exist_ok=True)
                normals = np.zeros_like(x)
                np.savetxt(root / names[y] / f"{name}.txt", np.hstack([x, normals]), "%.9g", ",")
            for stem, k in (("modelnet10", 2), ("modelnet40", n)):
                (root / f"{stem}_{split}.txt").write_text("\n".join(ids[:k]) + "\n")
                (root / f"{stem}_shape_names.txt").write_text("\n".join(names[:k]) + "\n")
        elif layout == "h5":
            for i, part in enumerate((slice(4), slice(4, None))):
                write_h5(root / f"ply_data_{split}{i}.h5", xs[part], ys[part, None])
            (root / "shape_names.txt").write_text("\n".join(names) + "\n")
        else:  # the other variants hold nothing but zeros
            split = {"train": "training"}.get(split, split)
            plain, turned = "objectdataset.h5", "objectdataset_augmentedrot_scale75.h5"
            write_h5(root / f"main_split/{split}_{plain}", xs * (layout == "bg"), ys)
            write_h5(root / f"main_split_nobg/{split}_{plain}", xs * (layout == "obj"), ys)
            write_h5(root / f"main_split/{split}_{turned}", xs * (layout == "t50"), ys)
    return names, written


def reduced(cloud):
    """What becomes of a larger cloud: centred, in the unit sphere, its 256 * 75 / 64 points."""
    x = torch.as_tensor(cloud, dtype=torch.float32)
    x = x - x.mean(0)
    x = x / x.norm(dim=1).max()
    return x[pc.farthest_points(x[None], 300)[0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_its_classes_labels_and_clouds(tmp_path, layout):
    names, written = write_tree(tmp_path, layout)
    data = pc.load_data(of_layout(layout, tmp_path))
    assert data["meta"] == {"classes": names} and len(data["val"][0]) == 1  # a tenth of train
    for split, got in (("train", data["train"] + data["val"][0]), ("test", data["test"][0])):
        expected, found = [reduced(x) for x, _ in written[split]], []
        for x, y in got:
            found.append([torch.allclose(x, e, atol=1e-5) for e in expected].index(True))
            assert y == written[split][found[-1]][1]
        assert sorted(found) == list(range(len(expected)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_directory_is_one_line(tmp_path, layout):
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises((UserError, OSError)) as caught:  # the script shows both as one line
            pc.load_data(of_layout(layout, root))
        assert str(root) in str(caught.value) and "\n" not in str(caught.value)


def test_classes_without_a_name_and_too_few_points_are_errors(tmp_path):
    names = write_tree(tmp_path, "txt")[0]
    (tmp_path / "modelnet40_shape_names.txt").write_text(" ".join(names[:2]))
    with pytest.raises(UserError, match="not laid out like txt: 'airplane'"):
        pc.load_data(of_layout("txt", tmp_path))
    for points in ("128", "1000"):
        with pytest.raises(UserError, match=f"--points {points} must be"):
            arguments("--points", points)


def test_h5_without_h5py_and_without_h5(tmp_path, monkeypatch):
    (tmp_path / "shape_names.txt").write_text("chair")
    (tmp_path / "ply_data_train0.h5").write_bytes(b"no h5")
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install h5py"):
        pc.load_data(of_layout("h5", tmp_path))
    monkeypatch.undo()
    write_h5(tmp_path / "ply_data_test0.h5", np.zeros((1, 256, 3)), np.ones(1))
    with pytest.raises(UserError, match="ply_data_train0.h5 is no readable .h5"):
        pc.load_data(of_layout("h5", tmp_path))
    write_h5(tmp_path / "ply_data_train0.h5", np.zeros((2, 256, 3)), np.eye(2))
    with pytest.raises(UserError, match=r"shapes are \(2, 256, 3\) and \(4,\)"):
        pc.load_data(of_layout("h5", tmp_path))
    (tmp_path / "ply_data_test0.h5").rename(tmp_path / "ply_data_train0.h5")
    with pytest.raises(UserError, match="not laid out like h5: labels 1 to 1 of 1 classes"):
        pc.load_data(of_layout("h5", tmp_path))


# ---------------------------------------------------------------- training


def batches_of(clouds, size, seed=0):
    """Each cloud's label is its number."""
    data = {"train": [(x, i) for i, x in enumerate(clouds)]}
    gen = torch.Generator().manual_seed(seed)
    return list(pc.train_batches(data, arguments("--batch-size", size), gen))


def test_batches_are_scaled_and_shifted_clouds_and_the_seed_decides():
    clouds = torch.randn(70, 256, 3, generator=torch.Generator().manual_seed(0)).double()
    xs, ys = (torch.stack(column) for column in zip(*batches_of(clouds, 32), strict=True))
    assert ys.shape == (2, 32) and len(ys.unique()) == 64
    x, source = xs.flatten(0, 1), clouds[ys.flatten()]
    scale = x.std(1, keepdim=True) / source.std(1, keepdim=True)  # (64, 1, 3)
    shift = x.mean(1, keepdim=True) - scale * source.mean(1, keepdim=True)
    assert 2 / 3 < scale.min() + 1e-6 < 0.7 and 1.45 < scale.max() - 1e-6 < 1.5
    assert -0.2 < shift.min() + 1e-6 < -0.19 and 0.19 < shift.max() - 1e-6 < 0.2
    assert (scale.amax(2) - scale.amin(2)).median() > 0.1  # each axis on its own
    apart, place = torch.cdist(scale * source + shift, x).min(2)
    assert apart.max() < 1e-5 and torch.equal(place.sort(1)[0], torch.arange(256).expand(64, -1))
    again, other = (torch.stack([x for x, _ in batches_of(clouds, 32, seed)]) for seed in (0, 1))
    assert torch.equal(again, xs) and not torch.equal(other, xs)


def test_all_points_of_a_cloud_are_drawn_from_anew_in_every_epoch():
    line, drawn = torch.arange(300.0)[:, None].expand(-1, 3) / 100, []
    for seed in range(5):
        [(x, _)] = batches_of([line], 1, seed)
        x = x[0, :, 0].sort().values
        drawn.append(((x - x[0]) / x.diff().min()).round().int().tolist())  # places on the line
    assert all(len(set(places)) == 256 for places in drawn)  # none twice
    assert max(places[-1] for places in drawn) > 290 and drawn[0] != drawn[1]


def test_two_processes_share_the_batches_of_one(monkeypatch):
    clouds, halves = torch.randn(21, 300, 3), []
    whole = batches_of(clouds, 8)
    monkeypatch.setattr(pc, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(pc, "RANK", rank)
        halves.append(batches_of(clouds, 8))
    assert len(whole) == 2
    for batch, *parts in zip(whole, *halves, strict=True):
        for tensor, *both in zip(batch, *parts, strict=True):
            assert torch.equal(torch.stack(both, dim=1).flatten(0, 1), tensor)


def normalise(norm, start=0, step=1):
    """Rows before and behind: what belongs to each row, what sums over the rows, and the state."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 48, 5, generator=g)[:, start::step]
    x = (2 + torch.arange(1, 6) * x).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(5) + 0.5)
        norm.bias.copy_(torch.arange(5) - 2.0)
    for _ in range(2):
        y = norm(x)
    (weight * y.square()).sum().backward()
    return [y.detach(), x.grad], [norm.weight.grad, norm.bias.grad], [*norm.state_dict().values()]


def normalise_half(rank, path):
    pc.WORLD, wait = 2, datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{path}/meet", wait, world_size=2, rank=rank)
    torch.save(normalise(pc.BatchNorm(5), rank, 2), path / f"{rank}.pt")
    dist.destroy_process_group()


def test_batchnorm_in_two_processes_equals_one_over_the_whole_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(pc, "WORLD", 2)  # set back behind the test
    other = mp.start_processes(normalise_half, (tmp_path,), 1, False, start_method="forkserver")
    normalise_half(1, tmp_path)
    other.join()
    halves = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    rows, sums, state = zip(*halves, normalise(nn.BatchNorm1d(5)), strict=True)
    for a, b, whole in zip(*rows, strict=True):
        assert torch.allclose(torch.stack([a, b], dim=1).flatten(0, 1), whole, atol=1e-4)
    for a, b, whole in zip(*sums, strict=True):
        assert torch.allclose(a + b, whole, rtol=1e-4, atol=1e-4)
    for a, b, whole in zip(*state, strict=True):
        assert torch.equal(a, b) and torch.allclose(a, whole)


def test_matrices_alone_have_weight_decay():
    args = arguments("--weight-decay", "0.3")
    model = make_model(args)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["weight_decay"]: g["params"] for g in pc.param_groups(model, args)}
    assert sorted(id(p) for ps in groups.values() for p in ps) == sorted(names)  # each once
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {names[id(p)] for p in groups[0.3]} == linear & set(names.values())  # some are frozen
    assert {"cls", "cls_pos"} < {names[id(p)] for p in groups[0]}


def test_one_batch_is_learned_by_heart():
    model, (x, y, _) = make_model(args := arguments()), pc.draw_toy(16, 0, 256)
    optimizer = torch.optim.AdamW(pc.param_groups(model, args), 2e-3)
    for _ in range(30):
        loss = pc.compute_loss(model, (x, y))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.any() for p in model.parameters())  # nothing hangs loose
        optimizer.step()
    assert loss < 1  # at first 2.3


def test_accuracies_equal_a_count_by_hand():
    answers, pairs = {0: [0, 0, 0, 0, 0, 2], 1: [3, 1], 3: [0]}, []  # class 2 has no cloud
    for label, given in answers.items():
        for answer in given:
            x = torch.ones(300, 3)
            x[:256] = 0  # the first 256 points are tested
            x[0, 0] = answer
            pairs.append((x, label))
    model = nn.Module()
    model.head, model.forward = [nn.Linear(1, 4)], lambda x: F.one_hot(x.sum((1, 2)).long(), 4)
    metrics = pc.evaluate(model, [pairs], arguments("--batch-size", "4"))
    assert metrics["acc"] == pytest.approx(100 * 6 / 9, abs=1e-3)
    assert metrics["class_acc"] == pytest.approx(100 * (5 / 6 + 1 / 2 + 0) / 3, abs=1e-3)


# ---------------------------------------------------------------- Point-BERT's published weights


def publish(path, D=64, depth=3, W=64, metrics=0.9, **changes):
    """Write random weights in the layout of Point-BERT.pth (there 384, 12, 256), and return them.
    Changes replace tensors; those that are None are left out.
    """
    first, second = "encoder.first_conv", "encoder.second_conv"
    layers = {f"{first}.0": (W // 2, 3, 1), f"{first}.3": (W, W // 2, 1)}
    layers |= {f"{second}.0": (2 * W, 2 * W, 1), f"{second}.3": (W, 2 * W, 1)}
    layers |= {"reduce_dim": (D, W), "pos_embed.0": (128, 3), "pos_embed.2": (D, 128)}
    layers |= {"lm_head": (80, D), "cls_head.0": (D, D), "cls_head.2": (D, D)}
    norms = {f"{first}.1": W // 2, f"{second}.1": 2 * W, "norm": D}
    for block in (f"blocks.blocks.{i}" for i in range(depth)):
        layers |= {f"{block}.attn.qkv": (3 * D, D), f"{block}.attn.proj": (D, D)}
        layers |= {f"{block}.mlp.fc1": (4 * D, D), f"{block}.mlp.fc2": (D, 4 * D)}
        norms |= {f"{block}.norm1": D, f"{block}.norm2": D}
    torch.manual_seed(1)
    w = {name: torch.randn(1, 1, D) for name in ("cls_token", "cls_pos", "mask_token")}
    for name, shape in layers.items():
        w[f"{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        if not name.endswith("qkv"):
            w[f"{name}.bias"] = 0.2 * torch.randn(shape[0])
    for name, n in norms.items():
        w[f"{name}.weight"], w[f"{name}.bias"] = 1 + 0.2 * torch.randn(n), 0.2 * torch.randn(n)
        if name.startswith("encoder"):
            w[f"{name}.running_mean"], w[f"{name}.running_var"] = torch.randn(n), torch.rand(n) + 1
            w[f"{name}.num_batches_tracked"] = torch.tensor(7)
    tensors = {f"transformer_q.{k}": x for k, x in (w | changes).items() if x is not None}
    tensors |= {f"transformer_k.{k}": torch.zeros(1) for k in w}
    tensors |= {f"dvae.{first}.0.weight": torch.zeros(1), "dvae.codebook": torch.zeros(4, 8)}
    tensors |= {"queue": torch.zeros(4, 8), "queue_ptr": torch.zeros(1).long()}
    state = {"base_model": {f"module.{k}": x for k, x in tensors.items()}, "epoch": 300}
    torch.save({**state, "metrics": {"acc": metrics}}, path)
    return w


def published_features(w, centres, groups, depth, heads):
    """Point-BERT's encoder as it was published, up to its last norm."""

    def layer(name, x):
        f = F.conv1d if w[f"{name}.weight"].ndim == 3 else F.linear
        return f(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def conv(name, x):  # (B * G, channels, K)
        stats = (w[f"{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
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
    for block in (f"blocks.blocks.{i}" for i in range(depth)):
        x = x + pos
        qkv = layer(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in qkv)  # (B, heads, N, d)
        seen = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + layer(f"{block}.attn.proj", seen.transpose(1, 2).flatten(2))
        hidden = F.gelu(layer(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + layer(f"{block}.mlp.fc2", hidden)
    return norm("norm", x)


@pytest.mark.parametrize("size", ["micro", "small"])
def test_published_weights_give_the_published_features(tmp_path, size):
    D, depth, heads, W = (pc.MODELS[size][k] for k in ("D", "depth", "heads", "W"))
    w = publish(tmp_path / "Point-BERT.pth", D, depth, W)
    model = make_model(arguments("--model", size, "--init", tmp_path / "Point-BERT.pth"), "none")
    seen, x = [], pc.draw_toy(3, 0, 256)[0]
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(x)
    features = published_features(w, *pc.group(x, model.G, model.K), depth, heads)
    expected = torch.cat([features[:, 0], features[:, 1:].amax(1)], dim=1)  # CLS, and the largest
    assert torch.allclose(seen[0], expected, atol=1e-3) and expected.std() > 0.5


@pytest.mark.parametrize("metrics", [0.9, np.float64(0.9)])
def test_the_accuracy_in_the_published_file_does_no_harm(tmp_path, metrics):
    w = publish(tmp_path / "a.pth", metrics=metrics)
    assert torch.equal(make_model(arguments("--init", tmp_path / "a.pth")).cls, w["cls_token"])


@pytest.mark.parametrize(
    "theirs, tensor, ours",
    [
        ("extra.weight", torch.zeros(2), "extra.weight"),
        ("cls_pos", None, "cls_pos"),
        ("blocks.blocks.1.attn.proj.bias", None, "blocks.1.out.bias"),
        ("encoder.first_conv.1.running_var", None, "pointnet.local.1.running_var"),
        ("reduce_dim.weight", torch.zeros(3, 5), "reduce.weight"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, theirs, tensor, ours):
    publish(tmp_path / "a.pth", **{theirs: tensor})
    with pytest.raises(UserError) as caught:
        make_model(arguments("--init", tmp_path / "a.pth"))
    assert str(caught.value).endswith(f"a.pth does not fit the model in {ours}")


@pytest.mark.parametrize("state", [{"task": "pointcloud", "model": {}}, [1, 2]])
def test_another_file_than_weights_is_an_error(tmp_path, state):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth"):
        make_model(arguments("--init", tmp_path / "a.pth"))


def test_code_in_a_file_of_weights_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    publish(tmp_path / "a.pth", cls_token=Evil())
    with pytest.raises(UserError, match="a.pth"):
        make_model(arguments("--init", tmp_path / "a.pth"))
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)  # the careless way
    assert (tmp_path / "made").exists()


def test_eval_repeats_the_result_without_the_file_of_weights(tmp_path):
    write_tree(tmp_path / "data", "txt")
    publish(tmp_path / "a.pth")
    argv = ["--data", "txt", "--root", tmp_path / "data", "--init", tmp_path / "a.pth"]
    argv += ["--batch-size", 4, "--epochs", 1, "--out", tmp_path]
    [trained] = pc.main([*SMALL, *map(str, argv)])
    (tmp_path / "a.pth").unlink()
    best = tmp_path / "pointcloud-txt-micro/pretrained-s0/best.pt"
    [tested] = pc.main([*SMALL, "--eval", str(best)])
    assert tested["metrics"] == trained["metrics"]


# ---------------------------------------------------------------- real clouds in two layouts


def real(layout, tmp_path):
    root = Path(os.environ["LLMBLOCK_DATA"]) / "pointcloud"
    if layout == "h5":
        pytest.importorskip("h5py")
        return ["--data", "h5", "--root", str(root / "dales5_hdf5")]
    shutil.unpack_archive(root / "dales5_normal_resampled.tar.gz", tmp_path)
    return ["--data", "txt", "--root", str(tmp_path / "dales5_normal_resampled")]


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="LLMBLOCK_DATA is not set")
def test_real_clouds_are_the_same_in_two_layouts(tmp_path):
    layouts = (pc.find_clouds(arguments(*real(k, tmp_path))) for k in ("h5", "txt"))
    (names, a), (same, b) = layouts
    assert names == same == ["building", "car", "fence", "pole", "tree"]
    for (_, first), (_, second), n in zip(a, b, (299, 100), strict=True):
        assert len(first) == n and np.array_equal(np.bincount(first), np.bincount(second))


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="LLMBLOCK_DATA is not set")
@pytest.mark.parametrize("layout", ["h5", "txt"])
def test_real_clouds_and_a_real_llama(tmp_path, layout):
    llm = str(Path(os.environ["LLMBLOCK_DATA"]) / "lm/stories260K")
    argv = [*SMALL, *real(layout, tmp_path), "--llm", llm, "--limit", "120", "--epochs", "5"]
    argv += ["--batch-size", "8", "--lr", "1e-3", "--out", str(tmp_path)]
    result = pc.main(argv)[0]
    assert result["params_frozen"] == 45_440
    assert result["metrics"]["acc"] > 50  # chance: 20 ± 4
