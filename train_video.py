"""Action recognition: a VideoMAE-style ViT with one frozen LLM block after its last layer.

    python train_video.py --block none random pretrained    # three arms on toy clips, offline
    python train_video.py --data folder --root DIR          # DIR/{train,val}/CLASS/clip
    python train_video.py --data ucf101 --root DIR          # class folders and ucfTrainTestlist
    python train_video.py --data list --root DIR            # DIR/{train,val}.csv of "path label"
    torchrun --nproc-per-node=4 train_video.py ...          # several GPUs, the same batches

A clip is a .gif, a folder of frames, or with PyAV (pip install av) .mp4 .m4v .webm .avi .mkv .mov.

The paper's Something-Something run (Table 3; ViT-S 64.7 -> 65.9 top-1; 3 to 4 days on 4 A100; not
run here). Its released code uses layer 15 of LLaMA-7B, not the last; the paper does not say so:

    torchrun --nproc-per-node=4 train_video.py --data ssv2 --root DIR --model small \\
        --init videomae_small_ssv2.pth --llm huggyllama/llama-7b --layers 15 \\
        --block none random pretrained --recipe videomae --epochs 40 --warmup 5 --batch-size 24 \\
        --lr 9.4e-5 --layer-decay 0.7 --weight-decay 0.05 --views 2x3

Each run ends with a line `RESULT {json}`. Its checkpoint is chosen on clips held out of train; the
test clips (val) are used once. The same command again resumes, or prints what is done.

Differs from the paper: it tests the last epoch, we the one that validation selects; RandAugment is
torchvision's; gradients are clipped at norm 1.
Letters: B batch, V views of a clip, T frames, S side in pixels, N tokens, D width, C classes.
"""

import argparse
import json
import math
import os
import platform
import re
import sys
import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm

from llmblock import KINDS, LLMBlock, UserError, count_gflops, fail, read, save

TASK, SIGN = "video", 1  # best.pt: the largest SIGN * first metric on validation
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun
FREE = ("block", "seed", "seeds", "workers", "device", "compile", "out", "eval")  # may differ
HIDE_BAR = RANK > 0 or None  # None: tqdm draws no bar where there is no terminal

# VideoMAE's widths (https://arxiv.org/abs/2203.12602); micro is ours, for a laptop.
MODELS = {
    "micro": {"D": 64, "depth": 3, "heads": 4, "patch": 8, "size": 32, "frames": 8},
    "small": {"D": 384, "depth": 12, "heads": 6, "patch": 16, "size": 224, "frames": 16},
    "base": {"D": 768, "depth": 12, "heads": 12, "patch": 16, "size": 224, "frames": 16},
}
VIDEOS = (".mp4", ".m4v", ".webm", ".avi", ".mkv", ".mov")  # read with PyAV
FRAMES = (".jpg", ".jpeg", ".png")  # of a folder


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = ("toy", "folder", "ucf101", "ssv2", "list")
    p.add_argument("--data", choices=data, default="toy", help="toy is drawn by the script")
    p.add_argument("--root", default="data", help="directory of the data")
    p.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="of UCF101")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: small, base")
    p.add_argument("--size", type=int, help="side of the frames (default: the model's)")
    p.add_argument("--patch", type=int, help="side of a patch (default: the model's)")
    p.add_argument("--frames", type=int, help="of a clip (default: the model's)")
    p.add_argument("--views", default="2x3", help="tested views of a clip: temporal x spatial")
    p.add_argument("--recipe", choices=("light", "videomae"), default="light", help="augmentation")
    p.add_argument("--no-flip", action="store_true", help="never mirror (as always: ssv2, toy)")
    p.add_argument("--layer-decay", type=float, default=1.0, help="paper: small 0.7, base 0.75")
    p.add_argument("--init", metavar="FILE", help="VideoMAE weights; with --recipe videomae")
    p.set_defaults(epochs=3, batch_size=32, lr=2e-3, weight_decay=0.05, warmup=1)
    args = finish_args(p, argv)
    for name in ("size", "patch", "frames"):
        setattr(args, name, getattr(args, name) or MODELS[args.model][name])
    if min(args.size, args.patch, args.frames) < 1 or args.size % args.patch or args.frames % 2:
        raise UserError("--size must be a multiple of --patch, --frames even, all positive")
    if [n.isdecimal() and int(n) > 0 for n in args.views.split("x")] != [True, True]:
        raise UserError(f"--views {args.views} must be two numbers like 2x3")
    args.no_flip = args.no_flip or args.data in ("ssv2", "toy")
    return args


# ---------------------------------------------------------------- data


TOY_MOTIONS = ("right", "left", "up", "down", "clockwise", "counter-clockwise", "across", "upright")


def draw_toy(n, seed, T, S):
    """n clips of one moving sprite among still ones: uint8 (n, T, 3, S, S), labels (n), and where
    the sprite is (n, T, S, S) bool.

    The class is the motion. Frames wrap around at their edges and the sprite starts anywhere, so
    that each frame alone looks the same in all classes.
    """
    g = torch.Generator().manual_seed(seed)

    def rand(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    def sprite(x, cx, cy, low, high):  # centres (n, T), brightness; paints on x, returns where
        radius, grid = rand(0.1, 0.16, 1, 1, 1) * S, torch.arange(S) + 0.5
        dx = (grid - cx[..., None, None] + S / 2) % S - S / 2  # (n, T, 1, S)
        dy = (grid[:, None] - cy[..., None, None] + S / 2) % S - S / 2  # (n, T, S, 1)
        p = torch.where(rand(0, 1, 1, 1, 1) < 0.5, 1.0, 4.0)  # a diamond or nearly a square
        where = (dx / radius).abs() ** p + (dy / radius).abs() ** p < 1
        colour = rand(low, high, 1, 3, 1, 1)
        return torch.where(where[:, :, None], colour, x), where

    label = torch.randint(8, (n,), generator=g)
    t = torch.arange(T) / T
    way, turn = rand(0.5, 1, 1) * t, 2 * math.pi * (rand(0.7, 1.2, 1) * t + rand(0, 1, 1))  # (n, T)
    swing, orbit, no = turn.cos() / 4, turn.sin() / 4, 0 * way
    dx = torch.stack([way, -way, no, no, swing, swing, swing, no])[label, torch.arange(n)]
    dy = torch.stack([no, no, -way, way, orbit, -orbit, no, swing])[label, torch.arange(n)]
    x = F.interpolate(rand(0, 120, 3, 4, 4), size=(S, S), mode="bilinear")[:, None]
    x = x.expand(n, T, 3, S, S)
    for _ in range(2):  # clutter
        x, _ = sprite(x, rand(0, S, 1), rand(0, S, 1), 0, 160)
    x, mask = sprite(x, S * (rand(0, 1, 1) + dx), S * (rand(0, 1, 1) + dy), 160, 255)
    x = x + 10 * torch.randn(x.shape, generator=g)
    return x.clamp(0, 255).to(torch.uint8), label, mask


def segment_frames(n, T):
    """Frames (1, T) for training: a random one in each of T equal parts of a clip of n frames."""
    return ((torch.arange(T) + torch.rand(1, T)) * n / T).long().clamp(max=n - 1)


def view_frames(n, T, views):
    """Frames (views, T) for testing: evenly spaced, the views interleaved."""
    offsets = (torch.arange(views)[:, None] + 0.5) / views
    return ((torch.arange(T) + offsets) * n / T).long()


def read_video(path, choose):
    """choose(n), and those of all n decoded frames as {index: uint8 (H, W, 3)}."""
    import av

    try:
        with av.open(str(path)) as file:
            frames = list(file.decode(video=0))
            choice, rgb = choose(len(frames)), av.video.reformatter.VideoReformatter()
            return choice, {
                i: rgb.reformat(frames[i], format="rgb24").to_ndarray()
                for i in choice.unique().tolist()
            }
    except av.FFmpegError as e:
        raise ValueError(e) from e


def natural(path):
    """The key that sorts frame_2 before frame_10: numbers in a name count as numbers."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", path.name)], path.name


def to_rgb(image):
    if image.mode[0] in "IF":  # 16 or 32 bits: Pillow would cut off all above 255
        raise ValueError(f"its mode is {image.mode}, only 8 bits a channel are read")
    return image.convert("RGB")


def read_clip(path, choose):
    """The frames of a clip that choose(n) picks, (V, T) out of n: uint8 (V, T, 3, H, W)."""
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in FRAMES), key=natural)
        choice = choose(len(files))
        frames = {i: np.array(to_rgb(Image.open(files[i]))) for i in choice.unique().tolist()}
    elif path.suffix.lower() == ".gif":
        with Image.open(path) as gif:
            choice, frames = choose(gif.n_frames), {}
            for i in choice.unique().tolist():
                gif.seek(i)
                frames[i] = np.array(gif.convert("RGB"))
    else:
        choice, frames = read_video(path, choose)
    x = torch.stack([torch.from_numpy(frames[i]) for i in choice.flatten().tolist()])
    x = x.permute(0, 3, 1, 2)
    return x.unflatten(0, choice.shape)


class Clips(Dataset):
    """Clips, uint8 (n, T, 3, S, S) in memory or a list of files, and their labels y (n).

    Workers decode and transform files. Samples are requested by (index, seed), so augmentation
    depends neither on workers nor on processes. A sample is V views of a clip, uint8
    (V, T, 3, S, S), and its label. views is (temporal, spatial), or None to train. A broken clip
    becomes a black one with label -1, which no loss and no metric counts.
    """

    def __init__(self, clips, y, args, views=None):
        self.clips, self.y = clips, torch.as_tensor(y)
        self.args, self.views = args, views

    def __len__(self):
        return len(self.y)

    def choose(self, n):
        if self.views:
            return view_frames(n, self.args.frames, self.views[0])
        copies = 2 if self.args.recipe == "videomae" else 1  # repeated augmentation
        return torch.cat([segment_frames(n, self.args.frames) for _ in range(copies)])

    def __getitem__(self, item):
        (i, seed), clip, S = item, self.clips[item[0]], self.args.size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone
            try:
                x, y = read_clip(clip, self.choose), int(self.y[i])
            except Exception as e:  # a broken file may raise anything
                print(f"skipped {clip}: {type(e).__name__}: {e}", file=sys.stderr)
                x, y = torch.zeros(*self.choose(1).shape, 3, S, S, dtype=torch.uint8), -1
            if self.views:
                return crops(x, S, self.views[1]), y
            return torch.stack([augment(view, self.args) for view in x]), y

    def batches(self, pairs, size, workers):
        """Yield x uint8 (size, V, T, 3, S, S) and y (size) for a list of pairs (index, seed)."""
        if torch.is_tensor(self.clips):
            for i in torch.tensor([i for i, _ in pairs]).split(size):
                yield self.clips[i][:, None], self.y[i]
        else:
            yield from DataLoader(self, size, sampler=pairs, num_workers=workers)


def augment(x, args):
    """All frames of a view (T, 3, H, W) in one and the same way -> (T, 3, S, S)."""
    if args.recipe == "videomae":  # 21 of torchvision's 30 is timm's m7 of 10
        steps = [v2.RandomResizedCrop(args.size, scale=(0.08, 1.0)), v2.RandAugment(4, 21)]
    else:
        steps = [v2.RandomResizedCrop(args.size, scale=(0.8, 1.0)), v2.RandomChannelPermutation()]
    return v2.Compose(steps + [v2.RandomHorizontalFlip()] * (not args.no_flip))(x)


def crops(x, S, n):
    """(V, T, 3, H, W), short side to S pixels -> n crops along the long side (n V, T, 3, S, S)."""
    x = v2.functional.resize(x, S)
    side = -2 if x.shape[-2] > x.shape[-1] else -1
    spare = x.shape[side] - S
    starts = [spare // 2] if n == 1 else [spare * i // (n - 1) for i in range(n)]
    return torch.cat([x.narrow(side, start, S) for start in starts])


def is_clip(path):
    return path.suffix.lower() in (*VIDEOS, ".gif") or path.is_dir()


def find_clips(args):
    """Class names, and of train and test the list of pairs (path, class name)."""
    root, found = Path(args.root), {}
    if args.data == "folder":
        for split in ("train", "val"):
            clips = [p for p in (root / split).glob("*/*") if is_clip(p)]
            found[split] = [(p, p.parent.name) for p in sorted(clips)]
        names = sorted({name for _, name in found["train"]})
        if not names:
            raise ValueError("there is no train/CLASS/clip")
    elif args.data == "ucf101":
        lists = root / "ucfTrainTestlist"
        lines = (lists / "classInd.txt").read_text("utf-8-sig").split("\n")
        names = [line.split()[1] for line in lines if line.strip()]
        for split in ("train", "test"):
            lines = (lists / f"{split}list0{args.split}.txt").read_text("utf-8-sig").split("\n")
            ids = [line.split()[0] for line in lines if line.strip()]
            folder = next((p for p in root.iterdir() if (p / ids[0]).exists()), root)
            found[split] = [(folder / i, i.split("/")[0]) for i in ids]
    elif args.data == "ssv2":
        names = json.loads((root / "labels/labels.json").read_text("utf-8-sig"))
        names = sorted(names, key=lambda name: int(names[name]))
        for split in ("train", "validation"):
            rows = json.loads((root / f"labels/{split}.json").read_text("utf-8-sig"))
            ids = [f"20bn-something-something-v2/{row['id']}.webm" for row in rows]
            labels = [row["template"].replace("[", "").replace("]", "") for row in rows]
            found[split] = [(root / i, name) for i, name in zip(ids, labels, strict=True)]
    else:
        for split in ("train", "val"):
            lines = (root / f"{split}.csv").read_text("utf-8-sig").split("\n")
            rows = [line.rsplit(maxsplit=1) for line in lines if line.strip()]
            found[split] = [(root / path, label) for path, label in rows]
        names = sorted({label for _, label in found["train"]}, key=int)
    return names, list(found.values())


def load_data(args, meta=None):
    """{"train": Clips, "val" and "test": [Clips], "meta": rebuilds the model, "sizes": text}."""
    views = (1, 1) if args.data == "toy" else tuple(int(n) for n in args.views.split("x"))
    if args.data == "toy":
        parts = [draw_toy(500, seed, args.frames, args.size)[:2] for seed in range(14)]
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        names, found = list(TOY_MOTIONS), [(x[:-1000], y[:-1000]), (x[-1000:], y[-1000:])]
    else:
        try:
            names, found = find_clips(args)
            found = [existing(pairs, names, args.root) for pairs in found]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
            found = f"{type(e).__name__}: {e}"  # repr shows the whole of a list not in UTF-8
            raise UserError(f"{args.root} is not laid out like {args.data}: {found}") from e
    order, test_order = (  # lists come class by class: --limit must not take the first classes
        torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).tolist()
        for _, y in found
    )
    held_out, sets = len(order) // 10, []
    chosen = [(order[held_out:], None), (order[:held_out], (1, 1)), (test_order, views)]
    for (indices, v), (clips, y) in zip(chosen, [found[0], *found], strict=True):
        indices = indices[: args.limit]
        clips = clips[indices] if torch.is_tensor(clips) else [clips[i] for i in indices]
        sets.append(Clips(clips, [int(y[i]) for i in indices], args, v))
    train, val, test = sets
    sizes = f"{len(train)} train, {len(val)} val, {len(test)} test clips, {len(names)} classes"
    if min(map(len, sets)) < WORLD:
        raise UserError(f"{args.root}: {sizes} are too few")
    meta = {"classes": names}
    return {"train": train, "val": [val], "test": [test], "meta": meta, "sizes": sizes}


def existing(pairs, names, root):
    """Lists of paths and of labels, for (path, class name); a few missing clips are reported."""
    there = [(path, names.index(name)) for path, name in pairs if path.exists()]
    lost = [path for path, _ in pairs if not path.exists()]
    check_broken(len(lost), len(pairs), f"{root} ({lost[0]} is not there)" if lost else root)
    if wrong := [path for path, _ in there if not is_clip(path)]:
        raise UserError(f"{wrong[0]} is no clip: neither {', '.join(VIDEOS)}, .gif nor a folder")
    if any(path.suffix.lower() in VIDEOS for path, _ in there) and not find_spec("av"):
        raise UserError(f"reading {', '.join(VIDEOS)} needs PyAV: pip install av")
    return [path for path, _ in there], [label for _, label in there]


def train_batches(data, args, gen):
    """Yield an epoch of x float (B V, T, 3, S, S), targets (B V, C): the generator decides all."""
    clips, C = data["train"], len(data["meta"]["classes"])
    n, B = len(clips), min(args.batch_size, len(clips) // WORLD * WORLD)
    order, seeds = torch.randperm(n, generator=gen), torch.randint(2**31, (n,), generator=gen)
    pairs = torch.stack([order, seeds], dim=1)[: n // B * B]  # whole batches only
    pairs = pairs[RANK::WORLD].tolist()  # each batch is shared among the processes
    broken = torch.zeros((), device=args.device)
    for x, y in clips.batches(pairs, B // WORLD, args.workers):
        V = x.shape[1]
        draw = torch.rand(1, B, V, generator=gen)[:, RANK::WORLD].flatten(1).to(args.device)
        x, y = x.flatten(0, 1).to(args.device), y.repeat_interleave(V).to(args.device)
        broken += (y < 0).sum() / V
        targets = F.one_hot(y.clamp(min=0), C) * (y >= 0)[:, None].float()
        x = prepare(x, args)
        if args.recipe == "videomae":  # the same mixture and hole in all frames
            x, targets = mix(x.flatten(1, 2), targets, draw)
            x = x.unflatten(1, (-1, 3))
        yield x, targets
    check_broken(int(all_sum(broken)), n, "this epoch")


def prepare(x, args):
    """Clips uint8 (B, T, 3, S, S) -> float."""
    if args.recipe == "videomae":
        return normalise(x)
    # NOTE(paper): from scratch, on a thousand clips, a background's colour is soon learned by
    # heart. So each clip is given mean 0 in each colour, and deviation 1.
    x = x / 255
    x = x - x.mean((1, 3, 4), keepdim=True)
    return x / x.square().mean((1, 2, 3, 4), keepdim=True).sqrt().clamp(min=1e-3)


def normalise(x):
    """uint8 -> float with ImageNet's mean and deviation, whatever the data."""
    return v2.functional.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


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


class VideoViT(nn.Module):
    """VideoMAE's vision transformer: tubelets of two frames, no CLS, head on the mean token."""

    def __init__(self, D, depth, heads, patch, size, frames, C, drop_path, llm):
        super().__init__()
        self.embed = nn.Conv3d(3, D, (2, patch, patch), (2, patch, patch))
        N = frames // 2 * (size // patch) ** 2
        self.register_buffer("pos", sinusoids(N, D), persistent=False)
        rates = [drop_path * i / (depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*[Block(D, heads, rate) for rate in rates])
        self.norm, self.head = nn.LayerNorm(D, eps=1e-6), nn.Linear(D, C)
        self.llm = llm

    def forward(self, x):
        x = self.embed(x.transpose(1, 2))  # (B, T, 3, S, S) -> (B, D, T/2, S/patch, S/patch)
        x = x.flatten(2).transpose(1, 2) + self.pos  # (B, N, D)
        x = self.blocks(x)  # the host's own encoder
        x = self.llm(x)  # the frozen LLM block: this line is the paper
        x = self.norm(x.mean(1))
        return self.head(x)  # (B, C)


def sinusoids(N, D):
    """Fixed positions (N, D): sine and cosine in turn, of wavelengths from 2 pi to 10000 2 pi
    (https://arxiv.org/abs/1706.03762, section 3.5).
    """
    angle = torch.arange(N)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)  # (N, D/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


# Names in VideoMAE's .pth files and in Hugging Face's, and here; in this order.
RENAME = {
    "videomae.": "", "encoder.layer.": "blocks.", "encoder.": "",
    "embeddings.patch_embeddings.projection": "embed", "patch_embed.proj": "embed",
    "attention.attention.": "attn.", "attn.proj": "out", "attention.output.dense": "out",
    "attn.qkv": "qkv", "query.": "q_", "key.": "k_", "value.": "v_",
    "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "intermediate.dense": "mlp.0", "output.dense": "mlp.2",
    "layernorm_before": "norm1", "layernorm_after": "norm2", "fc_norm": "norm",
}  # fmt: skip
UNUSED = ("decoder.", "encoder_to_decoder.", "mask_token", "head.", "classifier.", "encoder.norm.")
UNUSED += ("videomae.layernorm.",)  # norms of every token: ours comes after the mean


def init_from(path, model):
    """Fill the host from VideoMAE weights, pre-trained or fine-tuned, all but its head."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # VideoMAE's files have `args`
            state = load_file(path) if path.endswith(".safetensors") else read(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"--init {path} is no .safetensors file: {e}") from e
    if isinstance(state, dict):  # .pth: pre-trained, fine-tuned
        state = state.get("model", state.get("module", state))
    if not isinstance(state, dict):
        raise UserError(f"--init {path} holds no weights")
    tensors = {"norm.weight": model.norm.weight, "norm.bias": model.norm.bias}  # if it has none
    for name, x in state.items():
        if not (name := str(name)).startswith(UNUSED):
            for old, new in RENAME.items():
                name = name.replace(old, new)
            tensors[name] = x
    D = len(model.norm.weight)
    for a in [f"blocks.{i}.attn." for i in range(len(model.blocks))]:
        if a + "q_bias" in tensors:  # that of the keys would change no softmax: there is none
            tensors[a + "k_bias"] = torch.zeros(D)
        for end, shape in (("_bias", (D,)), ("_weight", (D, D))):
            names = [a + part + end for part in "qkv"]
            if all(getattr(tensors.get(name), "shape", None) == shape for name in names):
                qkv = torch.cat([tensors.pop(name) for name in names])
                tensors[a.replace("attn.", "qkv.") + end[1:]] = qkv
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
    config = MODELS[args.model] | {"patch": args.patch, "size": args.size, "frames": args.frames}
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    llm = LLMBlock(args.llm, config["D"], args.layers, kind, seed=seed, dtype=dtype)
    drop_path = 0.1 if args.recipe == "videomae" else 0.0
    model = VideoViT(**config, C=len(meta["classes"]), drop_path=drop_path, llm=llm)
    if args.init and not args.eval:
        init_from(args.init, model)
        model.head.weight.data.mul_(0.001)  # as the paper's code does
    return model


def example(args):
    """One input of the model, to count its GFLOPs."""
    return (torch.zeros(1, args.frames, 3, args.size, args.size),)


def param_groups(model, args):
    """Weight decay on matrices only; each layer learns --layer-decay times as fast as the next."""
    groups, last = {}, len(model.blocks) + 1
    for name, p in model.named_parameters():
        layer = 0 if name.startswith("embed.") else last
        if name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        groups.setdefault((p.ndim > 1, last - layer), []).append(p)
    return [
        {"params": ps, "weight_decay": args.weight_decay * on, "lr_scale": args.layer_decay**below}
        for (on, below), ps in groups.items()
    ]


def compute_loss(model, batch):
    x, targets = batch
    logits = model(x).float()  # (B, C)
    return -(targets * logits.log_softmax(1)).sum() / targets.sum().clamp(min=1)


@torch.no_grad()
def evaluate(model, sets, args):
    """Top-1 and top-5 in percent; of a clip's views the softmax is averaged."""
    model.eval()
    clips, counts = sets[0], torch.zeros(3, device=args.device)  # correct, among five, all
    pairs, V = [(i, 0) for i in range(RANK, len(clips), WORLD)], math.prod(clips.views)
    for x, y in clips.batches(pairs, max(1, args.batch_size // V), args.workers):
        y = y.to(args.device)
        with autocast(args):
            logits = model(prepare(x.flatten(0, 1).to(args.device), args))  # (B V, C)
        p = logits.float().softmax(1).view(len(y), -1, logits.shape[1]).mean(1)  # (B, C)
        hits = p.topk(min(5, p.shape[1])).indices == y[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), (y >= 0).sum()])
    counts = all_sum(counts)
    check_broken(len(clips) - int(counts[2]), len(clips), "evaluation")
    top1, top5 = (counts[:2] / counts[2]).tolist()
    return {"top1": round(100 * top1, 3), "top5": round(100 * top5, 3)}


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
