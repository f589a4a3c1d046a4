"""What the block does to the tokens, as pictures and numbers; and tables of results.

    python visualize.py runs/image-toy-micro              # all runs in a directory, ...
    python visualize.py runs/*/pretrained-s0 --n 4        # ... these, or checkpoints
    python visualize.py RUN --masks DIR                   # DIR/images, DIR/masks: same names
    python visualize.py tests/results.jsonl               # only tables, of RESULT lines

Prints a markdown table of the results. Into --out go a picture of every checkpoint and one that
compares the arms. Where masks say which tokens are foreground (image toys know theirs), it also
tells how well activations find them: the paper's information filtering, section 4. Other flags,
after the runs, go to the script that wrote the checkpoint (--root, --llm, ...).

Letters: B batch, N tokens, D width, S side of an image in pixels, T frames.
"""

import argparse
import importlib
import json
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms import v2

from llmblock import KINDS, UserError, fail, read, reading, run

FONT = ImageFont.load_default(13)
TASKS = ("image", "pointcloud", "video", "motion", "vqa", "retrieval")
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom: any book of statistics.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# ---------------------------------------------------------------- what the model computes
@torch.no_grad()
def look(model, inputs):
    """What happens in the model: its output; {stage: tokens (B, N, D)}; attention (B, N) of the
    host's last layer to each token; which tokens are real (B, N), or None."""
    attention = find_attention(model)
    calls = {}  # module: the arguments of its last call

    def remember(module, args, kwargs):
        calls[module] = (args, kwargs)

    hooks = [
        m.register_forward_pre_hook(remember, with_kwargs=True) for m in (attention, model.llm)
    ]
    output = model(*inputs)
    for hook in hooks:
        hook.remove()
    tokens, *mask = calls[model.llm][0]  # (tokens) or (tokens, mask)
    mask = mask[0] if mask else None
    return output, stages(model.llm, tokens, mask), attend(attention, *calls[attention]), mask


def stages(llm, x, mask=None):
    """Tokens on their way through the block: host and proj_out (B, N, dim), the others (B, N, D).
    attention and ffn: the residual stream of the LLM's last layer behind these two."""
    found = {"host": x}
    if llm.kind == "none":
        return found
    found["proj_in"] = llm.proj_in(x)
    if llm.layers:
        # The FFN is the last child with matrices; silenced, it leaves what the attention gives.
        children = llm.layers[-1].children()
        ffn = [m for m in children if any(p.ndim > 1 for p in m.parameters())][-1]
        hook = ffn.register_forward_hook(lambda m, args, y: y * 0)
        found["attention"] = llm.run_layers(found["proj_in"], mask)
        hook.remove()
        found["ffn"] = llm.run_layers(found["proj_in"], mask)
    found["proj_out"] = llm(x, mask)
    return found


def find_attention(model):
    """The host's last self-attention over the tokens that the block gets."""
    found = []
    for name, module in model.named_modules():
        if name.endswith("attn") and not name.startswith("llm") and "multihead" not in name:
            if "text_layers" not in name:
                found.append(module)
    return found[-1]


def attend(module, args, kwargs):
    """How much the token that the head reads attends to each, all heads together: (B, N)."""
    if isinstance(module, nn.MultiheadAttention):
        return module(*args, **kwargs | {"need_weights": True})[1][:, 0]
    x = args[0]
    B, N, D = x.shape
    bias = module.qkv.bias
    if hasattr(module, "q_bias"):  # VideoMAE's
        bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
    qkv = F.linear(x, module.qkv.weight, bias).view(B, N, 3, module.heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, D/h) each
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean(1)  # (B, N, N)
    # In video, the head reads the mean of all tokens, elsewhere the first one.
    return weights.mean(1) if hasattr(module, "q_bias") else weights[:, 0]


def unit(heat):
    """Stretch to 0 ... 1; what is constant becomes 0."""
    return (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)


def magnitude(x):
    """How far tokens (N, D) are from their mean: (N)."""
    return (x - x.mean(0)).norm(dim=1)


def frequency(x):
    """How far the phases of tokens' Fourier transforms over channels are from their mean: (N).

    NOTE(paper): its printed code averages over the first axis of a grid (H, W, D), its text over
    all tokens. So do we.
    """
    phase = torch.fft.fft(x, dim=1).angle()
    return (phase - phase.mean(0)).norm(dim=1)


def heat_maps(tokens, attention, mask, skip):
    """{"stage measure": (B, N)}, 0 to 1, without the first `skip` tokens; padding is 0."""
    maps = {}
    B, N = attention.shape
    for i in range(B):
        real = torch.arange(N) >= skip
        if mask is not None:
            real = real & mask[i].cpu()
        values = {"host attention-map": attention[i].cpu()[real]}
        for stage, x in tokens.items():
            x = x[i].float().cpu()[real]
            values[f"{stage} magnitude"] = magnitude(x)
            values[f"{stage} frequency"] = frequency(x)
        for name, heat in values.items():
            whole = torch.zeros(N)
            whole[real] = unit(heat)
            maps.setdefault(name, []).append(whole[skip:])
    return {name: torch.stack(rows) for name, rows in maps.items()}


# ---------------------------------------------------------------- how well they find foreground
def best_iou(heat, mask):
    """Intersection over union of heat (N) above t and mask (N), at the best of nine t.

    NOTE(paper): this knows the answer when it chooses t, image by image.
    """
    values = []
    for t in range(1, 10):
        found = heat > t / 10
        values.append(((found & mask).sum() / (found | mask).sum()).item())
    return max(values)


def average_precision(heat, mask):
    """Over foreground tokens, the mean share of foreground among all tokens at least as hot."""
    shares = [mask[heat >= h].float().mean().item() for h in heat[mask]]
    return sum(shares) / len(shares)


def masked_pictures(script, S, masks):
    """Yield pixels uint8 (3, S, S) and their foreground (S, S): of DIR/images and DIR/masks, or
    toys that were drawn for nothing else."""
    if masks is None:
        for index in range(10_000, 10_200):
            image, _, mask = script.draw_toy(index, S)
            yield v2.functional.pil_to_tensor(image), v2.functional.pil_to_tensor(mask)[0] > 0
        return
    names = {path.stem: path for path in sorted(Path(masks, "masks").glob("*"))}
    crop = script.make_transform(S, "light", train=False)
    for path in sorted(Path(masks, "images").glob("*")):
        if path.stem in names:
            with reading(path), Image.open(path) as image, Image.open(names[path.stem]) as mask:
                mask = Image.fromarray(255 * (np.array(mask) > 0).astype(np.uint8))
                yield crop(image.convert("RGB")), crop(mask)[0] > 127


def measure_masks(script, args, model, masks):
    """{"stage measure": [average precision, best IoU, the same two by chance]}, percent. A token is
    foreground where at least half of its patch is."""
    patch, S = script.MODELS[args.model]["patch"], script.MODELS[args.model]["S"]
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for pixels, mask in masked_pictures(script, S, masks):
        mask = F.avg_pool2d(mask[None].float(), patch).flatten() >= 0.5  # (N)
        if mask.any() and not mask.all():
            x = script.normalise(pixels[None].to(args.device))
            order = torch.randperm(len(mask), generator=generator)
            for name, heat in heat_maps(*look(model, (x,))[1:], skip=1).items():
                row = []
                for h in (heat[0], heat[0][order]):
                    row += [100 * average_precision(h, mask), 100 * best_iou(h, mask)]
                scores.setdefault(name, []).append(row)
    if not scores:
        raise UserError(f"{masks}: no images/NAME and masks/NAME with some foreground, not all")
    return {name: np.mean(rows, axis=0) for name, rows in scores.items()}


def mask_table(arms):
    """Markdown of {arm: [measure_masks of every seed]}."""
    lines = ["\nAverage precision / IoU at each image's best threshold (by chance), percent\n"]
    lines.append("| stage | measure | " + " | ".join(arms) + " |")
    lines.append("|---|---|" + "---:|" * len(arms))
    for name in max((seeds[0] for seeds in arms.values()), key=len):
        cells = name.split()
        for seeds in arms.values():
            if name not in seeds[0]:
                cells.append("")
                continue
            columns = np.array([scores[name] for scores in seeds]).T  # (4, seeds)
            chance = "{:.0f} / {:.0f}".format(*columns[2:].mean(1))
            cells.append(f"{spread(columns[0])} / {spread(columns[1])} ({chance})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------- results and learning curves
def spread(values):
    """Mean ± standard deviation of some seeds, as text."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def gain(results, baselines):
    """Mean difference of the first metric to `none` with the same seed, ± its 95 % interval."""
    none = {r["seed"]: first_metric(r) for r in baselines}
    differences = []
    for r in results:
        if r["seed"] in none and r["kind"] != "none":
            differences.append(first_metric(r) - none[r["seed"]])
    n = len(differences)
    if n < 2:
        return f"{differences[0]:+.2f}" if differences else ""
    t = T95[min(n - 1, len(T95)) - 1]
    interval = t * np.std(differences, ddof=1) / math.sqrt(n)
    return f"{np.mean(differences):+.2f} ± {interval:.2f}"


def first_metric(result):
    return next(iter(result["metrics"].values()))


def group_results(results):
    """{task data model: {arm: [RESULT of every seed]}}; arms differ in anything but the seed."""
    groups = {}
    for r in sorted(results, key=lambda r: (TASKS.index(r["task"]), KINDS.index(r["kind"]))):
        layers = " ".join(map(str, r["layers"] or []))
        arm = (r["kind"], r["llm"] * bool(layers), layers, r["epochs"], r["lr"], r["proj_lr"])
        group = groups.setdefault(f"{r['task']} {r['data']} {r['model']}", {})
        group.setdefault(arm, []).append(r)
    return groups


def results_table(arms):
    """Markdown of {arm: [RESULT of every seed]}: a row for each arm."""
    metrics = list(next(iter(arms.values()))[0]["metrics"])
    head = ["block", "LLM", "layers", "epochs", "lr", "proj-lr", "seeds", *metrics]
    head += [f"{metrics[0]} - none", "samples/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 7 + "---:|" * (len(head) - 7)]
    for arm, results in arms.items():
        baselines = []
        for other, others in arms.items():
            if other[0] == "none" and other[3:5] == arm[3:5]:  # as many epochs, the same rate
                baselines += others
        row = [*map(str, arm), str(len(results))]
        row += [spread([r["metrics"][name] for r in results]) for name in metrics]
        row += [gain(results, baselines), f"{results[-1]['samples_per_s'] or 0:.0f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def read_results(path):
    """RESULT lines of a file, as printed or without the word."""
    with reading(path):
        lines = path.read_text().splitlines()
        return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.strip()]


# ---------------------------------------------------------------- a tile for each kind of data
def glow(heat):
    """0 to 1 -> black, violet, orange, pale yellow: uint8 (..., 3)."""
    stops = np.array([[0, 0, 10], [90, 15, 110], [215, 70, 50], [250, 170, 40], [255, 255, 200]])
    columns = [np.interp(heat, np.linspace(0, 1, 5), stop) for stop in stops.T]
    return np.stack(columns, axis=-1).astype(np.uint8)


def paint_image(pixels, heat=None, size=112):
    """Pixels uint8 (3, S, S), under the heat (N) of their patches."""
    picture = v2.functional.to_pil_image(pixels).resize((size, size), Image.Resampling.BICUBIC)
    if heat is None:
        return picture
    side = math.isqrt(len(heat))
    over = Image.fromarray(glow(heat.view(side, side))).resize((size, size), Image.Resampling.BOX)
    return Image.blend(picture.convert("L").convert("RGB"), over, 0.7)


def paint_clip(frames, heat=None):
    """Four frames of a clip, uint8 (T, 3, S, S), side by side; tokens hold two frames each."""
    T = len(frames)
    image = Image.new("RGB", (4 * 58, 56), "white")
    for column, t in enumerate(range(0, T, T // 4)):
        part = None if heat is None else heat.view(T // 2, -1)[t // 2]
        image.paste(paint_image(frames[t], part, size=56), (58 * column, 0))
    return image


def paint_points(points, centres, heat=None, size=112):
    """Points (P, 3 or 6), z up, from above; each has the heat of the nearest centre (N, 3)."""
    colours = (100 + 140 * unit(points[:, 2]))[:, None].expand(-1, 3)  # brighter to the top
    if points.shape[1] > 3 and points[:, 3:].any():
        colours = 255 * points[:, 3:]
    if heat is not None:
        colours = torch.from_numpy(glow(heat[torch.cdist(points[:, :3], centres).argmin(1)]))
    x, y, z = points[:, :3].unbind(1)
    away = 0.8 * y - 0.6 * x
    places = torch.stack([0.8 * x + 0.6 * y, -0.6 * away - 0.8 * z], dim=1)  # right, down
    places = size / 2 + 0.45 * size * places / places.abs().max()
    image = Image.new("RGB", (size, size), "#222222")
    pen = ImageDraw.Draw(image)
    for i in (0.6 * z - 0.8 * away).argsort().tolist():  # near ones hide far ones
        pen.circle(places[i].tolist(), 1.5, tuple(colours[i].int().tolist()))
    return image


def paint_traffic(agents, lanes, heat=None, modes=(), size=168):
    """Polylines (A, P, 2) and (L, P, 2) in metres, the target first, driving to the right; in the
    picture without heat also where it may go, modes (K, T, 2). 80 m are shown."""
    image = Image.new("RGB", (size, size), "#222222")
    pen = ImageDraw.Draw(image)
    lines = [*agents, *lanes]
    for i in reversed(range(len(lines))):  # the target is on top
        colour = "#5599ff" if i < len(agents) else "#777777"
        colour = colour if i > 0 else "#ff5544"
        if heat is not None:
            colour = tuple(glow(heat[i]).tolist())
        draw_path(pen, lines[i], colour, 3 if i < len(agents) else 1, size)
    for mode in modes:
        draw_path(pen, mode, "#ffcc33", 1, size)
    return image


def draw_path(pen, line, colour, width, size):
    line = line[line.isfinite().all(1)]  # NaN: not seen
    places = size * (torch.tensor([0.35, 0.5]) + line * torch.tensor([1, -1]) / 80)
    if len(places) > 1:
        pen.line(places.flatten().tolist(), colour, width)


def find_inputs(script, args, batch):
    """What the model of a task gets of a batch of its test set."""
    x = batch[0]
    if script.TASK == "image":
        return (script.normalise(x),)
    if script.TASK == "video":
        return (script.normalise(x[:, 0]),)  # of the first view
    if script.TASK == "pointcloud":
        return (x[:, : args.points],)
    if script.TASK == "retrieval":  # every image with its own caption
        return x, x, batch[2][:, :1]
    return tuple(batch[:2])


def paint(script, model, batch, i, heat=None, output=None):
    """The tile of sample i of a batch."""
    x = batch[0][i]
    if script.TASK == "video":
        return paint_clip(x[0], heat)
    if script.TASK == "motion":
        return paint_traffic(x, batch[1][i], heat, () if output is None else output[0][i].cpu())
    if x.ndim == 3:
        return paint_image(x, heat)
    if script.TASK == "pointcloud":
        return paint_points(x, script.farthest_points(x[None], model.G)[0], heat)
    return paint_points(x, x[: model.image_encoder.G, :3], heat)  # a scene


def find_titles(script, args, test, batch, output):
    """What is known of each sample, and what the model says."""
    titles = []
    for i in range(len(batch[0])):
        if script.TASK in ("image", "pointcloud", "video"):
            titles.append(f"{args.classes[batch[1][i]]}: {args.classes[output[i].argmax()]}")
        elif script.TASK == "vqa":
            titles.append(f"{test.rows[i].text} {args.classes['answers'][output[i].argmax()]}")
        else:
            titles.append("")
    return titles


def draw_grid(columns, titles):
    """Columns {name: a tile of every sample}, and a title above every sample."""
    tile = next(iter(columns.values()))[0]  # all have the same size
    width, height = tile.width + 4, tile.height + 26
    image = Image.new("RGB", (width * len(columns), 40 + height * len(titles)), "white")
    pen = ImageDraw.Draw(image)
    for c, (name, tiles) in enumerate(columns.items()):
        pen.text((c * width + width / 2, 36), name.replace(" ", "\n"), "black", FONT, "md")
        for row, picture in enumerate(tiles):
            image.paste(picture, (c * width + 2, 58 + row * height))
    for row, title in enumerate(titles):
        pen.text((4, 41 + row * height), textwrap.shorten(title, image.width // 7), "black", FONT)
    return image


# ---------------------------------------------------------------- the whole
def show(path, args, flags):
    """A checkpoint's picture, and what is told of its run: a dictionary."""
    saved = read(path)
    if not isinstance(saved, dict) or saved.get("task") not in TASKS:
        raise UserError(f"{path} was not written by a training script")
    script = importlib.import_module(f"train_{saved['task']}")
    own = script.parse_args(["--eval", str(path), "--limit", str(max(16, args.n)), *flags])
    test = script.load_data(own)["test"]
    model = script.build_model(own, own.block[0], own.seeds[0])
    model.load_state_dict(saved["model"])
    model.to(own.device).eval()

    batch = script.collate([test[i, i] for i in range(min(args.n, len(test)))])
    inputs = [x.to(own.device) for x in find_inputs(script, own, batch)]
    output, *seen = look(model, inputs)
    skip = 0 if script.TASK in ("video", "motion") else 1  # the others have a CLS token
    samples = range(len(batch[0]))
    columns = {"input": [paint(script, model, batch, i, None, output) for i in samples]}
    for name, heats in heat_maps(*seen, skip).items():
        columns[name] = [paint(script, model, batch, i, heats[i]) for i in samples]
    layers = "-".join(map(str, model.llm.record.get("layers", [])))
    arm = f"{model.llm.kind} {layers}".strip()
    titles = find_titles(script, own, test, batch, output)
    group = f"{saved['task']}-{own.data}-{own.model}"
    name = f"{group}-{arm.replace(' ', '-')}-s{own.seeds[0]}.png"
    draw_grid(columns, titles).save(Path(args.out, name))
    masks = None
    if script.TASK == "image" and (args.masks or own.data == "toy"):
        masks = measure_masks(script, own, model, args.masks)
    return {"group": group, "arm": arm, "columns": columns, "titles": titles, "masks": masks}


def compare(group, runs, out):
    """One picture of all arms, as seen in their first seeds: the tokens that the head gets."""
    columns = {"input": runs[0]["columns"]["input"]}
    for one in reversed(runs):  # the first seed stays
        stage = "host" if one["arm"] == "none" else "proj_out"
        for measure in ("magnitude", "frequency"):
            columns[f"{run['arm']} {measure}"] = one["columns"][f"{stage} {measure}"]
    draw_grid(columns, runs[0]["titles"]).save(out / f"{group}-compare.png")
    arms = {}
    for one in runs:
        arms.setdefault(one["arm"], []).append(one["masks"])
    if runs[0]["masks"]:
        print(mask_table(arms))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", metavar="RUN", help="directories, checkpoints, .jsonl files")
    p.add_argument("--masks", metavar="DIR", help="DIR/images and DIR/masks, above 0 is foreground")
    p.add_argument("--n", type=int, default=8, help="samples in a picture")
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
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for checkpoint in checkpoints:
            shown = show(checkpoint, args, flags)
            groups.setdefault(shown["group"], []).append(shown)
            last = checkpoint.with_name("last.pt")
            result = read(last)["result"] if last.exists() else None
            results += [result] if result else []
    for group, arms in group_results(results).items():
        print(f"\n{group}\n\n{results_table(arms)}")
    for group, runs in groups.items():
        compare(group, runs, Path(args.out))
        print(f"\nPictures of {group} are in {args.out}")


if __name__ == "__main__":
    run(main)
