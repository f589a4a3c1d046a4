r"""Visual question answering in 2D and 3D: METER's fusion with one frozen LLM block after it.

    python train_vqa.py --block none random pretrained       # three arms on toy images, offline
    python train_vqa.py --data toy3d --block none random pretrained        # ... on toy 3D scenes
    python train_vqa.py --data easyvqa --root DIR --size 60  # {train,test}/{questions.json,images/}
    python train_vqa.py --data vqav2 --root DIR --blind      # without images: the number to beat
    python train_vqa.py --data sqa3d --root DIR  # scenes/{train,val,test}/SCENE.npz: points (n, 6)

The paper's run in 2D (VQAv2 69.60 -> 70.23 on test-dev, 1 day on 4 A100; not run here):

    torchrun --nproc-per-node=4 train_vqa.py --data vqav2 --root DIR --model base --size 224 \
        --vision openai/clip-vit-base-patch32 --text roberta-base --llm huggyllama/llama-7b \
        --block none pretrained --epochs 10 --batch-size 512 --warmup 1 --lr 5e-6 --proj-lr 10 \
        --min-count 9

A tenth of train's images or scenes selects the epoch; sqa3d without test files is tested on val.
Differs from the paper: cosine, betas 0.9 and 0.999 (METER: linear, 0.9 and 0.98), clipping, no
augmentation or token types; --size is a guess. vqav2 is tested on val2014 after train2014 (there:
test-dev after both). In 3D, METER replaces SQA3D's host (VoteNet, LSTM, MCAN); compare the paper's
48.09 EM@1 with its own mlp, 47.14, and random, 47.26: its baseline comes from another recipe.
Letters: B batch, N visual and M text tokens, D width, S side of an image, P points, G groups of
them, K answers.
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
from pathlib import Path
from typing import NamedTuple

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

TASK, BEST = "vqa", max  # BEST picks the best epoch by the first metric on validation data
torch.backends.mha.set_fastpath_enabled(False)  # so that FLOP counters and pictures see attention

# base: METER (https://arxiv.org/abs/2111.02387). depth: of a new image encoder; fusion: of Fusion
MODELS = {
    "micro": {"D": 64, "heads": 4, "dropout": 0.0, "depth": 1, "fusion": 2, "patch": 12},
    "small": {"D": 384, "heads": 6, "dropout": 0.1, "depth": 6, "fusion": 3, "patch": 16},
    "base": {"D": 768, "heads": 12, "dropout": 0.1, "depth": 12, "fusion": 6, "patch": 16},
}  # fmt: skip
WORD = re.compile(r"\w+|[^\w\s]")  # a word or a single sign
PAD = 1  # the token id of padding, as RoBERTa's
DATA_2D = ("toy2d", "easyvqa", "vqav2")
DATA_3D = ("toy3d", "sqa3d")


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


class Fusion(nn.Module):
    """METER's co-attention: in each layer, either stream attends to itself and to the other one.

    PyTorch's decoder layer is METER's: self-attention, cross-attention, MLP, a norm after each.
    """

    def __init__(self, D, depth, heads, dropout):
        super().__init__()
        kwargs = {"dropout": dropout, "activation": "gelu", "batch_first": True}
        layers = [nn.TransformerDecoderLayer(D, heads, 4 * D, **kwargs) for _ in range(2 * depth)]
        self.image_layers = nn.ModuleList(layers[:depth])
        self.text_layers = nn.ModuleList(layers[depth:])

    def forward(self, image, text, text_mask):
        """image (B, N, D), text (B, M, D), text_mask (B, M), True = real -> image, text."""
        padding = ~text_mask  # PyTorch's attention wants to know what is not real
        for image_layer, text_layer in zip(self.image_layers, self.text_layers, strict=True):
            seen = image  # for the text layer: the image tokens as they were before this layer
            image = image_layer(image, text, memory_key_padding_mask=padding)
            text = text_layer(text, seen, tgt_key_padding_mask=padding)
        return image, text


class SceneEncoder(nn.Module):
    """Groups of points (B, G, 32, 9) -> tokens (B, N, D), CLS first: a small PointNet."""

    def __init__(self, D):
        super().__init__()
        # NOTE(paper): there, tokens are proposals of a VoteNet, which needs boxes to learn from.
        # A point has 9 numbers: its place beside the centre of its group, its colour, the centre.
        first = [nn.Linear(9, D), nn.LayerNorm(D), nn.GELU(), nn.Linear(D, D)]
        self.pointnet = nn.Sequential(*first, nn.LayerNorm(D), nn.GELU(), nn.Linear(D, D))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))

    def forward(self, x):
        x = self.pointnet(x).amax(dim=2)  # (B, G, D): a maximum over points knows no order
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + G, D)


class VQA(nn.Module):
    """Encoders, METER's fusion, the LLM block on the visual tokens, poolers, an answer head."""

    def __init__(self, image_encoder, text_encoder, D, fusion, heads, dropout, K, llm):
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.fusion = Fusion(D, fusion, heads, dropout)
        self.llm = llm
        self.image_pooler = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.text_pooler = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        hidden = [nn.Linear(2 * D, 2 * D), nn.LayerNorm(2 * D), nn.GELU()]
        self.head = nn.Sequential(*hidden, nn.Linear(2 * D, K))

    def forward(self, x, ids):
        """Images (B, 3, S, S) or scenes (B, G, 32, 9), ids (B, M) -> logits of answers (B, K)."""
        image = self.image_encoder(x)  # (B, N, D)
        text, text_mask = self.text_encoder(ids)  # (B, M, D), (B, M)
        image, text = self.fusion(image, text, text_mask)
        image = self.llm(image)  # the frozen LLM block: this line is the paper
        image = self.image_pooler(image[:, 0])  # (B, D), of its CLS token
        text = self.text_pooler(text[:, 0])  # (B, D), of its first token
        return self.head(torch.cat([image, text], dim=1))


# ---------------------------------------------------------------- data: words and images
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


# ---------------------------------------------------------------- loss and metrics
def compute_loss(args, model, batch):
    """Binary cross-entropy with the soft scores: a sum over answers, a mean over questions."""
    x, ids, scores = [t.to(args.device) for t in batch]
    loss = F.binary_cross_entropy_with_logits(model(x, ids).float(), scores, reduction="sum")
    return loss / len(x)


@torch.no_grad()
def evaluate(args, model, questions):
    """Percent: the first guess's score, in all and by type; in 3D, whether one of ten is right."""
    model.eval()
    rows = []
    for x, ids, scores in batches(args, questions):
        logits = model(x.to(args.device), ids.to(args.device)).cpu()  # (B, K)
        best = logits.topk(min(10, logits.shape[1])).indices  # (B, 10), the best one first
        rows.append(100 * scores.gather(1, best))  # (B, 10): how right these answers are
    scores = torch.cat(rows)  # (n, 10)
    name = "em1" if args.data in DATA_3D else "acc"
    metrics = {name: scores[:, 0].mean().item()}
    if args.data in DATA_3D:
        metrics["em10"] = scores.amax(dim=1).mean().item()
    for kind in sorted({row.kind for row in questions.rows}):
        of_kind = [i for i, row in enumerate(questions.rows) if row.kind == kind]
        metrics[f"{name}_{kind}"] = scores[of_kind, 0].mean().item()
    return metrics


# ---------------------------------------------------------------- data: questions and answers
class Question(NamedTuple):
    visual: object  # the Path of an image or a scene; of the toys the number
    text: str
    scores: dict  # {answer: how right it is, from 0 to 1}, the most frequent answer first
    kind: str  # the type of its answer (vqav2) or of the question itself (all others)


NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(i) for i, word in enumerate(NUMBERS)} | {"none": "0"}


def normalise_answer(text):
    """As https://visualqa.org/evaluation.html, but apostrophes stay: "dont" is not "don't"."""
    text = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)", "", text.lower())  # 1,000 is 1000, u.s. is us
    words = re.sub(r"[;/\[\]\"{}()=+\\_><@`,?!-]", " ", text).split()
    return " ".join(DIGITS.get(w, w) for w in words if w not in ("a", "an", "the"))


def soft_scores(answers):
    """{answer: score}: VQA's min(n / 3, 1) of nine of ten people, averaged, is min(0.3 n, 1)."""
    counts = Counter(normalise_answer(answer) for answer in answers)
    return {answer: min(0.3 * n, 1.0) for answer, n in counts.most_common()}


def question_type(text):
    """SQA3D's types: how a question begins. (VQA v2 has types of answers in its files.)"""
    text = text.strip().capitalize()
    for word in ("What", "Is", "How", "Can", "Which"):
        if text.startswith(word):
            return word
    return "Others"


def read_json(path):
    with reading(path):
        return json.loads(path.read_bytes())


def read_annotated(questions, annotations):
    """Pairs (question, its annotation) of two JSON files, as VQA and SQA3D have them."""
    by_question = {a["question_id"]: a for a in read_json(annotations)["annotations"]}
    for q in read_json(questions)["questions"]:
        yield q, by_question[q["question_id"]]


def read_split(args, split):
    """The questions of a split: train, val or test."""
    root = Path(args.root)
    rows = []
    if args.data in ("toy2d", "toy3d"):
        images = range(1600) if split == "train" else range(1600, 2000)
        for i in images:
            for text, answer in draw_toy(i)[1]:  # without the image
                rows.append(Question(i, text, {answer: 1.0}, question_type(text)))
    elif args.data == "easyvqa":
        for text, answer, number in read_json(root / split / "questions.json"):
            image = root / split / "images" / f"{number}.png"
            rows.append(Question(image, text, {answer: 1.0}, question_type(text)))
    elif args.data == "vqav2":
        split = "train2014" if split == "train" else "val2014"
        questions = root / f"v2_OpenEnded_mscoco_{split}_questions.json"
        for q, a in read_annotated(questions, root / f"v2_mscoco_{split}_annotations.json"):
            image = root / split / f"COCO_{split}_{q['image_id']:012}.jpg"
            scores = soft_scores([answer["answer"] for answer in a["answers"]])
            rows.append(Question(image, q["question"], scores, a["answer_type"]))
    else:
        questions = root / f"v1_balanced_questions_{split}_scannetv2.json"
        if split == "test" and not questions.exists():
            return read_split(args, "val")
        annotations = root / f"v1_balanced_sqa_annotations_{split}_scannetv2.json"
        for q, a in read_annotated(questions, annotations):
            scene = root / "scenes" / split / f"{q['scene_id']}.npz"
            scores = {answer["answer"]: 1.0 for answer in a["answers"]}  # as written: SQA3D's way
            text = f"{q['situation']} {q['question']}"
            rows.append(Question(scene, text, scores, question_type(q["question"])))
    return rows


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


class Questions(Dataset):
    """Questions -> the image or scene (see look), tokens of the text (M), scores of answers (K)."""

    def __init__(self, args, rows):
        self.args = args
        self.rows = rows
        texts = [row.text for row in rows]
        self.ids = tokenise(texts, args.classes["words"], args.text, args.longest)  # (n, M)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        seed, index = item
        torch.default_generator.manual_seed(seed)  # the same for any number of workers
        row = self.rows[index]
        scores = [row.scores.get(answer, 0.0) for answer in self.args.classes["answers"]]
        return look(self.args, row.visual), self.ids[index], torch.tensor(scores)


def look(args, visual):
    """A file, or the number of a toy's -> image uint8 (3, S, S) or groups of points (G, 32, 9)."""
    G = min(256, args.points // 16)  # the paper's host has 256 proposals
    if args.blind:
        return torch.zeros((G, 32, 9) if args.data in DATA_3D else (3, args.size, args.size))
    if args.data not in DATA_3D:
        return to_pixels(draw_toy(visual)[0] if args.data == "toy2d" else visual, args.size)
    if args.data == "toy3d":  # the pixels of objects, each at some height
        pixels = v2.functional.pil_to_tensor(draw_toy(visual)[0]) / 255  # (3, 36, 36)
        y, x = pixels.amax(dim=0).nonzero(as_tuple=True)  # where it is not black
        points = torch.stack([x, -y, 6 * torch.rand(len(x)), *pixels[:, y, x]], dim=1)
    else:  # x, y, z in metres, z upwards, perhaps red, green, blue from 0 to 1
        with reading(visual), np.load(visual) as file:
            points = torch.tensor(file["points"]).float()
            if points[:1].shape not in ((1, 3), (1, 6)) or not points.isfinite().all():
                raise ValueError("its `points` are not (n, 3) or (n, 6), or not finite")
        points = F.pad(points, (0, 6 - points.shape[1]))  # missing colours are black
    # 1) P of them, in an order that the seed fixes; a scene with fewer repeats some
    order = torch.randperm(max(args.points, len(points)))
    points = points[order[: args.points] % len(points)]  # (P, 6)
    place = points[:, :3] - points[:, :3].mean(dim=0)  # toy3d's "Where" is now partly a guess
    place = place / (place.norm(dim=1).max() + 1e-6)  # NOTE(paper): SQA3D's stay metres
    # 2) the first G points are centres, each of a group of the 32 points nearest to it
    near = torch.cdist(place[:G], place).topk(32, largest=False).indices  # (G, 32)
    centres = place[:G, None].expand(-1, 32, -1)  # (G, 32, 3)
    offsets = place[near] - centres  # (G, 32, 3), then scaled by their deviation
    return torch.cat([offsets / (offsets.std() + 1e-6), points[near, 3:], centres], dim=2)


def load_data(args):
    """{"train", "val", "test": Questions}, for --eval the test questions alone."""
    data = {}
    with reading(f"--root {args.root}"):
        splits = {"test": read_split(args, "test")}
        if not args.eval:  # validation: every tenth image or scene, with all its questions
            train = read_split(args, "train")
            held = set(sorted({row.visual for row in train})[::10])
            splits["train"] = [row for row in train if row.visual not in held]
            splits["val"] = [row for row in train if row.visual in held]
            counts = Counter(next(iter(row.scores)) for row in splits["train"])  # most frequent
            answers = sorted(answer for answer, n in counts.items() if n >= args.min_count)
            words = [] if args.text else find_words(row.text for row in splits["train"])
            args.classes = {"answers": answers, "words": words}
        known = set(args.classes["answers"])
        for split, rows in splits.items():
            if split == "train":  # as METER: no question whose scores for our answers are all 0
                rows = [row for row in rows if known & row.scores.keys()]
            random.Random(0).shuffle(rows)  # so that --limit takes questions of all kinds
            if not rows[: args.limit]:
                raise ValueError(f"no question of {split} is left; see --limit and --min-count")
            data[split] = Questions(args, rows[: args.limit])
            for row in data[split].rows:
                if not (args.blind or isinstance(row.visual, int) or row.visual.exists()):
                    raise FileNotFoundError(row.visual)
    args.sizes = {split: len(questions) for split, questions in data.items()}
    return data


COLOURS = ("red", "green", "blue", "yellow")
SHAPES = {"box": (4, 4), "cube": (2, 2), "pole": (1, 5), "plate": (5, 1)}  # half width, half height


def draw_toy(index):
    """An image of two to four objects, each in a cell of its own, and four questions about it."""
    rng = random.Random(index)
    image = Image.new("RGB", (36, 36))
    cells = rng.sample(range(9), rng.randint(2, 4))  # of 3 x 3, each of 12 x 12 pixels
    shapes = rng.sample(list(SHAPES), len(cells))  # all different, so that "the box" is one
    colours = rng.choices(COLOURS, k=len(cells))  # may repeat
    for cell, shape, colour in zip(cells, shapes, colours, strict=True):
        x = 12 * (cell % 3) + rng.randint(5, 6)
        y = 12 * (cell // 3) + rng.randint(5, 6)
        w, h = SHAPES[shape]
        ImageDraw.Draw(image).rectangle((x - w, y - h, x + w, y + h), colour)
    colour = rng.choice([*colours, *COLOURS])  # more often one that is there
    return image, [
        (f"What color is the {shapes[0]}?", colours[0]),
        (f"What color is the {shapes[1]}?", colours[1]),
        (f"How many objects are {colour}?", str(colours.count(colour))),
        (f"Where is the {shapes[0]}?", ("left", "middle", "right")[cells[0] % 3]),
    ]


# ---------------------------------------------------------------- settings
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", choices=DATA_2D + DATA_3D, default="toy2d", help="toys are drawn here")
    p.add_argument("--root", default="data", help="where the data is")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: base")
    p.add_argument("--size", type=int, default=36, help="of images; easyvqa 60, photos 96 to 224")
    p.add_argument("--points", type=int, default=256, help="of a scene; paper: 40000")
    p.add_argument("--vision", metavar="NAME", help="a pre-trained CLIP; set --size 224, --lr")
    p.add_argument("--text", metavar="NAME", help="a pre-trained RoBERTa as text encoder")
    p.add_argument("--blind", action="store_true", help="hide images and scenes: a control")
    p.add_argument("--min-count", type=int, default=1, help="drop rarer answers; METER: 9")
    p.add_argument("--epochs", type=int, default=2, help="enough for the toys; paper: 10, 30 in 3D")
    p.add_argument("--batch-size", type=int, default=16, help="paper: 512, 32 in 3D")
    p.add_argument("--lr", type=float, default=1e-3, help="its peak; with --vision or --text: 5e-6")
    p.add_argument("--weight-decay", type=float, default=0.01, help="as METER")
    p.add_argument("--warmup", type=float, default=0.5, help="epochs; METER: a tenth of them")
    args = parse_shared(p, argv)
    args.longest = 100 if args.data in DATA_3D else 50  # tokens of a text; METER: 50
    clip_in_3d = args.vision and args.data in DATA_3D
    if clip_in_3d or args.points < 32 or args.size < MODELS[args.model]["patch"]:
        raise UserError("--vision is for images; --points: at least 32; --size: at least a patch")
    return args


def build_model(args, kind, seed):
    torch.manual_seed(seed)
    c = MODELS[args.model]
    D = c["D"]
    words = len(args.classes["words"])
    text_encoder = TextEncoder(args.text, D, words, args.longest, c["dropout"])
    if args.data in DATA_3D:
        image_encoder = SceneEncoder(D)
    else:
        image_encoder = ImageEncoder(args.vision, D, c["depth"], c["heads"], c["patch"], args.size)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    llm = LLMBlock(args.llm, D, args.layers, kind, seed, dtype)
    sizes = {"fusion": c["fusion"], "heads": c["heads"], "dropout": c["dropout"]}
    K = len(args.classes["answers"])
    return VQA(image_encoder, text_encoder, D, K=K, llm=llm, **sizes)


def param_groups(args, model):
    """Weight decay on all but vectors. Beside CLIP or RoBERTa, METER's rates: --lr is theirs."""
    groups = {}
    pretrained = {"image_encoder": args.vision, "text_encoder": args.text}
    for name, p in model.named_parameters():
        decay = args.weight_decay if p.ndim > 1 else 0.0
        new = not pretrained.get(name.partition(".encoder.")[0])  # `join` is, too
        scale = 1.0
        if name.startswith("llm.proj"):
            scale = args.proj_lr
        elif new and (args.vision or args.text):
            scale = 50.0 if name.startswith("head") else 5.0  # the rest learns faster
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
