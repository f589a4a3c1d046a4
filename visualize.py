"""What the block does to the tokens, as pictures and numbers; and tables of results.

    python visualize.py runs/image-toy-micro              # all runs in a directory, ...
    python visualize.py runs/*/pretrained-s0 --limit 4    # ... these, or checkpoints
    python visualize.py RUN --masks DIR                   # DIR/images, DIR/masks: same names
    python visualize.py tests/results.jsonl               # only tables, of RESULT lines

Prints tables of results. Into --out go two pictures of each task: learning curves; and samples
with their tokens, from cold (black) to hot (white), in the first run of each arm. Where masks tell
foreground (toy images know theirs), a table says how well heat finds it: the paper's information
filtering, section 4. Other flags, after the runs, are the training script's.
Letters: N tokens, D width, S side of an image in pixels, T frames, P points, G groups of points.
"""

import argparse
import importlib
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import v2

from llmblock import UserError, fail, read, reading, run

FONT = ImageFont.load_default(13)
COLOURS = "black crimson royalblue seagreen darkorange purple deepskyblue sienna".split()  # of arms
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom, as in any book of statistics
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# ---------------------------------------------------------------- what the model computes
@torch.no_grad()
def look(task, model, inputs):
    """One sample's {stage: tokens (N, D)}, and how much the host's last attention sees each (N)."""
    # 1) the last self-attention (the loop overwrites) among the tokens that the block gets
    for name, module in model.named_modules():
        if name.endswith((".attn", ".self_attn")) and "llm." not in name and "text" not in name:
            attention = module
    # 2) run the model and keep what this attention and the block are called with
    calls = {}

    def remember(module, args):
        calls[module] = args

    with attention.register_forward_pre_hook(remember):
        with model.llm.register_forward_pre_hook(remember):
            model(*inputs)
    # 3) call the attention once more, for its weights (1, N, N)
    if task in ("motion", "vqa", "retrieval"):  # PyTorch's; one sample has no padding to mask
        weights = attention(*calls[attention])[1]
    else:  # the same as in the scripts' class Attention
        bias = attention.qkv.bias
        if task == "video":  # the keys have none
            bias = torch.cat([attention.q_bias, 0 * attention.q_bias, attention.v_bias])
        qkv = F.linear(*calls[attention], attention.qkv.weight, bias)  # (1, N, 3 D)
        q, k, _ = qkv.unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)  # the mean of the heads
    # video's head reads the mean of all tokens, others' the first (pointcloud's a maximum, too)
    weights = weights[0].mean(0) if task == "video" else weights[0, 0]
    return find_stages(model.llm, *calls[model.llm]), weights


def find_stages(llm, x, mask=None):
    """{stage: tokens (N, D)} of one sample x (1, N, dim) on its way through the block."""
    stages = {"host": x[0]}
    if llm.kind == "none":
        return stages
    h = llm.proj_in(x)  # (1, N, D)
    stages["proj_in"] = h[0]
    if llm.layers:
        # The block's last layer adds its FFN's output to what it had after the attention, which
        # alone is left if that output is 0. The FFN is, or ends in, the last part with matrices.
        for part in llm.layers[-1].children():
            if any(p.ndim > 1 for p in part.parameters()):
                ffn = part
        with ffn.register_forward_hook(lambda module, args, output: 0 * output):
            stages["attention"] = llm.run_layers(h, mask)[0]
        stages["ffn"] = llm.run_layers(h, mask)[0]
    stages["proj_out"] = llm(x, mask)[0]
    return stages


def heat_maps(task, stages, attention):
    """{"stage, measure": heat (N) from 0 to 1}, without the CLS token. magnitude: how far a token
    is from the mean token; frequency: the same of its channels' Fourier phases, not wrapped."""
    first = 0 if task in ("video", "motion") else 1  # the others have a CLS token
    maps = {}
    for stage, x in stages.items():
        x = x[first:].float()
        maps[f"{stage}, magnitude"] = (x - x.mean(0)).norm(dim=1)
        # NOTE(paper): its code averages over the first axis of (H, W, D), its text, as we, over all
        phase = torch.fft.fft(x, dim=1).angle()
        maps[f"{stage}, frequency"] = (phase - phase.mean(0)).norm(dim=1)
    maps["host, attention map"] = attention[first:]
    for name, x in maps.items():
        maps[name] = (x - x.min()) / (x.max() - x.min() + 1e-12)  # what is constant becomes 0
    return maps


# ---------------------------------------------------------------- how well they find foreground
def score(heat, mask):
    """How well heat (N) finds the mask (N): average precision and best IoU, percent."""
    # for each foreground token: how much of what is at least as hot is foreground
    found = heat >= heat[mask][:, None]  # (foreground tokens, N)
    precision = (found & mask).sum(1) / found.sum(1)
    hot = heat > torch.arange(1, 10)[:, None] / 10  # at nine thresholds (9, N)
    iou = (hot & mask).sum(1) / (hot | mask).sum(1)
    # NOTE(paper): each image's mask picks its best threshold, so chance is far above 0
    return 100 * precision.mean().item(), 100 * iou.max().item()


def find_masked(script, S, root):
    """Yield pixels, uint8 (3, S, S), and masks, (1, S, S): of toys, or of files in root."""
    if not root:
        for index in range(10_000, 10_100):  # no split has these
            image, _, mask = script.draw_toy(index, S)
            yield v2.functional.pil_to_tensor(image), v2.functional.pil_to_tensor(mask)
        return
    masks = {path.stem: path for path in Path(root, "masks").glob("*")}
    crop = script.make_transform(S, "light", train=False)
    for path in sorted(Path(root, "images").glob("*")):
        with reading(path), Image.open(path) as image, Image.open(masks[path.stem]) as mask:
            yield crop(image.convert("RGB")), crop(Image.fromarray(np.atleast_3d(mask).any(2)))


def measure_masks(script, args, model, root):
    """{"stage, measure": mean average precision and IoU of all images, and both by chance}."""
    size = script.MODELS[args.model]
    scores = {}
    for x, mask in find_masked(script, size["S"], root):
        mask = F.avg_pool2d(mask.float(), size["patch"]).flatten() >= 0.5  # (N): half of a patch
        if mask.all() or not mask.any():
            continue
        maps = heat_maps(script.TASK, *look(script.TASK, model, [script.normalise(x[None])]))
        for name, heat in maps.items():
            row = score(heat, mask) + score(heat[torch.randperm(len(heat))], mask)
            scores.setdefault(name, []).append(row)
    if not scores:
        raise UserError(f"{root} has no images/NAME with masks/NAME that is partly foreground")
    return {name: np.mean(rows, axis=0) for name, rows in scores.items()}


def mask_table(arms):
    """A table of what measure_masks found, of {arm: its Runs}."""
    rows = ["stage|measure|block|average precision|best IoU|AP by chance|IoU by chance".split("|")]
    for name in max((runs[0].masks for runs in arms.values()), key=len):  # not `none`'s few
        for arm, runs in arms.items():
            if name in runs[0].masks:
                scores = np.stack([run.masks[name] for run in runs])  # (seeds, 4)
                rows.append([*name.split(", "), arm, *[spread(column) for column in scores.T]])
    return markdown(rows)


# ---------------------------------------------------------------- results
def read_results(path):
    """A file of RESULT lines and no others: grep RESULT LOG."""
    with reading(path):
        results = [json.loads(line.removeprefix("RESULT ")) for line in path.open()]
        group_results(results)  # fails where they are something else
    return results


def group_results(results):
    """{task, data, model, epochs, rate: {(kind, LLM, layers, proj-lr): [RESULT of each seed]}}."""
    groups = {}
    for r in {str(r): r for r in results if r}.values():  # each once; None: an unfinished run
        arm = ("none", "", "", "")
        if r["kind"] != "none":
            arm = (r["kind"], r["llm"], " ".join(map(str, r["layers"])), str(r["proj_lr"]))
        group = "{task} {data} {model}, {epochs} epochs, lr {lr}{flags}".format(**{"flags": ""} | r)
        groups.setdefault(group, {}).setdefault(arm, []).append(r)
    return groups


def results_table(arms):
    """A table of a group: mean ± sd of each metric, and the difference to `none`."""
    baselines = arms.get(("none", "", "", ""), [])
    names = list(next(iter(arms.values()))[0]["metrics"])
    rows = [["block", "LLM", "layers", "proj-lr", "seeds", *names, f"{names[0]} - none, 95 %"]]
    for arm, results in arms.items():
        row = [*arm, " ".join(str(r["seed"]) for r in results)]
        row += [spread([r["metrics"][name] for r in results]) for name in names]
        rows.append([*row, gain(results, baselines, names[0])])
    return markdown(rows)


def spread(values):
    """Mean ± standard deviation of some seeds."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def gain(results, baselines, name):
    """Mean difference of a metric, paired by seed, ± its 95 % interval."""
    none = {r["seed"]: r["metrics"][name] for r in baselines}
    differences = [r["metrics"][name] - none[r["seed"]] for r in results if r["seed"] in none]
    n = len(differences)
    if not n or results is baselines:
        return ""
    mean = f"{np.mean(differences):+.2f}"
    if n == 1:
        return mean
    return f"{mean} ± {T95[min(n, 10) - 2] * np.std(differences, ddof=1) / n**0.5:.2f}"


def markdown(rows):
    """Rows of cells, the first one is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


# ---------------------------------------------------------------- a tile for each kind of data
def glow(heat):
    """Heat from 0 to 1 -> colours from black over red and yellow to white: uint8 (..., 3)."""
    channels = torch.stack([3 * heat, 3 * heat - 1, 3 * heat - 2], dim=-1)
    return (255 * channels.clamp(0, 1)).byte()


def paint_image(pixels, heat=None, size=112):
    """Pixels (3, S, S), under the heat (N) of their patches."""
    picture = v2.functional.to_pil_image(pixels).resize((size, size))
    if heat is None:
        return picture
    side = round(len(heat) ** 0.5)
    colours = glow(heat.view(side, side)).numpy()
    colours = Image.fromarray(colours).resize((size, size), Image.Resampling.BOX)
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.7)


def paint_clip(frames, heat=None):
    """Four of the frames uint8 (T, 3, S, S) side by side."""
    tile = Image.new("RGB", (232, 56), "white")
    for column in range(4):
        t = column * len(frames) // 4
        patches = None if heat is None else heat.view(len(frames) // 2, -1)[t // 2]
        tile.paste(paint_image(frames[t], patches, 56), (58 * column, 0))
    return tile


def paint_points(points, colours, centres, heat=None, size=112):
    """Points (P, 3) in colours (P, 3) from 0 to 1, or as hot as the nearest of centres (G, 3)."""
    colours = (255 * colours).byte()
    if heat is not None:
        colours = glow(heat)[torch.cdist(points, centres).argmin(1)]
    x, y, z = points.unbind(1)  # y leads away from us, z upwards
    places = torch.stack([x + 0.4 * y, -z - 0.4 * y], dim=1)  # right, down
    places = size * (0.5 + 0.45 * places / places.abs().max())  # pixels
    tile = Image.new("RGB", (size, size), "#444444")
    pen = ImageDraw.Draw(tile)
    for i in y.argsort(descending=True).tolist():  # near ones hide far ones
        pen.circle(places[i].tolist(), 24 / len(points) ** 0.5, tuple(colours[i].tolist()))
    return tile


def paint_traffic(agents, lanes, heat=None, size=168):
    """Agents (A, P, 2), the target first, and lanes (L, 20, 2), in metres."""
    colours = ["#ff5544"] + ["#5599ff"] * (len(agents) - 1) + ["#777777"] * len(lanes)
    if heat is not None:
        colours = [tuple(colour) for colour in glow(heat).tolist()]
    tile = Image.new("RGB", (size, size), "#444444")
    pen = ImageDraw.Draw(tile)
    lines = [*agents, *lanes]
    for i in reversed(range(len(lines))):  # the target is on top
        line = lines[i][lines[i].isfinite().all(1)]  # NaN: not seen
        places = torch.tensor([0.35, 0.5]) + line * torch.tensor([1, -1]) / 80  # the tile is 80 m
        pen.line((size * places).flatten().tolist(), colours[i], 5 if i < len(agents) else 2)
    return tile


def prepare(script, args, model, test, i):
    """A sample's title, what the model gets (a batch of one), and what paints it: heat -> tile."""
    x, y, *others = script.collate([test[i, i]])
    title = ""
    inputs = [x, y]
    paint = partial(paint_image, x[0])
    if script.TASK in ("image", "pointcloud", "video"):
        title = args.classes[y]
    if script.TASK == "image":
        inputs = [script.normalise(x)]
    elif script.TASK == "video":  # its first view
        inputs = [script.normalise(x[:, 0])]
        paint = partial(paint_clip, x[0, 0])
    elif script.TASK == "pointcloud":
        inputs = [x]
        grey = (0.6 + 0.4 * x[0, :, 2:]).clamp(0, 1).expand(-1, 3)  # the higher, the brighter
        paint = partial(paint_points, x[0], grey, script.farthest_points(x, model.G)[0])
    elif script.TASK == "motion":
        paint = partial(paint_traffic, x[0], y[0])
    elif script.TASK == "retrieval":  # the image, once more for ITM, and the first caption: its own
        inputs = [x, x, others[0][:, :1]]
    else:
        title = test.rows[i].text
        if args.data in script.DATA_3D:  # groups of points, at their centres in their mean colours
            centres = x[0, :, 0, 6:]
            paint = partial(paint_points, centres, x[0, :, :, 3:6].mean(1), centres)
    return title, inputs, paint


# ---------------------------------------------------------------- whole pictures
class Run(NamedTuple):
    arm: str  # kind of block, with settings
    seed: int
    metric: str
    curve: list  # the metric of validation data after each epoch
    samples: list  # (title, {column: tile}) of each
    masks: dict  # what measure_masks finds


def draw_samples(runs):
    """A row for each sample in each run, the same samples below each other."""
    rows = []
    for same_sample in zip(*[one.samples for one in runs], strict=False):
        rows += same_sample
    columns = list(max((tiles for _, tiles in rows), key=len))
    _, tiles = rows[0]
    width = tiles["input"].width + 4
    height = tiles["input"].height + 22
    picture = Image.new("RGB", (width * len(columns), 36 + height * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for i, name in enumerate(columns):
        name = name.replace(", ", "\n")
        pen.text((width * (i + 0.5), 32), name, "black", FONT, "md", align="center")
    for row, (title, tiles) in enumerate(rows):
        y = 36 + height * row
        pen.text((4, y), title, "black", FONT)
        for name, tile in tiles.items():
            picture.paste(tile, (width * columns.index(name) + 2, y + 18))
    return picture


def draw_curves(arms):
    """Validation after each epoch: a line for each seed, in the colour of its arm."""
    curves = [one.curve for runs in arms.values() for one in runs]
    values = np.concatenate(curves)
    ends = [values.min(), values.max()]
    picture = Image.new("RGB", (640, 340 + 18 * len(arms)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((70, 300), f"{ends[0]:.2f}", "black", FONT, "rm")
    pen.text((70, 40), f"{ends[1]:.2f}", "black", FONT, "rm")
    for i, (arm, runs) in enumerate(arms.items()):
        colour = COLOURS[i % 8]
        for one in runs:
            x = np.linspace(80, 620, max(map(len, curves)))
            y = np.interp(one.curve, ends, [300, 40])
            points = list(zip(x, y, strict=False))
            pen.line(points, colour, 2)
            for point in points:
                pen.circle(point, 2, colour)
        pen.text((80, 325 + 18 * i), f"{arm}, seeds: {len(runs)}", colour, FONT)
    pen.text((80, 6), f"{runs[0].metric} of validation data after each epoch", "black", FONT)
    return picture


def open_run(path, masks, flags):
    """Task with data and model, the Run, and the RESULT (None: unfinished) of a checkpoint."""
    with reading(path):
        script = importlib.import_module(f"train_{read(path)['task']}")
    args = script.parse_args(["--eval", str(path), "--limit", "8", "--device", "cpu", *flags])
    test = script.load_data(args)["test"]
    kind = args.block[0]
    seed = args.seeds[0]
    model = script.build_model(args, kind, seed).eval()
    state = script.resume(args, path, kind, seed, model, None)  # with all its checks
    if path.with_name("last.pt").exists():  # it knows all epochs and the result
        state = read(path.with_name("last.pt"))
    arm = f"{kind}, lr {args.lr}, epochs {args.epochs}"
    if kind != "none":
        layers = " ".join(map(str, model.llm.record["layers"]))
        arm += f", {Path(args.llm).name}, layers {layers}, proj-lr {args.proj_lr}"
    samples = []
    step = max(1, len(test) // args.limit)  # the captions of an image follow each other
    for i in range(0, len(test), step):
        title, inputs, paint = prepare(script, args, model, test, i)
        tiles = {"input": paint()}
        for name, heat in heat_maps(script.TASK, *look(script.TASK, model, inputs)).items():
            tiles[name] = paint(heat)
        samples.append((f"{arm}, seed {seed}  {title}", tiles))
    metric = next(iter(state["history"][0]["val"]))
    curve = [row["val"][metric] for row in state["history"]]
    found = None
    if script.TASK == "image" and (args.data == "toy" or masks):
        found = measure_masks(script, args, model, masks)
    task = f"{script.TASK}-{args.data}-{args.model}"
    return task, Run(arm, seed, metric, curve, samples, found), state["result"]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", metavar="RUN", help="directories, checkpoints, .jsonl files")
    p.add_argument("--masks", metavar="DIR", help="DIR/images and DIR/masks, above 0 is foreground")
    p.add_argument("--out", default="figures", help="directory; other flags are the script's own")
    p.error = fail
    args, flags = p.parse_known_args(argv)
    results = []
    tasks = {}  # {task, data and model: {arm: [Run of each seed]}}
    for path in map(Path, args.runs):
        if path.suffix == ".jsonl":
            results += read_results(path)
            continue
        for checkpoint in sorted(path.rglob("best.pt")) or [path]:
            task, one, result = open_run(checkpoint, args.masks, flags)
            runs = tasks.setdefault(task, {}).setdefault(one.arm, [])
            if one.seed in [other.seed for other in runs]:
                print(f"{checkpoint} is left out: there is another {one.arm}, seed {one.seed}")
                continue
            runs.append(one)
            results.append(result)
    for group, arms in group_results(results).items():
        print(f"\n{group}\n\n{results_table(arms)}")
    for task, arms in tasks.items():
        Path(args.out).mkdir(parents=True, exist_ok=True)
        firsts = [runs[0] for runs in arms.values()]
        name = f"{task}, {firsts[0].arm}, s{firsts[0].seed}" if len(arms) == 1 else task
        path = Path(args.out, name.replace(", ", "-").replace(" ", "-"))
        draw_samples(firsts).save(f"{path}.png")
        draw_curves(arms).save(f"{path}-curves.png")
        print(f"\npictures: {path}*.png")
        if firsts[0].masks:
            print(f"\nin percent, to compare with what chance finds:\n\n{mask_table(arms)}")


if __name__ == "__main__":
    run(main)
