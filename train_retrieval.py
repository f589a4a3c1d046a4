"""Image-text retrieval: co-attention with one frozen LLM block after it ranks every pair.

    python train_retrieval.py --block none random pretrained   # three arms on a toy, offline
    python train_retrieval.py --data karpathy --root DIR       # Flickr8k, Flickr30k or COCO
    python train_retrieval.py --data karpathy --root DIR --json dataset_coco.json
    torchrun --nproc-per-node=4 train_retrieval.py ...         # several GPUs, the same batches

DIR holds Karpathy's dataset_*.json and, anywhere below, the images that it names. COCO's restval
belongs to train. A sample is a caption with its image; --limit counts images. Validation is the
first 100 images of val or, where there is none, of a tenth of train that is held out; the test is
on all pairs of image and caption.

The paper's run (Flickr30k image retrieval R@1/5/10 49.66/80.86/89.48 -> 50.22/82.26/90.08; not run
here):

    python train_retrieval.py --data karpathy --root DIR --model base --llm huggyllama/llama-7b \\
        --block none random pretrained --vision openai/clip-vit-base-patch32 --text roberta-base \\
        --epochs 10 --batch-size 512 --lr 2.5e-5 --weight-decay 0.01 --warmup 1

Each run ends with a line `RESULT {json}`: ir1, ir5, ir10 is how often (percent) a caption finds its
image among the first 1, 5, 10, and tr1, tr5, tr10 how often an image finds one of its captions.
Its checkpoint is chosen on validation; the test images are used once. The same command again
resumes, or prints what is done.

Differs from the paper: METER trains on train and val, and validates on test; its false captions
may be the image's own; its ITM fuses images and captions once more; its images have 384 pixels, in
their own proportions and augmented, here they are squeezed into a square.
Letters: B batch, K captions of an image (1 true, 15 false), N visual and M text tokens, D width, S
side of an image, n images and C captions of a gallery.
"""

import argparse
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from llmblock import KINDS, LLMBlock, UserError, count_gflops, fail, read, save

TASK, SIGN = "retrieval", 1  # best.pt: the largest SIGN * first metric on validation
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun
FREE = ("block", "seed", "seeds", "workers", "device", "compile", "out", "eval")  # may differ
HIDE_BAR = RANK > 0 or None  # None: tqdm draws no bar where there is no terminal

# base has METER's width and depth (https://arxiv.org/abs/2111.02387); depth layers see before the
# fusion layers see and read. micro is ours.
MODELS = {
    "micro": {"D": 64, "depth": 1, "fusion": 2, "heads": 4, "dropout": 0.0, "S": 36, "patch": 12},
    "small": {"D": 384, "depth": 6, "fusion": 3, "heads": 6, "dropout": 0.1, "S": 224, "patch": 16},
    "base": {"D": 768, "depth": 12, "fusion": 6, "heads": 12, "dropout": 0.1, "S": 224,
             "patch": 16},
}  # fmt: skip
LONGEST = 40  # tokens of a caption, METER's
VALIDATE = 100  # images: all pairs of Flickr30k's 1,000 would take about as long as an epoch
PAIRS = 256  # scored at a time: 50,000 visual tokens of base, enough work for a GPU


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", choices=("toy", "karpathy"), default="toy", help="toy is drawn here")
    p.add_argument("--root", default="data", help="directory of the data")
    p.add_argument("--json", metavar="NAME", help="Karpathy's file, where DIR has several")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: base")
    p.add_argument("--size", type=int, help="side of the images (default: the model's)")
    p.add_argument("--vision", metavar="NAME", help="pre-trained image encoder: openai/clip-...")
    p.add_argument("--text", metavar="NAME", help="pre-trained text encoder: roberta-base")
    p.add_argument("--false", type=int, help="captions to rank a true one with (toy: 3, paper: 15)")
    p.set_defaults(epochs=4, batch_size=32, lr=5e-4, weight_decay=0.01, warmup=0.5)
    args = finish_args(p, argv)
    args.size = args.size or MODELS[args.model]["S"]
    if args.size < 1 or (args.size % MODELS[args.model]["patch"] and not args.vision):
        raise UserError(f"--size {args.size} is not a multiple of {MODELS[args.model]['patch']}")
    args.false = (3 if args.data == "toy" else 15) if args.false is None else args.false
    if args.false < 1:
        raise UserError(f"--false {args.false} must be at least 1")
    return args


# ---------------------------------------------------------------- data


COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230),
           "yellow": (230, 210, 40), "white": (245, 245, 245), "purple": (170, 40, 200),
           "orange": (240, 130, 20), "cyan": (40, 200, 210)}  # fmt: skip
SHAPES = ("disc", "square", "triangle", "cross")


def draw_toy(n, seed, S):
    """n images, uint8 (n, 3, S, S), of two or three objects, and two captions of each. The second
    quarter has the scenes of the first, but two objects have exchanged their colours: to tell them
    apart, one must bind colours to shapes.
    """
    g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    x = 40 + 60 * torch.rand(n, 3, 1, 1, generator=g).expand(n, 3, S, S)
    cell = torch.rand(n, 9, generator=g).argsort(1)[:, :3]  # of 3 x 3, a different one for each
    shape = torch.rand(n, 4, generator=g).argsort(1)  # no two objects have the same
    colour = torch.rand(n, 8, generator=g).argsort(1)
    number, quarter = torch.randint(2, 4, (n,), generator=g), n // 4
    for values in (cell, shape, colour, number):
        values[quarter : 2 * quarter] = values[:quarter]
    colour[quarter : 2 * quarter, :2] = colour[:quarter, :2].flip(1)
    grid = 3 * (torch.arange(S) + 0.5) / S
    for i in range(3):
        shift = 0.5 + 0.1 * (2 * torch.rand(2, n, 1, 1, generator=g) - 1)
        u = (grid[None, None, :] - (cell[:, i] % 3)[:, None, None] - shift[0]) / 0.4
        v = (grid[None, :, None] - (cell[:, i] // 3)[:, None, None] - shift[1]) / 0.4
        square, cross = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
        triangle = (v < 0.85) & (v > 2 * u.abs() - 1)
        forms = [u**2 + v**2 < 0.9, square < 0.8, triangle, (square < 1) & (cross < 0.3)]
        where = torch.stack(forms)[shape[:, i], torch.arange(n)] & (number > i)[:, None, None]
        tint = torch.tensor(list(COLOURS.values()))[colour[:, i], :, None, None]
        x = torch.where(where[:, None], tint, x)
    x = (x + 10 * torch.randn(x.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    captions = []
    for m, *columns in zip(*(t.tolist() for t in (number, colour, shape, cell)), strict=True):
        objects = [
            (f"{list(COLOURS)[a]} {SHAPES[b]}", divmod(c, 3))
            for a, b, c in zip(*columns, strict=False)
        ][:m]
        captions.append([tell_toy(objects, rng) for _ in range(2)])
    return x, captions


def tell_toy(objects, rng):
    """A caption of objects (name, (row, column)): the first of any order, and where others are."""
    (text, (row, column)), *others = rng.sample(objects, len(objects))
    for i, (name, (r, c)) in enumerate(others):
        sides = ["left of" if column < c else "right of"] * (column != c)
        sides += ["above" if row < r else "below"] * (row != r)
        text += f"{' and' * (i > 0)} {rng.choice(sides)} {name}"
    return text


def read_toy(args):
    """{split: [(number of an image, its captions)]} and all images (n, 3, S, S) of the toy."""
    splits, images = {}, []
    for seed, (split, n) in enumerate((("train", 2000), ("val", 40), ("test", 100))):
        x, captions = draw_toy(n, seed, args.size)
        splits[split] = list(enumerate(captions, sum(map(len, images))))
        images.append(x)
    return splits, torch.cat(images)


def read_karpathy(args):
    """{split: [(name of an image, its captions)]} and {name: path} of all files below --root, where
    the path is None if several have that name.
    """
    files, splits = {}, {}
    for p in sorted(Path(args.root).rglob("*")):
        if p.is_file():
            files[p.name] = None if p.name in files else p  # None: no telling which is meant
    lists = [name for name in files if name.endswith(".json")]
    name = args.json or (lists[0] if len(lists) == 1 else None)
    if not files.get(name):
        found = ", ".join(lists[:5]) or "none"
        raise UserError(f"{args.root} has these .json files: {found}. Name Karpathy's with --json")
    try:
        for image in json.loads(files[name].read_text("utf-8-sig"))["images"]:
            split = "train" if image["split"] == "restval" else image["split"]
            row = image["filename"], [sentence["raw"] for sentence in image["sentences"]]
            if not all(isinstance(text, str) for text in (split, row[0], *row[1])):
                raise TypeError(f"{row} is not all text")
            if row[1]:  # images without captions are left out
                splits.setdefault(split, []).append(row)
    except Exception as e:
        raise UserError(f"{files[name]} is not in Karpathy's format: {e!r}") from e
    if not (splits.get("train") and splits.get("test")):
        found = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items()) or "none"
        raise UserError(f"{files[name]} lacks a train or a test split, it has images: {found}")
    return splits, files


def to_rgb(image):
    if image.mode[0] in "IF":  # 16 or 32 bits: Pillow would cut off all above 255
        raise ValueError(f"its mode is {image.mode}, only 8 bits a channel are read")
    return image.convert("RGB")


def read_image(path, shape):
    """uint8 (3, S, S), squeezed into the square: no text loses what it speaks of."""
    with Image.open(path) as file:
        image = to_rgb(file).resize(shape[1:], Image.Resampling.BICUBIC)
    return v2.functional.pil_to_tensor(image)


def decode_some(decode, shape, dtype, files):
    """decode(file, shape) of some files, zeros where one is broken; and which are good, 1 or 0."""
    x = torch.zeros(len(files), *shape, dtype=dtype)
    good = torch.zeros(len(files), dtype=torch.uint8)
    for i, file in enumerate(files):
        try:
            x[i], good[i] = decode(file, shape), 1
        except Exception as e:  # a broken file may raise anything
            print(f"skipped {file}: {type(e).__name__}: {e}", file=sys.stderr)
    return x, good


def decode_once(files, decode, shape, dtype, args):
    """What decode gives for each of n files, (n, *shape), and which of them are good (n).

    It is written to a file whose name is a hash of all that it depends on, and mapped from there.
    """
    stats = [(str(p), p.is_file() and (p.stat().st_size, p.stat().st_mtime_ns)) for p in files]
    key = repr([inspect.getsource(decode), shape, stats]).encode()
    path = Path(args.out) / "cache" / f"{TASK}-{hashlib.sha256(key).hexdigest()[:16]}.bin"
    if not path.exists():
        some = functools.partial(decode_some, decode, shape, dtype)
        loader = DataLoader(files, 8, collate_fn=some, num_workers=args.workers)
        path.parent.mkdir(parents=True, exist_ok=True)
        part, good = path.with_suffix(f".{os.getpid()}"), []
        try:
            with part.open("wb") as file:
                for x, fine in tqdm(loader, f"reading {args.root}", disable=HIDE_BAR):
                    file.write(x.numpy())
                    good.append(fine)
                file.write(torch.cat(good).numpy())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    rows = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    good = rows[-len(files) :] > 0
    check_broken(len(good) - int(good.sum()), len(good), args.root)
    return rows[: -len(files)].view(dtype).view(-1, *shape), good


def split_words(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def tokenise(texts, words, longest, args):
    """Token ids (n, M), padding is -1, of texts, and how many of them were too long and are cut.

    Of our own words, 0 is CLS, where every text begins, and 1 stands for what is unknown.
    """
    if args.text:
        lists = encoder(args.text, transformers.AutoTokenizer)(texts)["input_ids"]
    else:
        number = {word: i for i, word in enumerate(words, 2)}
        lists = [[0, *(number.get(word, 1) for word in split_words(text))] for text in texts]
    end = lists[0][-1:] if args.text else []  # which closes a text
    cut = [[*ids[: longest - len(end)], *end] if len(ids) > longest else ids for ids in lists]
    rows = [torch.tensor(ids, dtype=torch.int32) for ids in cut]
    return pad_sequence(rows, True, -1), sum(len(ids) > longest for ids in lists)


def trim(ids):
    """Token ids (..., M) without the columns that are padding in all texts."""
    return ids[..., : (ids >= 0).sum(-1).max()]


class Gallery:
    """n images, the rows which (n) of visuals, and their C captions: tokens ids (C, M), the image
    of each, owner (C), and a number for each different text, text (C). Its samples are captions.
    """

    def __init__(self, split, rows, visuals, which, words, args):
        self.split, self.visuals, self.which = split, visuals, torch.tensor(which)
        self.owner = torch.tensor([i for i, (_, texts) in enumerate(rows) for _ in texts])
        texts, number = [text for _, texts in rows for text in texts], {}
        self.ids, self.cut = tokenise(texts, words, LONGEST, args)
        plain = [" ".join(split_words(text)) for text in texts]
        self.text = torch.tensor([number.setdefault(text, len(number)) for text in plain])

    def __len__(self):
        return len(self.owner)

    def draw_false(self, true, K, gen):
        """K captions (B, K) for each of the captions true (B): of other images, of another text."""
        true, false = true[:, None], torch.randint(len(self), (len(true), K), generator=gen)
        while True:
            bad = (self.owner[false] == self.owner[true]) | (self.text[false] == self.text[true])
            if not bad.any():
                return false
            false[bad] = torch.randint(len(self), (int(bad.sum()),), generator=gen)

    def has_false(self):
        """Whether every caption has at least one false one."""
        ruled_out = self.owner.bincount()[self.owner] + self.text.bincount()[self.text]
        return bool((ruled_out - 1 < len(self)).all())  # itself was counted twice


def read_images(names, files, args):
    """uint8 (n, 3, S, S), and which of them are good (n)."""
    if twice := [name for name in names if name in files and not files[name]]:
        raise UserError(f"{args.root}: several files have the name {twice[0]}")
    lost = [name for name in names if name not in files]
    if len(lost) > max(1, 0.01 * len(names)):
        text = f"{len(lost)} of {len(names)} images are not there, such as {lost[0]}"
        raise UserError(f"{args.root}: {text}")
    paths = [files.get(name, Path(args.root) / name) for name in names]
    return decode_once(paths, read_image, (3, args.size, args.size), torch.uint8, args)


def load_data(args, meta=None):
    """{"train": Gallery, "val" and "test": [Gallery], "meta": ..., "sizes": text}."""
    splits, source = read_toy(args) if args.data == "toy" else read_karpathy(args)
    if not splits.get("val"):
        rows, held = splits["train"], len(splits["train"]) // 10
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        splits["val"] = [rows[i] for i in order[:held]]
        splits["train"] = [rows[i] for i in order[held:]]
    most = {"train": args.limit, "val": min(VALIDATE, args.limit or VALIDATE), "test": args.limit}
    splits = {split: splits[split][:n] for split, n in most.items()}
    names = sorted({name for rows in splits.values() for name, _ in rows})
    if args.data == "toy":
        visuals, good = source[names], [True] * len(names)
    else:
        visuals, good = read_images(names, source, args)
    number = {name: i for i, name in enumerate(names) if good[i]}
    splits = {split: [row for row in rows if row[0] in number] for split, rows in splits.items()}
    meta, data, sizes = meta or {"words": find_words(splits["train"], args)}, {}, []
    for split, rows in splits.items():
        if len(rows) < max(2, WORLD):
            raise UserError(f"{args.root}: {len(rows)} {split} images are too few")
        which = [number[name] for name, _ in rows]
        data[split] = s = Gallery(split, rows, visuals, which, meta["words"], args)
        text = f"{len(rows)} {split} images with {len(s)} captions"
        sizes.append(text + f" (ir1, tr1 by chance: {100 / len(rows):.2f})" * (split != "train"))
    if not data["train"].has_false() or len(data["train"]) < WORLD:
        raise UserError(f"{args.root}: there are too few different train captions")
    sizes += [
        f"{len(meta['words'])} words",
        f"{sum(s.cut for s in data.values())} captions are cut",
    ]
    if skipped := [name for name in names if name not in number]:
        sizes.append(f"{len(skipped)} images are missing or broken: {', '.join(skipped[:5])}")
    return {**data, "val": [data["val"]], "test": [data["test"]], "meta": meta,
            "sizes": ", ".join(sizes)}  # fmt: skip


def find_words(rows, args):
    """What the model can read. Words seen once stay unknown, to learn what unknown is."""
    words = Counter(word for _, texts in rows for text in texts for word in split_words(text))
    return [] if args.text else sorted(word for word, n in words.items() if n > 1)


def train_batches(data, args, gen):
    """Yield an epoch of batches (x, tokens (B, K, M) of captions, the first of which is the true
    one, and which of them ITM judges (B)), decided by the generator alone.
    """
    s = data["train"]
    B = min(args.batch_size, len(s) // WORLD * WORLD)
    order = torch.randperm(len(s), generator=gen)
    for true in order[: len(s) // B * B].split(B):
        captions = torch.cat([true[:, None], s.draw_false(true, args.false, gen)], dim=1)
        judged = torch.randperm(B, generator=gen) % 2  # the true one for half of the images
        captions, judged = captions[RANK::WORLD], judged[RANK::WORLD]  # processes share a batch
        x, ids = s.visuals[s.which[s.owner[captions[:, 0]]]], trim(s.ids[captions])
        yield x.to(args.device), ids.to(args.device), judged.to(args.device)


def normalise(x):
    """uint8 -> float with ImageNet's mean and deviation, whatever the data."""
    return v2.functional.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


# ---------------------------------------------------------------- model


class Attention(nn.Module):
    """x (B, N, D) attends to those tokens of y (B, M, D) that mask (B, M), or None, calls real."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads, self.q, self.kv = heads, nn.Linear(D, D), nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, D)

    def forward(self, x, y, mask):
        (B, N, D), M = x.shape, y.shape[1]
        q = self.q(x).view(B, N, self.heads, -1).transpose(1, 2)  # (B, h, N, d)
        k, v = self.kv(y).view(B, M, 2, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, h, M, d)
        mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, M)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(x.transpose(1, 2).reshape(B, N, D))


class Layer(nn.Module):
    """A pre-norm transformer layer; where cross, it attends to another stream, too."""

    def __init__(self, D, heads, dropout, cross=False):
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(D), nn.LayerNorm(D), nn.Dropout(dropout)
        self.own = Attention(D, heads)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        if cross:
            self.norm3, self.norm4 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.cross = Attention(D, heads)

    def forward(self, x, mask, y=None, y_mask=None):
        own = self.norm1(x)
        x = x + self.drop(self.own(own, own, mask))
        if y is not None:
            x = x + self.drop(self.cross(self.norm3(x), self.norm4(y), y_mask))
        return x + self.drop(self.mlp(self.norm2(x)))  # (B, N, D)


class ImageEncoder(nn.Module):
    """Patches of images uint8 (B, 3, S, S) as tokens (B, N, D), CLS first; their mask is None."""

    def __init__(self, D, depth, heads, dropout, S, patch):
        super().__init__()
        self.embed, self.cls = nn.Conv2d(3, D, patch, patch), nn.Parameter(torch.zeros(1, 1, D))
        self.pos = nn.Parameter(0.02 * torch.randn(1, 1 + (S // patch) ** 2, D))
        self.layers = nn.ModuleList([Layer(D, heads, dropout) for _ in range(depth)])

    def forward(self, x):
        x = self.embed(normalise(x)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        for layer in self.layers:
            x = layer(x, None)
        return x, None


class TextEncoder(nn.Module):
    """Word embeddings with positions of token ids (B, M), where -1 is padding; and the mask."""

    def __init__(self, D, words, longest):
        super().__init__()
        self.words = nn.Embedding(2 + words, D)
        self.pos = nn.Parameter(0.02 * torch.randn(1, longest, D))

    def forward(self, ids):
        return self.words(ids.clamp(min=0)) + self.pos[:, : ids.shape[1]], ids >= 0


def encoder(name, kind=transformers.AutoModel, **options):
    """What transformers has under a name or in a directory."""
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise UserError(f"transformers finds no encoder {name}: {e}") from e


class PretrainedVision(nn.Module):
    """Tokens of a pre-trained vision transformer, of CLIP or alone, trained along."""

    def __init__(self, name, D):
        super().__init__()
        model = encoder(name, dtype=torch.float32)
        self.encoder = getattr(model, "vision_model", model)
        look = encoder(name, transformers.AutoImageProcessor)
        self.mean, self.std = look.image_mean, look.image_std
        self.encoder.pooler = None  # of no use here
        self.join = nn.Linear(self.encoder.config.hidden_size, D)

    def forward(self, x):
        x = v2.functional.normalize(x / 255, self.mean, self.std)
        x = self.encoder(x, interpolate_pos_encoding=True).last_hidden_state
        last = getattr(self.encoder, "post_layernorm", nn.Identity())  # CLIP has it for CLS alone
        return self.join(last(x)), None


class PretrainedText(nn.Module):
    """Tokens of a pre-trained language encoder, trained along."""

    def __init__(self, name, D):
        super().__init__()
        self.encoder = encoder(name, dtype=torch.float32)
        self.encoder.pooler = None
        self.join = nn.Linear(self.encoder.config.hidden_size, D)

    def forward(self, ids):
        mask, padding = ids >= 0, self.encoder.config.pad_token_id
        x = self.encoder(ids.where(mask, padding), attention_mask=mask).last_hidden_state
        return self.join(x), mask


class Retrieval(nn.Module):
    """METER: two streams that attend to themselves and to each other, poolers, two heads.

    NOTE(paper): METER is post-norm; this is pre-norm, which trains from scratch.
    """

    def __init__(self, vision, text, D, fusion, heads, dropout, llm):
        super().__init__()
        self.encode_images, self.encode_texts = vision, text
        self.seeing, self.reading = (
            nn.ModuleList([Layer(D, heads, dropout, cross=True) for _ in range(fusion)])
            for _ in range(2)
        )
        self.norm, self.text_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.pool, self.text_pool = nn.Linear(D, D), nn.Linear(D, D)
        self.rank_head, self.itm_head = nn.Linear(2 * D, 1), nn.Linear(2 * D, 2)
        self.llm = llm

    def fuse(self, x, mask, t, t_mask):
        """Of pairs of tokens (B, N, D), (B, M, D): scores (B), and logits of no match, match."""
        for image_layer, text_layer in zip(self.seeing, self.reading, strict=True):
            x, t = image_layer(x, mask, t, t_mask), text_layer(t, t_mask, x, mask)
        x = self.llm(x, mask)  # the frozen LLM block: this line is the paper
        x, t = self.norm(x)[:, 0], self.text_norm(t)[:, 0]
        x = torch.cat([self.pool(x), self.text_pool(t)], dim=1).tanh().float()
        with torch.autocast(x.device.type, enabled=False):  # bf16 has ties, which count as wrong
            return self.rank_head(x)[:, 0], self.itm_head(x)  # (B), (B, 2)

    def forward(self, x, ids):
        """Images (B, 3, S, S) with K captions each, tokens (B, K, M): logits (B, K), (B, K, 2)."""
        B, K, _ = ids.shape
        x, mask = self.encode_images(x)  # once for all captions of an image
        x = x.repeat_interleave(K, dim=0)  # (B * K, N, D)
        score, match = self.fuse(x, mask, *self.encode_texts(ids.flatten(0, 1)))
        return score.view(B, K), match.view(B, K, 2)


def build_model(args, kind, seed, meta):
    torch.manual_seed(seed)
    c = MODELS[args.model]
    size = {k: c[k] for k in ("D", "heads", "dropout")}
    if args.vision:
        vision = PretrainedVision(args.vision, c["D"])
    else:
        vision = ImageEncoder(**size, depth=c["depth"], S=args.size, patch=c["patch"])
    if args.text:
        text = PretrainedText(args.text, c["D"])
    else:
        text = TextEncoder(c["D"], len(meta["words"]), LONGEST)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    llm = LLMBlock(args.llm, c["D"], args.layers, kind, seed=seed, dtype=dtype)
    return Retrieval(vision, text, **size, fusion=c["fusion"], llm=llm)


def example(args):
    """One input of the model, to count its GFLOPs: an image and a caption of 16 words."""
    images = torch.zeros(1, 3, args.size, args.size, dtype=torch.uint8)
    return images, torch.zeros(1, 1, 16, dtype=torch.int32)


def param_groups(model, args):
    """Weight decay on matrices only: not on biases, norms, positions, CLS and words. With encoders
    that are pre-trained, METER's rates: theirs is a fifth of --lr; the LLM's projections have the
    paper's, ten times that of the image encoder.
    """
    groups = {}
    for name, p in model.named_parameters():
        scale = 1.0
        if args.vision or args.text:
            scale = 0.2 if ".encoder." in name else 2.0 if name.startswith("llm.proj") else 1.0
        bare = ("cls", "pos", "words.weight")
        decay = args.weight_decay * (p.ndim > 1 and not name.endswith(bare))
        groups.setdefault((decay, scale), []).append(p)
    return [{"params": ps, "weight_decay": d, "lr_scale": s} for (d, s), ps in groups.items()]


def compute_loss(model, batch):
    """The true caption among K, and ITM: whether one of them, true or false, belongs to the image.

    As METER does, the sum, without the weight of 0.5 that its configuration has for ITM. Its ITM
    fuses pairs of its own; ours reuses ranked ones, which saves a seventeenth of the work.
    """
    x, ids, judged = batch
    score, match = model(x, ids)
    match = match[torch.arange(len(x)), judged]  # (B, 2)
    rank_loss = F.cross_entropy(score, torch.zeros_like(judged))
    return rank_loss + F.cross_entropy(match, (judged == 0).long())


def recalls(scores, owner):
    """Percent: ir, captions that find their image among the first 1, 5, 10; tr, images that find
    one of their captions. scores are (n, C), owner (C) says whose the captions are.

    A rank is the number of wrong ones that are not strictly worse than the best right one: a model
    that scores everything alike has found nothing.
    """
    right = owner == torch.arange(len(scores))[:, None]  # (n, C)
    own = scores.gather(0, owner[None])  # (1, C), each with its only image
    best = scores.where(right, -torch.inf).amax(1, keepdim=True)  # (n, 1)
    ranks = {"ir": (~(scores < own) & ~right).sum(0), "tr": (~(scores < best) & ~right).sum(1)}
    return {
        f"{way}{k}": round(100 * (rank < k).double().mean().item(), 3)
        for way, rank in ranks.items()
        for k in (1, 5, 10)
    }


@torch.no_grad()
def evaluate(model, sets, args):
    """Recalls where every image meets every caption. Each is encoded once, then pairs are fused:
    an image at a time with up to PAIRS captions. The processes share the images.
    """
    model.eval()
    s, device = sets[0], args.device
    by_length = (s.ids >= 0).sum(1).argsort(stable=True)  # little padding
    scores = torch.zeros(len(s.which), len(s), device=device)
    with autocast(args):
        images = [model.encode_images(s.visuals[i].to(device)) for i in s.which.split(PAIRS)]
        texts = [
            (c, *model.encode_texts(trim(s.ids[c]).to(device))) for c in by_length.split(PAIRS)
        ]
        images, start = torch.cat([x for x, _ in images]), time.perf_counter()  # (n, N, D)
        for i in tqdm(range(RANK, len(images), WORLD), f"scoring {s.split}", disable=HIDE_BAR):
            for c, t, t_mask in texts:
                x = images[i].expand(len(c), -1, -1)
                scores[i, c.to(device)] = model.fuse(x, None, t, t_mask)[0]
    scores = all_sum(scores).cpu()
    if s.split == "test":
        speed = scores.numel() / (time.perf_counter() - start)
        text = (
            f"scored {scores.numel()} pairs at {speed:.0f} pairs/s: 1,000 images x 5,000 captions"
        )
        say(f"{text} would take {5e6 / speed / 60:.1f} min")
    return recalls(scores, s.owner)


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
