"""Image classification: a DeiT-style ViT with one frozen LLM block behind its last layer.

    python train_image.py --block none random pretrained     # three arms on toy images, offline
    python train_image.py --data cifar10 --block none random pretrained --seeds 3
    python train_image.py --data folder --root DIR           # DIR/train/<class>/, DIR/val/<class>/
    torchrun --nproc-per-node=4 train_image.py ...           # several GPUs (or processes), same result

The paper's ImageNet run (its Table 1; ViT-S 80.1 -> 80.7 top-1; 4 to 6 days on 4 x A100; not run here):

    torchrun --nproc-per-node=4 train_image.py --data folder --root imagenet --model small \\
        --llm huggyllama/llama-7b --block none random pretrained --recipe deit --epochs 300 \\
        --warmup 20 --batch-size 1024 --lr 1e-3 --weight-decay 0.05 --compile

Its robustness tables read a finished run's checkpoint (c, a, r or sketch; 1 directory each):

    python train_image.py --eval runs/image-folder-small/pretrained-s0/best.pt \\
        --data imagenet-c --root imagenet-c

Every run ends with a line `RESULT {json}`. The checkpoint is chosen on images held out of train; val/
is the test set, and is looked at once. The same command again resumes, or reprints what is done.

Differs from the paper: no EMA (the paper keeps one and does not use it); RandAugment is torchvision's;
gradients are clipped at norm 1. Letters: B batch, N tokens, D width, S image side, C classes.
"""

import argparse
import json
import math
import os
import pickle
import platform
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import transformers
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from llmblock import KINDS, LLMBlock, UserError, count_gflops

TASK, SELECT = "image", "top1"  # SELECT: the validation metric that chooses best.pt
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
FREE = ("block", "seed", "seeds", "workers", "device", "compile", "out", "eval")  # may change

# DeiT's widths (https://arxiv.org/abs/2012.12877); micro is ours, for 32-pixel images on a laptop.
MODELS = {
    "micro": dict(D=96, depth=4, heads=3, patch=8, size=48),
    "tiny": dict(D=192, depth=12, heads=3, patch=16, size=224),
    "small": dict(D=384, depth=12, heads=6, patch=16, size=224),
    "base": dict(D=768, depth=12, heads=12, patch=16, size=224),
}
BARS, TURN = int(os.environ.get('BARS', 6)), float(os.environ.get('TURN', 0.4))
RAD = [float(v) for v in os.environ.get('RAD','0.2,0.3').split(',')]
ROBUST = ("imagenet-c", "imagenet-a", "imagenet-r", "imagenet-sketch")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.error = fail
    data = ("toy", "cifar10", "cifar100", "fashionmnist", "folder", *ROBUST)
    p.add_argument("--data", choices=data, default="toy", help="toy is drawn by the script")
    p.add_argument("--root", default="data", help="where the data is, or is downloaded to")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: tiny, small, base")
    p.add_argument("--size", type=int, help="image side in pixels (default: the model's)")
    p.add_argument("--patch", type=int, help="patch side in pixels (default: the model's)")
    p.add_argument("--recipe", choices=("light", "deit"), default="light",
                   help="light: flips and shifts; deit: the paper's augmentation and drop-path")  # fmt: skip
    add_shared_args(p, epochs=12, batch_size=128, lr=1e-3, weight_decay=0.05, warmup=1)
    args = p.parse_args(argv)
    if args.eval:  # the checkpoint's settings are the defaults then
        p.set_defaults(**load(args.eval)["settings"])
        args = p.parse_args(argv)
    m = MODELS[args.model]
    args.size, args.patch = args.size or m["size"], args.patch or m["patch"]
    if args.size % args.patch:
        raise UserError(f"--size {args.size} is no multiple of --patch {args.patch}")
    if args.data in ROBUST and not args.eval:
        raise UserError(f"--data {args.data} is a test set: give a checkpoint with --eval")
    return check_shared_args(args)


# ---------------------------------------------------------------- data


TOY_COLOURS = {"red": (220, 50, 40), "green": (50, 190, 60), "blue": (50, 80, 220)}
TOY_SHAPES = ("disc", "square", "triangle", "cross")


def draw_toy(n, seed, S):
    """n images with one shape each among clutter: (n, 3, S, S) uint8, labels, masks (n, S, S) bool.

    The class is colour and shape together. Place, size and rotation of the shape say nothing, nor
    do the bars around it, which have the same colours.
    """
    g = torch.Generator().manual_seed(seed)

    def rand(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    def frame(radius, turn):  # each pixel's coordinates in the frame of an object that fits in
        cx, cy = (radius + (S - 2 * radius) * rand(0, 1, 1, 1) for _ in range(2))
        a, grid = turn * rand(-1, 1, 1, 1), torch.arange(S) + 0.5
        dx, dy = (grid[None, None, :] - cx) / radius, (grid[None, :, None] - cy) / radius
        return dx * a.cos() + dy * a.sin(), dy * a.cos() - dx * a.sin()  # 2 x (n, S, S)

    def paint(x, where, colour):
        tint = torch.tensor(list(TOY_COLOURS.values()))[colour] + rand(-35, 35, 3)
        return torch.where(where[:, None], tint[:, :, None, None], x)

    x = F.interpolate(rand(60, 190, 3, 4, 4), size=(S, S), mode="bilinear")
    for _ in range(BARS):
        u, v = frame(rand(0.08, 0.2, 1, 1) * S, 3.14)
        x = paint(x, (u.abs() < 1) & (v.abs() < 0.3), torch.randint(3, (n,), generator=g))
    u, v = frame(rand(*RAD, 1, 1) * S, TURN)
    square = torch.maximum(u.abs(), v.abs())
    shapes = torch.stack([
        u**2 + v**2 < 0.8,
        square < 0.8,
        (v < 0.75) & (v > 2 * u.abs() - 1),
        (square < 0.95) & (torch.minimum(u.abs(), v.abs()) < 0.3),
    ])  # fmt: skip  # (4, n, S, S)
    shape, colour = torch.randint(4, (n,), generator=g), torch.randint(3, (n,), generator=g)
    mask = shapes[shape, torch.arange(n)]
    x = paint(x, mask, colour) + 15 * torch.randn(x.shape, generator=g)
    return x.clamp(0, 255).to(torch.uint8), 4 * colour + shape, mask


class Images(Dataset):
    """n images and labels. x: uint8 (n, 3, S, S) in memory, or paths that workers decode.

    Paths are asked for as (index, seed): augmentation depends on neither worker nor rank. A broken
    file becomes a black image with label -1, which no loss and no metric counts.
    """

    def __init__(self, x, y, transform=None, keep=None):
        self.x, self.y, self.transform = x, torch.as_tensor(y), transform
        self.keep = keep  # class of each label, where the folders are not the model's classes

    def __len__(self):
        return len(self.y)

    def subset(self, indices, transform=None):
        x = self.x[indices] if torch.is_tensor(self.x) else [self.x[i] for i in indices]
        return Images(x, self.y[indices], transform or self.transform, self.keep)

    def __getitem__(self, item):
        i, seed = item
        try:
            with Image.open(self.x[i]) as file:
                image, label = file.convert("RGB"), int(self.y[i])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            print(f"skipped {self.x[i]}: {e}", file=sys.stderr)
            image, label = Image.new("RGB", (32, 32)), -1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            return self.transform(image), label


def resize_and_crop(S, resize):
    steps = [v2.Resize(resize, v2.InterpolationMode.BICUBIC)] if resize else []
    return v2.Compose([*steps, v2.CenterCrop(S), v2.PILToTensor()])


def read_folder(path, S, workers, names=None, transform=None):
    """(Images, class names) of path/<class>/<image>; under 1 GB they are decoded here and now."""
    try:
        folder = ImageFolder(path)
    except OSError as e:
        raise UserError(f"{path} must hold one folder of images per class: {e}") from e
    x, y = [list(column) for column in zip(*folder.samples, strict=True)]
    names = names or folder.classes
    if unknown := set(folder.classes) - set(names):
        raise UserError(f"{path}: class folder '{min(unknown)}' is not among those of training")
    keep = [names.index(c) for c in folder.classes]
    images = Images(x, y, transform or resize_and_crop(S, S * 256 // 224), keep)
    if transform is None and len(x) * 3 * S * S < 1e9:
        images.transform = resize_and_crop(S, S)
        pairs = batches(images, chunked([(i, 0) for i in range(len(x))], 64), workers)
        x, y = [torch.cat(column) for column in zip(*pairs, strict=True)]
        images = Images(x[y >= 0], y[y >= 0], keep=keep)
        check_broken(int((y < 0).sum()), len(y), path)
    return images, names


def check_broken(broken, n, where):
    if broken:
        print(f"{where}: {broken} of {n} images are broken and were skipped", file=sys.stderr)
    if broken > 0.01 * n and broken > 1:
        raise UserError(f"{where}: {broken} of {n} images are broken, more than 1%")


def load_data(args, meta=None):
    """{"train": Images, "val", "test": [Images], "meta": what rebuilds the model}."""
    S, root = args.size, Path(args.root)
    if args.data == "toy":
        train, test = [Images(*draw_toy(n, seed, S)[:2]) for n, seed in ((6000, 0), (2000, 1))]
        names = [f"{c} {s}" for c in TOY_COLOURS for s in TOY_SHAPES]
    elif args.data == "folder":
        train, names = read_folder(root / "train", S, args.workers)
        test, _ = read_folder(root / "val", S, args.workers, names)
    elif args.data in ROBUST:
        names, sets = meta["classes"], [root]
        if args.data == "imagenet-c":  # corruption/severity/class, perhaps one folder further down
            sets = sorted(p for p in root.glob("**/[1-5]") if p.parent.name in CORRUPTIONS)
        crop = resize_and_crop(S, None if args.data == "imagenet-c" else S * 256 // 224)
        if not sets:
            raise UserError(f"{root}: no <corruption>/<severity 1 to 5>/<class>/ folders in it")
        return {"test": [read_folder(p, S, args.workers, names, crop)[0] for p in sets]}
    else:
        kind = {"cifar10": CIFAR10, "cifar100": CIFAR100, "fashionmnist": FashionMNIST}[args.data]
        try:
            sets = [kind(root, train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as e:
            raise UserError(f"{args.data} is not in {root} and cannot be downloaded: {e}") from e
        train, test = [Images(to_squares(s.data, S), s.targets) for s in sets]
        names = list(sets[0].classes)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = min(len(train) // 10, 10_000)
    data = {
        "train": train.subset(order[held_out:][: args.limit], train_transform(S, args.recipe)),
        "val": [train.subset(order[:held_out][: args.limit])],
        "test": [test.subset(list(range(len(test)))[: args.limit])],
        "meta": {"classes": names},
    }
    if not (len(data["train"]) and held_out and len(test)):
        raise UserError(f"{root}: {len(train)} images to train on and {len(test)} to test: too few")
    return data


def to_squares(x, S):
    """(n, H, W[, 3]) uint8 as torchvision's data sets hold it -> (n, 3, S, S)."""
    x = torch.as_tensor(x)
    x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x[:, None].expand(-1, 3, -1, -1)
    return x if x.shape[-1] == S else v2.functional.resize(x, [S, S])


def train_transform(S, recipe):
    """For one decoded image. RandAugment m9 is 9 of timm's 10, so 27 of torchvision's 30."""
    steps = [v2.RandomResizedCrop(S, interpolation=v2.InterpolationMode.BICUBIC)]
    steps += [v2.RandomHorizontalFlip(), v2.PILToTensor()]
    return v2.Compose(steps + ([v2.RandAugment(2, 27)] if recipe == "deit" else []))


def chunked(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def batches(images, chunks, workers):
    """Yield x uint8 (b, 3, S, S) and y (b) for lists of (index, seed) pairs."""
    if not torch.is_tensor(images.x):
        yield from DataLoader(images, batch_sampler=chunks, num_workers=workers)
        return
    for chunk in chunks:
        i = [i for i, _ in chunk]
        yield images.x[i], images.y[i]


def train_batches(data, args, gen):
    """Yield one epoch's (x, targets): (b, 3, S, S) normalised, (b, C); gen alone decides on it."""
    images, C = data["train"], len(data["meta"]["classes"])
    n, B = len(images), min(args.batch_size, len(images))
    order = torch.randperm(n, generator=gen)
    if args.recipe == "deit":  # repeated augmentation: three copies each of a third of the images
        order = order.repeat_interleave(3)[:n]
    chunks, draws = [], []
    for chunk in order.split(B)[: n // B]:
        chunk = chunk[torch.randperm(B, generator=gen)][RANK::WORLD]
        seeds = torch.randint(2**31, (B,), generator=gen)[RANK::WORLD]
        chunks.append(list(zip(chunk.tolist(), seeds.tolist(), strict=True)))
        draws.append(torch.rand(4, B, generator=gen)[:, RANK::WORLD])
    broken = 0
    for (x, y), draw in zip(batches(images, chunks, args.workers), draws, strict=True):
        if torch.is_tensor(images.x):  # otherwise the workers have done the like
            x = flip_and_shift(x, draw)
            if args.recipe == "deit":
                x = torch.stack([v2.RandAugment(2, 27)(image) for image in x])
        broken += int((y < 0).sum())
        targets = F.one_hot(y.clamp(min=0), C) * (y >= 0)[:, None].float()
        x, targets = normalise(x.to(args.device)), targets.to(args.device)
        yield mix(x, targets, draw) if args.recipe == "deit" else (x, targets)
    check_broken(broken, n, "training epoch")


def normalise(x):
    """uint8 to ImageNet's mean and deviation, whatever the data."""
    return v2.functional.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def flip_and_shift(x, draw):
    """Mirror half the images, shift all by up to S/8 pixels; draw (4, B) is uniform in [0, 1)."""
    B, _, _, S = x.shape
    pad = S // 8
    x = torch.where((draw[0] < 0.5)[:, None, None, None], x.flip(-1), x)
    shift = (draw[1:3] * (2 * pad + 1)).long()[:, :, None] + torch.arange(S)  # (2, B, S)
    x = F.pad(x, [pad] * 4).permute(0, 2, 3, 1)
    x = x[torch.arange(B)[:, None, None], shift[0][:, :, None], shift[1][:, None, :]]
    return x.permute(0, 3, 1, 2)


def mix(x, targets, draw):
    """DeiT's label smoothing 0.1, random erasing 0.25, and Mixup 0.8 or CutMix 1.0."""
    targets = 0.9 * targets + 0.1 * targets.sum(1, keepdim=True) / targets.shape[1]
    for i in (draw[3] < 0.25).nonzero():
        x[i] = v2.RandomErasing(p=1, value="random")(x[i])
    return (v2.MixUp(alpha=0.8) if torch.rand(()) < 0.5 else v2.CutMix(alpha=1.0))(x, targets)


# ---------------------------------------------------------------- model


class Block(nn.Module):
    """A pre-norm transformer layer with stochastic depth."""

    def __init__(self, D, heads, drop_path):
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
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

    def drop(self, x):
        if not (self.training and self.drop_path):
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * kept / (1 - self.drop_path)


class ViT(nn.Module):
    """DeiT's vision transformer: CLS token, learned positions, linear head on CLS."""

    def __init__(self, D, depth, heads, patch, size, C, drop_path, llm):
        super().__init__()
        self.embed = nn.Conv2d(3, D, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, D))
        self.pos = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, D))
        rates = [drop_path * i / (depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*[Block(D, heads, rate) for rate in rates])
        self.norm, self.head = nn.LayerNorm(D, eps=1e-6), nn.Linear(D, C)
        weights = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        self.llm = llm  # behind the line above: its weights are not ours to initialise, ...
        if llm.kind != "none":  # ... but for the projections, as in the released image code
            weights += [llm.proj_in.weight, llm.proj_out.weight]
        for w in [self.pos, *weights]:
            nn.init.trunc_normal_(w, std=0.02)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)  # (B, 3, S, S) -> (B, N, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        x = self.blocks(x)  # the host's own encoder
        x = self.llm(x)  # the frozen LLM block: this line is the paper
        x = self.norm(x)
        return self.head(x[:, 0])  # (B, C)


def build_model(args, kind, seed, meta):
    torch.manual_seed(seed)
    config = MODELS[args.model] | {"patch": args.patch, "size": args.size}
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    llm = LLMBlock(args.llm, config["D"], args.layers, kind, seed=seed, dtype=dtype)
    drop_path = 0.1 if args.recipe == "deit" else 0.0
    return ViT(**config, C=len(meta["classes"]), drop_path=drop_path, llm=llm)


def example(args):
    """One input of the model, to count its GFLOPs."""
    return (torch.zeros(1, 3, args.size, args.size),)


def compute_loss(model, batch):
    x, targets = batch
    logits = model(x).float()
    return -(targets * logits.log_softmax(1)).sum() / targets.sum().clamp(min=1)


@torch.no_grad()
def evaluate(model, sets, args):
    """Top-1 and top-5 in percent, averaged over the sets (one, but for ImageNet-C)."""
    model.eval()
    scores = []
    for images in sets:
        counts = torch.zeros(3, device=args.device)  # correct, correct among five, all
        pairs = [(i, 0) for i in range(RANK, len(images), WORLD)]
        for x, y in batches(images, chunked(pairs, args.batch_size), args.workers):
            y = y.to(args.device)
            with autocast(args):
                logits = model(normalise(x.to(args.device)))  # (B, C)
            logits = logits if images.keep is None else logits[:, images.keep]
            hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.sum(), (y >= 0).sum()])
        if WORLD > 1:
            dist.all_reduce(counts)
        check_broken(len(images) - int(counts[2]), len(images), "evaluation")
        scores.append(100 * counts[:2] / counts[2])
    top1, top5 = torch.stack(scores).mean(0).tolist()
    return {"top1": round(top1, 3), "top5": round(top5, 3)}


# ---------------------------------------------------------------- the same in every script


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def add_shared_args(p, epochs, batch_size, lr, weight_decay, warmup):
    p.add_argument("--llm", default="tests/tiny_llm", help="directory or Hugging Face name")
    p.add_argument("--layers", type=int, nargs="+", default=[-1], help="of the LLM; paper: -1")
    p.add_argument("--block", nargs="+", choices=KINDS, default=["pretrained"], help="arms to run")
    p.add_argument("--seed", type=int, default=0, help="the first seed")
    p.add_argument("--seeds", type=int, default=1, help="how many seeds of each arm")
    p.add_argument("--epochs", type=int, default=epochs)
    p.add_argument("--batch-size", type=int, default=batch_size, help="over all processes")
    p.add_argument("--lr", type=float, default=lr, help="peak of the cosine schedule")
    p.add_argument("--weight-decay", type=float, default=weight_decay)
    p.add_argument("--warmup", type=float, default=warmup, help="epochs")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="that load data")
    p.add_argument("--limit", type=int, help="use so many samples of each split at the most")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--out", default="runs", help="directory of all runs")
    p.add_argument("--eval", metavar="CKPT", help="only test this checkpoint")


def check_shared_args(args):
    for name in ("epochs", "batch_size", "seeds", "limit"):
        if (getattr(args, name) or 1) < 1 or getattr(args, name) == 0:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.lr <= 0 or min(args.weight_decay, args.warmup, args.workers) < 0:
        raise UserError("--lr must be positive; --weight-decay, --warmup, --workers at least 0")
    if args.batch_size % WORLD:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of {WORLD} processes")
    if args.device == "auto":  # mps only on request
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.precision == "auto":
        args.precision = "bf16" if fast_bf16(args.device) else "fp32"
    return args


def fast_bf16(device):
    """Whether the hardware multiplies bf16 matrices faster than fp32 ones."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


def save(state, path):
    """Write a checkpoint wholly or not at all."""
    part = path.with_suffix(".part")
    try:
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}, the last checkpoint is kept: {e}") from e


def load(path):
    """A checkpoint of this script; tensors and plain values only, nothing in it is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["task"] == TASK:
            return state
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as e:
        raise UserError(f"{path} is missing, damaged or no checkpoint: {e}") from e
    raise UserError(f"{path} is a checkpoint of train_{state['task']}.py")


def param_groups(model, weight_decay):
    """Weight decay on matrices only: not on biases, norms, positions and CLS."""
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    decay = [p for k, p in named if p.ndim > 1 and k not in ("cls", "pos")]
    rest = [p for k, p in named if p.ndim <= 1 or k in ("cls", "pos")]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def lr_at(step, steps, warmup, peak):
    """Linear warm-up, then a cosine from the peak to a hundredth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * t)) / 2)


def train(args, kind, seed, data):
    """One arm, one seed: train (or go on where it stopped), test the best epoch, return RESULT."""
    out = Path(args.out) / f"{TASK}-{args.data}-{args.model}" / f"{kind}-s{seed}"
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    last = load(out / "last.pt") if (out / "last.pt").exists() else None
    for k in settings if last else ():
        if last["settings"].get(k) != settings[k]:
            was = f"was begun with --{k.replace('_', '-')} {last['settings'].get(k)}"
            raise UserError(f"{out} {was}, not {settings[k]}: choose another --out")
    if last and last["result"]:
        return last["result"]

    model = build_model(args, kind, seed, data["meta"])
    gflops = count_gflops(model.eval(), *example(args))
    model.to(args.device)
    optimizer = torch.optim.AdamW(
        param_groups(model, args.weight_decay), fused=args.device != "mps"
    )
    state = {"task": TASK, "settings": settings, "kind": kind, "seed": seed, "meta": data["meta"]}
    history, best, seconds, result = [], -math.inf, 0.0, None
    if last:
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        history, best, seconds = last["history"], last["best"], last["seconds"]
        say(f"{out}: going on after epoch {len(history)}")
    if args.compile:
        model.compile()
    ddp = DistributedDataParallel(model, broadcast_buffers=False) if WORLD > 1 else model
    per_epoch = max(1, len(data["train"]) // args.batch_size)
    out.mkdir(parents=True, exist_ok=True)

    for epoch in range(len(history), args.epochs):
        torch.manual_seed(1000 * seed + epoch)  # dropout; data have a generator of their own
        gen = torch.Generator().manual_seed(1000 * seed + epoch)
        start, total = time.perf_counter(), torch.zeros((), device=args.device)
        model.train()
        bar = tqdm(train_batches(data, args, gen), f"epoch {epoch + 1}", per_epoch, disable=None)
        for step, batch in enumerate(bar, epoch * per_epoch):
            lr = lr_at(step, args.epochs * per_epoch, args.warmup * per_epoch, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with autocast(args):
                loss = compute_loss(ddp, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.detach()
        row = {"epoch": epoch + 1, "loss": total.item() / per_epoch, "lr": lr}
        speed = per_epoch * args.batch_size / (time.perf_counter() - start)
        val = evaluate(model, data["val"], args)
        seconds += time.perf_counter() - start
        if not math.isfinite(row["loss"]):
            raise UserError(f"{out}: the loss is {row['loss']} in epoch {epoch + 1}; lower --lr")
        history.append(row | {f"val_{k}": v for k, v in val.items()} | {"samples_per_s": speed})
        say(f"{kind}-s{seed} epoch {epoch + 1} | loss {row['loss']:.3f} | "
            f"val_{SELECT} {val[SELECT]:.2f} | lr {lr:.1e} | {speed:.0f} samples/s")  # fmt: skip
        if RANK == 0:
            weights = model.state_dict()
            if val[SELECT] > best:
                save(state | {"model": weights, "epoch": epoch + 1}, out / "best.pt")
            best = max(best, val[SELECT])
            rest = {"history": history, "best": best, "seconds": seconds, "result": None}
            last = state | rest | {"model": weights, "optimizer": optimizer.state_dict()}
            save(last, out / "last.pt")
            (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    if WORLD > 1:
        dist.barrier()
    model.load_state_dict(load(out / "best.pt")["model"])
    speed = sum(row["samples_per_s"] for row in history) / len(history)
    result = report(args, kind, seed, model, evaluate(model, data["test"], args))
    result |= {"gflops_per_sample": round(gflops, 4), "samples_per_s": round(speed, 1)}
    result |= {"seconds": round(seconds, 1)}
    if RANK == 0:
        save(last | {"result": result}, out / "last.pt")
    return result


def report(args, kind, seed, model, metrics):
    """The RESULT line's contents."""
    cuda = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(0).ru_maxrss
    chip = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores"
    record = model.llm.record
    return {
        "task": TASK, "data": args.data, "model": args.model, "kind": kind,
        "llm": record.get("llm"), "layers": record.get("layers"), "seed": seed, "metrics": metrics,
        "params_trainable": sum(p.numel() for p in model.parameters()),
        "params_frozen": sum(b.numel() for b in model.llm.layers.buffers()),
        "peak_mem_mb": round(peak / 2**20),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "device": chip},
    }  # fmt: skip


def say(text):
    if RANK == 0:
        print(text, flush=True)


def summarise(results):
    """mean +- sd over the seeds of each arm."""
    names = list(results[0]["metrics"])
    say("".join(f"{title:>16}" for title in ("block", "runs", *names)))
    for kind in dict.fromkeys(r["kind"] for r in results):
        runs = [r["metrics"] for r in results if r["kind"] == kind]
        row = [kind, str(len(runs))]
        for name in names:
            x = torch.tensor([m[name] for m in runs], dtype=torch.float64)
            row.append(f"{x.mean():.2f}" + (f" ± {x.std():.2f}" if len(runs) > 1 else ""))
        say("".join(f"{cell:>16}" for cell in row))


def main(argv=None):
    args = parse_args(argv)
    if WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    checkpoint = load(args.eval) if args.eval else {}
    if RANK:
        dist.barrier()  # rank 0 goes first and downloads what is missing
    data = load_data(args, checkpoint.get("meta"))
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    if checkpoint:
        kind, seed = checkpoint["kind"], checkpoint["seed"]
        model = build_model(args, kind, seed, checkpoint["meta"])
        model.load_state_dict(checkpoint["model"])
        metrics = evaluate(model.to(args.device), data["test"], args)
        results = [report(args, kind, seed, model, metrics)]
        say("RESULT " + json.dumps(results[0]))
        return results
    say(f"{TASK} {args.data}: " + ", ".join(f"{k} {len(v)}" for k, v in data.items()))
    results = []
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
    except UserError as e:
        fail(e)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)
