r"""Point-cloud classification: Point-BERT with one frozen LLM block after its last layer.

    python train_pointcloud.py --block none random pretrained     # three arms on a toy, offline
    python train_pointcloud.py --data h5 --root modelnet40_ply_hdf5_2048 --points 1024

The paper's run (Table 2; ScanObjectNN T50 83.1 -> 83.8; 6 to 10 hours on 4 A100; not run here):

    torchrun --nproc-per-node=4 train_pointcloud.py --data scanobjectnn --root h5_files \
        --points 1024 --model small --init Point-BERT.pth --llm huggyllama/llama-7b --bf16 \
        --block none random pretrained --epochs 300 --warmup 10 --lr 5e-4

A tenth of train selects the epoch (in T50, the hardest variant, it shares objects with the rest).
Differs from the paper: its code trains norms, biases and CLS (in all arms) at 0.1 of the rate, the
projections at 0.5 of it, without decay; here all train alike (see --proj-lr). It
selects on the test set, thins the clouds anew in each epoch, clips gradients at norm 10, not 1.
Letters: B batch, P points, G groups of M = 32 points, N tokens, D, W widths, h heads, K classes.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import default_collate as collate
from torchvision.ops import StochasticDepth
from tqdm import tqdm

from llmblock import KINDS, LLMBlock, UserError, fail, read, reading, run, save

TASK, BEST = "pointcloud", max  # BEST picks the best epoch by the first metric on validation data
MODELS = {  # small is Point-BERT (https://arxiv.org/abs/2111.14819); micro is ours, for a laptop
    "micro": {"D": 64, "depth": 3, "heads": 4, "W": 32, "drop_path": 0.0, "dropout": 0.0},
    "small": {"D": 384, "depth": 12, "heads": 6, "W": 256, "drop_path": 0.1, "dropout": 0.5},
}
FILES = {  # below --root, by --data or, for scanobjectnn, --variant; {} is train or test
    "txt": "*_{}.txt",  # names of clouds, as in modelnet40_normal_resampled
    "h5": "ply_data_{}*.h5",  # as in modelnet40_ply_hdf5_2048
    "bg": "main_split/{}*_objectdataset.h5",  # ScanObjectNN, with background
    "obj": "main_split_nobg/{}*_objectdataset.h5",  # without background
    "t50": "main_split/{}*_objectdataset_augmentedrot_scale75.h5",  # with it, moved, turned, scaled
}
SURFACES = ["sphere", "tube", "hourglass", "ring", "bowl", "saddle", "wave", "screw"]  # of the toy


# ---------------------------------------------------------------- the model
def farthest_points(x, n):
    """(B, P, 3) -> (B, n, 3): the first point, then always the farthest from all before it."""
    rows = torch.arange(len(x), device=x.device)  # (B)
    gaps = torch.full(x.shape[:2], torch.inf, device=x.device)  # to the nearest picked one (B, P)
    picked = [x[:, 0]]  # (B, 3) each
    while len(picked) < n:
        distances = (x - picked[-1][:, None]).square().sum(2)  # to the last picked one (B, P)
        gaps = torch.minimum(gaps, distances)
        picked.append(x[rows, gaps.argmax(1)])
    return torch.stack(picked, dim=1)


@torch.compiler.disable  # it would unroll the loop of farthest_points
def group_points(x, G, M=32):
    """G centres (B, G, 3), and the M points nearest to each, relative to it (B, G, M, 3)."""
    centres = farthest_points(x, G)
    # Matrix products (mm) would be faster, but inexact where the distance is small.
    distances = torch.cdist(centres, x, compute_mode="donot_use_mm_for_euclid_dist")  # (B, G, P)
    nearest = distances.topk(M, largest=False).indices  # (B, G, M)
    rows = torch.arange(len(x), device=x.device)[:, None, None]  # (B, 1, 1)
    return centres, x[rows, nearest] - centres[:, :, None]


class MiniPointNet(nn.Module):  # a token of width W for each group of points
    def __init__(self, W):
        super().__init__()
        self.first_conv = nn.Sequential(  # convolutions of width 1: linear layers on each point
            nn.Conv1d(3, W // 2, 1), nn.BatchNorm1d(W // 2), nn.ReLU(), nn.Conv1d(W // 2, W, 1)
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(2 * W, 2 * W, 1), nn.BatchNorm1d(2 * W), nn.ReLU(), nn.Conv1d(2 * W, W, 1)
        )

    def forward(self, groups):  # (B, G, M, 3)
        x = groups.flatten(0, 1).transpose(1, 2)  # (BG, 3, M)
        x = self.first_conv(x)  # (BG, W, M)
        whole = x.amax(2, keepdim=True).expand_as(x)  # the group's maximum, beside each point
        x = self.second_conv(torch.cat([whole, x], dim=1)).amax(2)  # (BG, W)
        return x.unflatten(0, groups.shape[:2])  # (B, G, W)


class Attention(nn.Module):
    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)  # as published
        self.proj = nn.Linear(D, D)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, D/h) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):  # a pre-norm transformer layer
    def __init__(self, D, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.attn = Attention(D, heads)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, 4 * D), "fc2": nn.Linear(4 * D, D)})
        self.drop_path = StochasticDepth(drop_path, mode="row")  # samples may skip attention or MLP

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))  # (B, N, 4D)
        return x + self.drop_path(self.mlp["fc2"](hidden))  # (B, N, D)


class PointBERT(nn.Module):  # parts are named as in the published weights
    def __init__(self, D, depth, heads, W, drop_path, dropout, G, K, llm):
        super().__init__()
        self.G = G
        self.encoder = MiniPointNet(W)
        self.reduce_dim = nn.Linear(W, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.cls_pos = nn.Parameter(torch.randn(1, 1, D))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, D))
        rates = torch.linspace(0, drop_path, depth).tolist()  # deep layers are skipped most
        self.blocks = nn.ModuleDict({"blocks": nn.ModuleList(Block(D, heads, r) for r in rates)})
        self.llm = llm
        self.norm = nn.LayerNorm(D)
        head = [nn.Linear(2 * D, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, K)]
        self.cls_head_finetune = nn.Sequential(*head)

    def forward(self, x):
        # Points become tokens in fp32, whatever --bf16 says: bf16 moves centres by up to 0.4 %.
        with torch.autocast(x.device.type, enabled=False):
            centres, groups = group_points(x, self.G)  # (B, G, 3), (B, G, M, 3)
            x = self.reduce_dim(self.encoder(groups))  # (B, G, D)
            pos = self.pos_embed(centres)  # (B, G, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        pos = torch.cat([self.cls_pos.expand(len(x), -1, -1), pos], dim=1)
        for block in self.blocks["blocks"]:  # the host's own encoder
            x = block(x + pos)  # positions are added again before every layer
        x = self.llm(x)  # the frozen LLM block: this line is the paper
        x = self.norm(x)
        x = torch.cat([x[:, 0], x[:, 1:].amax(1)], dim=1)  # CLS and the groups' maximum (B, 2D)
        return self.cls_head_finetune(x)  # (B, K)


# ---------------------------------------------------------------- loss and metrics
def compute_loss(args, model, batch):
    x, y = batch  # (B, P, 3), (B)
    return F.cross_entropy(model(x.to(args.device)), y.to(args.device))


@torch.no_grad()
def evaluate(args, model, clouds):
    model.eval()
    correct = 0
    for x, y in batches(args, clouds):
        answer = model(x.to(args.device)).argmax(1).cpu()  # (B)
        correct += (answer == y).sum().item()
    return {"acc": 100 * correct / len(clouds)}  # percent


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


class Clouds(TensorDataset):  # pairs (points or their file, class) -> x (P, 3), class
    def __init__(self, args, pairs, train):
        self.P = args.points
        self.train = train
        np.random.default_rng(0).shuffle(pairs)  # they come class by class, --limit takes the first
        pairs = pairs[: args.limit]
        clouds = []
        for points, _ in tqdm(pairs, "reading", disable=RANK > 0 or None):
            if isinstance(points, Path):
                with reading(points):  # its lines are x,y,z,...
                    points = np.loadtxt(points, delimiter=",", usecols=(0, 1, 2))
            clouds.append(points)
        x = torch.from_numpy(np.stack(clouds)).float()  # (clouds, all points, 3)
        labels = [label for _, label in pairs]
        if args.data != "scanobjectnn":  # into the unit sphere, as the paper; ScanObjectNN stays
            x = x - x.mean(1, keepdim=True)
            x = x / x.norm(dim=2).amax(1)[:, None, None]
        named = set(labels) <= set(range(len(args.classes)))  # each is the number of a class
        if x.shape[1] < args.points or x.shape[2] < 3 or not named or not x.isfinite().all():
            raise ValueError("too few points in a cloud, no z, NaN or a class without a name")
        n = args.points * 1200 // 1024  # as the paper: the farthest 1200 for 1024
        if x.shape[1] > n:
            x = torch.cat([farthest_points(part.to(args.device), n).cpu() for part in x.split(64)])
        super().__init__(x, torch.tensor(labels).long())

    def __getitem__(self, item):  # (random seed, index)
        torch.default_generator.manual_seed(item[0])  # the same for any number of workers
        x, y = super().__getitem__(item[1])
        if self.train:  # other points each time, stretched and shifted along each axis
            x = x[torch.randperm(len(x))]
            x = x * torch.empty(3).uniform_(2 / 3, 3 / 2) + torch.empty(3).uniform_(-0.2, 0.2)
        return x[: self.P], y  # in the test those picked first, so well spread


def read_pairs(args, split):
    """Pairs (points or their file, class) of train or test, and the names of the classes."""
    if args.data == "toy":
        indices = range(3_000) if split == "train" else range(3_000, 4_000)
        return [draw_toy(i, args.points) for i in indices], SURFACES
    root = Path(args.root)
    pattern = FILES.get(args.data, FILES[args.variant]).format(split)
    files = sorted(root.glob(pattern))
    if not files:
        raise FileNotFoundError(f"it has no {pattern}")
    names = sorted(root.glob("*shape_names.txt"))  # without: ScanObjectNN's 15, numbered
    classes = names[-1].read_text().split() if names else [str(i) for i in range(15)]
    pairs = []
    if args.data == "txt":
        for name in files[-1].read_text().split():  # modelnet40's list stands behind modelnet10's
            label = name.rpartition("_")[0]  # night_stand_0001 is a night_stand
            pairs.append((root / label / f"{name}.txt", classes.index(label)))
        return pairs, classes
    for path in files:
        with reading(path):
            import h5py  # which other data does not need

            file = h5py.File(path)
            pairs += zip(file["data"][:, :, :3], file["label"][:].flatten().tolist(), strict=True)
    return pairs, classes


def load_data(args):
    """{"train", "val", "test": Clouds}, for --eval the test set alone."""
    pairs = {}
    with reading(f"--root {args.root}"):
        pairs["test"], args.classes = read_pairs(args, "test")
        if not args.eval:
            pairs["train"], _ = read_pairs(args, "train")
            pairs["val"] = pairs["train"][::10]  # every tenth has all classes; selects the epoch
            del pairs["train"][::10]
        data = {split: Clouds(args, pairs[split], split == "train") for split in pairs}
    args.sizes = {split: len(clouds) for split, clouds in data.items()}
    return data


def draw_toy(index, P):
    """Noisy points (P, 3) on one of eight surfaces, after a random linear map; and the class."""
    rng = np.random.default_rng(index)
    u, v = rng.uniform(-3, 3, (2, P))  # where on the surface each point is, (P) both
    surfaces = {
        "sphere": (np.sin(v) * np.cos(u), np.sin(v) * np.sin(u), np.cos(v)),
        "tube": (np.cos(u), np.sin(u), v / 3),
        "hourglass": (v * np.cos(u), v * np.sin(u), v),
        "ring": ((2 + np.cos(v)) * np.cos(u), (2 + np.cos(v)) * np.sin(u), np.sin(v)),
        "bowl": (v * np.cos(u), v * np.sin(u), v * v / 2),
        "saddle": (u, v, u * v / 2),
        "wave": (u, v, 2 * np.sin(u)),
        "screw": (v * np.cos(u), v * np.sin(u), u),
    }
    label = int(rng.integers(8))
    x = np.stack(surfaces[SURFACES[label]], axis=1) @ (np.eye(3) + rng.normal(0, 0.5, (3, 3)))
    return x + rng.normal(0, 0.05 * x.std(), (P, 3)), label


# ---------------------------------------------------------------- settings
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", choices=("toy", "txt", "h5", "scanobjectnn"), default="toy")
    p.add_argument("--root", default="data", help="directory of the data")
    p.add_argument("--variant", choices=("bg", "obj", "t50"), default="t50", help="ScanObjectNN's")
    p.add_argument("--points", type=int, choices=(256, 512, 1024, 4096, 8192), default=256)
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: small")
    p.add_argument("--init", metavar="FILE", help="start from Point-BERT's published weights")
    p.add_argument("--epochs", type=int, default=3, help="enough for the toy; paper: 300")
    p.add_argument("--batch-size", type=int, default=32, help="as the paper")
    p.add_argument("--lr", type=float, default=2e-3, help="its peak; paper: 5e-4")
    p.add_argument("--weight-decay", type=float, default=0.05, help="as the paper")
    p.add_argument("--warmup", type=float, default=1, help="epochs; paper: 10")
    return parse_shared(p, argv)


def build_model(args, kind, seed):
    torch.manual_seed(seed)
    config = MODELS[args.model] | {"G": args.points // 16, "K": len(args.classes)}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    llm = LLMBlock(args.llm, config["D"], args.layers, kind, seed, dtype)
    model = PointBERT(**config, llm=llm)
    if args.init:
        load_init(model, args.init)
    if WORLD > 1 and args.device == "cuda":  # BatchNorm over the whole batch, as the paper's
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def load_init(model, path):
    """Fill the host from Point-BERT.pth or a fine-tuned file; its head, too, if that fits."""
    scalar = np.float64(0).__reduce__()[0]  # unpickles NumPy numbers, the files' accuracies
    safe = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype("f8"))]
    own = model.state_dict()
    fitting = {}
    with torch.serialization.safe_globals(safe), reading(path):
        for name, w in read(path)["base_model"].items():
            name = name.removeprefix("module.").removeprefix("transformer_q.")
            if name in own and w.shape == own[name].shape:
                fitting[name] = w
    missing = [k for k in own if k not in fitting and not k.startswith(("llm.", "cls_head"))]
    if missing:
        raise UserError(f"--init {path} lacks {missing[0]}, or has it in another shape")
    model.load_state_dict(fitting, strict=False)
    print(f"{path}: {len(fitting)} tensors loaded, head: {'cls_head_finetune.3.weight' in fitting}")


def param_groups(args, model):
    """Weight decay on matrices alone; the block's projections have a rate of their own."""
    groups = {}
    for name, p in model.named_parameters():
        decay = args.weight_decay if p.ndim > 1 and name not in ("cls_token", "cls_pos") else 0.0
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
