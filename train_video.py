r"""Action recognition: a VideoMAE-style ViT with one frozen LLM block after its last layer.

    python train_video.py --block none random pretrained     # three arms on toy clips, offline
    python train_video.py --data folder --root DIR           # DIR/train/CLASS/, DIR/val/CLASS/
    python train_video.py --data ssv2 --root DIR             # DIR/labels/, Something-Something v2

The paper's run (Table 3; ViT-S 64.7 -> 65.9 top-1; 3 to 4 days on 4 A100; not run here):

    torchrun --nproc-per-node=4 train_video.py --data ssv2 --root DIR --model small \
        --init videomae_vit_s_ssv2.pth --llm huggyllama/llama-7b --layers 15 \
        --block none random pretrained --recipe videomae --epochs 40 --warmup 5 --batch-size 24 \
        --lr 9.4e-5 --layer-decay 0.7 --weight-decay 0.05 --views 2x3 --bf16

A clip is a video file (pip install av) or a folder of frames sorted by name. A tenth of train
selects the epoch; the test set is val/ or validation.json. The paper tests the last epoch and
takes layer 15 of 0 to 31 (its text: the last). RandAugment is torchvision's; gradients are clipped.
Letters: B batch, V views or copies, T frames, S side, N tokens, D width, h heads, K classes.
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
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import default_collate as collate
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm

from llmblock import KINDS, LLMBlock, UserError, fail, read, reading, run, save

TASK, BEST = "video", max  # BEST picks the best epoch by the first metric on validation data
# VideoMAE's widths (https://arxiv.org/abs/2203.12602); micro is ours, for small clips on a laptop.
MODELS = {
    "micro": {"D": 64, "depth": 3, "heads": 4, "patch": 16, "S": 48, "T": 16},
    "small": {"D": 384, "depth": 12, "heads": 6, "patch": 16, "S": 224, "T": 16},
    "base": {"D": 768, "depth": 12, "heads": 12, "patch": 16, "S": 224, "T": 16},
}


# ---------------------------------------------------------------- the model
class Attention(nn.Module):
    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)  # keys have no bias: softmax cancels it
        self.q_bias = nn.Parameter(torch.zeros(D))
        self.v_bias = nn.Parameter(torch.zeros(D))
        self.proj = nn.Linear(D, D)

    def forward(self, x):
        B, N, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # (3D)
        qkv = F.linear(x, self.qkv.weight, bias).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, D/h) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):  # a pre-norm transformer layer
    def __init__(self, D, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, heads)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        mlp = OrderedDict(fc1=nn.Linear(D, 4 * D), act=nn.GELU(), fc2=nn.Linear(4 * D, D))
        self.mlp = nn.Sequential(mlp)
        self.drop_path = StochasticDepth(drop_path, mode="row")  # samples may skip attention or MLP

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # (B, N, D)


class VideoViT(nn.Module):  # VideoMAE's; its parts are named as in the published weights
    def __init__(self, D, depth, heads, patch, S, T, K, drop_path, centre, llm):
        super().__init__()
        self.centre = centre  # whether to subtract a clip's mean colour
        cube = (2, patch, patch)  # the frames and pixels of one token
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv3d(3, D, cube, cube)))
        N = T // 2 * (S // patch) ** 2  # positions: 3.5 of https://arxiv.org/abs/1706.03762
        angle = torch.arange(N)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)  # (N, D/2)
        positions = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (N, D)
        self.register_buffer("positions", positions, persistent=False)
        rates = torch.linspace(0, drop_path, depth).tolist()  # deep layers are skipped most
        self.blocks = nn.Sequential(*[Block(D, heads, rate) for rate in rates])
        self.fc_norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, K)
        self.llm = llm

    def forward(self, x):
        if self.centre:  # NOTE(paper): in our light recipe alone: motion is learned sooner
            x = x - x.mean((1, 3, 4), keepdim=True)
        x = self.patch_embed(x.transpose(1, 2))  # (B, T, 3, S, S) -> (B, D, T/2, S/patch, S/patch)
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        x = self.blocks(x + self.positions)  # the host's own encoder
        x = self.llm(x)  # the frozen LLM block: this line is the paper
        x = self.fc_norm(x.mean(1))  # the mean token (B, D)
        return self.head(x)  # (B, K)


# ---------------------------------------------------------------- loss and metrics
def compute_loss(args, model, batch):
    # 1) first copies of all clips, then second ones: what mixes neighbours (3) finds no twins
    x = batch[0].to(args.device)  # (B, V, T, 3, S, S): V copies of each clip
    y = batch[1].to(args.device).repeat(x.shape[1])  # (V B)
    x = normalise(x.transpose(0, 1).flatten(0, 1))  # (V B, T, 3, S, S)
    if args.recipe != "videomae":
        return F.cross_entropy(model(x), y)
    erase = v2.RandomErasing(0.25, value="random")
    x = torch.stack([erase(clip) for clip in x])  # the same hole and noise in all frames
    # 2) mix neighbours, all frames alike; y (V B, K) then says how much there is of each class
    K = len(args.classes)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=K), v2.CutMix(num_classes=K)])
    x, y = mix(x.flatten(1, 2), y)  # (V B, T 3, S, S)
    x = x.unflatten(1, (-1, 3))  # (V B, T, 3, S, S)
    return F.cross_entropy(model(x), y, label_smoothing=0.1)


def normalise(x):
    """uint8 -> float with ImageNet's mean and deviation, as published weights expect."""
    return v2.functional.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@torch.no_grad()
def evaluate(args, model, clips):
    """Top-1 and top-5 accuracy in percent. The probabilities of a clip's views are averaged."""
    model.eval()
    correct = torch.zeros(2)  # clips whose class is the first guess, or among the first five
    for x, y in batches(args, clips):
        p = 0
        for view in x.unbind(1):  # V times (B, T, 3, S, S)
            logits = model(normalise(view.to(args.device)))
            p = p + logits.float().softmax(1)  # (B, K)
        hits = p.cpu().topk(min(5, len(args.classes))).indices == y[:, None]  # (B, 5)
        correct += torch.tensor([hits[:, 0].sum(), hits.sum()])
    top1, top5 = (100 * correct / len(clips)).tolist()
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


class Clips(Dataset):
    """Pairs (clip, class) -> V augmented copies or V test views, uint8 (V, T, 3, S, S), class."""

    def __init__(self, pairs, args, views=None):
        self.pairs = pairs
        self.views = views  # None in training, or say 2x3: 2 in time, 3 crops of each
        self.T = MODELS[args.model]["T"]
        self.S = MODELS[args.model]["S"]
        if args.recipe == "videomae":  # 21 of torchvision's 30 is magnitude 7 of timm's 10
            self.copies = 2
            steps = [v2.RandAugment(4, 21), v2.RandomResizedCrop(self.S)]
        else:  # swap red, green, blue: colours of few clips would soon be learned by heart
            self.copies = 1
            steps = [v2.RandomResizedCrop(self.S, (0.8, 1.0)), v2.RandomChannelPermutation()]
        self.augment = v2.Compose([*steps, v2.RandomHorizontalFlip(0.5 * args.flip)])

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, item):
        seed, index = item
        torch.default_generator.manual_seed(seed)  # the same for any number of workers
        clip, label = self.pairs[index]
        if self.views is None:
            offsets = torch.rand(1, self.T)  # all copies show the same frames
            x = read_clip(clip, offsets, self.S)[0]  # (T, 3, H, W)
            return torch.stack([self.augment(x) for _ in range(self.copies)]), label
        # 1) in time: the first view shows the middle of each segment, the second its beginning
        in_time, in_space = map(int, self.views.split("x"))
        offsets = torch.tensor([0.5, 0.0])[:in_time, None]
        x = read_clip(clip, offsets.expand(-1, self.T), self.S)
        # 2) in space: the short side gets S pixels; one or three crops along the long side
        x = v2.functional.resize(x, self.S)
        side = -1 if x.shape[-1] > x.shape[-2] else -2  # the long one: width or height
        spare = x.shape[side] - self.S
        starts = [0, spare // 2, spare] if in_space == 3 else [spare // 2]
        return torch.cat([x.narrow(side, start, self.S) for start in starts]), label


def read_clip(clip, offsets, S):
    """The frames at these offsets (V, T), 0 to 1, in a clip's T segments: uint8 (V, T, 3, H, W)."""
    T = offsets.shape[1]
    with reading(clip):
        if isinstance(clip, int):  # the number of a toy
            frames = draw_toy(clip, T, S)[0]
        elif clip.is_dir():
            frames = sorted(clip.glob("[!.]*"))  # no hidden files
        else:
            import av

            to_rgb = av.video.reformatter.VideoReformatter()  # one for all: quick to call again
            with av.open(str(clip)) as file:
                frames = list(file.decode(video=0))
        n = len(frames)
        indices = ((torch.arange(T) + offsets) * n / T).long().clamp(max=n - 1)  # (V, T)
        pictures = []
        for i in indices.flatten():
            frame = frames[i]
            if isinstance(frame, Path):
                frame = Image.open(frame).convert("RGB")
            elif not isinstance(frame, np.ndarray):  # PyAV's
                frame = to_rgb.reformat(frame, format="rgb24").to_ndarray()
            pictures.append(np.array(frame))
        x = torch.from_numpy(np.stack(pictures))  # (V T, H, W, 3)
    return x.permute(0, 3, 1, 2).unflatten(0, offsets.shape)


def find_clips(args, split):
    """Pairs (clip, class) of train or val. Sets args.classes, unless a checkpoint has done so."""
    root = Path(args.root)
    if args.data == "toy":
        clips = range(1_200) if split == "train" else range(1_200, 2_000)
        names = [draw_toy(i, 1, 8)[1] for i in clips]
    elif args.data == "folder":
        clips = sorted(root.glob(f"{split}/*/[!.]*"))
        names = [clip.parent.name for clip in clips]
        if not clips:
            raise FileNotFoundError(f"it has no {split}/CLASS/CLIP")
    else:
        file = "train.json" if split == "train" else "validation.json"
        rows = json.loads((root / "labels" / file).read_text())
        names = [row["template"].replace("[", "").replace("]", "") for row in rows]
        folder = root / "20bn-something-something-v2"
        clips = [(folder / f"{row['id']}.webm").resolve(strict=True) for row in rows]  # it exists
        labels = json.loads((root / "labels/labels.json").read_text())
        args.classes = args.classes or sorted(labels, key=lambda name: int(labels[name]))
    args.classes = args.classes or sorted(set(names))
    pairs = [(clip, args.classes.index(name)) for clip, name in zip(clips, names, strict=True)]
    random.Random(0).shuffle(pairs)  # folders come class by class
    return pairs


def load_data(args):
    """{"train", "val", "test": Clips}, for --eval the test set alone."""
    with reading(f"--root {args.root}"):
        train = [] if args.eval else find_clips(args, "train")
        test = find_clips(args, "val")
    data = {"test": Clips(test[: args.limit], args, args.views)}
    if not args.eval:
        n = len(train) // 10  # held out; may be of the same recordings as the rest
        data["val"] = Clips(train[:n][: args.limit], args, "1x1")
        data["train"] = Clips(train[n:][: args.limit], args)
    args.sizes = {name: len(clips) for name, clips in data.items()}
    return data


def draw_toy(index, T, S):
    """A moving disc: frames uint8 (T, S, S, 3), its direction (the class), its masks (T, S, S)."""
    # One frame alone does not tell the direction: what leaves the picture comes back (np.roll).
    rng = random.Random(index)
    hour = rng.randrange(12)  # 0 is up, 3 right; drawn first, so the same for any T and S
    colour = np.array(rng.choices(range(150, 256), k=3), np.uint8)
    background = np.array(rng.choices(range(110), k=3), np.uint8)
    disc = Image.new("1", (S, S))
    ImageDraw.Draw(disc).circle((S / 2, S / 2), rng.uniform(0.12, 0.17) * S, fill=1)
    disc = np.roll(disc, (rng.randrange(S), rng.randrange(S)), axis=(0, 1))  # any place
    angle = math.radians(30 * hour)
    speed = rng.uniform(0.4, 0.9) * S / T  # pixels a frame
    masks = []
    for t in range(T):
        down = round(-t * speed * math.cos(angle))
        right = round(t * speed * math.sin(angle))
        masks.append(np.roll(disc, (down, right), axis=(0, 1)))
    masks = np.stack(masks)
    return np.where(masks[..., None], colour, background), f"{hour} o'clock", masks


# ---------------------------------------------------------------- settings
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", choices=("toy", "ssv2", "folder"), default="toy")
    p.add_argument("--root", default="data", help="directory of the data")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: small, base")
    p.add_argument("--init", metavar="FILE", help="VideoMAE's weights; with --recipe videomae")
    p.add_argument("--recipe", choices=("light", "videomae"), default="light", help="light is ours")
    p.add_argument("--flip", action="store_true", help="mirror at random, if sides do not matter")
    p.add_argument("--views", choices=("1x1", "2x1", "2x3"), default="1x1", help="paper: 2x3")
    p.add_argument("--layer-decay", type=float, default=1.0, help="paper: small 0.7, base 0.75")
    p.add_argument("--epochs", type=int, default=3, help="enough for the toy; paper: 40, base 30")
    p.add_argument("--batch-size", type=int, default=16, help="in clips; paper: 24, base 12")
    p.add_argument("--lr", type=float, default=3e-3, help="its peak; 1e-3 for real clips")
    p.add_argument("--weight-decay", type=float, default=0.05, help="as the paper")
    p.add_argument("--warmup", type=float, default=1, help="epochs; paper: 5")
    p.set_defaults(classes=None)  # the data or a checkpoint tells
    return parse_shared(p, argv)


def build_model(args, kind, seed):
    torch.manual_seed(seed)
    config = MODELS[args.model] | {"K": len(args.classes)}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    llm = LLMBlock(args.llm, config["D"], args.layers, kind, seed, dtype)
    paper = args.recipe == "videomae"
    model = VideoViT(**config, drop_path=0.1 if paper else 0.0, centre=not paper, llm=llm)
    if args.init:
        load_init(model, args.init)
    return model


def load_init(model, path):
    """Fill the host from a published file; its head, too, if it has as many classes."""
    own = model.state_dict()
    with torch.serialization.safe_globals([argparse.Namespace]), reading(path):  # of its run
        weights = read(path)
        weights = weights.get("model", weights.get("module", weights))
        weights = {k.removeprefix("encoder."): w for k, w in weights.items()}  # pre-trained
        fitting = {k: w for k, w in weights.items() if k in own and w.shape == own[k].shape}
    new = ("llm.", "head.", "fc_norm.")  # pre-training files lack them
    missing = [k for k in own if k not in fitting and not k.startswith(new)]
    if missing:
        raise UserError(f"--init {path} lacks {missing[0]}, or has it in another shape")
    model.load_state_dict(fitting, strict=False)
    if "head.weight" not in fitting:  # a new one starts near 0, as VideoMAE's
        model.head.weight.data.mul_(0.001)
        model.head.bias.data.zero_()
    print(f"{path}: {len(fitting)} tensors loaded, head: {'head.weight' in fitting}")


def param_groups(args, model):
    """Weight decay on matrices alone; the lower a layer, the slower it learns (--layer-decay)."""
    groups = {}
    top = len(model.blocks) + 1  # of all that comes after the blocks
    for name, p in model.named_parameters():
        layer = 0 if name.startswith("patch_embed.") else top
        if name.startswith("blocks."):  # blocks.0. and so on
            layer = 1 + int(name.split(".")[1])
        decay = args.weight_decay if p.ndim > 1 else 0.0
        scale = args.proj_lr if name.startswith("llm.proj") else args.layer_decay ** (top - layer)
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
