"""What the block does to the tokens, as pictures and numbers; and the table of results.

    python visualize.py runs/image-toy-micro                    # all runs in a directory, ...
    python visualize.py runs/*/pretrained-s0 --n 4              # ... these, or checkpoints
    python visualize.py RUN --data folder --root DIR            # on other data
    python visualize.py RUN --masks DIR [--foreground 8 9]      # an image model on masked images

Prints a markdown table of the runs' results. Where masks say which tokens are foreground (toys of
images and video know theirs), also how well activations find them: the paper's information
filtering, section 4. Into --out go a picture of every checkpoint, one that compares the arms,
learning curves, and numbers.json. Other flags, after the runs, are passed to the script that
wrote the checkpoint: --root, --llm, --device, ...

Letters: B batch, N tokens, D width, S side of an image in pixels, T frames.
"""

import argparse
import functools
import importlib
import json
import math
import sys
import textwrap
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import v2

from llmblock import KINDS, UserError, fail, read

FONT = ImageFont.load_default(13)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", metavar="RUN_OR_CKPT", help="directories or checkpoints")
    p.add_argument("--masks", metavar="DIR", help="images, and .png files of the same names in "
                   "folders called mask..., ...annot or ...segmentation")  # fmt: skip
    p.add_argument("--foreground", type=int, nargs="+", help="values in a mask (default: not 0)")
    p.add_argument("--n", type=int, default=8, help="samples in a picture")
    p.add_argument("--out", default="figures", help="directory of what is written")
    p.error = fail
    args, args.rest = p.parse_known_args(argv)
    if args.n < 1:
        raise UserError("--n must be at least 1")
    return args


# ---------------------------------------------------------------- what the model computes


def open_run(path, flags):
    """The script that wrote a checkpoint, its args, what was saved, and the model."""
    saved = read(path)
    if not isinstance(saved, dict) or saved.get("task") not in SEE:
        raise UserError(f"{path} was not written by a training script")
    script = importlib.import_module(f"train_{saved['task']}")
    args = script.parse_args(["--eval", str(path), *flags])
    model = script.build_model(args, saved["kind"], saved["seed"], saved["meta"])
    script.load(path, model)
    return script, args, saved, model.to(args.device).eval()


@torch.no_grad()
def look(script, args, model, inputs):
    """The model's output, {stage: tokens (B, N, dim or D)}, how much the host's last layer attends
    to each token (B, N), its heads summed, and which tokens are real (B, N), or None.
    """
    seen, attend = {}, F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        seen["last"] = q, k, attn_mask
        return attend(q, k, v, attn_mask=attn_mask, **options)

    def enter(block, tokens):  # what attends from here on is the LLM
        (q, k, mask), seen["tokens"] = seen["last"], tokens
        logits = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, h, M, N)
        logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
        seen["weights"] = logits.softmax(-1).sum(1)  # (B, M, N)

    hook = model.llm.register_forward_pre_hook(enter)
    with script.autocast(args), mock.patch.object(F, "scaled_dot_product_attention", record):
        output = model(*(x.to(args.device) for x in inputs))
    hook.remove()
    with script.autocast(args):
        stages = model.llm.stages(*seen["tokens"])
    if model.llm.kind == "none":
        del stages["proj_out"]  # the host's tokens once more
    # Of the token that the head reads: CLS, the question, the target. In video it reads the mean.
    weights = seen["weights"].mean(1) if script.TASK == "video" else seen["weights"][:, 0]
    real = seen["tokens"][1] if len(seen["tokens"]) > 1 else None
    return output, stages, weights, real


def unit(heat):
    """The last axis, stretched to 0 ... 1; what is constant becomes 0."""
    low, high = heat.amin(-1, keepdim=True), heat.amax(-1, keepdim=True)
    return (heat - low) / (high - low).clamp(min=1e-12)


def magnitude(x):
    """How far tokens (..., N, D) are from their mean, 0 to 1: (..., N)."""
    return unit((x - x.mean(-2, keepdim=True)).norm(dim=-1))


def frequency(x):
    """How far the phases of tokens' Fourier transforms over channels are from their mean.

    NOTE(paper): its printed code averages over the first axis of a grid (H, W, D), its text over
    all tokens. So do we.
    """
    phase = torch.fft.fft(x, dim=-1).angle()
    return unit((phase - phase.mean(-2, keepdim=True)).norm(dim=-1))


def heat_maps(stages, weights, real, skip):
    """{"stage measure": (B, N)}, 0 to 1, without the first `skip` tokens; padding is 0."""
    sources = {f"{k} {f.__name__}": (f, x) for k, x in stages.items() for f in MEASURES}
    sources["host attention-map"] = lambda x: unit(x[..., 0]), weights[..., None]
    maps = {}
    for name, (f, x) in sources.items():
        x = x[:, skip:].float()  # (B, N, D)
        maps[name] = torch.zeros(x.shape[:2])
        there = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real[:, skip:].cpu()
        if there.all():
            maps[name] = f(x).cpu()
        else:
            for heat, tokens, mask in zip(maps[name], x.cpu(), there, strict=True):
                heat[mask] = f(tokens[mask])
    return maps


MEASURES = (magnitude, frequency)


# ---------------------------------------------------------------- how well they find foreground


def iou(heat, mask, t):
    """Intersection over union (B) of heat (B, N) above t and mask (B, N) bool."""
    return ((heat > t) & mask).sum(1) / ((heat > t) | mask).sum(1)


def average_precision(heat, mask):
    """(B): over foreground tokens, the mean share of foreground among all at least as hot."""
    above = heat[:, None] >= heat[:, :, None]  # (B, token, at least as hot)
    precision = (above & mask[:, None]).sum(2) / above.sum(2)
    return (precision * mask).sum(1) / mask.sum(1)


def scores(heat, mask):
    """(B, 3), percent: IoU at the best of nine thresholds, IoU at 0.5, average precision.

    NOTE(paper): it reports the first, which knows the answer when it chooses the threshold.
    """
    best = torch.stack([iou(heat, mask, t / 10) for t in range(1, 10)]).amax(0)
    return 100 * torch.stack([best, iou(heat, mask, 0.5), average_precision(heat, mask)], dim=1)


SCORES = {"iou_best": "IoU at the best threshold for each image", "iou_half": "IoU at threshold "
          "0.5", "ap": "Average precision"}  # fmt: skip


def find_masked(script, args, masks, foreground):
    """How many pictures have masks, and a function of indices (B) that gives x uint8
    (B, T, 3, S, S), labels, -1 if unknown, and masks (B, T, S, S) bool; or 0, None. Images: T = 1.
    """
    if masks and script.TASK != "image":
        raise UserError(f"--masks is for image models, train_{script.TASK}.py wrote this one")
    if masks:
        pairs = find_pairs(Path(masks))
        return len(pairs), lambda some: read_masked(pairs, some, args.size, foreground)
    if args.data != "toy" or script.TASK not in ("image", "video"):
        return 0, None
    if script.TASK == "image":  # these seeds drew the test set, or half of it
        x, y, mask = script.draw_toy(1000, 10, args.size)
        x, mask = x[:, None], mask[:, None]
    else:
        drawn = [script.draw_toy(500, seed, args.frames, args.size) for seed in (12, 13)]
        x, y, mask = (torch.cat(column) for column in zip(*drawn, strict=True))
    return len(x), lambda some: (x[some], y[some], mask[some])


def find_pairs(root):
    """[(image, mask)] of files with the same name but for its ending."""
    found = {}, {}
    for p in sorted(root.rglob("*")):
        folders = " ".join(p.relative_to(root).parent.parts).lower()
        is_mask = any(word in folders for word in ("mask", "annot", "segment"))
        if p.suffix.lower() in ((".png",) if is_mask else (".jpg", ".jpeg", ".png")):
            found[is_mask][p.stem] = p
    pairs = [(p, found[1][name]) for name, p in found[0].items() if name in found[1]]
    if not pairs:
        text = f"{len(found[0])} images and {len(found[1])} masks, no two of one name"
        raise UserError(f"--masks {root} has {text}")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    return [pairs[i] for i in order]  # files come class by class


def read_masked(pairs, some, S, foreground):
    """See find_masked; cropped as train_image.py crops its folders."""
    x, masks = [], []
    for image, mask in [pairs[i] for i in some]:
        try:
            with Image.open(image) as a, Image.open(mask) as b:
                picture = v2.functional.pil_to_tensor(a.convert("RGB"))
                mask = torch.from_numpy(np.array(b)).int()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise UserError(f"{image} or its mask {mask} cannot be read: {e}") from e
        if mask.ndim == 3:  # ImageNet-S: a class is red + 256 green, and 1000 is to be ignored
            mask = mask[..., 0] + 256 * mask[..., 1]
            mask[mask == 1000] = 0
        if mask.shape != picture.shape[1:]:
            raise UserError(f"{image} is {picture.shape[2]} pixels wide, its mask {mask.shape[1]}")
        mask = torch.isin(mask, torch.tensor(foreground)) if foreground else mask > 0
        for list_, z, how in ((x, picture, "BICUBIC"), (masks, mask[None].byte(), "NEAREST")):
            z = v2.functional.resize(z, S, v2.InterpolationMode[how])
            list_.append(v2.functional.center_crop(z, [S, S])[None])
    return torch.stack(x), torch.full((len(x),), -1), torch.cat(masks) > 0


def on_tokens(script, args, mask):
    """Masks (B, T, S, S) of tokens (B, N): at least half of a patch or tubelet is foreground."""
    image = script.TASK == "image"
    patch = args.patch if image else script.MODELS[args.model]["patch"]
    return F.avg_pool3d(mask.float(), (1 if image else 2, patch, patch)).flatten(1) >= 0.5


def measure_masks(script, args, model, masked, n):
    """{"stage measure": (images, 6)}: scores, and scores of the same heat with tokens exchanged."""
    found, gen, used = {}, torch.Generator().manual_seed(0), 0
    for some in torch.arange(n).split(100):
        x, _, mask = masked(some)
        mask = on_tokens(script, args, mask)
        good = mask.any(1) & ~mask.all(1)
        used += int(good.sum())
        if good.any():
            _, *seen = look(script, args, model, prepare(script, args, x[good]))
            order = torch.rand(mask[good].shape, generator=gen).argsort(1)
            for name, heat in heat_maps(*seen, script.TASK == "image").items():
                both = [scores(h, mask[good]) for h in (heat, heat.gather(1, order))]
                found.setdefault(name, []).append(torch.cat(both, dim=1))
    if not found:
        raise UserError(f"none of {n} masks covers a token, and not all of them")
    if used < n:
        print(f"{n - used} of {n} masks cover no token, or all, and are left out")
    return {name: torch.cat(parts) for name, parts in found.items()}


def mask_tables(arms):
    """Markdown tables of each score for arms {name: [measure_masks of every seed]}."""
    names, lines = max((runs[0] for runs in arms.values()), key=len), []
    n = len(next(iter(names.values())))
    for column, title in enumerate(SCORES.values()):
        lines += [f"\n{title}, percent, mean of {n} ± 95 % interval (by chance)\n"]
        lines += ["| stage | measure | " + " | ".join(arms) + " |"]
        lines += ["|---|---" + "|---:" * len(arms) + "|"]
        for name in names:
            cells = name.split()
            for runs in arms.values():
                if name not in runs[0]:
                    cells.append("")
                    continue
                x = torch.stack([run[name] for run in runs])
                mean, chance = x.mean((0, 1))[[column, column + 3]].tolist()
                values = x.mean(1)[:, column] if len(x) > 1 else x[0, :, column]
                cells.append(f"{mean:.1f} ± {interval(values.tolist()):.1f} ({chance:.1f})")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------- results and learning curves


@functools.cache
def t95(df):
    """The 97.5 % quantile of Student's t with df degrees of freedom, by integrating its density."""
    x = torch.linspace(0, 13, 1_300_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    below = torch.cumulative_trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x)
    return x[torch.searchsorted(below, 0.475)].item()


def interval(values):
    """Half the width of the 95 % interval of their mean, of at least two values."""
    return t95(len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))


def results_table(results):
    """Markdown of RESULT lines of one task, data set and model: a row for each arm."""
    arms, metrics = {}, list(results[0]["metrics"])
    for r in results:
        arm = arms.setdefault((r["kind"], Path(r["llm"] or "").name, str(r["layers"] or "")), {})
        if r["seed"] in arm:
            raise UserError(f"two runs are of block {r['kind']}, LLM {r['llm']}, seed {r['seed']}")
        arm[r["seed"]] = r
    none = arms.get(("none", "", ""), {})
    head = ["block", "LLM", "layers", "seeds", *metrics, f"{metrics[0]} - none (95 % interval)"]
    head += ["trained", "frozen", "GFLOPs", "samples/s"]
    lines = [head, ["---"] * 4 + ["---:"] * (len(head) - 4)]
    for arm, runs in sorted(arms.items(), key=lambda item: KINDS.index(item[0][0])):
        row = [*arm, str(len(runs))]
        for metric in metrics:
            x = [r["metrics"].get(metric, math.nan) for r in runs.values()]
            row.append(f"{np.mean(x):.2f}" + (f" ± {np.std(x, ddof=1):.2f}" if len(x) > 1 else ""))
        gain = [runs[s]["metrics"][metrics[0]] - none[s]["metrics"][metrics[0]]
                for s in runs if s in none and runs is not none]  # fmt: skip
        row.append(f"{np.mean(gain):+.2f}" if gain else "")
        row[-1] += f" ± {interval(gain):.2f}" if len(gain) > 1 else ""
        last = list(runs.values())[-1]
        row += [f"{last[k]:,}" for k in ("params_trainable", "params_frozen", "gflops_per_sample")]
        lines.append([*row, f"{np.mean([r['samples_per_s'] for r in runs.values()]):.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


COLOURS = ("#777777", "#999933", "#44aa99", "#4477aa", "#aa7744", "#cc3311", "#882255", "#117733")


def draw_curves(histories):
    """Loss and validation metric by epoch, of [(arm, rows of metrics.jsonl)]."""
    W, H, left = 360, 260, 60
    image = Image.new("RGB", (2 * (W + 200), H + 80), "white")
    draw, epochs = ImageDraw.Draw(image), max(len(rows) for _, rows in histories)
    for name in ("loss", next(k for k in histories[0][1][0] if k.startswith("val_"))):
        values, ends = [row[name] for _, rows in histories for row in rows], {}
        low, high = min(values), max(values) + 1e-9
        draw.text((left, 15), f"{name} by epoch", "black", FONT)
        for part in (0, 0.25, 0.5, 0.75, 1):
            y = 40 + H * part
            draw.line([left, y, left + W, y], "#dddddd")
            draw.text((left - 8, y), f"{high - (high - low) * part:.3g}", "black", FONT, "rm")
        draw.text((left, H + 50), "1", "black", FONT, "mt")
        draw.text((left + W, H + 50), str(epochs), "black", FONT, "rt")
        for arm, rows in histories:
            colour = COLOURS[KINDS.index(arm.split()[0])]
            at = [(left + W * (row["epoch"] - 1) / max(1, epochs - 1),
                   40 + H * (high - row[name]) / (high - low)) for row in rows]  # fmt: skip
            draw.line(at, colour, 2)
            draw.circle(at[-1], 3, colour)
            ends.setdefault(arm, []).append(at[-1][1])
        y = 0  # names stand at the ends of their lines, one below the other
        for arm, end in sorted(ends.items(), key=lambda item: np.mean(item[1])):
            y = max(np.mean(end), y + 14)
            colour = COLOURS[KINDS.index(arm.split()[0])]
            draw.text((left + W + 8, y), arm, colour, FONT, "lm")
        left += W + 200
    return image


# ---------------------------------------------------------------- pictures


def glow(heat):
    """0 to 1 -> black, violet, orange, pale yellow: uint8 (..., 3)."""
    stops = np.array([[0, 0, 10], [90, 15, 110], [215, 70, 50], [250, 170, 40], [255, 255, 200]])
    columns = [np.interp(heat, np.linspace(0, 1, 5), stop) for stop in stops.T]
    return np.stack(columns, axis=-1).astype(np.uint8)


def paint_patches(x, heat=None, size=112):
    """A tile of an image uint8 (3, S, S), under the heat (N) of its patches."""
    picture = v2.functional.to_pil_image(x).resize((size, size), Image.Resampling.BICUBIC)
    if heat is None:
        return picture
    side = math.isqrt(len(heat))
    over = Image.fromarray(glow(heat.view(side, side))).resize((size, size), Image.Resampling.BOX)
    return Image.blend(picture.convert("L").convert("RGB"), over, 0.7)


def paint_points(x, tilt, turn, heat=None, size=112):
    """A tile of points (P, 3 or more: colours), z up, from above by tilt radians; heat is (P)."""
    colours = 100 + 140 * unit(x[:, 2])[:, None].expand(-1, 3)  # brighter towards the top
    if x.shape[1] > 3 and x[:, 3:6].any():
        colours = 255 * x[:, 3:6]
    colours = colours.int() if heat is None else torch.from_numpy(glow(heat))
    right = x[:, 0] * math.cos(turn) + x[:, 1] * math.sin(turn)
    away = x[:, 1] * math.cos(turn) - x[:, 0] * math.sin(turn)
    up = away * math.sin(tilt) + x[:, 2] * math.cos(tilt)
    places = torch.stack([right, -up], dim=1)
    places = size / 2 + 0.45 * size * places / places.abs().max().clamp(min=1e-6)
    order = (x[:, 2] * math.sin(tilt) - away * math.cos(tilt)).argsort()  # near ones hide far ones
    image = Image.new("RGB", (size, size), "#222222")
    draw = ImageDraw.Draw(image)
    for place, colour in zip(places[order].tolist(), colours[order].tolist(), strict=True):
        draw.circle(place, 1.5, tuple(colour))
    return image


def paint_scene(x, lane, heat=None, modes=(), sure=(), future=None, size=168):
    """A tile of traffic, vectors (N, V, 7); the target comes first and drives to the right."""
    image = Image.new("RGB", (size, size), "#222222")
    draw = ImageDraw.Draw(image)

    def line(points, colour, width):  # 80 m are shown
        places = torch.tensor([0.35, 0.5]) + points * torch.tensor([1, -1]) / 80
        draw.line([tuple(p) for p in (size * places).tolist()], colour, width)

    for i in reversed(range(len(x))):
        steps = x[i][x[i, :, 6] > 0]
        if len(steps):
            is_lane = steps[0, 5] >= lane
            colour = "#777777" if is_lane else "#5599ff" if i else "#ff5544"
            colour = colour if heat is None else tuple(glow(heat[i]).tolist())
            ends = torch.cat([steps[:, :2], steps[-1:, :2] + steps[-1:, 2:4]])
            line(ends, colour, 1 if is_lane else 3)
    for mode, p in zip(modes, sure, strict=True):
        line(mode, (int(80 + 175 * p), int(60 + 120 * p), 0), 2)
    if future is not None:
        line(future, "#44dd66", 1)
    return image


def side_by_side(tiles):
    size = sum(tile.width + 2 for tile in tiles) - 2, tiles[0].height
    image = Image.new("RGB", size, "white")
    for i, tile in enumerate(tiles):
        image.paste(tile, (i * (tile.width + 2), 0))
    return image


def prepare(script, args, x):
    """Pictures uint8 (B, T, 3, S, S) as inputs of the model."""
    return (script.normalise(x[:, 0]) if script.TASK == "image" else script.prepare(x, args),)


# For n test samples of a task: inputs of the model, what is known of them (n texts), told(output),
# what the model says (n texts), and paint(i, heat or None, output), a tile.


def see_pictures(script, args, saved, data, model, n):
    video, names = script.TASK == "video", saved["meta"]["classes"]
    if "masked" in data:
        x, y, _ = data["masked"](torch.arange(n))
    else:
        pairs = [(i, 0) for i in range(n)]
        x, y = next(iter(data["test"][0].batches(pairs, n, args.workers)))
        x = x[:, 0] if video else x[:, None]  # the first view; (B, T, 3, S, S)

    def paint(i, heat, output):
        frames = x[i, :: 2 if video else 1]  # the first of every tubelet's two
        heat = [None] * len(frames) if heat is None else heat.view(len(frames), -1)
        shown = range(0, len(frames), max(1, len(frames) // 4))[:4]
        size = 56 if video else 112
        return side_by_side([paint_patches(frames[t], heat[t], size) for t in shown])

    known = [names[i] if i >= 0 else "" for i in y]
    return prepare(script, args, x), known, tell_class(names), paint


def tell_class(names):
    return lambda output: [f"predicted: {names[i]}" for i in output.argmax(1)]


def see_pointcloud(script, args, saved, data, model, n):
    names, (clouds, y) = saved["meta"]["classes"], zip(*data["test"][0][:n], strict=True)
    x = torch.stack([cloud[: args.points] for cloud in clouds])
    nearest = torch.cdist(x, script.group(x, model.G, model.K)[0]).argmin(2)  # (B, P)

    def paint(i, heat, output):
        heat = None if heat is None else heat[nearest[i]]
        return side_by_side([paint_points(x[i], 0.4, turn, heat, 84) for turn in (0.6, 2.2)])

    return (x,), [names[i] for i in y], tell_class(names), paint


def see_motion(script, args, saved, data, model, n):
    x, future = data["test"][0].batch(torch.arange(n), args.hide)

    def told(output):
        errors = script.displacement(output[0].cpu(), future)
        return [f"minADE6 {ade:.1f} m, minFDE6 {fde:.1f} m" for ade, fde, _ in errors.tolist()]

    def paint(i, heat, output):
        if heat is not None:
            return paint_scene(x[i], script.LANE, heat)
        modes, sure = output[0][i].cpu(), output[1][i].softmax(0).cpu()
        return paint_scene(x[i], script.LANE, None, modes, sure, future[i])

    return (x,), [""] * n, told, paint


def see_vqa(script, args, saved, data, model, n):
    x, ids, targets = data["test"][0].batch(torch.arange(n), args)
    flat, answers = args.data in script.DATA_2D, saved["meta"]["answers"]
    some = slice(None, None, max(1, x.shape[1] // 2048))  # of the points of a scene
    if not flat:  # the token of each point: that of its object, or of the nearest group
        token = x[:, some, 6].long()
        if not args.objects:
            centres, _ = script.group(x, model.vision.G, script.K)
            token = torch.cdist(x[:, some, :3], centres).argmin(2)

    def paint(i, heat, output):
        if flat:
            return paint_patches(x[i], heat)
        return paint_points(x[i, some], 1.1, 0.0, None if heat is None else heat[token[i]])

    right = [answers[t.argmax()] if t.any() else "no answer it knows" for t in targets]
    known = [f"{text} right: {a}" for text, a in zip(spell(ids, saved, args), right, strict=True)]
    return (x, ids), known, tell_class(answers), paint


def see_retrieval(script, args, saved, data, model, n):
    s = data["test"][0]
    x, ids = s.visuals[s.which[:n]], torch.stack([s.ids[s.owner == i][0] for i in range(n)])
    ids = script.trim(ids)

    def told(output):
        return [f"score {score:.2f}" for score in output[0][:, 0]]

    def paint(i, heat, output):
        return paint_patches(x[i], heat)

    return (x, ids[:, None]), spell(ids, saved, args), told, paint


def spell(ids, saved, args):
    """Texts of token ids (B, M), -1 is padding."""
    if args.text:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.text)
        return [tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in ids]
    words = ["", "(?)", *saved["meta"]["words"]]
    return [" ".join(words[i] for i in row if i > 0) for row in ids.tolist()]


SEE = {"image": see_pictures, "video": see_pictures, "pointcloud": see_pointcloud,
       "motion": see_motion, "vqa": see_vqa, "retrieval": see_retrieval}  # fmt: skip


def draw_grid(columns, titles):
    """Columns {name: a tile of every sample}, and a title above every sample."""
    tile = next(iter(columns.values()))[0]  # all have the same size
    width, high = tile.width + 4, tile.height + 8
    total = max(width * len(columns), 400)
    titles = [textwrap.wrap(title, total // 7) for title in titles]
    image = Image.new("RGB", (total, 40 + sum(high + 16 * len(t) for t in titles)), "white")
    draw, y = ImageDraw.Draw(image), 40
    for c, name in enumerate(columns):
        at = (c * width + width / 2, 36)
        draw.text(at, name.replace(" ", "\n"), "black", FONT, "md", align="center")
    for tiles, lines in zip(zip(*columns.values(), strict=True), titles, strict=True):
        draw.text((4, y), "\n".join(lines), "black", FONT)
        y += 16 * len(lines) + 2
        for c, tile in enumerate(tiles):
            image.paste(tile, (c * width + 2, y))
        y += high - 2
    return image


# ---------------------------------------------------------------- the whole


def show(path, args, loaded):
    """All that is to be known of a checkpoint."""
    flags = ["--out", args.out, "--limit", str(max(16, args.n))]  # enough for pictures
    script, own, saved, model = open_run(path, [*flags, *args.rest])
    n, masked = find_masked(script, own, args.masks, args.foreground)
    data = {"masked": masked}
    if not masked:  # the arms have the same data
        key = str({k: v for k, v in vars(own).items() if k not in ("llm", "layers", "eval")})
        data = loaded[key] = loaded.get(key) or script.load_data(own, saved["meta"])
        if data["meta"] != saved["meta"]:
            raise UserError(f"{path} was trained on other classes than {own.data} has")
        test = data["test"][0]  # in retrieval, samples are captions, but pictures show images
        n = len(test.which if script.TASK == "retrieval" else test)
    some = range(min(args.n, n))
    inputs, known, told, paint = SEE[script.TASK](script, own, saved, data, model, len(some))
    output, *seen = look(script, own, model, inputs)
    maps = heat_maps(*seen, script.TASK not in ("video", "motion"))  # the others have CLS
    if masked:
        maps = {"mask": on_tokens(script, own, masked(torch.tensor(some))[2]).float(), **maps}
    columns = {"input": [paint(i, None, output) for i in some]}
    columns |= {name: [paint(i, heat[i], output) for i in some] for name, heat in maps.items()}
    log, last = path.with_name("metrics.jsonl"), path.with_name("last.pt")
    finished = read(last, mmap=True) if last.exists() else saved
    return {
        "group": f"{script.TASK}-{own.data}-{own.model}", "kind": saved["kind"],
        "llm": Path(own.llm).name if "llm" in model.llm.record else None, "seed": saved["seed"],
        "columns": columns, "known": known, "told": told(output), "result": finished["result"],
        "history": [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else [],
        "masks": measure_masks(script, own, model, masked, n) if masked else None,
    }  # fmt: skip


def compare(arms):
    """The last tokens of all arms {name: run} side by side."""
    columns = {"input": next(iter(arms.values()))["columns"]["input"]}
    for name, run in arms.items():
        stage = "host" if run["kind"] == "none" else "proj_out"
        for f in MEASURES:
            columns[f"{name} {f.__name__}"] = run["columns"][f"{stage} {f.__name__}"]
    return columns


def report(group, runs, out):
    """Draw and print what there is of one task, data set and model; return the numbers."""
    runs.sort(key=lambda run: KINDS.index(run["kind"]))
    arms, several = {}, len({run["llm"] for run in runs} - {None}) > 1
    for run in runs:
        name = f"{run['kind']} {run['llm']}" if several and run["llm"] else run["kind"]
        arms.setdefault(name, []).append(run)
        titles = [f"{a}  {b}" for a, b in zip(run["known"], run["told"], strict=True)]
        file = f"{group}-{name.replace(' ', '-')}-s{run['seed']}.png"
        draw_grid(run["columns"], titles).save(out / file)
    if len(arms) > 1:
        columns = compare({name: some[0] for name, some in arms.items()})
        draw_grid(columns, runs[0]["known"]).save(out / f"{group}-compare.png")
    histories = [(name, run["history"]) for name in arms for run in arms[name] if run["history"]]
    if histories:
        draw_curves(histories).save(out / f"{group}-curves.png")
    results = [run["result"] for run in runs if run["result"]]
    if results:
        print(f"\n{group}\n\n{results_table(results)}")
    if len(results) < len(runs):
        print(f"\n{len(runs) - len(results)} of {len(runs)} runs are not finished: no result")
    masks = {name: [run["masks"] for run in some] for name, some in arms.items()}
    if runs[0]["masks"]:
        print(mask_tables(masks))
    columns = [f"{k}{chance}" for chance in ("", "_by_chance") for k in SCORES]
    return results, [
        {"group": group, "block": name, "seed": run["seed"], "tokens": tokens, "images": len(x)}
        | dict(zip(columns, x.mean(0).tolist(), strict=True))
        for name, some in arms.items() for run in some for tokens, x in (run["masks"] or {}).items()
    ]  # fmt: skip


def main(argv=None):
    args, loaded, groups, numbers = parse_args(argv), {}, {}, {"results": [], "masks": []}
    for path in map(Path, args.runs):
        found = sorted(path.rglob("best.pt")) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path} holds no run: no best.pt")
        for checkpoint in found:
            run = show(checkpoint, args, loaded)
            groups.setdefault(run["group"], []).append(run)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for group, runs in groups.items():
        results, masks = report(group, runs, out)
        numbers["results"] += results
        numbers["masks"] += masks
    (out / "numbers.json").write_text(json.dumps(numbers, indent=1))
    print(f"\nPictures and numbers.json are in {out}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as e:
        fail(e)
    except KeyboardInterrupt:
        sys.exit(130)
