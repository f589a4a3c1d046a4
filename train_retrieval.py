r"""Image-text retrieval: METER's fusion and one frozen LLM block after it score every pair.

    python train_retrieval.py --block none random pretrained     # three arms on toy images, offline
    python train_retrieval.py --data karpathy --root DIR --size 96       # Flickr8k, Flickr30k, COCO

DIR holds Karpathy's dataset_*.json and images/ (of COCO images/train2014/ and images/val2014/).
The paper's run (Flickr30k image retrieval R@1 49.66 -> 50.22; 1 day on 4 A100; not run here):

    torchrun --nproc-per-node=4 train_retrieval.py --data karpathy --root DIR --model base \
        --vision openai/clip-vit-base-patch32 --text roberta-base --llm huggyllama/llama-7b \
        --block none random pretrained --size 224 --epochs 10 --batch-size 512 --warmup 1 \
        --lr 5e-6 --proj-lr 10

val selects the epoch (its first 100 images); test is used once, every image with every caption.
Differs from the paper: METER adds token types, trains on val, too, selects on test, augments, and
its false captions may be the image's own; Adam's betas (0.9, 0.98) and linear decay there.
Letters: B batch, K captions ranked, N visual, M text tokens, D width, S side; n images, C captions.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import default_collate as collate
from torchvision.transforms import v2
from tqdm import tqdm

from llmblock import KINDS, LLMBlock, UserError, fail, read, reading, run, save

TASK, BEST = "retrieval", max  # BEST picks the best epoch by the first metric on validation data
torch.backends.mha.set_fastpath_enabled(False)  # so that FLOP counters and pictures see attention

# base: METER (https://arxiv.org/abs/2111.02387). depth: a new image encoder's; fusion: a stream's
MODELS = {
    "micro": {"D": 64, "heads": 4, "dropout": 0.0, "depth": 1, "fusion": 2, "patch": 12},
    "small": {"D": 384, "heads": 6, "dropout": 0.1, "depth": 6, "fusion": 3, "patch": 16},
    "base": {"D": 768, "heads": 12, "dropout": 0.1, "depth": 12, "fusion": 6, "patch": 16},
}  # fmt: skip
CAPTIONS = 16  # ranked in a training sample, as in METER: 1 true and 15 false ones
LONGEST = 40  # tokens of a caption, as in METER
WORD = re.compile(r"\w+|[^\w\s]")  # a word or a single sign
PAD = 1  # the token id of padding, as RoBERTa's


# ---------------------------------------------------------------- the model
class ImageEncoder(nn.Module):
    """METER's, a CLIP: images uint8 (B, 3, S, S) -> tokens (B, N, D), CLS first."""

    def __init__(self, name, D, depth, heads, patch, S):
        super().__init__()
        size = {"hidden_size": D, "num_hidden_layers": depth + 1, "num_attention_heads": heads}
        size |= {"intermediate_size": 4 * D, "patch_size": patch, "image_size": S}
        config = transformers.CLIPVisionConfig(**size)
        self.encoder = load_model(transformers.CLIPVisionModel, name, "clip", config).float()
        self.encoder.encoder.layers = self.encoder.encoder.layers[:-1]  # METER drops the last
        self.join = nn.Linear(self.encoder.config.hidden_size, D) if name else nn.Identity()

    def forward(self, x):
        mean = [0.48145466, 0.4578275, 0.40821073]  # of CLIP's own training images
        x = v2.functional.normalize(x / 255, mean, [0.26862954, 0.26130258, 0.27577711])
        x = self.encoder(x, interpolate_pos_encoding=True).last_hidden_state
        return self.join(self.encoder.post_layernorm(x))  # (B, N, D)


class TextEncoder(nn.Module):
    """METER's, a RoBERTa: token ids (B, M) -> tokens (B, M, D), and their mask, True = real."""

    def __init__(self, name, D, words, longest, dropout):
        super().__init__()
        # A new one has embeddings and no layers: those of the fusion read the text, too.
        size = {"hidden_size": D, "num_hidden_layers": 0, "hidden_dropout_prob": dropout}
        size |= {"vocab_size": 3 + words, "max_position_embeddings": longest + 2}
        config = transformers.RobertaConfig(**size)
        self.encoder = load_model(transformers.RobertaModel, name, "roberta", config).float()
        self.encoder.pooler = None  # METER has poolers of its own, after the fusion
        self.join = nn.Linear(self.encoder.config.hidden_size, D) if name else nn.Identity()

    def forward(self, ids):
        ids = ids[:, : (ids != PAD).sum(dim=1).max()]  # no longer than the longest text
        mask = ids != PAD
        return self.join(self.encoder(ids, attention_mask=mask).last_hidden_state), mask


def load_model(cls, name, family, config=None):
    """A model or tokeniser of transformers, pre-trained; without a name, new from its config."""
    if not name:
        return cls(config)
    with reading(name):
        found = transformers.AutoConfig.from_pretrained(name).model_type
        if found != family:
            raise ValueError(f"it is a {found}, only {family} is served here")
        return cls.from_pretrained(name)


class Retrieval(nn.Module):
    """METER with the LLM block on its visual tokens. In each layer of its fusion, either stream
    attends to itself and to the other one, which is what PyTorch's decoder layer does."""

    def __init__(self, image_encoder, text_encoder, llm, D, depth, heads, dropout):
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        kwargs = {"dropout": dropout, "activation": "gelu", "batch_first": True}
        layers = [nn.TransformerDecoderLayer(D, heads, 4 * D, **kwargs) for _ in range(2 * depth)]
        self.image_layers = nn.ModuleList(layers[:depth])
        self.text_layers = nn.ModuleList(layers[depth:])
        self.llm = llm
        self.image_pooler = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.text_pooler = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        # As in METER's code: the head of image-text matching (ITM; 0 no, 1 match) never trains,
        # and the ranking head starts from its row 1.
        self.itm_score = nn.Linear(2 * D, 2).requires_grad_(False)
        self.rank_output = nn.Linear(2 * D, 1, bias=False)
        self.rank_output.weight.data = self.itm_score.weight[1:].clone()

    def fuse(self, image, text, text_mask):
        """Tokens of B pairs, image (B, N, D) and text (B, M, D) -> their features (B, 2 D)."""
        for image_layer, text_layer in zip(self.image_layers, self.text_layers, strict=True):
            seen = image  # for the text layer: the image tokens as they were before this layer
            image = image_layer(image, text, memory_key_padding_mask=~text_mask)
            text = text_layer(text, seen, tgt_key_padding_mask=~text_mask)
        image = self.llm(image)  # the frozen LLM block: this line is the paper
        image = self.image_pooler(image[:, 0])  # (B, D)
        text = self.text_pooler(text[:, 0])
        return torch.cat([image, text], dim=1)

    def forward(self, x, itm_x, ids):
        """Scores (B, K) of images x (B, 3, S, S) with captions ids (B, K, M), the first of which is
        true; and ITM's logits (B, 2) of images itm_x with the first ones."""
        B, K, _ = ids.shape
        text, text_mask = self.text_encoder(ids.flatten(0, 1))  # (B * K, M, D), (B * K, M)
        image = self.image_encoder(x).repeat_interleave(K, dim=0)  # (B * K, N, D)
        scores = self.rank_output(self.fuse(image, text, text_mask)).view(B, K)
        itm_image = self.image_encoder(itm_x)  # (B, N, D), with every K-th caption
        pairs = self.fuse(itm_image, text[::K], text_mask[::K])
        return scores, self.itm_score(pairs)


# ---------------------------------------------------------------- loss and metrics
def compute_loss(args, model, batch):
    x, itm_x, ids, match = [t.to(args.device) for t in batch]
    scores, itm_logits = model(x, itm_x, ids)
    first = torch.zeros_like(match)  # the true caption's place
    # NOTE(paper): METER's code never applies the weight 0.5 that its configuration has for ITM.
    return F.cross_entropy(scores, first) + F.cross_entropy(itm_logits, match)


@torch.no_grad()
def evaluate(args, model, captions):
    """Score all images with all captions, each encoded once. A chunk has B K pairs, as a batch."""
    model.eval()
    chunks = captions.ids.to(args.device).split(args.batch_size // WORLD * CAPTIONS)
    texts = [model.text_encoder(ids) for ids in chunks]
    scores = torch.zeros(len(captions.images), len(captions))  # (n, C)
    for i in tqdm(range(RANK, len(scores), WORLD), "all pairs", disable=RANK > 0 or None):
        x = to_pixels(captions.images[i], args.size)
        image = model.image_encoder(x[None].to(args.device))  # (1, N, D)
        row = []
        for text, text_mask in texts:
            pairs = model.fuse(image.expand(len(text), -1, -1), text, text_mask)
            row.append((pairs * model.rank_output.weight).sum(1))  # fp32: bf16 would make ties
        scores[i] = torch.cat(row)
    if WORLD > 1:
        dist.all_reduce(scores)  # the sum: rows of other processes are 0 here
    return recalls(scores, captions.owner)


def recalls(scores, owner):
    """Percent of captions that find their image (ir), and of images that find one of their captions
    (tr) among the first 1, 5, 10. scores (n, C); caption c is of image owner[c]."""
    true = owner == torch.arange(len(scores))[:, None]  # (n, C)
    # A rank counts what is not below the true one: ties, NaN and, in ir, the true one itself.
    own = scores[owner, torch.arange(len(owner))]  # (C)
    best = scores.where(true, -torch.inf).amax(1, keepdim=True)  # (n, 1)
    ranks = {"ir": (~(scores < own)).sum(0), "tr": 1 + (~true & ~(scores < best)).sum(1)}
    metrics = {}
    for way in ("ir", "tr"):
        for k in (1, 5, 10):
            metrics[f"{way}{k}"] = 100 * (ranks[way] <= k).float().mean().item()
    return metrics


# ---------------------------------------------------------------- data
def find_words(texts):
    """Our vocabulary: words that come twice or more. The others teach what an unknown word is."""
    counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
    return sorted(word for word, n in counts.items() if n > 1)


def tokenise(texts, words, roberta, longest):
    """Token ids (n, M). Of our own, 0 begins a text, 1 is padding, 2 an unknown word."""
    if roberta:
        tokeniser = load_model(transformers.AutoTokenizer, roberta, "roberta")
        lists = tokeniser(texts, truncation=True, max_length=longest)["input_ids"]
    else:
        numbers = {word: i for i, word in enumerate(words, 3)}
        lists = [[0] + [numbers.get(w, 2) for w in WORD.findall(text.lower())] for text in texts]
    rows = [torch.tensor(ids[:longest]) for ids in lists]
    return pad_sequence(rows, batch_first=True, padding_value=PAD)


def to_pixels(image, S):
    """An image, or its file, -> pixels uint8 (3, S, S) of its central square, as in METER."""
    if isinstance(image, Path):
        with reading(image), Image.open(image) as file:
            image = file.convert("RGB")
    steps = [v2.Resize(S, v2.InterpolationMode.BICUBIC), v2.CenterCrop(S), v2.PILToTensor()]
    return v2.Compose(steps)(image)


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


class Captions(Dataset):
    """Captions as token ids (C, M); caption c is of images[owner[c]].

    A sample: a caption's image; for ITM that image again or, half of the time, another one; the
    caption's tokens ahead of 15 false ones' (K, M); whether ITM's image is the right one.
    """

    def __init__(self, args, rows):
        self.S = args.size
        self.images = [image for image, _ in rows]
        texts = [text for _, captions in rows for text in captions]
        self.ids = tokenise(texts, args.classes, args.text, LONGEST)
        self.owner = torch.tensor([i for i, (_, captions) in enumerate(rows) for _ in captions])

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, item):
        seed, index = item
        torch.default_generator.manual_seed(seed)  # so workers and processes change nothing
        others = (self.owner != self.owner[index]).nonzero()[:, 0]  # captions of other images
        false = others[torch.randint(len(others), (CAPTIONS,))].tolist()  # [0] for ITM, 15 to rank
        match = torch.randint(2, ()).item()
        pair = (index, index if match else false[0])
        images = [to_pixels(self.images[self.owner[i]], self.S) for i in pair]
        return *images, self.ids[[index, *false[1:]]], match


def read_rows(args, split):
    """Rows (image or its file, its captions) of train, val or test."""
    if args.data == "toy":
        return [draw_toy(i) for i in TOY[split]]
    root = Path(args.root)
    rows = []
    with reading(f"{root}/dataset_*.json (there must be one)"):
        [captions_file] = root.glob("dataset_*.json")
        for image in json.loads(captions_file.read_text("utf-8"))["images"]:
            # COCO has more of train as restval; an image without captions cannot be asked for.
            if image["split"].replace("restval", "train") == split and image["sentences"]:
                file = root / "images" / image.get("filepath", "") / image["filename"]
                rows.append((file.resolve(strict=True), [s["raw"] for s in image["sentences"]]))
    return rows


def load_data(args):
    """{"train", "val", "test": Captions}, for --eval the test set alone."""
    data = {}
    for split in ["test"] if args.eval else ["train", "val", "test"]:
        rows = read_rows(args, split)[: args.limit]
        if len(rows) < 2:
            raise UserError(f"{args.root} has {len(rows)} {split} images, at least 2 are needed")
        if split == "val":
            rows = rows[:100]  # all pairs of Flickr30k's 1,000 images would take half an epoch
        if split == "train":  # its words are the vocabulary; --eval has them from the checkpoint
            args.classes = find_words(text for _, captions in rows for text in captions)
        data[split] = Captions(args, rows)
    args.sizes = {split: len(captions.images) for split, captions in data.items()}
    return data


COLOURS = ("red", "green", "blue", "yellow", "white", "magenta")
SHAPES = {"square": (5, 5), "pole": (2, 5), "plate": (5, 2), "dot": (2, 2)}  # half width and height
SCENES = list(product(combinations(SHAPES, 2), combinations(COLOURS, 2)))  # 90 of them
random.Random(0).shuffle(SCENES)
TOY = {"train": range(400), "val": range(400, 440), "test": range(440, 480)}  # scenes recur


def draw_toy(index):
    """Two objects, each in a patch of its own, and two captions. Images 2 i and 2 i + 1 show one
    scene with exchanged colours: what tells them apart is which colour is which shape's."""
    rng = random.Random(index)
    shapes, colours = SCENES[index // 2 % 90]
    if index % 2:
        colours = colours[::-1]
    image = Image.new("RGB", (36, 36), "dimgrey")
    for cell, shape, colour in zip(rng.sample(range(9), 2), shapes, colours, strict=True):
        x = 12 * (cell % 3) + rng.randint(5, 6)
        y = 12 * (cell // 3) + rng.randint(5, 6)
        w, h = SHAPES[shape]
        ImageDraw.Draw(image).rectangle((x - w, y - h, x + w, y + h), colour)
    first = f"{colours[0]} {shapes[0]}"
    second = f"{colours[1]} {shapes[1]}"
    return image, [f"{first} and {second}", f"{second} and {first}"]


# ---------------------------------------------------------------- settings
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", choices=("toy", "karpathy"), default="toy", help="toy is drawn here")
    p.add_argument("--root", default="data", help="where the data is")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: base")
    p.add_argument("--size", type=int, default=36, help="of images; photos 96 to 224")
    p.add_argument("--vision", metavar="NAME", help="a pre-trained CLIP; set --size 224, --lr")
    p.add_argument("--text", metavar="NAME", help="a pre-trained RoBERTa as text encoder")
    p.add_argument("--epochs", type=int, default=3, help="enough for the toy; paper: 10")
    p.add_argument("--batch-size", type=int, default=4, help="captions; paper: 512")
    p.add_argument("--lr", type=float, default=7e-4, help="its peak; with --vision or --text: 5e-6")
    p.add_argument("--weight-decay", type=float, default=0.01, help="as METER")
    p.add_argument("--warmup", type=float, default=0.5, help="epochs; METER: a tenth of them")
    return parse_shared(p, argv)


def build_model(args, kind, seed):
    torch.manual_seed(seed)
    c = MODELS[args.model]
    image = ImageEncoder(args.vision, c["D"], c["depth"], c["heads"], c["patch"], args.size)
    text = TextEncoder(args.text, c["D"], len(args.classes), LONGEST, c["dropout"])
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    llm = LLMBlock(args.llm, c["D"], args.layers, kind, seed, dtype)
    return Retrieval(image, text, llm, c["D"], c["fusion"], c["heads"], c["dropout"])


def param_groups(args, model):
    """Weight decay on all but vectors. With pre-trained encoders METER's rates: --lr is theirs and
    the ranking head's, what else is new has 5 times that, projections --proj-lr times."""
    groups = {}
    slow = {"image_encoder": args.vision, "text_encoder": args.text, "rank_output.weight": True}
    for name, p in model.named_parameters():
        decay = args.weight_decay if p.ndim > 1 else 0.0
        new = not slow.get(name.partition(".encoder.")[0])  # so is `join`
        scale = 5.0 if new and (args.vision or args.text) else 1.0
        if name.startswith("llm.proj"):
            scale = args.proj_lr
        if p.requires_grad:
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
