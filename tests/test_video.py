"""train_video.py: frames, views, every layout, the toy, augmentation, VideoMAE's weights. Offline.

python -m pytest tests/test_video.py -q         # LLMBLOCK_DATA=DIR adds DIR/video
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_video as tv  # noqa: E402
from llmblock import UserError  # noqa: E402

tv.MODELS["tiny"] = {"D": 32, "depth": 2, "heads": 4, "patch": 8, "size": 16, "frames": 4}
SMALL = "--model tiny --workers 0 --device cpu --precision fp32 --epochs 1".split()
NOISE = np.random.default_rng(0).integers(0, 256, (50, 24, 40, 3), dtype=np.uint8)
CLASSES = ["2", "9", "10"]  # in the order of all lists; folders have that of the alphabet
META = {"classes": CLASSES}
REAL = Path(os.environ.get("LLMBLOCK_DATA", "/nowhere"))
TREES = {
    "folder .gif": "{split}/{name}/{k}.gif", "folder .mp4": "{split}/{name}/{k}.mp4",
    "folder": "{split}/{name}/{k}", "ssv2": "20bn-something-something-v2/{k}.webm",
    "ucf101": "UCF-101/{name}/v{k}.avi", "list": "my clips/{k}.gif",
}  # fmt: skip
torch.set_num_threads(1)


def arguments(*argv):
    return tv.parse_args([*SMALL, *map(str, argv)])


def load(tree, root):
    return tv.load_data(arguments("--data", tree.split()[0], "--root", root, "--split", 2))


def batches_of(clips):
    data = {"train": clips, "meta": META}
    return list(tv.train_batches(data, clips.args, torch.manual_seed(0)))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(text), encoding="latin-1")


def write_clip(path, frames, codec=None, options=None):
    """Frames uint8 (n, H, W, 3) as a .gif, a folder or, with a key frame in ten, a video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(frame) for frame in frames]
    if path.suffix == ".gif":
        images[0].save(path, save_all=True, append_images=images[1:])
    elif not path.suffix:
        path.mkdir()
        for i, image in enumerate(images):
            image.save(path / f"{i:03}.{'jpg' if i % 2 else 'PNG'}")
    else:
        av, codecs = pytest.importorskip("av"), {".mp4": "h264", ".avi": "mpeg4", ".webm": "vp8"}
        with av.open(str(path), "w") as file:
            options = {"sc_threshold": "0"} | (options or {})
            stream = file.add_stream(codec or codecs[path.suffix], 10, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", 10, 2_000_000
            for frame in [*map(av.VideoFrame.from_ndarray, frames), None]:
                file.mux(stream.encode(frame))
    return path


def write_tree(root, tree, write_clip=write_clip):
    """20 clips to train on and 6, longer than 10 frames, to test on; and all lists."""
    lists = {"ucfTrainTestlist/classInd.txt": ["1 2", "2 9", "3 10"]}
    lists["labels/labels.json"] = {"10": "12", "2": "3", "9": "5"}
    for k in range(26):
        split, test, valid = ("train",) * 3 if k < 20 else ("val", "test", "validation")
        n, name, label = 3 + k % 8 if k < 20 else k - 9, CLASSES[k % 3], k % 3
        path = TREES[tree].format(k=k, name=name, split=split)
        frames = np.array([[[(12 * i, 12 * n, 60 * label)]] for i in range(n)], np.uint8)
        write_clip(root / path, frames.repeat(24, axis=1).repeat(40, axis=2))
        lists.setdefault(f"{split}.csv", []).append(f"{path} {name}")
        row = f"{name}/v{k}.avi {label + 1}" if k < 20 else f"{name}/v{k}.avi"
        lists.setdefault(f"ucfTrainTestlist/{test}list02.txt", []).append(row)
        lists.setdefault(f"labels/{valid}.json", []).append({"id": str(k), "template": f"[{name}]"})
    for file, rows in lists.items():
        write(root / file, json.dumps(rows) if file.endswith("json") else "\n".join(rows))


def test_positions_equal_their_definition():
    for (i, j), x in np.ndenumerate(tv.sinusoids(50, 6).numpy()):
        angle = i / 10000 ** (2 * (j // 2) / 6)
        assert x == pytest.approx(np.cos(angle) if j % 2 else np.sin(angle), abs=1e-5)


@pytest.mark.parametrize("n", [1, 3, 8, 20, 40, 300])
def test_frames_are_spread_evenly_over_a_clip(n, monkeypatch):
    torch.manual_seed(0)
    drawn = torch.cat([tv.segment_frames(n, 8) for _ in range(4000)])
    for t in range(8):  # each in its own part of the clip
        shares = [min(i + 1, (t + 1) * n / 8) - max(i, t * n / 8) for i in range(n)]
        p, counts = torch.tensor(shares).clamp(min=0) * 8 / n, drawn[:, t].bincount(minlength=n)
        assert len(counts) == n and torch.equal(counts > 0, p > 0)
        assert (counts - 4000 * p).abs().max() < 5 * (4000 / 4) ** 0.5
    assert n < 20 or len(drawn.unique(dim=0)) > 1000  # in each part anew
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(shape, 1 - 2**-24))  # the largest
    assert tv.segment_frames(n, 8).max() == n - 1
    for views in (1, 2, 5):
        merged = tv.view_frames(n, 8, views).T.flatten()  # the first frames of all, the second ...
        steps = merged.diff()
        assert len(merged) == 8 * views and steps.max() - steps.min() <= 1
        assert merged[0] >= 0 and abs(merged[0] - (n - 1 - merged[-1])) <= 1  # centred
        assert steps.min() >= (n >= 8 * views)  # all different, if there are as many


def test_crops_reach_both_ends_of_the_long_side():
    wide = torch.randint(256, (2, 4, 3, 16, 37), dtype=torch.uint8)
    for n, starts in ((1, [10]), (2, [0, 21]), (3, [0, 10, 21])):
        expected = torch.cat([wide[..., i : i + 16] for i in starts])
        assert torch.equal(tv.crops(wide, 16, n), expected)
        assert torch.equal(tv.crops(wide.mT, 16, n), expected.mT)


def test_views_are_averaged_and_a_broken_clip_is_not_counted(tmp_path, capsys):
    paths = [write_clip(tmp_path / str(i), NOISE[i : i + 9]) for i in range(40)]
    args, y, ranks = arguments("--batch-size", 16), [i * i % 7 for i in range(41)], []
    clips = tv.Clips([*paths, tmp_path / "missing"], y, args, (2, 3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4 * 3 * 16 * 16, 7))
    model[1].weight.data = 0.1 * torch.randn(7, 4 * 3 * 16 * 16, generator=torch.manual_seed(0))
    for views, label in (clips[i, 0] for i in range(40)):
        assert views.shape == (6, 4, 3, 16, 16)
        p = torch.cat([model(tv.prepare(view[None], args)).softmax(1) for view in views]).mean(0)
        ranks.append((p > p[label]).sum())
    top1, top5 = (100 * sum(rank < k for rank in ranks).item() / 40 for k in (1, 5))
    assert tv.evaluate(model, [clips], args) == {"top1": top1, "top5": top5}
    assert "evaluation: 1 of 41 samples are broken and were skipped" in capsys.readouterr().err


@pytest.mark.parametrize("tree", TREES)
def test_every_layout_gives_its_classes_labels_and_frames(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(tv, "augment", lambda x, args: tv.crops(x[None], args.size, 1)[0])
    write_tree(tmp_path, tree)
    names = (data := load(tree, tmp_path))["meta"]["classes"]
    assert names == (sorted(CLASSES) if tree.startswith("folder") else CLASSES)
    for clips, size in zip([data["train"], *data["val"], *data["test"]], (18, 2, 6), strict=True):
        assert len(set(clips.clips)) == len(clips) == size
        for x, y in (clips[i, i] for i in range(size)):
            colour = x.float().mean((-2, -1)) / torch.tensor([12, 12, 60])
            frames, n, label = colour.round().long().movedim(-1, 0)  # each (V, T)
            n, label = n.unique().item(), label.unique().item()
            assert names[y] == CLASSES[label] and (n > 10) == (clips in data["test"])
            for t, shown in enumerate(frames.T):
                assert set(shown.tolist()) <= {*range(t * n // 4, -(-(t + 1) * n // 4))}


@pytest.mark.parametrize("path", [None, *sorted(REAL.glob("video/formats/*"))])
def test_of_a_long_video_only_what_holds_chosen_frames_is_decoded(tmp_path, path, monkeypatch):
    made = path or write_clip(tmp_path / "a.mp4", NOISE)
    with pytest.importorskip("av").open(str(made)) as file:
        full = np.stack([f.to_rgb().to_ndarray().transpose(2, 0, 1) for f in file.decode(video=0)])
    for choice in (torch.tensor([[3, 4, 21], [3, 29, 31]]), tv.view_frames(len(full), 25, 2)):
        assert np.array_equal(tv.read_clip(made, {len(full): choice}.get), full[choice])


@pytest.mark.parametrize("name", ["{}.png", "img_{}.jpg", "x1_{}b.PNG", "{:02}.jpeg"])
def test_frames_of_a_folder_follow_their_numbers(tmp_path, name):
    for i in torch.randperm(120).tolist():
        Image.new("L", (9, 9), 2 * i).save(tmp_path / name.format(i))
    shown = tv.read_clip(tmp_path, {120: torch.arange(120)[None]}.get)[0, :, 0, 0, 0]
    assert shown.tolist() == list(range(0, 240, 2))


def copy_packets(path, source, change):
    """Write the packets of a video, of which change(k, packet) gives the bytes, to another."""
    av = pytest.importorskip("av")
    with av.open(str(source)) as old, av.open(str(path), "w") as file:
        stream = file.add_stream_from_template(old.streams.video[0])
        for k, packet in enumerate(p for p in old.demux(video=0) if p.size):
            copy = av.Packet(change(k, packet))
            for name in ("pts", "dts", "time_base", "is_keyframe"):
                setattr(copy, name, getattr(packet, name))
            copy.stream = stream
            file.mux(copy)
    return path


def hide(k, packet):  # as VP8's alternative reference frames are: decoded and never shown
    data = bytearray(bytes(packet))
    data[0] &= 255 - 16 * (k in (4, 17, 18))
    return bytes(data)


def cut(k, packet):  # as by ffmpeg -ss 0.35 -c copy: the first frames are there, yet not shown
    shift = int(0.35 / packet.time_base)
    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
    return bytes(packet)


OPEN = {"x264-params": "open-gop=1"}, {"x265-params": "keyint=10:open-gop=1:log-level=none"}


@pytest.mark.parametrize("name, codec, options, change", [
    ("a.mp4", "mpeg4", {"bf": "2"}, None), ("a.avi", "mpeg4", {"bf": "2"}, None),
    ("a.mkv", "mpeg2video", {"bf": "2"}, None), ("a.mp4", "libx264", OPEN[0], None),
    ("a.avi", "libx264", OPEN[0], None), ("a.mp4", "libx265", OPEN[1], None),
    ("a.webm", "vp8", {}, hide), ("a.mp4", "libx264", {}, cut),
])  # fmt: skip
def test_each_frame_equals_that_of_the_whole_file(tmp_path, name, codec, options, change):
    frames = np.stack([np.roll(NOISE[0].repeat(4, 0).repeat(4, 1), k, 1) for k in range(30)])
    path = write_clip(tmp_path / name, frames, codec, options)  # moving, so B frames differ
    if change:
        path = copy_packets(tmp_path / f"changed{path.suffix}", path, change)
    with pytest.importorskip("av").open(str(path)) as file:
        full = np.stack([f.to_rgb().to_ndarray().transpose(2, 0, 1) for f in file.decode(video=0)])
    assert len(full) == {hide: 27, cut: 26}.get(change, 30)
    for choice in (torch.arange(len(full))[None], *torch.arange(len(full))[:, None, None]):
        assert np.array_equal(tv.read_clip(path, {len(full): choice}.get), full[choice.numpy()])


def test_pyav_is_asked_for_by_videos_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tv, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    write_tree(tmp_path / "b", "folder .gif")
    assert load("folder .gif", tmp_path / "b")["train"][0, 0][1] >= 0
    for tree, path, found in [("folder .mp4", TREES["folder .mp4"], "pip install av"),
                              ("list", "a/{k}.m4v", "pip install av"),
                              ("list", "a/{k}.txt", "a/.*.txt is no clip")]:  # fmt: skip
        monkeypatch.setitem(TREES, tree, path)
        write_tree(root := tmp_path / path[-3:], tree, write)
        argv = "--data", tree.split()[0], "--root", root, "--out", tmp_path / "out"
        with pytest.raises(UserError, match=found):
            tv.main([*SMALL, *map(str, argv)])
        assert not (tmp_path / "out").exists()


def test_broken_clips_are_skipped_and_many_are_an_error(tmp_path, capsys):
    args, good = arguments("--batch-size", 100), write_clip(tmp_path / "good.gif", NOISE[:2])
    broken = [tmp_path / name for name in ("empty", "text.gif", "cut.gif")]
    broken[0].mkdir()
    broken[1].write_text("no picture")
    broken[2].write_bytes(good.read_bytes()[:-999])
    if tv.find_spec("av"):
        broken += [write_clip(tmp_path / name, NOISE[:9]) for name in ("cut.mp4", "codec.webm")]
        broken[3].write_bytes(broken[3].read_bytes()[:9999])
        broken[4].write_bytes(broken[4].read_bytes().replace(b"V_VP8", b"V_XXX"))
    for path in broken:
        x, y = tv.Clips([path], [1], args)[0, 0]
        assert y == -1 and x.shape == (1, 4, 3, 16, 16) and not x.any()
        assert capsys.readouterr().err.startswith(f"skipped {path}: ")
    for n in range(0, len(data := good.read_bytes()), 8):  # wherever it is cut, nothing is raised
        (tmp_path / "short.gif").write_bytes(data[:n])
        y = tv.Clips([tmp_path / "short.gif"], [1], args)[0, 0][1]
        assert y == -1 or n > len(data) // 2
    capsys.readouterr()
    batches = batches_of(tv.Clips([*broken[:2], *[good] * 198], [1] * 200, args))
    assert "this epoch: 2 of 200 samples are broken and were skipped" in capsys.readouterr().err
    x, targets = next(batch for batch in batches if batch[1].sum() < 100)
    kept, model = targets.sum(1) > 0, tv.build_model(args, "none", 0, META)
    losses = [tv.compute_loss(model, batch) for batch in ((x, targets), (x[kept], targets[kept]))]
    assert torch.allclose(*losses, rtol=1e-5) and losses[0] > 0.1
    with pytest.raises(UserError, match="3 of 200 samples are broken, more than 1%"):
        batches_of(tv.Clips([*broken[:3], *[good] * 197], [1] * 200, args))


@pytest.mark.parametrize("tree, file, text", [
    ("list", "train.csv", "clip.gif\n"), ("list", "train.csv", "my clips/0.gif walk\n"),
    ("list", "val.csv", "my clips/20.gif 7\n"), ("folder", "val/7/clip/0.png", ""),  # no class 7
    ("ucf101", "ucfTrainTestlist/classInd.txt", "1 2\n2 9\n"),  # and here no class 10
    ("ucf101", "ucfTrainTestlist/trainlist02.txt", ""), ("ssv2", "labels/labels.json", "{"),
    ("ssv2", "labels/labels.json", '{"9": "0"}'), ("ssv2", "labels/train.json", '[{"id": "1"}]'),
    ("list", "train.csv", "a.gif 2\nb.gif 9\nc.gif 10\n"),  # all are missing
    ("list", "train.csv", "é 0\n" * 999),  # not UTF-8
    ("ssv2", "labels/train.json", '[{"id": "1", "template": null}]'),
])  # fmt: skip
def test_a_wrong_directory_and_malformed_lists_are_one_line(tmp_path, tree, file, text):
    with pytest.raises((UserError, OSError), match=f"^[^\n]*{tmp_path}[^\n]*$"):
        load(tree, tmp_path)  # the script shows both as one line
    write_tree(tmp_path, tree, write)
    write(tmp_path / file, text)
    found = "is not laid out like |3 of 3 samples are broken"
    with pytest.raises(UserError, match=found) as caught:
        load(tree, tmp_path)
    assert len(str(caught.value)) < len(str(tmp_path)) + 150  # and not all of the list


def test_a_single_frame_of_the_toy_tells_nothing(tmp_path):
    a, b, c = (tv.draw_toy(9, seed, 8, 32) for seed in (0, 0, 1))
    assert all(map(torch.equal, a, b)) and not torch.equal(a[0], c[0])
    x, y, mask = tv.draw_toy(1300, 0, 8, 32)
    grey = x.float().mean(2)
    assert ((grey > 160) == mask).float().mean() > 0.98  # the sprite is the brightest
    area, light = mask.float().mean((2, 3)), (grey * mask).mean((2, 3))
    facts = nn.functional.adaptive_avg_pool2d(grey, 4).flatten(2)  # (n, T, 16)
    facts = torch.cat([facts, torch.stack([area, light / area], dim=2)], dim=2)
    for of_class in (y == i for i in range(8)):
        sigma = facts.std(0) / of_class.sum() ** 0.5
        assert ((facts[of_class].mean(0) - facts.mean(0)).abs() < 5 * sigma).all()
    still = x[torch.arange(1300), torch.arange(1300) % 8][:, None].expand_as(x)
    parts, top1 = torch.arange(1300).split(1000), []
    args = arguments("--model", "micro", "--batch-size", 8, "--lr", 3e-3, "--out", tmp_path)
    for seed, clips in enumerate((x, still)):
        train, test = (tv.Clips(clips[i], y[i], args, (1, 1)) for i in parts)
        data = {"train": train, "val": [test], "test": [test], "sizes": ""}
        data["meta"] = {"classes": tv.TOY_MOTIONS}
        top1.append(tv.train(args, "none", seed, data)["metrics"]["top1"])
    assert top1[0] > 35 and top1[1] < 12.5 + 5 * 1.9  # chance and five deviations


def test_a_batch_has_two_views_of_each_clip_and_follows_from_seeds_alone(tmp_path, monkeypatch):
    paths = [write_clip(tmp_path / str(i), NOISE[i : i + 1]) for i in range(8)]  # still pictures
    args, mix, seen = arguments("--recipe", "videomae", "--batch-size", 4), tv.mix, []
    clips = tv.Clips(paths, [0, 1, 2, 0, 1, 2, 0, 1], args)
    monkeypatch.setattr(tv, "mix", lambda *a: seen.append([a[0].clone(), a[1]]) or mix(*a))
    batches = batches_of(clips)
    for (x, labels), (mixed, targets) in zip(seen, batches, strict=True):
        assert mixed.shape == (8, 4, 3, 16, 16) and torch.allclose(targets.sum(1), torch.ones(8))
        assert (x.unflatten(1, (4, 3)) == x[:, None, :3]).all()  # still pictures are again such
        assert (x[::2] != x[1::2]).flatten(1).any(1).all() and labels[::2].equal(labels[1::2])
    args.workers = 2
    for batch, again in zip(batches, batches_of(clips), strict=True):
        assert all(map(torch.equal, batch, again))
    assert not torch.equal(clips[0, 1][0], clips[0, 2][0])


def test_all_frames_have_the_same_mixture_and_hole_and_targets_tell_the_mixture():
    plain, kinds = torch.arange(5.0)[:, None, None, None].expand(5, 12, 16, 16), set()
    for seed in range(20):  # class c has colour c
        torch.manual_seed(seed)
        x, targets = tv.mix(plain.clone(), torch.eye(5), torch.full((1, 5), 0.25))  # no hole
        assert (x == x[:, :1]).all() and torch.allclose(targets.sum(1), torch.ones(5))
        colour = (targets - 0.1 / 5) / 0.9 @ torch.arange(5.0)
        assert torch.allclose(x.mean((1, 2, 3)), colour, atol=1e-4)
        kinds.add("Mixup" if x.std((1, 2, 3)).max() < 1e-4 else "CutMix")
        x, _ = tv.mix(torch.zeros_like(x), torch.eye(5), torch.tensor([[0.2, 1, 1, 1, 1]]))
        assert x.any() and ((x != 0) == (x != 0)[:, :1]).all()  # the same hole
    assert kinds == {"Mixup", "CutMix"}


def test_clips_are_mirrored_unless_left_and_right_matter():
    ramp = torch.arange(0, 160, 10, dtype=torch.uint8).expand(4, 3, 16, 16)
    for data in ("folder", "toy", "ssv2"):
        made = [tv.augment(ramp, arguments("--data", data)) for _ in range(30)]
        assert {(x[..., 0] > x[..., -1]).all().item() for x in made} == {False, data == "folder"}


def test_lower_layers_learn_slower_and_matrices_alone_decay():
    args = arguments("--layer-decay", 0.7, "--weight-decay", 0.3)
    groups = tv.param_groups(model := tv.build_model(args, "pretrained", 0, META), args)
    got = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        below = {"embed": 3, "blocks.0": 2, "blocks.1": 1}  # all others: 0
        scale = 0.7 ** sum(n for start, n in below.items() if name.startswith(start))
        assert got.pop(id(p)) == pytest.approx((scale, 0.3 * (p.ndim > 1))), name
    assert not got


def publish(root):
    """Write random weights in the layouts of Hugging Face and of VideoMAE; return their model."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 4, "num_labels": 3}
    sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = VideoMAEForVideoClassification(VideoMAEConfig(**sizes, intermediate_size=128)).eval()
    for p in model.parameters():
        p.data = 0.2 * torch.randn(p.shape)
    save_file(w := model.state_dict(), root / "new.safetensors")
    w = {k.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): w[k] for k in w}
    save_file(w, root / "old.safetensors")
    for theirs, ours in {
        "videomae.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "videomae.encoder.layer": "blocks", "attention.attention": "attn", "classifier": "head",
        "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2", "layernorm_before": "norm1", "layernorm_after": "norm2",
    }.items():  # fmt: skip
        w = {k.replace(theirs, ours): x for k, x in w.items()}
    for a in ("blocks.0.attn", "blocks.1.attn"):
        parts = [w.pop(f"{a}.{k}.weight") for k in ("query", "key", "value")]
        w[f"{a}.qkv.weight"] = torch.cat(parts)
    args = argparse.Namespace(model="vit", lr=1e-3, opt_betas=[0.9, 0.95], data_path=None)
    torch.save({"module": w, "args": args}, root / "tuned.pth")
    w = {f"encoder.{k}": x for k, x in w.items() if k.startswith(("patch_embed", "blocks"))}
    others = "mask_token encoder.norm.weight encoder_to_decoder.weight decoder.norm.weight"
    w |= dict.fromkeys(others.split(), torch.zeros(32))
    torch.save({"model": w, "epoch": 800, "args": args}, root / "pre.pth")
    return model


@pytest.mark.parametrize("file", ["new.safetensors", "old.safetensors", "tuned.pth", "pre.pth"])
def test_published_weights_give_the_published_logits(tmp_path, file):
    theirs, args = publish(tmp_path), arguments("--init", tmp_path / file)
    if file == "pre.pth":
        theirs.fc_norm.reset_parameters()  # it has none
    ours, x = tv.build_model(args, "none", 0, META).eval(), torch.randn(3, 4, 3, 16, 16)
    ours.head.load_state_dict(theirs.classifier.state_dict())
    expected = theirs(pixel_values=x).logits
    assert torch.allclose(ours(x), expected, atol=1e-5) and expected.std() > 0.2


def test_weights_that_do_not_fit_are_named_and_no_code_is_run(tmp_path):
    run = {"__reduce__": lambda self: (os.mkdir, (str(tmp_path / "made"),))}
    evil = {"mask_token": type("Evil", (), run)()}
    w = {"embed.bias": torch.zeros(32), "embed.weight": torch.zeros(1), "x": torch.zeros(1)}
    for file, state in {"a.pth": w, "b.pth": [1], "c.pth": evil, "d.safetensors": w}.items():
        torch.save(state, tmp_path / file)
        with pytest.raises(UserError, match=file) as caught:
            tv.build_model(arguments("--init", tmp_path / file), "none", 0, META)
        assert file != "a.pth" or caught.match("blocks.1.qkv.weight, embed.weight, x$")
    assert not (tmp_path / "made").exists()
    publish(tmp_path)
    good, a = load_file(tmp_path / "old.safetensors"), "encoder.layer.0.attention.attention."
    good, one = {k.replace("videomae.", ""): x for k, x in good.items()}, torch.zeros(1)
    low, high, narrow = torch.zeros(16, 32), torch.zeros(48, 32), torch.zeros(32, 16)
    for state, found in [
        ({"model": [1]}, "holds no weights"), ({0: one}, " in 0, blocks"),
        ({"model": {0: one}}, " in 0, blocks"), (good | {a + "q_bias": 1}, "blocks.0.qkv.bias"),
        (good | {a + "key.weight": narrow}, "blocks.0.attn.k_weight"),
        (good | {a + "query.weight": low, a + "value.weight": high}, "blocks.0.attn.q_weight"),
    ]:  # fmt: skip
        torch.save(state, tmp_path / "e.pth")
        with pytest.raises(UserError, match=found):
            tv.build_model(arguments("--init", tmp_path / "e.pth"), "none", 0, META)


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="LLMBLOCK_DATA is not set")
def test_real_videos_and_a_real_llama(tmp_path):
    args = arguments("--data", "ucf101", "--root", REAL / "video/fight_surv")
    assert tv.load_data(args)["sizes"] == "180 train, 20 val, 100 test clips, 2 classes"
    argv = "--data", "ssv2", "--root", REAL / "video/sprites_ssv2", "--llm", REAL / "lm/stories260K"
    argv = *SMALL, *argv, "--limit", 64, "--out", tmp_path
    [result] = tv.main([str(k) for k in argv])
    assert result["params_frozen"] == 45_440 and result["metrics"]["top5"] > 0
