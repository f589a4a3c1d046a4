r"""Image classification: a DeiT-style ViT with one frozen LLM block after its last layer.

    python train_image.py --block none random pretrained     # three arms (kinds of block), offline
    python train_image.py --data cifar10 --epochs 20 --lr 1e-3 --block none random pretrained
    python train_image.py --data folder --root DIR           # DIR/train/CLASS/, DIR/val/CLASS/
    python train_image.py --eval CKPT --data folder --root DIR    # ImageNet-A, -R, -Sketch, ...

The paper's ImageNet run (Table 1; ViT-S 80.1 -> 80.7 top-1; 4 to 6 days on 4 A100; not run here):

    torchrun --nproc-per-node=4 train_image.py --data folder --root imagenet --model small \
        --llm huggyllama/llama-7b --block none random pretrained --recipe deit --epochs 300 \
        --warmup 20 --batch-size 1024 --lr 1e-3 --weight-decay 0.05 --bf16 --compile

A tenth of train is held out to select the epoch; val/ is the test set, used once.
Differs from the paper: torchvision's RandAugment, no repeated augmentation, gradients are clipped
at norm 1, biases start as PyTorch's and not at 0, no EMA (theirs is kept, but not used).
Letters: B batch, N tokens, D width of the ViT (llmblock's dim), h heads, S side, K classes.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from filelock import FileLock
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import default_collate as collate
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm

from llmblock import KINDS, LLMBlock, UserError, fail, read, reading, run, save

TASK, BEST = "image", max  # BEST picks the best epoch by the first metric on validation data

# DeiT's widths (https://arxiv.org/abs/2012.12877); micro is ours, for small images on a laptop.
MODELS = {
    "micro": {"D": 64, "depth": 3, "heads": 4, "patch": 6, "S": 36},
    "tiny": {"D": 192, "depth": 12, "heads": 3, "patch": 16, "S": 224},
    "small": {"D": 384, "depth": 12, "heads": 6, "patch": 16, "S": 224},
    "base": {"D": 768, "depth": 12, "heads": 12, "patch": 16, "S": 224},
}


# ---------------------------------------------------------------- the model
class Attention(nn.Module):
    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D)  # queries, keys and values at once
        self.proj = nn.Linear(D, D)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, D/h) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """A pre-norm transformer layer. In training, drop_path skips its halves for some samples."""

    def __init__(self, D, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, heads)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        mlp = OrderedDict(fc1=nn.Linear(D, 4 * D), act=nn.GELU(), fc2=nn.Linear(4 * D, D))
        self.mlp = nn.Sequential(mlp)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))  # tokens look at each other
        return x + self.drop_path(self.mlp(self.norm2(x)))  # each token for itself (B, N, D)


class ViT(nn.Module):
    """DeiT's vision transformer. Its parts are named as in the published weights."""

    def __init__(self, D, depth, heads, patch, S, K, drop_path, llm):
        super().__init__()
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, D, patch, patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))  # collects what the head wants to know
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (S // patch) ** 2, D))
        rates = torch.linspace(0, drop_path, depth).tolist()  # the deeper, the more
        self.blocks = nn.Sequential(*[Block(D, heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, K)
        # Listed before self.llm is set: an LLM layer that trains must keep its own values.
        # Its projections are initialised like all other matrices, as in the released image code.
        matrices = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        self.llm = llm
        if llm.kind != "none":
            matrices += [llm.proj_in.weight, llm.proj_out.weight]
        for weight in [self.pos_embed, *matrices]:
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, 3, S, S) -> (B, N - 1, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        x = self.blocks(x + self.pos_embed)  # the host's own encoder
        x = self.llm(x)  # the frozen LLM block: this line is the paper
        x = self.norm(x)
        return self.head(x[:, 0])  # (B, K)


# ---------------------------------------------------------------- loss and metrics
def compute_loss(args, model, batch):
    x = normalise(batch[0].to(args.device))  # (B, 3, S, S)
    y = batch[1].to(args.device)  # (B)
    if args.recipe != "deit":
        return F.cross_entropy(model(x), y)
    # DeiT's: noise over a part of some images, then two images blended or cut into each other
    erase = v2.RandomErasing(0.25, value="random")
    x = torch.stack([erase(image) for image in x])
    K = len(args.classes)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=K), v2.CutMix(num_classes=K)])
    x, y = mix(x, y)  # y (B, K): how much there is of each class
    return F.cross_entropy(model(x), y, label_smoothing=0.1)


def normalise(x):
    """uint8 -> float with ImageNet's mean and deviation, as published weights expect."""
    return v2.functional.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@torch.no_grad()
def evaluate(args, model, images):
    """Top-1 and top-5 accuracy in percent, among the classes that the images may have."""
    model.eval()
    absent = sorted(set(range(len(args.classes))) - set(images.present))
    correct = torch.zeros(2)  # images whose class is the first guess, is among five
    for x, y in batches(args, images):
        logits = model(normalise(x.to(args.device))).cpu()  # (B, K)
        logits[:, absent] = -torch.inf
        hits = logits.topk(min(5, len(args.classes))).indices == y[:, None]  # (B, 5)
        correct += torch.tensor([hits[:, 0].sum(), hits.sum()])
    top1, top5 = (100 * correct / len(images)).tolist()
    return {"top1": top1, "top5": top5}


# ---------------------------------------------------------------- data
def batches(args, dataset, seed=None):
    """All samples in order or, with a seed, a shuffled epoch, shared out to the WORLD processes."""
    n = len(dataset)
    size = args.batch_size
    items = list(enumerate(range(n)))  # what __getitem__ is called with: (random seed, index)
    if seed is not None:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        size = min(size, n // WORLD * WORLD)  # no larger than the data
        whole = n // size * size  # only whole batches
        items = list(enumerate(order[:whole], 10_000_000 * seed))[RANK::WORLD]  # no seed twice
        size = size // WORLD  # of each process
    return DataLoader(dataset, size, sampler=items, num_workers=args.workers, collate_fn=collate)


class Images(Dataset):
    """Pairs (image or its file, class) -> x uint8 (3, S, S), class."""

    def __init__(self, pairs, present, transform):
        self.pairs = pairs
        self.present = present  # the classes that may occur
        self.transform = transform

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, item):
        seed, index = item
        torch.default_generator.manual_seed(seed)  # the same for any number of workers
        image, label = self.pairs[index]
        if isinstance(image, str):
            with reading(image), Image.open(image) as file:
                image = file.convert("RGB")
        return self.transform(image), label


def make_transform(S, recipe, train):
    """From a picture of any size to pixels, uint8 (3, S, S)."""
    bicubic = v2.InterpolationMode.BICUBIC
    if recipe == "deit" and train:  # 27 of torchvision's 30 stands for magnitude 9 of timm's 10
        steps = [v2.RandomResizedCrop(S, interpolation=bicubic), v2.RandomHorizontalFlip()]
        steps += [v2.RandAugment(2, 27, interpolation=bicubic)]
    elif recipe == "deit":
        steps = [v2.Resize(S * 256 // 224, bicubic), v2.CenterCrop(S)]
    elif train:
        steps = [v2.Resize(S), v2.RandomCrop(S, padding=S // 8), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(S), v2.CenterCrop(S)]
    return v2.Compose([*steps, v2.PILToTensor()])


def read_images(args, train):
    """Pairs (image or its file, class) of train or test, and the names of the classes."""
    root = Path(args.root)
    if args.data == "toy":
        indices = range(7_000) if train else range(7_000, 8_500)
        pairs = [draw_toy(i, MODELS[args.model]["S"])[:2] for i in indices]
        return pairs, [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    if args.data == "folder":
        # --eval also takes the class folders themselves
        val = root if args.eval and not (root / "val").is_dir() else root / "val"
        folder = ImageFolder(root / "train" if train else val)
        return folder.samples, folder.classes
    cifar = {"cifar10": CIFAR10, "cifar100": CIFAR100}[args.data]
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{args.data}.lock"):  # torchrun starts several processes at once
        dataset = cifar(root, train, download=True)
    images = map(Image.fromarray, dataset.data)
    return list(zip(images, dataset.targets, strict=True)), dataset.classes


def load_data(args):
    """Images by split: train, val, test; with --eval test alone. Sets args.classes and .sizes."""
    S = MODELS[args.model]["S"]
    with reading(f"--root {args.root}"):  # --eval reads no train: its classes are the checkpoint's
        train, args.classes = ([], args.classes) if args.eval else read_images(args, train=True)
        test, names = read_images(args, train=False)
    # A test set may have fewer classes than the model, as ImageNet-A and -R: they go by name.
    unknown = sorted(set(names) - set(args.classes))
    if unknown:
        raise UserError(f"{args.root}: class {unknown[0]} is not one of the model's")
    present = [args.classes.index(name) for name in names]
    # --limit takes samples at equal distances: the classes come sorted.
    picks = np.linspace(0, len(test) - 1, len(test[: args.limit]), dtype=int)
    test = [(test[i][0], present[test[i][1]]) for i in picks]
    test_transform = make_transform(S, args.recipe, train=False)
    data = {"test": Images(test, present, test_transform)}
    if train:
        random.Random(0).shuffle(train)
        n = len(train) // 10  # held out, to select the best epoch
        every = range(len(args.classes))
        data["val"] = Images(train[:n][: args.limit], every, test_transform)
        train_transform = make_transform(S, args.recipe, train=True)
        data["train"] = Images(train[n:][: args.limit], every, train_transform)
    args.sizes = {name: len(images) for name, images in data.items()}
    return data


COLOURS = {"red": (220, 50, 40), "green": (50, 190, 60), "blue": (50, 80, 220)}
SHAPES = ("disc", "frame", "triangle", "cross")


def draw_toy(index, S):
    """One shape on clutter: the image, its class, and the shape's pixels as a mask.

    The class is colour and shape together. Place, size and the bar behind the shape say nothing.
    """
    rng = random.Random(index)
    image = Image.new("RGB", (4, 4))
    image.putdata([tuple(rng.choices(range(80, 170), k=3)) for _ in range(16)])
    image = image.resize((S, S), Image.Resampling.BILINEAR)  # a soft background
    tints = [tuple(c + rng.randint(-20, 20) for c in rgb) for rgb in COLOURS.values()]
    bar = rng.choices(range(S), k=4)
    ImageDraw.Draw(image).line(bar, rng.choice(tints), width=S // 8)
    colour = rng.randrange(3)
    shape = rng.randrange(4)
    r = rng.randrange(S // 3, S * 4 // 9)
    x, y = [rng.randrange(r, S - r) for _ in range(2)]
    mask = Image.new("1", (S, S))
    pen = ImageDraw.Draw(mask)
    box = (x - r, y - r, x + r, y + r)
    if SHAPES[shape] == "disc":
        pen.ellipse(box, fill=1)
    elif SHAPES[shape] == "frame":
        pen.rectangle(box, outline=1, width=r // 2)
    elif SHAPES[shape] == "triangle":
        pen.polygon((x - r, y + r, x + r, y + r, x, y - r), fill=1)
    else:  # a cross
        pen.line((x - r, y, x + r, y), fill=1, width=r // 2)
        pen.line((x, y - r, x, y + r), fill=1, width=r // 2)
    image.paste(tints[colour], mask=mask)
    return image, 4 * colour + shape, mask


# ---------------------------------------------------------------- settings
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", choices=("toy", "cifar10", "cifar100", "folder"), default="toy")
    p.add_argument("--root", default="data", help="where the data is, or is downloaded to")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: tiny, small, base")
    p.add_argument("--init", metavar="FILE", help="start from DeiT's published weights")
    p.add_argument("--recipe", choices=("light", "deit"), default="light", help="deit: the paper's")
    p.add_argument("--epochs", type=int, default=3, help="enough for the toy; paper: 300")
    p.add_argument("--batch-size", type=int, default=24, help="small, for few images; paper: 1024")
    p.add_argument("--lr", type=float, default=2e-3, help="at its peak; for photos try 1e-3")
    p.add_argument("--weight-decay", type=float, default=0.05, help="as the paper")
    p.add_argument("--warmup", type=float, default=1, help="epochs; paper: 20")
    return parse_shared(p, argv)


def build_model(args, kind, seed):
    torch.manual_seed(seed)  # the host starts alike in every arm
    config = MODELS[args.model] | {"K": len(args.classes)}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    llm = LLMBlock(args.llm, config["D"], args.layers, kind, seed, dtype)
    model = ViT(**config, drop_path=0.1 if args.recipe == "deit" else 0.0, llm=llm)
    if args.init:
        load_init(model, args.init)
    return model


def load_init(model, path):
    """Fill the host from a published file; its head, too, if it has as many classes."""
    weights = read(path)
    own = model.state_dict()
    with reading(path):
        weights = weights.get("model", weights)
        fitting = {k: w for k, w in weights.items() if k in own and w.shape == own[k].shape}
    missing = [k for k in own if k not in fitting and not k.startswith(("llm.", "head."))]
    if missing:
        raise UserError(f"--init {path} lacks {missing[0]}, or has it in another shape")
    model.load_state_dict(fitting, strict=False)
    print(f"{path}: {len(fitting)} tensors loaded, head: {'head.weight' in fitting}")


def param_groups(args, model):
    """Weight decay on matrices alone; the rate of the block's projections is scaled."""
    groups = {}
    for name, p in model.named_parameters():
        decay = args.weight_decay if p.ndim > 1 and name not in ("cls_token", "pos_embed") else 0.0
        scale = args.proj_lr if name.startswith("llm.proj") else 1.0
        groups.setdefault((decay, scale), []).append(p)
    return [{"params": ps, "weight_decay": d, "lr_scale": s} for (d, s), ps in groups.items()]


# ---------------------------------------------------------------- the same in every script

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
WORKERS = max(0, min(8, os.cpu_count() - 2))  # two cores are the training's own
DEVICES = [name for name in ("cuda", "mps", "cpu") if torch.get_device_module(name).device_count()]
# May differ when a run is resumed. All other settings, and classes and sizes of the data, may not.
FREE = ("root", "workers", "device", "compile", "out", "eval", "autocast")


def parse_shared(p, argv):
    p.add_argument("--llm", default="tests/tiny_llm", help="directory or Hugging Face name")
    p.add_argument("--layers", type=int, nargs="+", default=[-1], help="one or a chain; -1: last")
    p.add_argument("--block", nargs="+", choices=KINDS, default=["pretrained"], help="arms to run")
    p.add_argument("--proj-lr", type=float, default=1.0, help="times --lr: the projections' rate")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="each arm runs once a seed")
    p.add_argument("--limit", type=int, help="use at most so many samples of each split")
    p.add_argument("--workers", type=int, default=WORKERS, help="processes that load data")
    p.add_argument("--device", choices=DEVICES, default="cuda" if "cuda" in DEVICES else "cpu")
    p.add_argument("--bf16", action="store_true", help="frozen layers in bf16; autocast on CUDA")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--out", default="runs", help="directory of all runs")
    p.add_argument("--eval", metavar="CKPT", help="only test this checkpoint")
    p.error = fail  # a mistake is one line, without the list of all flags
    args = p.parse_args(argv)
    if args.eval:  # parse again: the checkpoint's settings, classes too, are the defaults now
        p.set_defaults(**(read(args.eval, TASK)["settings"] | {"limit": None, "init": None}))
        args = p.parse_args(argv)
    if args.batch_size < 1 or args.batch_size % WORLD or (args.limit or 1) < 1:
        raise UserError("--batch-size (a multiple of the processes) and --limit must be positive")
    args.autocast = torch.autocast(args.device, torch.bfloat16, args.bf16 and args.device == "cuda")
    return args


def train(args, kind, seed, data):
    """Train or resume one arm with one seed, test its best epoch. Returns the RESULT line."""
    out = Path(args.out, f"{TASK}-{args.data}-{args.model}", f"{kind}-s{seed}")
    model = build_model(args, kind, seed).to(args.device)
    optimizer = torch.optim.AdamW(param_groups(args, model), fused=True)
    state = resume(args, Path(args.eval or out / "last.pt"), kind, seed, model, optimizer)
    if args.eval or args.epochs == 0:  # a checkpoint, or what --init loaded, is tested
        return test(args, model, seed, state["history"], data)
    if state["result"]:  # it was finished before
        return state["result"]
    out.mkdir(parents=True, exist_ok=True)  # a wrong --out is found now, not after an epoch
    ddp = DistributedDataParallel(model) if WORLD > 1 else model  # averages the gradients
    ddp = torch.compile(ddp, disable=not args.compile)
    for epoch in range(len(state["history"]), args.epochs):
        start = time.perf_counter()
        loader = batches(args, data["train"], 1000 * seed + epoch)  # the same for all arms
        steps = len(loader)
        total = 0
        model.train()  # evaluate leaves it in eval mode
        for step, batch in enumerate(tqdm(loader, f"epoch {epoch + 1}", disable=RANK > 0 or None)):
            torch.manual_seed(hash((seed, epoch, step, RANK)))  # so that resuming is exact
            # 1) learning rate: linear warm-up, then a cosine that counts from epoch 0, as timm's
            now = epoch + step / steps
            cosine = 0.505 + 0.495 * math.cos(math.pi * now / args.epochs)  # 1 to 0.01
            rate = min(1, (now + 1 / steps) / args.warmup) if now < args.warmup else cosine
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate * group["lr_scale"]
            # 2) forward and backward
            with args.autocast:
                loss = compute_loss(args, ddp, batch)
            optimizer.zero_grad()
            loss.backward()
            # 3) clip the gradient and step
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.detach()
        row = {"epoch": epoch + 1, "loss": total.item() / steps}
        row["samples_per_s"] = steps * loader.batch_size * WORLD / (time.perf_counter() - start)
        row["val"] = args.autocast(evaluate)(args, model, data["val"])  # runs it in autocast
        row["seconds"] = time.perf_counter() - start
        save_epoch(out, state, row, model, optimizer)
    model.load_state_dict(read(out / "best.pt", TASK)["model"])  # validation has chosen it
    state["result"] = test(args, model, seed, state["history"], data)
    if RANK == 0:  # finished: from here on last.pt holds the best epoch's model, too
        save(state | {"model": model.state_dict()}, out / "last.pt")
    return state["result"]


def resume(args, path, kind, seed, model, optimizer):
    """The state of a new run, or of the checkpoint if there is one, which is then loaded."""
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings |= {"block": [kind], "seeds": [seed], "frozen_hash": model.llm.record.get("hash")}
    state = {"task": TASK, "settings": settings, "history": [], "result": None}
    if path.exists():
        state = read(path, TASK)
        for key in ("model", "block", "seeds", "classes", "frozen_hash") if args.eval else settings:
            saved = state["settings"].get(key)
            if saved != settings[key]:
                raise UserError(f"{path} has {key} {saved!s:.50}, not {settings[key]}: new --out?")
        with reading(path):  # fails if it has other shapes
            model.load_state_dict(state["model"])
            if not args.eval:
                optimizer.load_state_dict(state["optimizer"])
        print("loaded", path)
    return state


def save_epoch(out, state, row, model, optimizer):
    """Write metrics.jsonl, best.pt, then last.pt: killed before that, a run repeats the epoch."""
    if not math.isfinite(row["loss"]):
        raise UserError(f"{out}: the loss is {row['loss']}; try a lower --lr and another --out")
    state["history"].append(row)
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}  # in place
    values = [next(iter(row["val"].values())) for row in state["history"]]  # the first metric
    print(f"{out} {row['epoch']}: loss {row['loss']:.3f}, val {values[-1]:.2f}", flush=True)
    if RANK == 0:
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, state["history"])) + "\n")
        if values[-1] == BEST(values):
            save(state | {"optimizer": None}, out / "best.pt")  # the model alone
        save(state, out / "last.pt")  # all that resuming needs
    if WORLD > 1:
        dist.barrier()  # until they are written


def test(args, model, seed, history, data):
    """Score the test set, once. Returns what the RESULT line says."""
    metrics = args.autocast(evaluate)(args, model, data["test"])
    weights = [p for layer in model.llm.layers for p in layer.parameters()]
    return {
        "task": TASK, "data": args.data, "model": args.model, "kind": model.llm.record["kind"],
        "llm": Path(args.llm).name, "layers": model.llm.record.get("layers"),
        "seed": seed, "epochs": args.epochs, "lr": args.lr, "proj_lr": args.proj_lr,
        "metrics": {k: round(v, 3) for k, v in metrics.items()},
        "params_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "params_frozen": sum(p.numel() for p in weights if not p.requires_grad),
        "samples_per_s": round(history[-1]["samples_per_s"], 1) if history else None,
        "seconds": round(sum(r["seconds"] for r in history), 1), "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }  # fmt: skip


def main(argv=None):
    args = parse_args(argv)
    if WORLD > 1:
        sys.stdout = open(os.devnull, "w") if RANK > 0 else sys.stdout  # one speaks for all
        torch.get_device_module(args.device).set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    data = load_data(args)  # fills args.classes and args.sizes
    if min(args.sizes.values()) < WORLD:
        raise UserError(f"{args.sizes}: too few samples (val is a part of train)")
    print(TASK, args.data, args.model, args.device, args.sizes)
    results = []
    for seed in args.seeds:
        for kind in args.block:
            results.append(train(args, kind, seed, data))
            print("RESULT", json.dumps(results[-1]), flush=True)
    for kind in args.block:  # a small table
        for name in results[0]["metrics"]:
            values = [r["metrics"][name] for r in results if r["kind"] == kind]
            sd = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            print(f"{kind:12}{name:16}{np.mean(values):8.2f}{sd}")
    return results


if __name__ == "__main__":
    run(main)
