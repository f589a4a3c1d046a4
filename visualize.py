"""What the block does to the tokens, as pictures and numbers; and tables of results.

    python visualize.py runs/image-toy-micro              # all runs in a directory, ...
    python visualize.py runs/*/pretrained-s0 --limit 4    # ... these, or checkpoints
    python visualize.py RUN --masks DIR                   # DIR/images, DIR/masks: same names
    python visualize.py tests/results.jsonl               # only tables, of RESULT lines

Prints tables of the results in markdown. Into --out go a picture of every run and one that compares
the arms. Where masks say which tokens are foreground (toy images know theirs), a table tells how
well activations find it: the paper's information filtering, section 4. All is done on the CPU.
Other flags, as --root or --llm, go to the script that wrote the checkpoint.

Letters: N tokens, D width, S side of an image in pixels, T frames, P points, G groups of points.
"""

import argparse
import importlib
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms import v2

from llmblock import UserError, fail, read, reading, run

FONT = ImageFont.load_default(13)
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom, as in any book of statistics
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# ---------------------------------------------------------------- what the model computes
@torch.no_grad()
def look(model, inputs):
    """One sample's {stage: tokens (N, D)}, and how much the host's last attention sees each (N)."""
    # 1) find the host's last self-attention among the tokens that the block gets
    for name, module in model.named_modules():
        others = name.startswith(("llm.", "fusion.text_layers."))
        if name.endswith((".attn", ".self_attn")) and not others:
            attention = module
    # 2) run the model and keep what this attention and the block are called with
    calls = {}

    def remember(module, args, kwargs):
        calls[module] = (args, kwargs)

    with attention.register_forward_pre_hook(remember, with_kwargs=True):
        with model.llm.register_forward_pre_hook(remember, with_kwargs=True):
            model(*inputs)
    # 3) call both once more, step by step
    args, _ = calls[model.llm]  # the tokens, in traffic also a mask
    return find_stages(model.llm, *args), find_weights(attention, *calls[attention])


def find_stages(llm, x, mask=None):
    """The tokens (1, N, dim) of one sample on their way through the block: {stage: (N, D)}.
    attention and ffn: what stands behind these two parts of the LLM's last layer."""
    stages = {"host": x[0]}
    if llm.kind == "none":
        return stages
    h = llm.proj_in(x)  # (1, N, D)
    stages["proj_in"] = h[0]
    if llm.layers:
        # The FFN ends in the last part of the layer that has matrices. When that part gives 0, the
        # layer returns what it has after the attention.
        parts = llm.layers[-1].children()
        ffn = [part for part in parts if any(p.ndim > 1 for p in part.parameters())][-1]
        with ffn.register_forward_hook(lambda module, args, output: 0 * output):
            stages["attention"] = llm.run_layers(h, mask)[0]
        stages["ffn"] = llm.run_layers(h, mask)[0]
    stages["proj_out"] = llm(x, mask)[0]
    return stages


def find_weights(attention, args, kwargs):
    """How much the token that the head reads attends to each one, mean of the heads: (N)."""
    if isinstance(attention, nn.MultiheadAttention):
        _, weights = attention(*args, **kwargs | {"need_weights": True})  # (1, N, N)
        return weights[0, 0]
    # the same once more as in `Attention` of the scripts for images, point clouds and videos
    bias = attention.qkv.bias
    if hasattr(attention, "q_bias"):  # video: the keys have no bias
        bias = torch.cat([attention.q_bias, 0 * attention.q_bias, attention.v_bias])
    qkv = F.linear(args[0][0], attention.qkv.weight, bias)  # (N, 3 D)
    q, k, _ = qkv.unflatten(1, (3, attention.heads, -1)).permute(1, 2, 0, 3)  # (h, N, D/h) each
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)  # (N, N)
    # the head of the video model reads the mean of all tokens, the others the first one
    return weights.mean(0) if hasattr(attention, "q_bias") else weights[0]


def heat_maps(task, tokens, attention):
    """{"stage measure": how hot each token is, from 0 to 1}, without the CLS token. magnitude: how
    far it is from the mean token. frequency: the same of phases of the channels' Fourier transform.
    """
    first = 0 if task in ("video", "motion") else 1  # the others have a CLS token
    maps = {}
    for stage, x in tokens.items():
        x = x[first:].float()
        maps[f"{stage} magnitude"] = stretch((x - x.mean(0)).norm(dim=1))
        # NOTE(paper): its code averages over the first axis of (H, W, D), its text, as we, over all
        phase = torch.fft.fft(x, dim=1).angle()
        maps[f"{stage} frequency"] = stretch((phase - phase.mean(0)).norm(dim=1))
    maps["host attention"] = stretch(attention[first:])
    return maps


def stretch(x):
    """To 0 ... 1; what is constant becomes 0."""
    return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12)


# ---------------------------------------------------------------- how well they find foreground
def score(heat, mask):
    """How well heat (N) finds the mask (N): average precision and best IoU, percent."""
    # for each foreground token, the share of foreground among all tokens at least as hot
    shares = [mask[heat >= h].float().mean() for h in heat[mask]]
    ious = []  # intersection over union at nine thresholds
    for t in range(1, 10):
        hot = heat > t / 10
        ious.append((hot & mask).sum() / (hot | mask).sum())
    # NOTE(paper): so the threshold is chosen by the answer, image by image
    return 100 * torch.stack(shares).mean().item(), 100 * max(ious).item()


def masked_toys(script, S):
    """Yield toys that were drawn for nothing else, pixels (3, S, S), and their masks (1, S, S)."""
    for index in range(10_000, 10_200):
        image, _, mask = script.draw_toy(index, S)
        yield v2.functional.pil_to_tensor(image), v2.functional.pil_to_tensor(mask)


def masked_photos(script, S, root):
    """Yield the same of root/images/NAME and root/masks/NAME."""
    masks = {path.stem: path for path in Path(root, "masks").glob("*")}
    crop = script.make_transform(S, "light", train=False)
    for path in sorted(Path(root, "images").glob("*")):
        with reading(path), Image.open(path) as image, Image.open(masks[path.stem]) as mask:
            yield crop(image.convert("RGB")), crop(Image.fromarray(np.array(mask) > 0))


def measure_masks(script, args, model, root):
    """{"stage measure": means of the scores over images, and of the scores by chance}."""
    size = script.MODELS[args.model]
    pairs = masked_photos(script, size["S"], root) if root else masked_toys(script, size["S"])
    rows = {}
    for x, mask in pairs:
        mask = F.avg_pool2d(mask.float(), size["patch"]).flatten() >= 0.5  # (N): half of a patch
        if mask.all() or not mask.any():
            continue
        tokens, attention = look(model, [script.normalise(x[None])])
        order = torch.randperm(len(mask))
        for name, heat in heat_maps(script.TASK, tokens, attention).items():
            rows.setdefault(name, []).append([*score(heat, mask), *score(heat[order], mask)])
    if not rows:
        raise UserError(f"{root} has no images/NAME with masks/NAME that is partly foreground")
    return {name: np.mean(scores, axis=0) for name, scores in rows.items()}


def mask_table(arms):
    """A table of {arm: [what measure_masks found, for each seed]}."""
    rows = ["stage|measure|block|average precision|best IoU|AP by chance|IoU by chance".split("|")]
    for name in max((seeds[0] for seeds in arms.values()), key=len):
        for arm, seeds in arms.items():
            if name in seeds[0]:  # not all arms have all stages
                columns = np.array([scores[name] for scores in seeds]).T  # (4, seeds)
                rows.append([*name.split(), arm, *map(spread, columns)])
    return markdown(rows)


# ---------------------------------------------------------------- results
def read_results(path):
    """RESULT lines of a file, as they were printed."""
    with reading(path):
        lines = path.read_text().splitlines()
        results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
        group_results(results)  # fails where they are something else
    return results


def group_results(results):
    """{task, data, model, epochs, rate: {(kind, LLM, layers, proj-lr): [RESULT of each seed]}}."""
    groups = {}
    for r in filter(None, results):  # without those of unfinished runs
        arm = ("none", "", "", "")
        if r["kind"] != "none":
            arm = (r["kind"], r["llm"], " ".join(map(str, r["layers"])), str(r["proj_lr"]))
        group = "{task} {data} {model}, {epochs} epochs, lr {lr}".format(**r)
        groups.setdefault(group, {}).setdefault(arm, []).append(r)
    return groups


def results_table(arms):
    """A table of a group: mean ± sd of each metric, and the difference to `none`."""
    baselines = arms.get(("none", "", "", ""), [])
    names = list(next(iter(arms.values()))[0]["metrics"])
    rows = [["block", "LLM", "layers", "proj-lr", "seeds", *names, f"{names[0]} - none"]]
    for arm, results in arms.items():
        row = [*arm, str(len(results))]
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
    if n == 0 or results is baselines:
        return ""
    if n == 1:
        return f"{differences[0]:+.2f}"
    t = T95[min(n, 10) - 2]
    interval = t * np.std(differences, ddof=1) / n**0.5
    return f"{np.mean(differences):+.2f} ± {interval:.2f}"


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
    side = math.isqrt(len(heat))
    colours = glow(heat.view(side, side)).numpy()
    colours = Image.fromarray(colours).resize((size, size), Image.Resampling.BOX)
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.7)


def paint_clip(frames, heat=None):
    """Four of the frames uint8 (T, 3, S, S) side by side."""
    T = len(frames)
    image = Image.new("RGB", (4 * 58, 56), "white")
    heats = [None] * T if heat is None else heat.view(T // 2, -1)  # of two frames each
    for column in range(4):
        t = column * T // 4
        image.paste(paint_image(frames[t], heats[t // 2], size=56), (58 * column, 0))
    return image


def paint_points(points, colours, centres, heat=None, size=112):
    """Points (P, 3) in colours (P, 3) from 0 to 1, or as hot as the nearest of centres (G, 3)."""
    if not colours.any():  # the data has none: the higher, the brighter
        colours = 0.4 + 0.6 * stretch(points[:, 2:]).expand(-1, 3)
    colours = (255 * colours).byte()
    if heat is not None:
        nearest = torch.cdist(points, centres).argmin(1)
        colours = glow(heat)[nearest]
    x, y, z = points.unbind(1)  # y leads away from us, z upwards
    places = torch.stack([x + 0.4 * y, -z - 0.4 * y], dim=1)  # right, down
    places = size * (0.5 + 0.45 * places / places.abs().max())  # pixels
    radius = 24 / len(points) ** 0.5
    image = Image.new("RGB", (size, size), "#444444")
    pen = ImageDraw.Draw(image)
    for i in y.argsort(descending=True).tolist():  # near ones hide far ones
        pen.circle(places[i].tolist(), radius, tuple(colours[i].tolist()))
    return image


def paint_traffic(lines, colours, heat=None, size=168):
    """Polylines (P, 2) in metres, first of all the target's, which drives to the right."""
    if heat is not None:
        lines = lines[: len(heat)]  # without the forecasts
        colours = [tuple(colour) for colour in glow(heat).tolist()]
    image = Image.new("RGB", (size, size), "#444444")
    pen = ImageDraw.Draw(image)
    for i in reversed(range(len(lines))):  # the target is on top
        line = lines[i][lines[i].isfinite().all(1)]  # NaN: not seen
        places = size * (torch.tensor([0.35, 0.5]) + line * torch.tensor([1, -1]) / 80)  # of 80 m
        if len(places) > 1:
            pen.line(places.flatten().tolist(), colours[i], 2)
    return image


@torch.no_grad()
def prepare(script, args, model, sample):
    """What the model gets of a sample (a batch of one), and what paints it: heat -> tile."""
    x, y, *_ = sample
    if script.TASK == "image":
        return [script.normalise(x)], partial(paint_image, x[0])
    if script.TASK == "video":  # its first view
        return [script.normalise(x[:, 0])], partial(paint_clip, x[0, 0])
    if script.TASK == "pointcloud":
        x = x[:, : args.points]
        centres = script.farthest_points(x, model.G)[0]
        return [x], partial(paint_points, x[0], torch.zeros_like(x[0]), centres)
    if script.TASK == "retrieval":  # an image and its own caption
        return [x, x, sample[2][:, :1]], partial(paint_image, x[0])
    if script.TASK == "motion":  # agents, lanes and forecasts
        modes = model(x, y)[0][0]
        colours = ["#5599ff"] * x.shape[1] + ["#777777"] * y.shape[1] + ["#ffcc33"] * len(modes)
        colours[0] = "#ff5544"  # the target
        return [x, y], partial(paint_traffic, [*x[0], *y[0], *modes], colours)
    if args.data in script.DATA_3D:  # groups of points, at their centres in their mean colours
        centres = x[0, :, 0, 6:]
        return [x, y], partial(paint_points, centres, x[0, :, :, 3:6].mean(1), centres)
    return [x, y], partial(paint_image, x[0])


def draw_grid(rows):
    """A picture of rows (title, {name of the column: tile})."""
    _, tiles = rows[0]
    width = tiles["input"].width + 4
    height = tiles["input"].height + 22
    image = Image.new("RGB", (width * len(tiles), 56 + height * len(rows)), "white")
    pen = ImageDraw.Draw(image)
    for column, name in enumerate(tiles):
        lines = "\n".join(word[:16] for word in name.split())
        pen.text((width * (column + 0.5), 52), lines, "black", FONT, "md", align="center")
    for row, (title, tiles) in enumerate(rows):
        y = 56 + row * height
        pen.text((4, y), title, "black", FONT)
        for column, tile in enumerate(tiles.values()):
            image.paste(tile, (width * column + 2, y + 18))
    return image


# ---------------------------------------------------------------- the whole
def show(path, args, flags):
    """Draw the picture of a checkpoint. Returns what comparing it with others needs."""
    with reading(path):
        script = importlib.import_module(f"train_{read(path)['task']}")
    # what the run was trained with, but for eight samples
    own = script.parse_args(["--eval", str(path), "--limit", "8", "--device", "cpu", *flags])
    test = script.load_data(own)["test"]
    kind = own.block[0]
    model = script.build_model(own, kind, own.seeds[0]).eval()
    optimizer = torch.optim.AdamW(script.param_groups(own, model))
    script.resume(own, path, kind, own.seeds[0], model, optimizer)  # with all its checks
    rows = []
    step = max(1, len(test) // own.limit)  # the captions of an image follow each other
    for i in range(0, len(test), step):
        sample = script.collate([test[i, i]])
        inputs, paint = prepare(script, own, model, sample)
        title = ""
        if script.TASK == "vqa":
            title = test.rows[i].text
        elif script.TASK in ("image", "pointcloud", "video"):
            title = own.classes[sample[1]]
        tiles = {"input": paint()}
        for name, heat in heat_maps(script.TASK, *look(model, inputs)).items():
            tiles[name] = paint(heat)
        rows.append((title, tiles))
    masks = None
    if script.TASK == "image" and (args.masks or own.data == "toy"):
        masks = measure_masks(script, own, model, args.masks)
    group = f"{script.TASK}-{own.data}-{own.model}"
    arm = kind
    if kind != "none":
        arm = f"{kind}-{'-'.join(map(str, model.llm.record['layers']))} {Path(own.llm).name}"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    draw_grid(rows).save(Path(args.out, f"{group}-{arm}-s{own.seeds[0]}.png".replace(" ", "-")))
    return {"group": group, "arm": arm, "rows": rows, "masks": masks}


def compare(runs):
    """A picture of all arms: the tokens that the head gets, in the first run of each."""
    rows = []
    for i, (title, tiles) in enumerate(runs[0]["rows"]):
        columns = {"input": tiles["input"]}
        for one in runs:
            stage = "host" if one["arm"] == "none" else "proj_out"
            _, tiles = one["rows"][i]
            for measure in ("magnitude", "frequency"):
                columns.setdefault(f"{one['arm']} {measure}", tiles[f"{stage} {measure}"])
        rows.append((title, columns))
    return draw_grid(rows)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", metavar="RUN", help="directories, checkpoints, .jsonl files")
    p.add_argument("--masks", metavar="DIR", help="DIR/images and DIR/masks, above 0 is foreground")
    p.add_argument("--out", default="figures", help="directory of what is written")
    p.error = fail
    args, flags = p.parse_known_args(argv)
    results = []
    groups = {}
    for path in map(Path, args.runs):
        if path.suffix == ".jsonl":
            results += read_results(path)
            continue
        checkpoints = sorted(path.rglob("best.pt")) if path.is_dir() else [path]
        if not checkpoints:
            raise UserError(f"{path} holds no run: no best.pt")
        for checkpoint in checkpoints:
            one = show(checkpoint, args, flags)
            groups.setdefault(one["group"], []).append(one)
            last = checkpoint.with_name("last.pt")
            if last.exists():  # a single best.pt knows no result
                results.append(read(last)["result"])
    for group, arms in group_results(results).items():
        print(f"\n{group}\n\n{results_table(arms)}")
    for group, runs in groups.items():
        compare(runs).save(Path(args.out, f"{group}-compare.png"))
        arms = {}
        for one in runs:
            arms.setdefault(one["arm"], []).append(one["masks"])
        print(f"\n{group}: pictures are in {args.out}")
        if runs[0]["masks"]:
            print(f"\n{mask_table(arms)}")


if __name__ == "__main__":
    run(main)
