"""Visual question answering in 2D and 3D: co-attention with one frozen LLM block after it.

    python train_vqa.py --block none random pretrained        # three arms on toy images, offline
    python train_vqa.py --block none random pretrained --data toy3d         # ... on toy 3D scenes
    python train_vqa.py --data easyvqa --root DIR             # {train,test}/questions.json, images/
    python train_vqa.py --data vqav2 --root DIR --blind       # without seeing: the number to beat
    python train_vqa.py --data sqa3d --root DIR               # or scanqa, with scenes named by id
    torchrun --nproc-per-node=4 train_vqa.py ...              # several GPUs, the same batches

Files may lie anywhere below DIR. vqav2 is trained on train2014 and tested on val2014; sqa3d has its
own val and test; scanqa's test answers are secret, so its val is the test. Where nothing else is
left for it, validation is every tenth image or scene of train, with all its questions.

The paper's runs (VQAv2 69.60 -> 70.23 on test-dev, 1 day on 4 A100; SQA3D 47.20 -> 48.09 EM@1;
not run here):

    torchrun --nproc-per-node=4 train_vqa.py --data vqav2 --root DIR --model base \\
        --llm huggyllama/llama-7b --block none random pretrained \\
        --vision openai/clip-vit-base-patch32 --text roberta-base --epochs 10 \\
        --batch-size 512 --lr 2.5e-5 --weight-decay 0.01 --warmup 1
    python train_vqa.py --data sqa3d --root DIR --model base --llm huggyllama/llama-7b \\
        --block none random pretrained --epochs 30 --batch-size 32 --lr 1e-4 --weight-decay 0.01

Each run ends with a line `RESULT {json}`. Its checkpoint is chosen on validation; the test
questions are used once. The same command again resumes, or prints what is done.

Differs from the paper: METER trains on val2014, too, and drops questions whose answers are not in
the vocabulary when it validates, here they count as wrong; images are squeezed into a square and
not augmented; for 3D see NOTE(paper).
Letters: B batch, N visual and M text tokens, P points, G groups, K points in a group, D width, S
side of an image, C answers.
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
import zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
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

TASK, SIGN = "vqa", 1  # best.pt: the largest SIGN * first metric on validation
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun
FREE = ("block", "seed", "seeds", "workers", "device", "compile", "out", "eval")  # may differ
HIDE_BAR = RANK > 0 or None  # None: tqdm draws no bar where there is no terminal

# base has METER's width and depth (https://arxiv.org/abs/2111.02387); depth layers see before the
# fusion layers see and read. In 3D, K and the width W are Point-BERT's; micro is ours.
MODELS = {
    "micro": {"D": 64, "depth": 1, "fusion": 2, "heads": 4, "dropout": 0.0,
              "S": 36, "patch": 12, "W": 32},
    "small": {"D": 384, "depth": 6, "fusion": 3, "heads": 6, "dropout": 0.1,
              "S": 224, "patch": 16, "W": 256},
    "base": {"D": 768, "depth": 12, "fusion": 6, "heads": 12, "dropout": 0.1,
             "S": 224, "patch": 16, "W": 256},
}  # fmt: skip
DATA_2D, DATA_3D = ("toy2d", "easyvqa", "vqav2"), ("toy3d", "scanqa", "sqa3d")
K = 32  # points in a group


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", choices=DATA_2D + DATA_3D, default="toy2d", help="toys are drawn here")
    p.add_argument("--root", default="data", help="directory of the data")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: base")
    p.add_argument("--size", type=int, help="side of the images (default: the model's)")
    p.add_argument("--points", type=int, help="of a scene (paper: 40000, micro: 1024, toy: 256)")
    p.add_argument("--objects", action="store_true", help="tokens are the file's objects, in 3D")
    p.add_argument("--vision", metavar="NAME", help="pre-trained image encoder: openai/clip-...")
    p.add_argument("--text", metavar="NAME", help="pre-trained text encoder: roberta-base")
    p.add_argument("--blind", action="store_true", help="hide the image or scene: a control")
    p.add_argument("--min-count", type=int, help="drop rarer answers (default: 1, vqav2: 9)")
    p.set_defaults(epochs=2, batch_size=32, lr=1e-3, weight_decay=0.01, warmup=0.5)
    args = finish_args(p, argv)
    args.min_count = args.min_count or (9 if args.data == "vqav2" else 1)
    args.size = args.size or MODELS[args.model]["S"]
    usual = 1024 if args.model == "micro" else 40_000
    args.points = args.points or (256 if args.data == "toy3d" else usual)
    if args.size < 1 or (args.size % MODELS[args.model]["patch"] and not args.vision):
        raise UserError(f"--size {args.size} is not a multiple of {MODELS[args.model]['patch']}")
    if args.points < 256:
        raise UserError(f"--points {args.points} must be at least 256")
    if args.objects and args.data not in DATA_3D or args.vision and args.data not in DATA_2D:
        raise UserError(f"--objects is for 3D, --vision for 2D, --data is {args.data}")
    return args


# ---------------------------------------------------------------- data


COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230),
           "yellow": (230, 210, 40)}  # fmt: skip
SHAPES_2D, SHAPES_3D = ("disc", "square", "triangle", "cross"), ("ball", "box", "cone", "pole")


def draw_toy(n, seed, S):
    """n images, uint8 (n, 3, S, S), of two to four objects, and four questions about each:
    triples (number of the image, question, answer).
    """
    g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    x = 40 + 60 * torch.rand(n, 3, 1, 1, generator=g).expand(n, 3, S, S)
    cell = torch.rand(n, 9, generator=g).argsort(1)[:, :4]  # of 3 x 3, a different one for each
    colour = torch.randint(4, (n, 4), generator=g)
    shape = torch.rand(n, 4, generator=g).argsort(1)  # no two objects have the same
    number, grid = torch.randint(2, 5, (n,), generator=g), 3 * (torch.arange(S) + 0.5) / S
    for i in range(4):
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
    questions, columns = [], [t.tolist() for t in (number, colour, shape, cell)]
    for i, (m, c, s, places) in enumerate(zip(*columns, strict=True)):
        objects = [
            (list(COLOURS)[a], SHAPES_2D[b], k % 3) for a, b, k in zip(c, s, places, strict=True)
        ][:m]
        questions += [(i, *ask_toy(objects, rng)) for _ in range(4)]
    return x, questions


def ask_toy(objects, rng):
    """A question and its answer about objects (colour, shape, column)."""
    kind = rng.choice(("color", "color", "shape", "there", "side", "number"))
    (colour, shape, column), other = rng.sample(objects, 2)
    colours, shapes, _ = zip(*objects, strict=True)
    if kind == "shape" and colours.count(colour) == 1:
        return f"What shape is the {colour} object?", shape
    if kind == "there":
        told = colour if rng.random() < 0.5 else rng.choice([*COLOURS])
        return f"Is the {shape} {told}?", "yes" if told == colour else "no"
    if kind == "side" and column != other[2]:
        side = rng.choice(("left", "right"))
        answer = "yes" if (column < other[2]) == (side == "left") else "no"
        return f"Is the {shape} {side} of the {other[1]}?", answer
    if kind == "number":
        colour = rng.choice((colour, *COLOURS))
        return f"How many objects are {colour}?", str(colours.count(colour))
    return f"What color is the {shape}?", colour


def draw_toy3d(n, seed, P):
    """n scenes, float (n, P, 7) as read_points returns them, of four objects around somebody, and
    four questions about each: triples (number of the scene, situation and question, answer).
    """
    g, rng, m = torch.Generator().manual_seed(seed), random.Random(seed), P // 4
    shape = torch.rand(n, 4, generator=g).argsort(1)  # counterclockwise, as seen from above
    colour = torch.randint(4, (n, 4), generator=g)
    ball = F.normalize(torch.randn(n, 4, m, 3, generator=g), dim=-1)
    r, a, z = torch.rand(3, n, 4, m, 1, generator=g)
    r, a, z = 0.5 * r.sqrt(), 2 * math.pi * a, 4 * z - 2
    box = ball / ball.abs().amax(-1, keepdim=True)
    cone = torch.cat([r * a.cos(), r * a.sin(), 1 - 4 * r], dim=-1)
    pole = torch.cat([0.2 * a.cos(), 0.2 * a.sin(), z], dim=-1)
    forms = torch.stack([0.5 * ball, box, cone, pole])
    x = 0.2 * forms[shape, torch.arange(n)[:, None], torch.arange(4)]  # (n, 4, m, 3)
    turn = math.pi / 2 * torch.arange(4) + 0.6 * torch.rand(n, 4, generator=g)
    place = torch.stack([turn.cos(), turn.sin(), 0 * turn], dim=-1)
    x += ((0.6 + 0.3 * torch.rand(n, 4, 1, generator=g)) * place)[:, :, None]
    tint = torch.tensor(list(COLOURS.values()))[colour][:, :, None].expand(-1, -1, m, -1) / 255
    number = torch.arange(1.0, 5)[:, None, None].expand(n, -1, m, -1)
    x = torch.cat([x, tint, number], dim=-1).flatten(1, 2)
    questions = []
    for i, (c, s) in enumerate(zip(colour.tolist(), shape.tolist(), strict=True)):
        objects = [([*COLOURS][a], SHAPES_3D[b]) for a, b in zip(c, s, strict=True)]
        questions += [(i, *ask_toy3d(objects, rng)) for _ in range(4)]
    return x, questions


def ask_toy3d(objects, rng):
    """A situation and a question, and the answer; objects (colour, shape) are counterclockwise."""
    kind = rng.choice(("color", "color", "color", "place", "place", "is", "number"))
    (i, k), colours = rng.sample(range(4), 2), [colour for colour, _ in objects]
    situation, (colour, shape) = f"I am facing the {objects[i][1]}. ", objects[k]
    if kind == "place":
        turn = rng.randrange(1, 4)
        place = (None, "on my left", "behind me", "on my right")[turn]
        return f"{situation}What is {place}?", objects[(i + turn) % 4][1]
    if kind == "is":
        told = colour if rng.random() < 0.5 else rng.choice([*COLOURS])
        return f"{situation}Is the {shape} {told}?", "yes" if told == colour else "no"
    if kind == "number":
        colour = rng.choice((colour, *COLOURS))
        return f"{situation}How many objects are {colour}?", str(colours.count(colour))
    return f"{situation}What color is the {shape}?", colour


NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(i) for i, word in enumerate(NUMBERS)} | {"none": "0"}


@functools.cache
def normalise_answer(text):
    """As VQA's evaluation compares answers (https://visualqa.org/evaluation.html): in lower case,
    without articles and punctuation, numbers as digits. Contractions lose their apostrophe.
    """
    text = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)|['’]", "", text.lower())
    words = re.sub(r"[;/\[\]\"{}()=+\\_><@`,?!-]", " ", text).split()
    return " ".join(NUMBERS.get(w, w) for w in words if w not in ("a", "an", "the"))


def soft_scores(answers):
    """{answer: score} of what people said: min(others who said so / 3, 1), averaged over leaving
    each of them out. An answer that 1, 2, 3, 4 of 10 people gave scores 0.3, 0.6, 0.9, 1.
    """
    n, counts = len(answers), Counter(map(normalise_answer, answers))
    return {
        a: round((c * min((c - 1) / 3, 1) + (n - c) * min(c / 3, 1)) / n, 6)
        for a, c in counts.items()
    }


def read_json(files, name):
    if not files.get(name):
        raise ValueError(f"there is no {name}, or there are several")
    return json.loads(files[name].read_text("utf-8-sig"))


def read_questions(data, files, split):
    """The questions of a split: tuples (name of the image or scene, text, {answer: score}, type,
    answers to be learned). files is {name: path}.
    """
    rows = []
    if data == "easyvqa":
        for text, answer, i in read_json(files, f"{split}/questions.json"):
            image = f"{split}/images/{i}.png"
            rows.append(all_right(image, text, [answer], answer_type(answer)))
    elif data == "scanqa":
        for q in read_json(files, f"ScanQA_v1.0_{split}.json"):
            answers = q.get("answers", [])  # those of its tests are secret
            text = q["question"]
            rows.append(all_right(q["scene_id"], text, answers, question_type(text)))
    else:
        theirs = {"vqav2": ("v2_OpenEnded_mscoco_{}_questions", "v2_mscoco_{}_annotations"),
                  "sqa3d": ("v1_balanced_questions_{}_scannetv2",
                            "v1_balanced_sqa_annotations_{}_scannetv2")}  # fmt: skip
        asked, told = (read_json(files, f"{name.format(split)}.json") for name in theirs[data])
        told = {a["question_id"]: a for a in told["annotations"]}
        for q in asked["questions"]:
            text, a = q["question"], told[q["question_id"]]
            answers = [x["answer"] for x in a["answers"]]
            if data == "vqav2":
                image, usual = f"COCO_{split}_{q['image_id']:012}.jpg", a["multiple_choice_answer"]
                usual = [normalise_answer(usual)]
                rows.append((image, text, soft_scores(answers), a["answer_type"], usual))
            else:
                situated = f"{q['situation']} {text}"
                rows.append(all_right(q["scene_id"], situated, answers, question_type(text)))
    if not rows or not all(isinstance(x, str) for row in rows for x in (*row[:2], *row[4])):
        raise ValueError(f"{split} has no questions, or other things than texts in them")
    return rows


def all_right(name, text, answers, kind):
    """A question where every answer is right."""
    if not isinstance(answers, list):
        raise ValueError(f"answers are no list: {answers!r}")
    answers = list(dict.fromkeys(map(normalise_answer, answers)))
    return name, text, dict.fromkeys(answers, 1.0), kind, answers


TYPES_3D = ("What", "Is", "How", "Can", "Which")


def question_type(question):
    """SQA3D's types of questions."""
    question = question.strip().capitalize()
    return next((word for word in TYPES_3D if question.startswith(word)), "Others")  # also What's


def answer_type(answer):
    """As VQA v2 calls them."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def to_rgb(image):
    if image.mode[0] in "IF":  # 16 or 32 bits: Pillow would cut off all above 255
        raise ValueError(f"its mode is {image.mode}, only 8 bits a channel are read")
    return image.convert("RGB")


def read_image(path, shape):
    """uint8 (3, S, S), squeezed into the square: no text loses what it speaks of."""
    with Image.open(path) as file:
        image = to_rgb(file).resize(shape[1:], Image.Resampling.BICUBIC)
    return v2.functional.pil_to_tensor(image)


PLY = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
       "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2",
       "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"}  # fmt: skip


def read_ply(path):
    """{property: values} of the vertices, which are the first element of a .ply file."""
    with path.open("rb") as file:
        head = []
        for line in file:
            head.append(line.decode("ascii").split())
            if head[-1] == ["end_header"]:
                break
        body = file.read()
    elements = [i for i, words in enumerate(head) if words[:1] == ["element"]]
    if head[0] != ["ply"] or not elements or head[elements[0]][1] != "vertex":
        raise ValueError("it is no .ply file that begins with vertices")
    n, last = int(head[elements[0]][2]), [*elements, len(head)][1]
    fields = [words[1:] for words in head[elements[0] : last] if words[:1] == ["property"]]
    form = next((words[1] for words in head if words[:1] == ["format"]), None)
    if form == "ascii":
        values = np.array(body.split()[: n * len(fields)], dtype=float).reshape(n, len(fields))
        return {name: values[:, i] for i, (_, name) in enumerate(fields)}
    order = {"binary_little_endian": "<", "binary_big_endian": ">"}[form]
    vertices = np.frombuffer(body, [(name, order + PLY[kind]) for kind, name in fields], n)
    return {name: vertices[name] for _, name in fields}


def read_points(path, shape):
    """P points of a scene, float (P, 7): place in the unit sphere; red, green, blue from 0 to 1, or
    black; number of the object, or 0.

    .npz holds points (n, 3 or 6), perhaps colors (n, 3) and instance (n); .npy (n, 3, 6 or 7) the
    same in columns; .ply x, y, z, perhaps red, green, blue and instance.
    """
    if path.suffix == ".ply":
        ply = read_ply(path)
        columns = [ply["x"], ply["y"], ply["z"]]
        if "red" in ply:
            columns += [ply["red"], ply["green"], ply["blue"]]
        points, instance = np.stack(columns, axis=1), ply.get("instance", 0)
    elif path.suffix == ".npy":
        table = np.load(path)
        points, instance = table[:, :6], table[:, 6] if table.shape[1] == 7 else 0
    else:
        with np.load(path) as file:
            points, instance = file["points"], file.get("instance", 0)
            if "colors" in file:
                points = np.concatenate([points[:, :3], file["colors"]], axis=1)
    x = np.zeros((len(points), 7), dtype=np.float32)
    x[:, : points.shape[1]], x[:, 6] = points, instance
    if not len(x) or points.shape[1] not in (3, 6) or not np.isfinite(x).all():
        raise ValueError(f"points {points.shape} with a place, or place and colour, are needed")
    chosen = np.random.default_rng(zlib.crc32(path.stem.encode())).permutation(len(x))
    x = torch.from_numpy(x[np.resize(chosen, shape[0])])  # with repetitions where there are fewer
    x[:, :3] = to_unit_sphere(x[:, :3])
    x[:, 3:6] /= 255 if x[:, 3:6].max() > 1 else 1
    return x


def to_unit_sphere(x):
    """Points (..., P, 3), centred at their mean, the outermost at distance 1."""
    x = x - x.mean(-2, keepdim=True)
    return x / x.norm(dim=-1).amax(-1)[..., None, None].clamp(min=1e-12)


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


class Questions:
    """n questions about visuals, images or scenes: which (n), tokens (n, M), labels and scores
    (n, A) of right answers, padded with scores of 0, and kinds (n), numbers in the list types.
    """

    def __init__(self, rows, visuals, which, ids, answers, types):
        self.visuals, self.which, self.ids = visuals, torch.tensor(which), ids
        self.C, self.types = len(answers), types
        self.kinds = torch.tensor([types.index(kind) for _, _, _, kind, _ in rows])
        width = max(1, *(len(row[2]) for row in rows))
        number = {answer: i for i, answer in enumerate(answers)}
        pairs = [[(number.get(a, 0), s * (a in number)) for a, s in row[2].items()] for row in rows]
        pairs = torch.tensor([p + [(0, 0.0)] * (width - len(p)) for p in pairs])  # (n, A, 2)
        self.labels, self.scores = pairs[..., 0].long(), pairs[..., 1]

    def __len__(self):
        return len(self.which)

    def batch(self, i, args):
        """x uint8 (B, 3, S, S) or float (B, P, 7), tokens (B, M), targets (B, C) of questions i."""
        x, ids = self.visuals[self.which[i]], self.ids[i]
        if args.blind:
            x = torch.zeros_like(x)
        targets = torch.zeros(len(i), self.C).scatter_add_(1, self.labels[i], self.scores[i])
        return x, ids[:, : (ids >= 0).sum(1).max()], targets


def find_questions(args):
    """({"train": rows of read_questions, ...}, {name: path} of all files below --root, where the
    path is None if several have that name).
    """
    root = Path(args.root)
    paths = [p for p in sorted(root.rglob("*")) if p.is_file()]
    files = {}
    for p in paths:
        files[p.name] = None if p.name in files else p
    if args.data == "easyvqa":  # has a train/images/0.png and a test/images/0.png
        files = {p.relative_to(root).as_posix(): p for p in paths}
    for p in paths:  # ScanNet's scene0000_00_vh_clean_2.ply, ScanQA's scene0000_00_aligned_vert.npy
        if p.suffix in (".npz", ".npy", ".ply"):
            files.setdefault(re.sub("(_vh_clean_2|_aligned_vert)$", "", p.stem), p)
    theirs = {
        "easyvqa": {"train": "train", "test": "test"},
        "vqav2": {"train": "train2014", "test": "val2014"},
        "scanqa": {"train": "train", "test": "val"},
        "sqa3d": {"train": "train", "val": "val", "test": "test"},
    }[args.data]
    if args.data == "sqa3d" and "v1_balanced_questions_test_scannetv2.json" not in files:
        theirs = {"train": "train", "test": "val"}
    try:
        splits = {ours: read_questions(args.data, files, name) for ours, name in theirs.items()}
    except Exception as e:
        raise UserError(f"{root} is not laid out like {args.data}: {e!r}") from e
    return splits, files


def find_toy(args):
    """The same of a toy, and all its images or scenes (n, ...)."""
    toy, size, n = draw_toy, args.size, 8  # thousand
    if args.data == "toy3d":
        toy, size, n = draw_toy3d, args.points, 5
    drawn, rows = [toy(1000, seed, size) for seed in range(n)], []
    for seed, (_, questions) in enumerate(drawn):
        for i, text, answer in questions:
            question = text.rpartition(". ")[2]  # behind a situation
            kind = answer_type(answer) if toy is draw_toy else question_type(question)
            rows.append(all_right(1000 * seed + i, text, [answer], kind))
    return {"train": rows[:-4000], "test": rows[-4000:]}, torch.cat([x for x, _ in drawn])


def hold_out(rows):
    """Rows of nine tenths of the images or scenes, and those of the others."""
    names = list(dict.fromkeys(row[0] for row in rows))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    held = {names[i] for i in order[: len(names) // 10]}
    return [r for r in rows if r[0] not in held], [r for r in rows if r[0] in held]


def load_visuals(names, files, args):
    """Images or scenes (n, ...) of these names, and which of them are good (n)."""
    if twice := [name for name in names if name in files and not files[name]]:
        raise UserError(f"{args.root}: several files have the name {twice[0]}")
    if lost := [name for name in names if name not in files]:
        text = f"{args.root}: {len(lost)} of {len(names)} images or scenes are missing"
        if len(lost) > max(1, 0.01 * len(names)):
            raise UserError(f"{text}, such as {lost[0]}")
    paths = [files.get(name, Path(args.root) / name) for name in names]
    if args.data in DATA_3D:
        return decode_once(paths, read_points, (args.points, 7), torch.float32, args)
    return decode_once(paths, read_image, (3, args.size, args.size), torch.uint8, args)


def find_vocabulary(rows, args):
    """What the model can read and say. Words seen once stay unknown, to learn what unknown is."""
    words = Counter(word for row in rows for word in split_words(row[1]))
    words = [] if args.text else sorted(word for word, n in words.items() if n > 1)
    counts = Counter(answer for row in rows for answer in row[4])
    answers = sorted(counts, key=lambda answer: (-counts[answer], answer))
    answers = [answer for answer in answers if counts[answer] >= args.min_count]
    if not answers:
        raise UserError(f"{args.root}: no answer is given {args.min_count} times (--min-count)")
    return {"words": words, "answers": answers}


def load_data(args, meta=None):
    """{"train": Questions, "val" and "test": [Questions], "meta": ..., "sizes": text}."""
    toy = args.data in ("toy2d", "toy3d")
    splits, source = find_toy(args) if toy else find_questions(args)
    if "val" not in splits:
        splits["train"], splits["val"] = hold_out(splits["train"])
    for name, rows in splits.items():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        splits[name] = [rows[i] for i in order[: args.limit]]
    names = sorted({row[0] for rows in splits.values() for row in rows})
    if toy:
        visuals, good = source[names], [True] * len(names)
    else:
        visuals, good = load_visuals(names, source, args)
    number = {name: i for i, name in enumerate(names) if good[i]}
    meta = meta or find_vocabulary(splits["train"], args)
    types = sorted({row[3] for rows in splits.values() for row in rows})
    data, sizes, cut = {"meta": meta}, [], 0
    for name in ("train", "val", "test"):
        rows = [row for row in splits[name] if row[0] in number]
        known = [row for row in rows if not row[2].keys().isdisjoint(meta["answers"])]
        sizes.append(f"{len(known)} of {len(rows)} {name}")
        rows = known if name == "train" else rows  # as METER does: others teach nothing
        if len(rows) < WORLD:
            raise UserError(f"{args.root}: {len(rows)} {name} questions are too few")
        ids, longer = tokenise([row[1] for row in rows], meta["words"], longest(args), args)
        cut, which = cut + longer, [number[row[0]] for row in rows]
        data[name] = Questions(rows, visuals, which, ids, meta["answers"], types)
    sizes = f"{', '.join(sizes)} questions have one of the {len(meta['answers'])} answers; "
    sizes += f"{len(meta['words'])} words; {len(number)} images or scenes; {cut} texts are cut"
    if args.data in DATA_3D and not visuals[..., 3:6].any():
        sizes += "; without colours"
    if args.objects and not 0 < (most := int(visuals[..., 6].max())) < groups(args):
        few = f"1 to {groups(args) - 1} are needed (--points gives a token for 16 points)"
        raise UserError(f"--objects: {args.root} has {most} objects in a scene, {few}")
    return {**data, "val": [data["val"]], "test": [data["test"]], "sizes": sizes}


def train_batches(data, args, gen):
    """Yield an epoch of batches (x, tokens, targets), decided by the generator alone."""
    questions = data["train"]
    B = min(args.batch_size, len(questions) // WORLD * WORLD)
    order = torch.randperm(len(questions), generator=gen)
    for batch in order[: len(questions) // B * B].split(B):
        angle = math.radians(5) * (2 * torch.rand(B, 1, generator=gen)[RANK::WORLD] - 1)
        x, ids, targets = questions.batch(batch[RANK::WORLD], args)  # the processes share a batch
        if args.data in DATA_3D:  # turned by up to 5 degrees, as in SQA3D: north stays north
            east, north, cos, sin = x[..., 0], x[..., 1], angle.cos(), angle.sin()
            x[..., 0], x[..., 1] = cos * east - sin * north, sin * east + cos * north
        yield x.to(args.device), ids.to(args.device), targets.to(args.device)


def normalise(x):
    """uint8 -> float with ImageNet's mean and deviation, whatever the data."""
    return v2.functional.normalize(x / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


# ---------------------------------------------------------------- model


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


@torch.no_grad()
def group_objects(x, G, K):
    """The same of the objects that x (B, P, 7) is numbered by: K points of each, around its centre;
    and which of the G groups are objects (B, G). The others repeat these, for BatchNorm's sake.
    """
    cloud = torch.arange(len(x), device=x.device)[:, None]
    number, order = x[..., 6].sort(dim=1, stable=True)
    every = torch.arange(G, device=x.device)
    wanted = every % (number[:, -1:] + 1)  # (B, G)
    start = torch.searchsorted(number, wanted)
    count = torch.searchsorted(number, wanted, right=True) - start
    steps = torch.arange(K, device=x.device) * count[..., None] // K
    picked = (start[..., None] + steps).clamp(max=x.shape[1] - 1)  # (B, G, K)
    groups = x[cloud[..., None], order[cloud[..., None], picked]]
    centres = groups[..., :3].mean(2)
    groups[..., :3] -= centres[:, :, None]
    return centres, groups, (count > 0) & (every <= number[:, -1:])


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


class SceneEncoder(nn.Module):
    """Groups of points of scenes (B, P, 7) as tokens (B, N, D), CLS first, and their mask (B, N).

    NOTE(paper): there, tokens are 256 proposals of a VoteNet, which needs boxes to learn from. Here
    they are Point-BERT's groups or, to see what perfect proposals would give, the file's objects.
    """

    def __init__(self, D, depth, heads, dropout, W, G, objects):
        super().__init__()
        self.G, self.objects = G, objects
        self.scale = BatchNorm(6)  # places in a group are small, colours large
        self.pointnet, self.reduce = MiniPointNet(W, channels=6), nn.Linear(W, D)
        self.pos = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, D))
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.layers = nn.ModuleList([Layer(D, heads, dropout) for _ in range(depth)])

    def forward(self, x):
        mask = None
        if self.objects:
            centres, groups, mask = group_objects(x, self.G, K)
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)  # CLS is real
        else:
            centres, groups = group(x, self.G, K)  # (B, G, 3), (B, G, K, 7)
        x = self.reduce(self.pointnet(self.scale(groups[..., :6]))) + self.pos(centres)  # (B, G, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x, mask)
        return x, mask


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


class VQA(nn.Module):
    """METER: two streams that attend to themselves and to each other, poolers, an answer head.

    NOTE(paper): METER is post-norm; this is pre-norm, which trains from scratch.
    """

    def __init__(self, vision, text, D, fusion, heads, dropout, C, llm):
        super().__init__()
        self.vision, self.text = vision, text
        layers = [Layer(D, heads, dropout, cross=True) for _ in range(2 * fusion)]
        self.seeing, self.reading = nn.ModuleList(layers[::2]), nn.ModuleList(layers[1::2])
        self.norm, self.text_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.pool, self.text_pool = nn.Linear(D, D), nn.Linear(D, D)
        self.head = nn.Sequential(
            nn.Linear(2 * D, 2 * D), nn.LayerNorm(2 * D), nn.GELU(), nn.Linear(2 * D, C)
        )
        self.llm = llm

    def forward(self, x, ids):
        (x, mask), (t, t_mask) = self.vision(x), self.text(ids)  # (B, N, D), (B, M, D)
        for image_layer, text_layer in zip(self.seeing, self.reading, strict=True):
            x, t = image_layer(x, mask, t, t_mask), text_layer(t, t_mask, x, mask)
        x = self.llm(x, mask)  # the frozen LLM block: this line is the paper
        x, t = self.norm(x)[:, 0], self.text_norm(t)[:, 0]
        return self.head(torch.cat([self.pool(x), self.text_pool(t)], dim=1).tanh())  # (B, C)


def longest(args):
    """Tokens of a text: METER's, and twice as many for a situation and a question."""
    return 100 if args.data in DATA_3D else 50


def groups(args):
    """How many: 256 as the paper has proposals; fewer where there are fewer points."""
    return min(256, args.points // 16)


def build_model(args, kind, seed, meta):
    torch.manual_seed(seed)
    c = MODELS[args.model]
    size = {k: c[k] for k in ("D", "heads", "dropout")}
    if args.vision:
        vision = PretrainedVision(args.vision, c["D"])
    elif args.data in DATA_2D:
        vision = ImageEncoder(**size, depth=c["depth"], S=args.size, patch=c["patch"])
    else:
        kwargs = {"W": c["W"], "G": groups(args), "objects": args.objects}
        vision = SceneEncoder(**size, depth=c["depth"], **kwargs)
    if args.text:
        text = PretrainedText(args.text, c["D"])
    else:
        text = TextEncoder(c["D"], len(meta["words"]), longest(args))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    llm = LLMBlock(args.llm, c["D"], args.layers, kind, seed=seed, dtype=dtype)
    return VQA(vision, text, **size, fusion=c["fusion"], C=len(meta["answers"]), llm=llm)


def example(args):
    """One input of the model, to count its GFLOPs: a question of 16 words."""
    shape, dtype = (1, 3, args.size, args.size), torch.uint8
    if args.data in DATA_3D:
        shape, dtype = (1, args.points, 7), torch.float32
    return torch.zeros(shape, dtype=dtype), torch.zeros(1, 16, dtype=torch.int32)


def param_groups(model, args):
    """Weight decay on matrices only: not on biases, norms, positions, CLS and words. With encoders
    that are pre-trained, METER's rates: theirs is a fifth of --lr, ten times --lr for the head; the
    LLM's projections have the paper's, ten times that of the image encoder.
    """
    groups = {}
    for name, p in model.named_parameters():
        scale = 1.0
        if args.vision or args.text:
            if ".encoder." in name:
                scale = 0.2
            elif name.startswith("head"):
                scale = 10.0
            elif name.startswith("llm.proj"):
                scale = 2.0
        bare = ("cls", "pos", "words.weight")
        decay = args.weight_decay * (p.ndim > 1 and not name.endswith(bare))
        groups.setdefault((decay, scale), []).append(p)
    return [{"params": ps, "weight_decay": d, "lr_scale": s} for (d, s), ps in groups.items()]


def compute_loss(model, batch):
    """Binary cross-entropy with the soft scores, summed over answers."""
    x, ids, targets = batch
    logits = model(x, ids).float()
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(x)


@torch.no_grad()
def evaluate(model, sets, args):
    """Percent: 2D, the soft score of the best answer; 3D, how often a right answer is the best one
    (EM@1) or among ten (EM@10). And the first of these by type of question.
    """
    model.eval()
    questions = sets[0]
    sums = torch.zeros(len(questions.types), 3)  # of questions, scores at 1, scores at 10
    for batch in torch.arange(RANK, len(questions), WORLD).split(args.batch_size):
        x, ids, targets = questions.batch(batch, args)
        with autocast(args):
            logits = model(x.to(args.device), ids.to(args.device)).cpu()
        score = targets.gather(1, logits.topk(min(10, logits.shape[1])).indices)  # (B, 10)
        rows = torch.stack([torch.ones(len(x)), score[:, 0], score.amax(1)], dim=1)
        sums.index_add_(0, questions.kinds[batch], rows)
    sums = all_sum(sums.to(args.device)).cpu()
    n, first, ten = sums.sum(0)
    means = {"em1": first / n, "em10": ten / n} if args.data in DATA_3D else {"acc": first / n}
    name, rows = next(iter(means)), zip(questions.types, sums, strict=True)
    means |= {f"{name}_{kind}": first / n for kind, (n, first, _) in rows if n}
    return {name: round(100 * mean.item(), 3) for name, mean in means.items()}


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
