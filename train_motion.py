r"""Motion forecasting: VectorNet with one frozen LLM block on its polyline tokens.

    python train_motion.py --block none random pretrained    # three arms on toy traffic, offline
    python train_motion.py --data argoverse1 --root DIR --map map_files    # {train,val}/data/*.csv
    python train_motion.py --data argoverse2 --root DIR      # {train,val}/ID/scenario_ID.parquet

The paper's run (Table 4; VectorNet minADE6 0.77 -> 0.76 m; 2 days on one A100; not run here):

    python train_motion.py --data argoverse1 --root DIR --map map_files --model small \
        --llm huggyllama/llama-7b --block none random pretrained --epochs 60 --lr 5e-4

Train's last tenth by time selects the epoch (it may share seconds with the rest); val is the test.
The paper describes neither its head for 6 trajectories nor its loss: see NOTE(paper). Here, the
global attention is a transformer layer, scenes are mirrored, gradients clipped, no auxiliary task.
Letters: B batch, A agents, L lanes, N = A + L polylines (tokens), P points of each (of an agent:
observed steps), T future steps, K trajectories, D width of a token, W half of D.
"""

import argparse
import csv
import functools
import json
import math
import os
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llmblock import KINDS, LLMBlock, UserError, fail, read, reading, run, save

TASK, BEST = "motion", min  # BEST picks the best epoch by the first metric on validation data

# small is VectorNet (https://arxiv.org/abs/2005.04259); micro is ours, for a laptop.
MODELS = {"micro": {"D": 64, "heads": 4}, "small": {"D": 128, "heads": 8}}
STEPS = {"toy": (20, 30), "argoverse1": (20, 30), "argoverse2": (50, 60)}  # P, T
SECOND = 10  # steps
K = 6
NEAR = 65.0  # metres: the target sees no farther; mmTransformer: lanes 65, agents 56
UNSEEN = complex(math.nan, math.nan)  # places are complex, x + iy: a product rotates them
torch.backends.mha.set_fastpath_enabled(False)  # keeps the attention visible to visualize.py


# ---------------------------------------------------------------- the model
def valid_steps(points):
    """Which steps have both ends; NaN is unseen or padding. (B, N, P, 2) -> bool (B, N, P - 1)."""
    return points.diff(dim=2).isfinite().all(-1)


class PolylineNet(nn.Module):
    """VectorNet's subgraph network: a token for each polyline, (B, N, P, 2) -> (B, N, D)."""

    def __init__(self, P, D):
        super().__init__()
        W = D // 2
        widths = (4, 2 * W, 2 * W)  # a vector; then its own W beside the polyline's W
        layers = [nn.Sequential(nn.Linear(w, W), nn.LayerNorm(W), nn.ReLU()) for w in widths]
        self.layers = nn.ModuleList(layers)
        self.proj = nn.Linear(4 * (P - 1) + W, D)

    def forward(self, points):
        # 1) a vector of 4 for each step: where it ends, in tens of metres, and how far it leads
        valid = valid_steps(points)[..., None]  # (B, N, P - 1, 1)
        vectors = torch.cat([points[:, :, 1:] / 10, points.diff(dim=2)], dim=-1).where(valid, 0)
        # 2) three times, each vector gets the maximum over its polyline beside it
        x = vectors  # (B, N, P - 1, 4)
        for layer in self.layers:
            x = layer(x) * valid  # (B, N, P - 1, W); 0 changes no maximum: ReLU gives none below
            polyline = x.amax(2, keepdim=True)  # (B, N, 1, W)
            x = torch.cat([x, polyline.expand_as(x)], dim=-1)  # (B, N, P - 1, 2W); the last: unused
        # 3) NOTE(paper): the token also gets all vectors, as maxima alone blur the motion.
        return self.proj(torch.cat([vectors.flatten(2), polyline[:, :, 0]], dim=-1))


class VectorNet(nn.Module):
    """Polylines as tokens; the target's becomes K trajectories and K confidences."""

    def __init__(self, D, heads, P, T, llm):
        super().__init__()
        self.agents = PolylineNet(P, D)
        self.lanes = PolylineNet(20, D)
        self.block = nn.TransformerEncoderLayer(D, heads, 4 * D, 0.0, batch_first=True)
        self.llm = llm
        self.norm = nn.LayerNorm(D)
        outputs = K * 2 * T + K  # x and y of all places, and the confidences
        self.head = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, outputs))

    def forward(self, agents, lanes):
        """agents (B, A, P, 2), the target first, lanes (B, L, 20, 2) -> (B, K, T, 2), (B, K)."""
        mask = torch.cat([valid_steps(agents).any(2), valid_steps(lanes).any(2)], dim=1)  # (B, N)
        with torch.autocast(agents.device.type, enabled=False):  # bf16 would round to decimetres
            x = torch.cat([self.agents(agents), self.lanes(lanes)], dim=1)  # (B, N, D)
        x = self.block(x, src_key_padding_mask=~mask)  # the host's own encoder
        x = self.llm(x, mask)  # the frozen LLM block: this line is the paper
        x = self.norm(x)
        # NOTE(paper): it does not describe its head. This one corrects constant velocity.
        output = self.head(x[:, 0])  # (B, 2KT + K), from the target's token
        moves = output[:, :-K].unflatten(1, (K, -1, 2))  # (B, K, T, 2)
        confidence = output[:, -K:]  # (B, K)
        seconds = torch.arange(1, moves.shape[2] + 1, device=x.device) / SECOND  # (T)
        velocity = -agents[:, :1, None, -1 - SECOND]  # (B, 1, 1, 2): from there to 0 in a second
        straight = velocity * seconds[:, None]  # (B, 1, T, 2)
        return straight + 3 * moves, confidence  # some 3 metres: bf16 keeps the centimetres


# ---------------------------------------------------------------- loss and metrics
def compute_loss(args, model, batch):
    """Winner takes all: only the trajectory that ends nearest learns; confidences name it."""
    agents, lanes, future = [x.to(args.device) for x in batch]
    modes, confidence = model(agents, lanes)  # (B, K, T, 2), (B, K)
    distance = (modes[:, :, -1] - future[:, None, -1]).norm(dim=-1)  # (B, K), at the end
    best = distance.argmin(1)  # (B)
    winner = modes[torch.arange(len(best)), best]  # (B, T, 2): of each scene its best
    return F.smooth_l1_loss(winner, future) + F.cross_entropy(confidence, best)  # NOTE(paper): ours


@torch.no_grad()
def evaluate(args, model, scenes):
    """Metres; misses in percent; brier adds (1 - confidence)^2. The best of K *ends* nearest."""
    model.eval()
    sums = torch.zeros(7)
    for agents, lanes, future in batches(args, scenes):
        modes, confidence = model(agents.to(args.device), lanes.to(args.device))
        distance = (modes.cpu() - future[:, None]).norm(dim=-1)  # (B, K, T)
        confidence = confidence.cpu().float().softmax(1)  # (B, K)
        best = distance[:, :, -1].argmin(1)  # (B)
        scene = torch.arange(len(best))
        metrics = []  # (B) each
        for mode in (best, confidence.argmax(1)):  # of K trajectories, and of the surest alone
            error = distance[scene, mode]  # (B, T): one trajectory of each scene
            final = error[:, -1]
            metrics += [error.mean(1), final, 100.0 * (final > 2)]  # a miss: over 2 m away
        # Argoverse 2's brier-minFDE6 punishes a best trajectory that was not trusted.
        metrics.append(metrics[1] + (1 - confidence[scene, best]) ** 2)
        sums += torch.stack(metrics).sum(1)
    names = ("minADE6", "minFDE6", "MR6", "minADE1", "minFDE1", "MR1", "brier-minFDE6")
    return dict(zip(names, (sums / len(scenes)).tolist(), strict=True))


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


def collate(samples):
    """Scenes of any number of polylines -> a batch, with NaN where one has fewer."""
    columns = zip(*samples, strict=True)  # agents, lanes, futures
    return [pad_sequence(column, batch_first=True, padding_value=torch.nan) for column in columns]


class Scenes(Dataset):
    """A list of what make_scene returns. Scenes to learn from are mirrored at random."""

    def __init__(self, scenes, mirror):
        self.scenes = scenes
        self.mirror = mirror

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, item):
        seed, index = item
        torch.default_generator.manual_seed(seed)  # the same for any number of workers
        scene = self.scenes[index]
        if self.mirror and torch.rand(()) < 0.5:
            scene = [x.conj() for x in scene]  # x - iy: left becomes right
        return [torch.view_as_real(torch.from_numpy(x)) for x in scene]  # x + iy -> (..., 2)


def make_scene(tracks, lanes, P, T):
    """tracks (A, P + T), the target's first, lanes (L, 20) -> what the target sees: agents (A, P),
    itself first, and lanes; its future (T). It is now at the origin and came along the x axis."""
    needed = tracks[0, P - 1 - SECOND : P + T]  # of the target, from a second ago
    if np.isfinite(needed).sum() < 1 + SECOND + T:
        raise ValueError("the target is not seen throughout the last second and the future")
    now = needed[SECOND]  # its place at step P - 1
    turn = np.exp(-1j * np.angle(now - needed[0]))  # times this: rotated by minus its direction
    tracks = (tracks - now) * turn
    lanes = (lanes - now) * turn
    scene = [hide_far(tracks[:, :P]), hide_far(lanes), tracks[0, P : P + T]]
    return [x.astype(np.complex64) for x in scene]


def hide_far(lines):
    """Lines without their far points, and only those with a step left."""
    lines = np.where(abs(lines) < NEAR, lines, UNSEEN)
    return lines[np.isfinite(np.diff(lines)).any(1)]


def read_table(path):
    """The rows of a .csv file (Argoverse 1) or .parquet file (Argoverse 2), as dictionaries."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)
    else:
        from pyarrow import parquet  # no other data needs it

        columns = "timestep track_id position_x position_y focal_track_id start_timestamp".split()
        yield from parquet.read_table(path, columns=columns).to_pylist()


def read_scene(path, maps):
    """Tracks (A, steps), the target's first, UNSEEN at steps without a row; lanes (L, 20)."""
    rows = list(read_table(path))
    if path.suffix == ".csv":
        when, agent, x, y = ["TIMESTAMP", "TRACK_ID", "X", "Y"]  # columns
        targets = {row["TRACK_ID"] for row in rows if row["OBJECT_TYPE"] == "AGENT"}
        maps = [file for file in maps if f"_{rows[0]['CITY_NAME']}_" in file.name]
    else:
        when, agent, x, y = ["timestep", "track_id", "position_x", "position_y"]
        targets = {row["focal_track_id"] for row in rows}
        maps = path.parent.glob("log_map_archive*.json")
    if len(targets) != 1:
        raise ValueError(f"{len(targets)} agents are the target, not one")
    times = sorted({float(row[when]) for row in rows})
    tracks = {target: np.full(len(times), UNSEEN) for target in targets}
    for row in rows:
        track = tracks.setdefault(row[agent], np.full(len(times), UNSEEN))
        track[times.index(float(row[when]))] = complex(float(row[x]), float(row[y]))
    lanes = [np.zeros((0, 20)), *map(read_map, maps)]  # (0, 20) where there is no map
    return np.stack(list(tracks.values())), np.concatenate(lanes)


@functools.lru_cache(100)
def read_map(path):
    """Centre lines (L, 20) of the lanes in a map of Argoverse 1 (.xml) or 2 (.json)."""
    lanes = []
    with reading(path):
        if path.suffix == ".xml":
            root = ElementTree.parse(path).getroot()
            nodes = {node.get("id"): node for node in root.iter("node")}
            for lane in root.iter("way"):
                lanes.append(resample([nodes[end.get("ref")] for end in lane.iter("nd")]))
        else:
            for lane in json.loads(path.read_bytes())["lane_segments"].values():
                left = resample(lane["left_lane_boundary"])
                right = resample(lane["right_lane_boundary"])
                lanes.append((left + right) / 2)  # as av2-api does it
        return np.stack(lanes)


def resample(points):
    """20 places (20), evenly spaced along a line of points, each with an "x" and a "y"."""
    line = np.array([complex(float(p.get("x")), float(p.get("y"))) for p in points])
    metres = abs(np.diff(line, prepend=line[0])).cumsum()  # from the first point, along the line
    return np.interp(np.linspace(0, metres[-1], 20), metres, line)


def find_scenes(args, split):
    """The files of train or val by time (--limit: the earliest); of the toy its numbers."""
    if args.data == "toy":
        return range(4_000) if split == "train" else range(4_000, 5_000)
    layout = {"argoverse1": "data/*.csv", "argoverse2": "*/scenario_*.parquet"}[args.data]
    files = sorted(Path(args.root, split).glob(layout), key=first_time)
    if not files:
        raise ValueError(f"no file {split}/{layout} is there")
    return files


def first_time(path):
    with reading(path):
        row = next(read_table(path), {})  # an empty file lacks the column, too
        return float(row["TIMESTAMP" if path.suffix == ".csv" else "start_timestamp"])


def load_data(args):
    """{"train", "val", "test": Scenes}, for --eval the test set alone."""
    P, T = STEPS[args.data]
    args.classes = [P, T]  # there are none: stands in, so that --eval refuses other P, T
    maps = []
    if args.map:  # a file, or a directory as Argoverse 1's or of Argoverse 2's sensor logs
        with reading("--map"):
            path = Path(args.map).resolve(strict=True)  # it exists
        maps = sorted([path, *path.glob("*vector_map.xml"), *path.glob("**/log_map_archive*.json")])
    with reading(args.root):
        files = {"test": find_scenes(args, "val")}
        if not args.eval:
            train = find_scenes(args, "train")
            cut = len(train) * 9 // 10
            files["train"] = train[:cut]
            files["val"] = train[cut:]  # it selects the best epoch
    data = {}
    for name, paths in files.items():
        scenes = []
        for path in tqdm(paths[: args.limit], f"reading {name}", disable=RANK > 0 or None):
            with reading(path):
                tracks, lanes = draw_toy(path) if args.data == "toy" else read_scene(path, maps)
                scenes.append(make_scene(tracks, lanes, P, T))
        data[name] = Scenes(scenes, mirror=name == "train")
    args.sizes = {name: len(scenes) for name, scenes in data.items()}
    test = data["test"].scenes
    if args.map and not any(len(lanes) for _, lanes, _ in test):
        raise UserError(f"--map {args.map}: no map with _CITY_ in its name is near a scene")
    seconds = np.arange(1, T + 1) / SECOND  # the baseline: on, as in the last second
    errors = [abs(future + agents[0, -1 - SECOND] * seconds) for agents, _, future in test]
    errors = np.mean(errors, axis=0)  # (T)
    print(f"constant velocity: minADE1 {errors.mean():.2f}, minFDE1 {errors[-1]:.2f}")
    return data


def draw_toy(index):
    """Three roads part at a fork. Tracks (2, 50) of the target and of a car in front whose speed
    it takes on; lanes (3, 20). Nothing tells which road it takes; lanes tell how it bends."""
    rng = np.random.default_rng(index)
    fork = rng.uniform(10, 30)  # metres ahead
    bends = rng.uniform([0.02, -0.02, -0.06], [0.06, 0.02, -0.02])  # 1 / radius: left, on, right
    own, leader = rng.uniform(4, 16, 2)  # metres per second
    t = np.arange(-19, 31) / SECOND
    change = np.maximum(t, 0) ** 2 / 6  # a t^2 / 2 with a = 1 / 3: alike after 3 seconds
    driven = [own * t + (leader - own) * change, 25 + leader * t]  # metres, the target's first
    tracks = [follow(s, fork, rng.choice(bends)) for s in driven]
    lanes = [follow(np.linspace(-30, 70, 20), fork, bend) for bend in bends]
    return np.stack(tracks), np.stack(lanes)


def follow(s, fork, bend):
    """Where s metres along a road lead: straight up to the fork, then on a circle."""
    angle = bend * np.maximum(s - fork, 0)
    return np.minimum(s, fork) + (np.exp(1j * angle) - 1) / (1j * bend)


# ---------------------------------------------------------------- settings
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", choices=STEPS, default="toy")
    p.add_argument("--root", default="data", help="directory of the data")
    p.add_argument("--map", metavar="PATH", help="of argoverse1: .xml or .json, or a directory")
    p.add_argument("--model", choices=MODELS, default="micro", help="paper: small")
    p.add_argument("--epochs", type=int, default=5, help="enough for the toy; paper: 60")
    p.add_argument("--batch-size", type=int, default=32, help="as the paper")
    p.add_argument("--lr", type=float, default=1e-3, help="its peak; paper: 5e-4")
    p.add_argument("--weight-decay", type=float, default=0.01, help="paper: not told")
    p.add_argument("--warmup", type=float, default=1, help="epochs; paper: not told")
    return parse_shared(p, argv)


def build_model(args, kind, seed):
    torch.manual_seed(seed)
    P, T = STEPS[args.data]
    config = MODELS[args.model]
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    llm = LLMBlock(args.llm, config["D"], args.layers, kind, seed, dtype)
    return VectorNet(**config, P=P, T=T, llm=llm)


def param_groups(args, model):
    """Weight decay on matrices alone; the block's projections have a rate of their own."""
    groups = {}
    for name, p in model.named_parameters():
        decay = args.weight_decay if p.ndim > 1 else 0.0
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
