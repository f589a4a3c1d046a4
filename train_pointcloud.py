"""Point-cloud classification: Point-BERT with one frozen LLM block after its last layer.

    python train_pointcloud.py --block none random pretrained    # three arms on toy shapes, offline
    python train_pointcloud.py --data off --root ModelNet40      # CLASS/{train,test}/*.off
    python train_pointcloud.py --data txt --root modelnet40_normal_resampled
    python train_pointcloud.py --data h5 --root modelnet40_ply_hdf5_2048
    torchrun --nproc-per-node=4 train_pointcloud.py ...          # several GPUs, the same batches

The paper's run (Table 2; ScanObjectNN T50 83.1 -> 83.8; 6 to 10 hours on 4 A100; not run here):

    torchrun --nproc-per-node=4 train_pointcloud.py --data scanobjectnn --variant t50 \\
        --root h5_files --model small --init Point-BERT.pth --llm huggyllama/llama-7b \\
        --block none random pretrained --epochs 300 --warmup 10 --batch-size 32 --lr 5e-4 \\
        --weight-decay 0.05

Each run ends with a line `RESULT {json}`. Its checkpoint is chosen on clouds held out of train; the
test clouds are used once. The same command again resumes, or prints what is done.

Differs from the paper: it selects on the test set, we on a tenth of train; its code gives norms,
biases and CLS a tenth of the learning rate in the LLaMA runs alone, here all arms train alike;
every cloud is scaled to the unit sphere (there ScanObjectNN is not); groups are started at the
outermost point, not at the first in the file; gradients are clipped at norm 1, not 10.
Letters: B batch, P points, G groups, K points in a group, N tokens, D width, C classes.
"""

import argparse
import functools
import json
import math
import os
import platform
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.ops import StochasticDepth
from tqdm import tqdm

from llmblock import KINDS, LLMBlock, UserError, count_gflops, fail, read, save

TASK, SIGN = "pointcloud", 1  # best.pt: the largest SIGN * first metric on validation
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun
FREE = ("block", "seed", "seeds", "workers", "device", "compile", "out", "eval")  # may differ
HIDE_BAR = RANK > 0 or None  # None: tqdm draws no bar where there is no terminal

# small is Point-BERT (https://arxiv.org/abs/2111.14819), W the width of its mini-PointNet; micro is
# ours, for a laptop.
MODELS = {
    "micro": {"D": 64, "depth": 3, "heads": 4, "W": 64, "K": 16,
              "drop_path": 0.0, "dropout": 0.0},
    "small": {"D": 384, "depth": 12, "heads": 6, "W": 256, "K": 32,
              "drop_path": 0.1, "dropout": 0.5},
}  # fmt: skip
VARIANTS = {  # of ScanObjectNN
    "bg": ("main_split", "objectdataset.h5"),
    "obj": ("main_split_nobg", "objectdataset.h5"),
    "t50": ("main_split", "objectdataset_augmentedrot_scale75.h5"),
}
SCANOBJECTNN = "bag bin box cabinet chair desk display door shelf table bed pillow sink sofa toilet"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = ("toy", "off", "txt", "h5", "scanobjectnn")
    p.add_argument("--data", choices=data, default="toy", help="toy is drawn by the script")
    p.add_argument("--root", default="data", help="directory of the data")
    p.add_argument("--variant", choices=VARIANTS, default="t50", help="of ScanObjectNN")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: small")
    p.add_argument("--points", type=int, help="paper: 1024, 4096, 8192 (default: 1024, toy 512)")
    p.add_argument("--init", metavar="PTH", help="start from the published Point-BERT.pth")
    p.set_defaults(epochs=3, batch_size=32, lr=2e-3, weight_decay=0.05, warmup=1)
    args = finish_args(p, argv)
    args.points = args.points or (512 if args.data == "toy" else 1024)
    if args.points < 256 or args.points % 16:
        raise UserError(f"--points {args.points} must be a multiple of 16 from 256 on")
    return args


# ---------------------------------------------------------------- data


# Each toy object is made of parts (surface, scale, place); draw_toy also tells the part of a point.
TOY = {
    "ball": [("sphere", (1, 1, 1), (0, 0, 0))],
    "box": [("cube", (0.8, 0.8, 0.8), (0, 0, 0))],
    "can": [("tube", (0.7, 0.7, 1), (0, 0, 0)), ("disc", (0.7, 0.7, 0), (0, 0, 1)),
            ("disc", (0.7, 0.7, 0), (0, 0, -1))],
    "cup": [("tube", (0.7, 0.7, 1), (0, 0, 0)), ("disc", (0.7, 0.7, 0), (0, 0, -1)),
            ("torus", (0.15, 0.45, 0.6), (0.85, 0, 0))],
    "cone": [("cone", (0.9, 0.9, 1), (0, 0, 0)), ("disc", (0.9, 0.9, 0), (0, 0, -1))],
    "ring": [("torus", (0.4, 1, 1), (0, 0, 0))],
    "lamp": [("cone", (0.8, 0.8, 0.4), (0, 0, 0.6)), ("tube", (0.1, 0.1, 0.6), (0, 0, -0.4)),
             ("disc", (0.5, 0.5, 0), (0, 0, -1))],
    "dumbbell": [("sphere", (0.4, 0.4, 0.4), (0, 0, 0.7)), ("tube", (0.15, 0.15, 0.4), (0, 0, 0)),
                 ("sphere", (0.4, 0.4, 0.4), (0, 0, -0.7))],
    "table": [("cube", (0.9, 0.9, 0.1), (0, 0, 0.5))]
    + [("tube", (0.1, 0.1, 0.7), (x, y, -0.3)) for x in (-0.7, 0.7) for y in (-0.7, 0.7)],
    "chair": [("cube", (0.6, 0.6, 0.1), (0, 0, 0)), ("cube", (0.1, 0.6, 0.5), (-0.6, 0, 0.5))]
    + [("tube", (0.1, 0.1, 0.5), (x, y, -0.5)) for x in (-0.5, 0.5) for y in (-0.5, 0.5)],
}  # fmt: skip


def draw_toy(n, seed, P):
    """n clouds: float (n, P, 3) in the unit sphere, labels (n), part of each point (n, P).

    A random affine map stretches, shears and tilts every object, a random plane cuts up to 40 % of
    it off, as occlusion does, and its points are noisy.
    """
    g = torch.Generator().manual_seed(seed)
    v, r = torch.rand(n, 2 * P, generator=g), torch.rand(n, 2 * P, generator=g).sqrt()
    a, z = 2 * math.pi * torch.rand(n, 2 * P, generator=g), 2 * v - 1
    cos, sin, b = a.cos(), a.sin(), 2 * math.pi * v
    sphere = torch.cat(
        [(1 - z**2).sqrt()[..., None] * torch.stack([cos, sin], -1), z[..., None]], -1
    )
    tube = 0.75 + 0.25 * b.cos()  # of the torus
    surfaces = {  # at random places (n, 2P, 3)
        "sphere": sphere,
        "cube": sphere / sphere.abs().amax(-1, keepdim=True),
        "tube": torch.stack([cos, sin, z], -1),
        "disc": torch.stack([r * cos, r * sin, 0 * r], -1),
        "cone": torch.stack([r * cos, r * sin, 1 - 2 * r], -1),
        "torus": torch.stack([b.sin(), tube * cos, tube * sin], -1),
    }

    table = torch.zeros(len(TOY), 6, 8)  # up to 6 parts: surface, scale, place, and weight
    for c, parts in enumerate(TOY.values()):
        for i, (surface, s, place) in enumerate(parts):
            area = s[0] * s[1] + s[1] * s[2] + s[2] * s[0]  # roughly
            table[c, i] = torch.tensor([list(surfaces).index(surface), *s, *place, area])
    labels = torch.randint(len(TOY), (n,), generator=g)
    parts = table[labels, :, 7].multinomial(2 * P, replacement=True, generator=g)  # (n, 2P)
    rows = table[labels[:, None], parts]  # (n, 2P, 8)
    index = rows[..., 0].long(), torch.arange(n)[:, None], torch.arange(2 * P)
    x = torch.stack(list(surfaces.values()))[index] * rows[..., 1:4] + rows[..., 4:7]

    x = x @ (torch.eye(3) + 0.3 * torch.randn(n, 3, 3, generator=g))
    height = (x @ torch.randn(n, 3, 1, generator=g)).squeeze(-1)  # (n, 2P) along some direction
    left = 2 * P * (0.6 + 0.4 * torch.rand(n, 1, generator=g))
    cut = height.argsort(1).argsort(1) >= left
    order = (torch.rand(n, 2 * P, generator=g) + cut).argsort(1)[:, :P]  # P of those left
    x = x.gather(1, order[..., None].expand(-1, -1, 3))
    x = to_unit_sphere(x + 0.03 * torch.randn(x.shape, generator=g))
    return x, labels, parts.gather(1, order)


def to_unit_sphere(x):
    """Points (..., P, 3), centred at their mean, the outermost at distance 1."""
    x = x - x.mean(-2, keepdim=True)
    return x / x.norm(dim=-1).amax(-1)[..., None, None].clamp(min=1e-12)


def farthest_points(x, n):
    """Farthest-point sampling: indices (B, n) into x (B, P, 3). Each point is the farthest from
    those picked before, the first is the farthest from the origin: the order of x plays no role.
    """
    x, cloud, picked = x.transpose(1, 2).contiguous(), torch.arange(len(x), device=x.device), []
    farthest, distance = x.square().sum(1).argmax(1), torch.inf  # (B), squared
    for _ in range(n):
        picked.append(farthest)
        to_this = (x - x[cloud, :, farthest][:, :, None]).square_().sum(1)  # (B, P)
        distance = to_this.clamp(max=distance)
        farthest = distance.argmax(1)
    return torch.stack(picked, dim=1)


def read_off(path, n=8192):
    """n points (n, 3) on the polygons of an .off mesh, uniform by area, the same in every run."""
    text = path.read_text().strip()
    if not text.startswith("OFF"):
        raise ValueError("it does not begin with OFF")
    numbers = np.array(text[3:].split(), dtype=np.float64)  # ModelNet40 also has "OFF490 518 0"
    end = 3 + 3 * int(numbers[0])
    rest, faces, i = numbers[end:].astype(int).tolist(), [], 0
    for _ in range(int(numbers[1])):
        corners = rest[i + 1 : i + 1 + rest[i]]
        if len(corners) < rest[i]:
            raise ValueError("it ends too early")
        faces += [(corners[0], *edge) for edge in zip(corners[1:-1], corners[2:], strict=True)]
        i += 1 + rest[i]
    a, b, c = torch.from_numpy(numbers[3:end].reshape(-1, 3))[torch.tensor(faces)].unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=1).cumsum(0)
    g = torch.Generator().manual_seed(zlib.crc32(path.name.encode()))
    u, v, w = torch.rand(3, n, 1, generator=g, dtype=torch.float64)
    face = torch.searchsorted(area, u[:, 0] * area[-1])
    v = v.sqrt()  # https://doi.org/10.1145/571647.571648, section 4.2
    return (1 - v) * a[face] + v * (1 - w) * b[face] + v * w * c[face]


def read_cloud(P, pair):
    """The cloud (P or more, 3) of a pair (file or array, label), and its label: -1 if broken.

    Of larger clouds the paper's code keeps the 1200 (4800, 8192) mutually farthest points, to draw
    1024 (4096, 8192) of them anew in every epoch; the first so many are tested.
    """
    source, label = pair
    try:
        x = source
        if isinstance(source, Path):
            columns = {"delimiter": ",", "usecols": (0, 1, 2), "ndmin": 2}
            x = read_off(source) if source.suffix == ".off" else np.loadtxt(source, **columns)
        x = torch.as_tensor(x, dtype=torch.float32)
        if len(x) < P or not x.isfinite().all():
            raise ValueError(f"{len(x)} points, {P} finite ones are needed (--points)")
    except Exception as e:  # a broken file may raise anything
        what = source if isinstance(source, Path) else "a cloud"
        print(f"skipped {what}: {type(e).__name__}: {e}", file=sys.stderr)
        return torch.zeros(1, 3), -1
    x, spare = to_unit_sphere(x), P * 75 // 64 if P < 8192 else P
    if len(x) > P:
        x = x[farthest_points(x[None], min(len(x), spare))[0]]
    return x, int(label)


def read_clouds(pairs, args, name):
    """Pairs (cloud, label) of pairs (file or array, label), without the broken ones."""
    workers = args.workers if args.data != "toy" else 0
    read_one = functools.partial(read_cloud, args.points)
    loader = DataLoader(pairs, None, collate_fn=read_one, num_workers=workers)
    bar = tqdm(loader, f"reading {name}", disable=HIDE_BAR)
    pairs = [(x.clone(), y) for x, y in bar]  # a copy: the workers' memory is scarce
    good = [(x, y) for x, y in pairs if y >= 0]
    check_broken(len(pairs) - len(good), len(pairs), name)
    return good


def read_h5(path):
    """Arrays data (n, P, 3 or more) and label (n) of one .h5 file: places, classes."""
    try:
        import h5py
    except ImportError as e:
        raise UserError("reading .h5 needs h5py: pip install h5py") from e
    try:
        with h5py.File(path) as file:
            clouds, labels = file["data"][:], file["label"][:].reshape(-1).astype(int)
            if clouds.ndim != 3 or clouds.shape[2] < 3 or len(clouds) != len(labels):
                raise ValueError(f"shapes are {clouds.shape} and {labels.shape}")
            return clouds[..., :3], labels
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is no readable .h5 file with 'data' and 'label': {e}") from e


def find_clouds(args):
    """Class names, and of train and test the sources (files or arrays) and labels."""
    root, found = Path(args.root), []
    if args.data == "off":
        names = sorted(p.parent.name for p in root.glob("*/train"))
        if not names:
            raise ValueError("there is no CLASS/train/*.off")
        for split in ("train", "test"):
            files = sorted(root.glob(f"*/{split}/*.off"))
            found.append((files, [names.index(p.parts[-3]) for p in files]))
    elif args.data == "txt":
        lists = sorted(root.glob("*_train.txt"), key=lambda p: p.stat().st_size)
        if not lists:
            raise ValueError("there is no list *_train.txt")
        stem = lists[-1].name.removesuffix("_train.txt")  # ModelNet40's also lists ModelNet10
        names = (root / f"{stem}_shape_names.txt").read_text("utf-8-sig").split()
        for split in ("train", "test"):
            ids = (root / f"{stem}_{split}.txt").read_text("utf-8-sig").split()
            kinds = [i.rpartition("_")[0] for i in ids]  # night_stand_0001 is a night_stand
            files = [root / kind / f"{i}.txt" for kind, i in zip(kinds, ids, strict=True)]
            found.append((files, [names.index(kind) for kind in kinds]))
    else:
        names, splits = SCANOBJECTNN.split(), ("training", "test")
        patterns = [f"{VARIANTS[args.variant][0]}/{s}_{VARIANTS[args.variant][1]}" for s in splits]
        if args.data == "h5":
            names = (root / "shape_names.txt").read_text("utf-8-sig").split()
            patterns = ["ply_data_train*.h5", "ply_data_test*.h5"]
        for pattern in patterns:
            parts = [read_h5(path) for path in sorted(root.glob(pattern))]
            if not parts:
                raise ValueError(f"there is no {pattern}")
            clouds, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
            if not 0 <= labels.min() <= labels.max() < len(names):
                raise ValueError(f"labels {labels.min()} to {labels.max()} of {len(names)} classes")
            found.append((clouds, labels))
    return names, found


def load_data(args, meta=None):
    """{"train": [(cloud, label)], "val" and "test": [the same], "meta": ..., "sizes": text}."""
    if args.data == "toy":
        parts = [draw_toy(1000, seed, args.points)[:2] for seed in range(6)]
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        names, found = list(TOY), [(x[:-2000], y[:-2000]), (x[-2000:], y[-2000:])]
    else:
        try:
            names, found = find_clouds(args)
        except (ValueError, IndexError) as e:
            raise UserError(f"{args.root} is not laid out like {args.data}: {e}") from e
    order, test_order = (  # lists come class by class: --limit must not take the first classes
        torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
        for _, labels in found
    )
    held_out, data = len(order) // 10, {"meta": {"classes": names}}
    chosen = {"train": order[held_out:], "val": order[:held_out], "test": test_order}
    for name, indices in chosen.items():
        sources, labels = found[name == "test"]
        pairs = [(sources[i], labels[i]) for i in indices[: args.limit]]
        data[name] = read_clouds(pairs, args, name)
    sizes = ", ".join(f"{len(data[name])} {name}" for name in chosen)
    sizes += f" clouds of {args.points} points, {len(names)} classes"
    if min(len(data[name]) for name in chosen) < WORLD:
        raise UserError(f"{args.root}: {sizes} are too few")
    return {**data, "val": [data["val"]], "test": [data["test"]], "sizes": sizes}


def train_batches(data, args, gen):
    """Yield an epoch of x (B, P, 3) and labels (B), decided by the generator alone."""
    pairs, P = data["train"], args.points
    B = min(args.batch_size, len(pairs) // WORLD * WORLD)
    for batch in torch.randperm(len(pairs), generator=gen)[: len(pairs) // B * B].split(B):
        clouds, y = zip(*[pairs[i] for i in batch], strict=True)
        x = torch.stack([x[torch.randperm(len(x), generator=gen)[:P]] for x in clouds])
        draw = torch.rand(2, B, 1, 3, generator=gen)
        x = x * (2 / 3 + 5 / 6 * draw[0]) + 0.4 * draw[1] - 0.2  # scale 2/3 to 3/2, shift 0.2
        mine = slice(RANK, None, WORLD)  # each batch is shared among the processes
        yield x[mine].to(args.device), torch.tensor(y[mine], device=args.device)


# ---------------------------------------------------------------- model


@torch.no_grad()
def group(x, G, K):
    """x (B, P, 3) -> G mutually far centres (B, G, 3), and around each the nearest K points, as
    seen from it (B, G, K, 3). Further columns stay unchanged.
    """
    cloud = torch.arange(len(x), device=x.device)[:, None]
    places = x[..., :3]
    centres = places[cloud, farthest_points(places, G)]
    exact = "donot_use_mm_for_euclid_dist"  # the fast way loses the digits of small distances
    distance = torch.cdist(centres, places, compute_mode=exact)  # (B, G, P)
    nearest = distance.topk(K, largest=False, sorted=False).indices  # (B, G, K)
    groups = x[cloud[..., None], nearest]
    groups[..., :3] -= centres[:, :, None]
    return centres, groups


class Sum(torch.autograd.Function):
    """The sum over all processes, which gradients pass."""

    @staticmethod
    def forward(ctx, x):
        return all_sum(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_sum(grad.clone())


class BatchNorm(nn.BatchNorm1d):
    """Over all but the last axis, and over all processes (nn.SyncBatchNorm wants GPUs)."""

    def forward(self, x):
        if not self.training or WORLD == 1:
            return super().forward(x.flatten(0, -2)).view_as(x)
        rows = x.flatten(0, -2).float()
        mean, n = Sum.apply(rows.mean(0)) / WORLD, len(rows) * WORLD
        var = Sum.apply((rows - mean).square().mean(0)) / WORLD
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


class MiniPointNet(nn.Module):
    """A token for each group of points, whatever their order."""

    def __init__(self, W, channels=3):
        super().__init__()
        first, norm = nn.Linear(channels, W // 2), BatchNorm(W // 2)
        self.local = nn.Sequential(first, norm, nn.ReLU(), nn.Linear(W // 2, W))
        first, norm = nn.Linear(2 * W, 2 * W), BatchNorm(2 * W)
        self.joint = nn.Sequential(first, norm, nn.ReLU(), nn.Linear(2 * W, W))

    def forward(self, x):  # (B, G, K, channels)
        x = self.local(x)  # (B, G, K, W)
        whole = x.amax(2, keepdim=True).expand_as(x)
        return self.joint(torch.cat([whole, x], dim=-1)).amax(2)  # (B, G, W)


class Block(nn.Module):
    """A pre-norm transformer layer with stochastic depth."""

    def __init__(self, D, heads, drop_path):
        super().__init__()
        self.heads, self.drop = heads, StochasticDepth(drop_path, mode="row")
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))  # (B, N, D)

    def attention(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, h, N, d)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(B, N, D))


class PointBERT(nn.Module):
    """Point-BERT: groups of points as tokens, CLS, positions of the groups before every block."""

    def __init__(self, D, depth, heads, W, K, drop_path, dropout, G, C, llm):
        super().__init__()
        self.G, self.K = G, K
        self.pointnet, self.reduce = MiniPointNet(W), nn.Linear(W, D)
        self.pos = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, D))
        self.cls, self.cls_pos = (nn.Parameter(0.02 * torch.randn(1, 1, D)) for _ in range(2))
        rates = [drop_path * i / (depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList([Block(D, heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(D)
        self.head = nn.Sequential(
            nn.Linear(2 * D, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, C)
        )
        self.llm = llm

    def forward(self, x):
        centres, groups = group(x, self.G, self.K)  # (B, P, 3) -> (B, G, 3), (B, G, K, 3)
        x, pos = self.reduce(self.pointnet(groups)), self.pos(centres)  # (B, G, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        pos = torch.cat([self.cls_pos.expand(len(x), -1, -1), pos], dim=1)
        for block in self.blocks:
            x = block(x + pos)  # the host's own encoder
        x = self.llm(x)  # the frozen LLM block: this line is the paper
        x = self.norm(x)
        return self.head(torch.cat([x[:, 0], x[:, 1:].amax(1)], dim=1))  # (B, C)


# The published file also holds accuracies as NumPy numbers; older NumPy had another module name.
SCALAR = np._core.multiarray.scalar
NUMPY = [SCALAR, (SCALAR, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype("f8"))]
# Names in the published file, and here.
RENAME = {
    "encoder.first_conv": "pointnet.local", "encoder.second_conv": "pointnet.joint",
    "reduce_dim": "reduce", "cls_token": "cls", "pos_embed": "pos", "blocks.blocks": "blocks",
    "attn.qkv": "qkv", "attn.proj": "out", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
}  # fmt: skip
UNUSED = ("transformer_k.", "dvae.", "queue", "transformer_q.mask_token", "transformer_q.lm_head.")
UNUSED += ("transformer_q.cls_head.",)  # what only pre-training needs


def init_from(path, model):
    """Fill the host from the published Point-BERT.pth, all but its head."""
    with torch.serialization.safe_globals(NUMPY):
        state, tensors = read(path), {}
    if not isinstance(state, dict) or not isinstance(state.get("base_model"), dict):
        raise UserError(f"--init {path} holds no 'base_model', as Point-BERT.pth does")
    for name, x in state["base_model"].items():
        name = name.removeprefix("module.")
        if not name.startswith(UNUSED):
            name = name.removeprefix("transformer_q.")
            for old, new in RENAME.items():
                name = name.replace(old, new)
            conv = name.startswith("pointnet") and x.ndim == 3  # of width 1, a linear layer
            tensors[name] = x.squeeze(-1) if conv else x
    for i, block in enumerate(model.blocks):
        tensors[f"blocks.{i}.qkv.bias"] = torch.zeros_like(block.qkv.bias)  # Point-BERT has none
    fit(tensors, model, path)


def fit(tensors, model, path):
    """Load the tensors into the host; all names and shapes must agree, but for the head's."""
    own = {k: x.shape for k, x in model.state_dict().items() if not k.startswith(("llm.", "head."))}
    given = {k: getattr(x, "shape", None) for k, x in tensors.items()}
    if wrong := sorted(k for k in own.keys() | given.keys() if own.get(k) != given.get(k)):
        raise UserError(f"--init {path} does not fit the model in {', '.join(wrong)}")
    model.load_state_dict(tensors, strict=False)
    say(f"{path}: {len(tensors)} tensors loaded into the host")


def build_model(args, kind, seed, meta):
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    config, G, C = MODELS[args.model], args.points // 16, len(meta["classes"])
    llm = LLMBlock(args.llm, config["D"], args.layers, kind, seed=seed, dtype=dtype)
    model = PointBERT(**config, G=G, C=C, llm=llm)
    if args.init and not args.eval:
        init_from(args.init, model)
    return model


def example(args):
    """One input of the model, to count its GFLOPs."""
    return (torch.zeros(1, args.points, 3),)


def param_groups(model, args):
    """Weight decay on matrices only: not on biases, norms and CLS."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        groups[p.ndim > 1 and name not in ("cls", "cls_pos")].append(p)
    return [{"params": ps, "weight_decay": args.weight_decay * on} for on, ps in groups.items()]


def compute_loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x).float(), y)


@torch.no_grad()
def evaluate(model, sets, args):
    """Accuracy, and the mean of the classes' accuracies, in percent."""
    model.eval()
    C = model.head[-1].out_features
    counts = torch.zeros(2, C, device=args.device)  # clouds of each class: all, right
    for batch in DataLoader(sets[0][RANK::WORLD], args.batch_size, collate_fn=list):
        x = torch.stack([x[: args.points] for x, _ in batch]).to(args.device)
        y = torch.tensor([y for _, y in batch], device=args.device)
        with autocast(args):
            right = model(x).argmax(1) == y
        counts += torch.stack([y.bincount(minlength=C), y[right].bincount(minlength=C)])
    total, right = all_sum(counts)
    classes = (right / total)[total > 0].mean()  # of those that have clouds
    metrics = {"acc": right.sum() / total.sum(), "class_acc": classes}
    return {k: round(100 * v.item(), 3) for k, v in metrics.items()}


# ---------------------------------------------------------------- the same in every script


def finish_args(p, argv):
    """Add the flags of every script, parse (with --eval, a checkpoint's settings are the defaults),
    check, and resolve `auto`.
    """
    p.add_argument("--llm", default="tests/tiny_llm", help="directory or Hugging Face name")
    p.add_argument("--layers", type=int, nargs="+", default=[-1], help="of the LLM; -1 is the last")
    p.add_argument("--block", nargs="+", choices=KINDS, default=["pretrained"], help="arms to run")
    p.add_argument("--seed", type=int, default=0, help="the first seed")
    p.add_argument("--seeds", type=int, default=1, help="how many seeds of each arm")
    p.add_argument("--epochs", type=int, help="default: %(default)s")
    p.add_argument("--batch-size", type=int, help="of all processes (default: %(default)s)")
    p.add_argument("--lr", type=float, help="the cosine's peak (default: %(default)s)")
    p.add_argument("--weight-decay", type=float, help="default: %(default)s")
    p.add_argument("--warmup", type=float, help="epochs (default: %(default)s)")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="to load data")
    p.add_argument("--limit", type=int, help="use at most so many samples of each split")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--out", default="runs", help="directory of all runs")
    p.add_argument("--eval", metavar="CKPT", help="only test this checkpoint")
    p.error = fail
    args = p.parse_args(argv)
    if args.eval:
        p.set_defaults(**load(args.eval)["settings"])
        args = p.parse_args(argv)
    args.block = list(dict.fromkeys(args.block))  # each arm once
    if min(args.epochs, args.batch_size, args.seeds, args.limit or 1) < 1:
        raise UserError("--epochs, --batch-size, --seeds and --limit must be at least 1")
    if args.lr <= 0 or min(args.weight_decay, args.warmup, args.workers) < 0:
        raise UserError("--lr must be positive; --weight-decay, --warmup, --workers at least 0")
    if args.batch_size % WORLD:
        raise UserError(f"--batch-size {args.batch_size} is not a multiple of {WORLD} processes")
    if args.device == "auto":  # mps only on request
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.get_device_module(args.device).device_count():
        raise UserError(f"--device {args.device}: PyTorch finds none here")
    if args.precision == "auto":
        if args.device == "cpu":  # casting costs the narrow micro more than bf16 saves
            bf16 = args.model != "micro" and torch.cpu._is_avx512_bf16_supported()
        else:
            bf16 = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if bf16 else "fp32"
    return args


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


def lr_at(step, steps, warmup, peak):
    """Linear warm-up, then a cosine from the peak to a hundredth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * t)) / 2)


def all_sum(x):
    """Sum of a tensor over all processes."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def check_broken(broken, n, where):
    if broken > max(1, 0.01 * n):
        raise UserError(f"{where}: {broken} of {n} samples are broken, more than 1%")
    if broken and RANK == 0:
        print(f"{where}: {broken} of {n} samples are broken and were skipped", file=sys.stderr)


def say(text):
    if RANK == 0:
        print(text, flush=True)


def load(path, model=None):
    """A checkpoint of this script, also into the model."""
    state = read(path)
    if not isinstance(state, dict) or state.get("task") != TASK:
        raise UserError(f"{path} was not written by train_{TASK}.py")
    try:
        if model is not None:
            model.load_state_dict(state["model"])
    except RuntimeError as e:
        raise UserError(f"{path} holds a model of another shape: {e}") from e
    return state


def train_epoch(args, model, optimizer, data, epoch, gen, name):
    """The plain loop over the batches of an epoch, and what metrics.jsonl says of it."""
    start, total = time.perf_counter(), torch.zeros((), device=args.device)
    steps = max(1, len(data["train"]) // args.batch_size)
    bar = tqdm(train_batches(data, args, gen), f"{name} {epoch + 1}", steps, disable=HIDE_BAR)
    model.train()
    for step, batch in enumerate(bar, epoch * steps):
        lr = lr_at(step, args.epochs * steps, args.warmup * steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        with autocast(args):
            loss = compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.detach() + 0 * norm  # NaN, too, where a gradient was infinite
        last = step + 1 == steps * (epoch + 1)
        if (step % 50 == 0 or last) and not total.isfinite():  # not always: it waits for the GPU
            where = f"at step {step + 1}, learning rate {lr:.1e}"
            raise UserError(f"{name}: the loss is {total} {where}. What was saved before is kept; "
                            "try a lower --lr, with another --out")  # fmt: skip
    loss = all_sum(total).item() / steps / WORLD
    samples = steps * min(args.batch_size, len(data["train"]))
    return {"loss": loss, "lr": lr, "samples_per_s": samples / (time.perf_counter() - start)}


def train(args, kind, seed, data):
    """Train one arm with one seed, or resume it; test its best epoch once."""
    out = Path(args.out) / f"{TASK}-{args.data}-{args.model}" / f"{kind}-s{seed}"
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    state = {"task": TASK, "kind": kind, "seed": seed, "settings": settings, "meta": data["meta"],
             "sizes": data["sizes"], "history": [], "seconds": 0.0, "result": None}  # fmt: skip
    if (out / "last.pt").exists():
        state = load(out / "last.pt")
        if changed := [k for k in settings if state["settings"].get(k) != settings[k]]:
            theirs = f"--{changed[0].replace('_', '-')} {state['settings'].get(changed[0])}"
            raise UserError(f"{out} was begun with {theirs}: choose another --out or delete it")
        if [state["meta"], state.get("sizes")] != [data["meta"], data["sizes"]]:
            theirs = f"other data, {state.get('sizes')}"
            raise UserError(f"{out} was begun with {theirs}: choose another --out or delete it")
    if state["result"]:
        return state["result"]
    model, history = build_model(args, kind, seed, data["meta"]).to(args.device), state["history"]
    optimizer = torch.optim.AdamW(param_groups(model, args), fused=True)
    if history:
        optimizer.load_state_dict(load(out / "last.pt", model)["optimizer"])
        say(f"{out}: resuming after epoch {len(history)}")
    if args.compile:
        model.compile()
    ddp = model
    if WORLD > 1:
        ddp = DistributedDataParallel(model)
        ddp.broadcast_buffers = False  # frozen weights agree from the start and never change
    out.mkdir(parents=True, exist_ok=True)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    for epoch in range(len(history), args.epochs):
        # All randomness of an epoch follows from its seeds: resuming needs no generator's state.
        torch.manual_seed(1_000_000 * RANK + 1000 * seed + epoch)  # for drop-path and Mixup
        gen = torch.Generator().manual_seed(1000 * seed + epoch)  # for the data, on all processes
        start = time.perf_counter()
        row = train_epoch(args, ddp, optimizer, data, epoch, gen, f"{kind} s{seed}")
        val = evaluate(model, data["val"], args)
        state["seconds"] += time.perf_counter() - start
        history.append({"epoch": epoch + 1} | row | {f"val_{k}": v for k, v in val.items()})
        name, value = next(iter(val.items()))  # the epoch is selected by the first metric
        say(f"{kind} s{seed} epoch {epoch + 1} | loss {row['loss']:.3f} | val_{name} {value:.2f} "
            f"| lr {row['lr']:.1e} | {row['samples_per_s']:.0f} samples/s")  # fmt: skip
        if RANK == 0:
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            if all(SIGN * value > SIGN * old[f"val_{name}"] for old in history[:-1]):
                save(state | {"optimizer": None}, out / "best.pt")
            (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))
            save(state, out / "last.pt")  # at last: killed before, the epoch is simply run again
    if WORLD > 1:
        dist.barrier()  # until best.pt is there
    load(out / "best.pt", model)
    state["result"] = report(args, model, state, data)
    if RANK == 0:  # read again, for state["model"] is the live weights, now those of best.pt
        save(load(out / "last.pt") | {"result": state["result"]}, out / "last.pt")
    return state["result"]


def report(args, model, state, data):
    """Test, and return the contents of the RESULT line."""
    metrics, record = evaluate(model, data["test"], args), model.llm.record
    speeds = [row["samples_per_s"] for row in state["history"]]
    inputs = [x.to(args.device) for x in example(args)]
    peak, chip = None, f"{platform.machine()}, {os.cpu_count()} cores"
    if args.device == "cuda":
        peak, chip = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    elif sys.platform == "linux":  # of the whole process, so at least that of earlier arms
        import resource  # not on Windows

        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "task": TASK, "data": args.data, "model": args.model, "kind": state["kind"],
        "llm": record.get("llm"), "layers": record.get("layers"), "seed": state["seed"],
        "metrics": metrics, "params_trainable": sum(p.numel() for p in model.parameters()),
        "params_frozen": sum(b.numel() for b in model.llm.layers.buffers()),
        "gflops_per_sample": round(count_gflops(model, *inputs), 4),
        "samples_per_s": round(sum(speeds) / len(speeds), 1),
        "peak_mem_mb": peak and round(peak / 2**20), "seconds": round(state["seconds"], 1),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                     "transformers": transformers.__version__, "device": chip},
    }  # fmt: skip


def summarise(results):
    """Mean ± standard deviation over the seeds of each arm."""
    rows = [["block", "n", *results[0]["metrics"]]]
    for kind in dict.fromkeys(r["kind"] for r in results):
        runs = [list(r["metrics"].values()) for r in results if r["kind"] == kind]
        rows.append([kind, len(runs)])
        for x in torch.tensor(runs, dtype=torch.float64).T:  # one metric of all seeds
            rows[-1].append(f"{x.mean():.2f}" + (f" ± {x.std():.2f}" if len(x) > 1 else ""))
    for row in rows:
        say(f"{row[0]:12}" + "".join(f"{cell:>16}" for cell in row[1:]))


def main(argv=None):
    args = parse_args(argv)
    if WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(hours=12))  # the first may read for long
    saved = load(args.eval) if args.eval else None
    if RANK:
        dist.barrier()  # the first process goes ahead and downloads what is missing
    data = load_data(args, saved and saved["meta"])
    if saved and data["meta"] != saved["meta"]:
        raise UserError(f"{args.eval} was trained on other classes than {args.data} has")
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    say(f"{TASK} {args.data} {args.model} on {args.device} in {args.precision}: {data['sizes']}")
    if saved:
        model = build_model(args, saved["kind"], saved["seed"], saved["meta"])
        load(args.eval, model)
        results = [report(args, model.to(args.device), saved, data)]
        say("RESULT " + json.dumps(results[0]))
    else:
        results = []
        for kind in args.block:  # what cannot be built fails now, and not after the first arm
            build_model(args, kind, args.seed, data["meta"])
        for seed in range(args.seed, args.seed + args.seeds):
            for kind in args.block:
                results.append(train(args, kind, seed, data))
                say("RESULT " + json.dumps(results[-1]))
    if len(results) > 1:
        summarise(results)
    if WORLD > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as e:
        fail(e)
    except KeyboardInterrupt:
        print("stopped: the same command resumes after the last finished epoch", file=sys.stderr)
        sys.exit(130)
