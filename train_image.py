"""Image classification: a DeiT-style ViT with one frozen LLM block after its last layer.

    python train_image.py --block none random pretrained     # three arms on toy images, offline
    python train_image.py --data cifar10 --epochs 20 --lr 1e-3 --block none random pretrained
    python train_image.py --data folder --root DIR           # DIR/train/CLASS/, DIR/val/CLASS/
    torchrun --nproc-per-node=4 train_image.py ...           # several GPUs, the same batches

The paper's ImageNet run (Table 1; ViT-S 80.1 -> 80.7 top-1; 4 to 6 days on 4 A100; not run here):

    torchrun --nproc-per-node=4 train_image.py --data folder --root imagenet --model small \\
        --llm huggyllama/llama-7b --block none random pretrained --recipe deit --epochs 300 \\
        --warmup 20 --batch-size 1024 --lr 1e-3 --weight-decay 0.05 --compile

To test a finished run on ImageNet-C, -A, -R or -Sketch (each in a directory of its own):

    python train_image.py --eval runs/image-folder-small/pretrained-s0/best.pt \\
        --data imagenet-c --root imagenet-c

Each run ends with a line `RESULT {json}`. Its checkpoint is chosen on images held out of train; the
test images (val/) are used once. The same command again resumes, or prints what is done.

Differs from the paper: RandAugment is torchvision's, the three views of repeated augmentation are
spread over the epoch, gradients are clipped at norm 1, and there is no EMA (the released code keeps
one without using it).
Letters: B batch, N tokens, D width, S side of the images in pixels, C classes.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, ImageFolder
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm

from llmblock import KINDS, LLMBlock, UserError, count_gflops, fail, read, save

TASK, SIGN = "image", 1  # best.pt: the largest SIGN * first metric on validation
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun
FREE = ("block", "seed", "seeds", "workers", "device", "compile", "out", "eval")  # may differ
HIDE_BAR = RANK > 0 or None  # None: tqdm draws no bar where there is no terminal

# DeiT's widths (https://arxiv.org/abs/2012.12877); micro is ours, for small images on a laptop.
MODELS = {
    "micro": {"D": 64, "depth": 3, "heads": 4, "patch": 6, "size": 36},
    "tiny": {"D": 192, "depth": 12, "heads": 3, "patch": 16, "size": 224},
    "small": {"D": 384, "depth": 12, "heads": 6, "patch": 16, "size": 224},
    "base": {"D": 768, "depth": 12, "heads": 12, "patch": 16, "size": 224},
}
ROBUST = ("imagenet-c", "imagenet-a", "imagenet-r", "imagenet-sketch")  # tests for --eval


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = ("toy", "cifar10", "cifar100", "fashionmnist", "folder", *ROBUST)
    p.add_argument("--data", choices=data, default="toy", help="toy is drawn by the script")
    p.add_argument("--root", default="data", help="where the data is, or is downloaded to")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: tiny, small, base")
    p.add_argument("--size", type=int, help="side of the images (default: the model's)")
    p.add_argument("--patch", type=int, help="side of a patch (default: the model's)")
    p.add_argument("--recipe", choices=("light", "deit"), default="light", help="deit: the paper's")
    p.set_defaults(epochs=3, batch_size=32, lr=2e-3, weight_decay=0.05, warmup=1)
    args = finish_args(p, argv)
    args.size = args.size or MODELS[args.model]["size"]
    args.patch = args.patch or MODELS[args.model]["patch"]
    if min(args.size, args.patch) < 1 or args.size % args.patch:
        raise UserError(f"--size {args.size} is not a multiple of --patch {args.patch}")
    if args.data in ROBUST and not args.eval:
        raise UserError(f"--data {args.data} is a test set: give a checkpoint with --eval")
    return args


# ---------------------------------------------------------------- data


EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # ImageNet-C's, not in its mean

TOY_COLOURS = {"red": (220, 50, 40), "green": (50, 190, 60), "blue": (50, 80, 220)}
TOY_SHAPES = ("disc", "frame", "triangle", "cross")


def draw_toy(n, seed, S):
    """n images of one shape among clutter: uint8 (n, 3, S, S), labels (n), masks (n, S, S) bool.

    The class is colour and shape together. The shape's place, size and rotation say nothing, nor do
    the bars behind it, which have the same colours.
    """
    g = torch.Generator().manual_seed(seed)

    def rand(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    def place(radius, turn):  # coordinates (n, S, S) in the frame of an object somewhere inside
        cx, cy = (radius + (S - 2 * radius) * rand(0, 1, 1, 1) for _ in range(2))
        a, grid = turn * rand(-1, 1, 1, 1), torch.arange(S) + 0.5
        dx, dy = (grid[None, None, :] - cx) / radius, (grid[None, :, None] - cy) / radius
        return dx * a.cos() + dy * a.sin(), dy * a.cos() - dx * a.sin()

    def paint(x, where, colour):
        tint = torch.tensor(list(TOY_COLOURS.values()))[colour] + rand(-35, 35, 3)
        return torch.where(where[:, None], tint[:, :, None, None], x)

    x = F.interpolate(rand(60, 190, 3, 4, 4), size=(S, S), mode="bilinear")
    for _ in range(2):
        u, v = place(rand(0.08, 0.2, 1, 1) * S, 3.14)
        x = paint(x, (u.abs() < 1) & (v.abs() < 0.3), torch.randint(3, (n,), generator=g))
    u, v = place(rand(0.25, 0.38, 1, 1) * S, 0.2)
    square = torch.maximum(u.abs(), v.abs())
    disc, frame = u**2 + v**2 < 0.8, (square < 0.85) & (square > 0.45)
    triangle = (v < 0.75) & (v > 2 * u.abs() - 1)
    cross = (square < 0.95) & (torch.minimum(u.abs(), v.abs()) < 0.3)
    shape, colour = torch.randint(4, (n,), generator=g), torch.randint(3, (n,), generator=g)
    mask = torch.stack([disc, frame, triangle, cross])[shape, torch.arange(n)]
    x = paint(x, mask, colour) + 15 * torch.randn(x.shape, generator=g)
    return x.clamp(0, 255).to(torch.uint8), 4 * colour + shape, mask


def to_rgb(image):
    if image.mode[0] in "IF":  # 16 or 32 bits: Pillow would cut off all above 255
        raise ValueError(f"its mode is {image.mode}, only 8 bits a channel are read")
    return image.convert("RGB")


class Images(Dataset):
    """n images x, uint8 (n, 3, S, S) in memory or a list of files, and their labels y.

    Without a transform they are used as they are. With one, workers decode and transform. Samples
    are requested by (index, seed), so augmentation depends neither on workers nor on processes. A
    broken file becomes a black image with label -1, which no loss and no metric counts.
    """

    def __init__(self, x, y, transform=None):
        self.x, self.y, self.transform = x, torch.as_tensor(y), transform

    def __len__(self):
        return len(self.y)

    def subset(self, indices, transform):
        x = self.x[indices] if torch.is_tensor(self.x) else [self.x[i] for i in indices]
        return Images(x, self.y[indices], transform)

    def __getitem__(self, item):
        (i, seed), image = item, self.x[item[0]]
        if not torch.is_tensor(image):
            try:
                with Image.open(image) as file:
                    image = to_rgb(file)
            except Exception as e:  # a broken file may raise anything
                print(f"skipped {image}: {type(e).__name__}: {e}", file=sys.stderr)
                return self.transform(Image.new("RGB", (32, 32))), -1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone
            return self.transform(image), int(self.y[i])

    def batches(self, pairs, size, workers):
        """Yield x uint8 (size, 3, S, S) and y (size) for a list of pairs (index, seed)."""
        if self.transform:
            yield from DataLoader(self, size, sampler=pairs, num_workers=workers)
        else:
            for i in torch.tensor([i for i, _ in pairs]).split(size):
                yield self.x[i], self.y[i]


def crop(S, resize):
    """The test transform: short side to `resize` pixels (0: as it is), then the centre."""
    steps = [v2.Resize(resize, v2.InterpolationMode.BICUBIC)] if resize else []
    return v2.Compose([v2.PILToTensor(), *steps, v2.CenterCrop(S)])


def read_folder(path, S, workers, names=None, transform=None):
    """(Images, class names) of path/<class>/<image>. Less than 1 GB is decoded here and now."""
    try:
        folder = ImageFolder(path)
    except OSError as e:
        raise UserError(f"{path} must hold one folder of images per class: {e}") from e
    names = names or folder.classes
    if unknown := set(folder.classes) - set(names):
        raise UserError(f"{path}: class folder '{min(unknown)}' is not among those of training")
    x, y = zip(*folder.samples, strict=True)
    y = [names.index(folder.classes[i]) for i in y]
    if transform or len(x) * 3 * S * S > 1e9:
        return Images(x, y, transform or crop(S, S * 256 // 224)), names
    parts = Images(x, y, crop(S, S)).batches([(i, 0) for i in range(len(x))], 64, workers)
    x, y = [torch.cat(column) for column in zip(*parts, strict=True)]
    check_broken(int((y < 0).sum()), len(y), path)
    return Images(x[y >= 0], y[y >= 0]), names


def load_data(args, meta=None):
    """{"train": Images, "val" and "test": [Images], "meta": rebuilds the model, "sizes": text}."""
    S, root = args.size, Path(args.root)
    if args.data in ROBUST:
        names, sets = meta["classes"], [root]
        if args.data == "imagenet-c":  # <corruption>/<severity>/<class>/, perhaps further down
            sets = [p for p in root.glob("**/[1-5]") if p.parent.name not in EXTRA]
        if not sets:
            raise UserError(f"{root}: no <corruption>/<severity 1 to 5>/<class>/ folders in it")
        test = crop(S, 0 if args.data == "imagenet-c" else S * 256 // 224)
        test = [read_folder(p, S, args.workers, names, test)[0] for p in sets]
        sizes = f"{sum(map(len, test))} test images in {len(sets)} sets"
        return {"test": test, "meta": meta, "sizes": sizes}
    if args.data == "toy":
        parts = [draw_toy(1000, seed, S)[:2] for seed in range(12)]  # each fits the CPU's cache
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        train, test = Images(x[:10_000], y[:10_000]), Images(x[10_000:], y[10_000:])
        names = [f"{colour} {shape}" for colour in TOY_COLOURS for shape in TOY_SHAPES]
    elif args.data == "folder":
        train, names = read_folder(root / "train", S, args.workers)
        # The same view of test and validation images: both streamed, or both in memory.
        test, _ = read_folder(root / "val", S, args.workers, names, train.transform)
    else:
        source = {"cifar10": CIFAR10, "cifar100": CIFAR100, "fashionmnist": FashionMNIST}
        try:
            sets = [source[args.data](root, train=t, download=True) for t in (True, False)]
        except (OSError, RuntimeError) as e:
            raise UserError(f"{args.data} is not in {root} and cannot be downloaded: {e}") from e
        train, test = (Images(to_squares(s.data, S), s.targets) for s in sets)
        names = list(sets[0].classes)
    order, test_order = (  # folders come class by class: --limit must not take the first classes
        torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
        for images in (train, test)
    )
    held_out = min(len(train) // 10, 10_000)
    augment = train_transform(S, args.recipe) if train.transform or args.recipe == "deit" else None
    val = train.subset(order[:held_out][: args.limit], train.transform)
    train = train.subset(order[held_out:][: args.limit], augment)
    test = test.subset(test_order[: args.limit], test.transform)
    sizes = f"{len(train)} train, {len(val)} val, {len(test)} test images, {len(names)} classes"
    if min(len(train), len(val), len(test)) < WORLD:
        raise UserError(f"{root}: {sizes} are too few for {WORLD} processes")
    meta = {"classes": names}
    return {"train": train, "val": [val], "test": [test], "meta": meta, "sizes": sizes}


def to_squares(x, S):
    """(n, H, W) or (n, H, W, 3) uint8, as torchvision's data sets hold it -> (n, 3, S, S)."""
    x = torch.as_tensor(x)
    x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x[:, None].expand(-1, 3, -1, -1)
    return x if x.shape[-1] == S else v2.functional.resize(x, [S, S])


def train_transform(S, recipe):
    """For one image. Magnitude 27 of torchvision's 30 stands for timm's m9 of 10, increasing."""
    resized = v2.RandomResizedCrop(S, interpolation=v2.InterpolationMode.BICUBIC)
    steps = [v2.PILToTensor(), resized, v2.RandomHorizontalFlip()]
    if recipe == "deit":
        steps.append(v2.RandAugment(2, 27))
    return v2.Compose(steps)


def train_batches(data, args, gen):
    """Yield an epoch of x float (B, 3, S, S) and targets (B, C), decided by the generator alone."""
    images, C = data["train"], len(data["meta"]["classes"])
    n, B = len(images), min(args.batch_size, len(images) // WORLD * WORLD)
    order = torch.randperm(n, generator=gen)
    if args.recipe == "deit":  # repeated augmentation: three views each of a third of the images
        order = order.repeat_interleave(3)[:n][torch.randperm(n, generator=gen)]
    seeds = torch.randint(2**31, (n,), generator=gen)
    pairs = torch.stack([order, seeds], dim=1)[: n // B * B]  # whole batches only
    pairs = pairs[RANK::WORLD].tolist()  # each batch is shared among the processes
    broken = torch.zeros((), device=args.device)
    for batch in images.batches(pairs, B // WORLD, args.workers):
        draw = torch.rand(3, B, generator=gen)[:, RANK::WORLD]
        x, y, draw = (t.to(args.device) for t in (*batch, draw))
        broken += (y < 0).sum()
        targets = F.one_hot(y.clamp(min=0), C) * (y >= 0)[:, None].float()
        x = normalise(x if images.transform else flip_and_shift(x, draw))
        yield mix(x, targets, draw) if args.recipe == "deit" else (x, targets)
    check_broken(int(all_sum(broken)), n, "this epoch")


def normalise(x):
    """uint8 -> float with ImageNet's mean and deviation, whatever the data."""
    return v2.functional.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def flip_and_shift(x, draw):
    """Mirror half the images, shift each by up to S/8 pixels; draw (3, B) is uniform in [0, 1)."""
    S, pad = x.shape[-1], x.shape[-1] // 8
    x = torch.where((draw[0] < 0.5)[:, None, None, None], x.flip(-1), x)
    x = F.pad(x, [pad] * 4).permute(0, 2, 3, 1)
    shift = (draw[1:] * (2 * pad + 1)).long()[:, :, None]  # (2, B, 1)
    rows, columns = shift + torch.arange(S, device=x.device)  # (B, S) each
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return x[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mix(x, targets, draw):
    """DeiT's label smoothing 0.1, random erasing 0.25, and Mixup 0.8 or CutMix 1.0."""
    targets = 0.9 * targets + 0.1 * targets.sum(1, keepdim=True) / targets.shape[1]
    for i in (draw[0] < 0.25).nonzero():
        x[i] = v2.RandomErasing(p=1, value="random")(x[i])
    return (v2.MixUp(alpha=0.8) if torch.rand(()) < 0.5 else v2.CutMix(alpha=1.0))(x, targets)


# ---------------------------------------------------------------- model


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
        # Assigned after that list: of the LLM block, only the projections are initialised here, as
        # in the released image code.
        self.llm = llm
        if llm.kind != "none":
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


def param_groups(model, args):
    """Weight decay on matrices only: not on biases, norms, positions and CLS."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        groups[p.ndim > 1 and name not in ("cls", "pos")].append(p)
    return [{"params": ps, "weight_decay": args.weight_decay * on} for on, ps in groups.items()]


def compute_loss(model, batch):
    x, targets = batch
    logits = model(x).float()  # (B, C)
    return -(targets * logits.log_softmax(1)).sum() / targets.sum().clamp(min=1)


@torch.no_grad()
def evaluate(model, sets, args):
    """Top-1 and top-5 in percent, averaged over the sets (one, but for ImageNet-C's 75)."""
    model.eval()
    scores = []
    for images in sets:
        counts = torch.zeros(3, device=args.device)  # correct, correct among five, all
        absent = []  # ImageNet-A and -R have 200 of the 1000 classes: only those compete
        if args.data in ("imagenet-a", "imagenet-r"):
            absent = sorted(set(range(model.head.out_features)) - set(images.y.tolist()))
        pairs = [(i, 0) for i in range(RANK, len(images), WORLD)]
        for x, y in images.batches(pairs, args.batch_size, args.workers):
            y = y.to(args.device)
            with autocast(args):
                logits = model(normalise(x.to(args.device)))  # (B, C)
            logits[:, absent] = -torch.inf
            hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.sum(), (y >= 0).sum()])
        counts = all_sum(counts)
        check_broken(len(images) - int(counts[2]), len(images), "evaluation")
        scores.append(100 * counts[:2] / counts[2])
    top1, top5 = torch.stack(scores).mean(0).tolist()
    return {"top1": round(top1, 3), "top5": round(top5, 3)}


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
