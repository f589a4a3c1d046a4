"""train_video.py: frames, views, every layout, the toy, augmentation, VideoMAE's weights. Offline.

python -m pytest tests/test_video.py -q         # LLMBLOCK_DATA=DIR adds DIR/video
"""

import functools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train_video as tv  # noqa: E402
from llmblock import UserError  # noqa: E402

TINY = ["--workers", "0", "--device", "cpu", "--size", "16", "--frames", "4"]
FOLDER = "folder", "bend, climb, dive"
LAYOUTS = {  # --data, the classes in their order, and where the clips are
    "gif": (*FOLDER, "{split}/{name}/{k}.gif"),
    "frames": (*FOLDER, "{split}/{name}/{k}"),
    "mp4": (*FOLDER, "{split}/{name}/{k}.mp4"),
    "list": ("list", "2, 9, 10", "my clips/{k}.gif"),
    "ucf101": ("ucf101", "Yoga, Archery, Lunges", "UCF-101/{name}/v{k}.avi"),
    "ssv2": ("ssv2", "Turn something, Hit something, Fall", "20bn-something-something-v2/{k}.webm"),
}
torch.set_num_threads(1)


def arguments(*argv):
    return tv.parse_args([*TINY, *map(str, argv)])


def build(args, kind="none", C=5):
    return tv.build_model(args, kind, 0, {"classes": [str(c) for c in range(C)]})


def batches_of(clips, C=3, seed=0):
    torch.manual_seed(0)
    data = {"train": clips, "meta": {"classes": range(C)}}
    return list(tv.train_batches(data, clips.args, torch.Generator().manual_seed(seed)))


def write_clip(path, frames):
    """Frames uint8 (n, H, W, 3) as a .gif, a folder or, with a key frame in ten, a video."""
    images = [Image.fromarray(frame) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        images[0].save(path, save_all=True, append_images=images[1:])
    elif not path.suffix:
        path.mkdir()
        (path / "notes.txt").write_text("no frame")
        for i, image in enumerate(images):
            image.save(path / f"{i:03}.{'jpg' if i % 2 else 'PNG'}")
    else:
        av = pytest.importorskip("av")
        codec = {".mp4": "libx264", ".avi": "mpeg4", ".webm": "libvpx"}[path.suffix]
        with av.open(str(path), "w") as file:
            stream = file.add_stream(codec, 10, options={"sc_threshold": "0"})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", 10, 2_000_000
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())
    return path


def touch(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def numbered(n, label):
    """Frames that show in their colour their number, how many there are, and the class."""
    colours = np.array([(12 * i, 12 * n, 60 * label) for i in range(n)], np.uint8)
    return np.broadcast_to(colours[:, None, None], (n, 24, 40, 3))


def write_tree(root, layout, write=write_clip):
    """Clips in one layout, with the lists of all: 20 to train on, of 3 to 10 frames, and 6 to test
    on, of 11 to 16. Returns the names of the classes.
    """
    names, lists = LAYOUTS[layout][1].split(", "), root / "ucfTrainTestlist"
    for folder in (root / "labels", lists):
        folder.mkdir(parents=True)
    for split, other, long, ks in (
        ("train", "train", "train", range(20)),
        ("val", "test", "validation", range(20, 26)),
    ):
        name = {k: names[k % 3] for k in ks}
        path = {k: LAYOUTS[layout][2].format(k=k, name=name[k], split=split) for k in ks}
        for k in ks:
            write(root / path[k], numbered(3 + k % 8 if k < 20 else k - 9, k % 3))
        (root / f"{split}.csv").write_text("".join(f"{path[k]} {name[k]}\n" for k in ks))
        rows = "".join(f"{name[k]}/v{k}.avi{f' {k % 3 + 1}' * (k < 20)}\n" for k in ks)
        (lists / f"{other}list02.txt").write_text(rows)
        rows = [{"id": str(k), "template": name[k].replace("some", "[some")} for k in ks]
        rows = json.dumps(rows).replace("[something", "[something]")
        (root / f"labels/{long}.json").write_text(rows)
    (lists / "classInd.txt").write_text("".join(f"{i} {k}\n" for i, k in enumerate(names, 1)))
    numbers = dict(zip(names[::-1], ("10", "9", "2"), strict=True))
    (root / "labels/labels.json").write_text(json.dumps(numbers))
    return names


# ---------------------------------------------------------------- frames and views


@pytest.mark.parametrize("n", [1, 3, 8, 20, 40])
def test_each_training_frame_is_drawn_evenly_from_its_own_part_of_the_clip(n, monkeypatch):
    torch.manual_seed(0)
    drawn = torch.cat([tv.segment_frames(n, 8) for _ in range(4000)])
    for t in range(8):
        shares = [min(i + 1, (t + 1) * n / 8) - max(i, t * n / 8) for i in range(n)]
        p, counts = torch.tensor(shares).clamp(min=0) * 8 / n, drawn[:, t].bincount(minlength=n)
        assert len(counts) == n and torch.equal(counts > 0, p > 0)
        assert (counts - 4000 * p).abs().max() < 5 * (4000 / 4) ** 0.5
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(shape, 1 - 2**-24))  # the largest
    assert tv.segment_frames(n, 8).max() == n - 1


def test_views_lie_evenly_between_each_other():
    for n in (1, 3, 8, 16, 50, 300):
        for views in (1, 2, 5):
            merged = tv.view_frames(n, 8, views).T.flatten()  # first frames of all, second ...
            steps = merged.diff()
            assert len(merged) == 8 * views and steps.max() - steps.min() <= 1
            assert merged[0] >= 0 and abs(merged[0] - (n - 1 - merged[-1])) <= 1  # centred
            assert steps.min() >= (n >= 8 * views)  # all different, if there are as many
    assert tv.view_frames(8, 8, 1).tolist() == [list(range(8))]


def test_crops_reach_both_ends_of_the_long_side():
    wide = torch.randint(256, (2, 4, 3, 16, 37), dtype=torch.uint8)
    for n, starts in ((1, [10]), (2, [0, 21]), (3, [0, 10, 21])):
        expected = torch.cat([wide[..., i : i + 16] for i in starts])
        assert torch.equal(tv.crops(wide, 16, n), expected)
        assert torch.equal(tv.crops(wide.transpose(-1, -2), 16, n), expected.transpose(-1, -2))
    assert tv.crops(torch.zeros(1, 4, 3, 50, 32), 16, 3).shape == (3, 4, 3, 16, 16)


def test_views_are_averaged_and_a_broken_clip_is_not_counted(tmp_path, capsys):
    g, paths = np.random.default_rng(0), [tmp_path / str(i) for i in range(41)]
    for path in paths[:40]:
        write_clip(path, g.integers(0, 256, (9, 24, 40, 3), dtype=np.uint8))
    args, y, ranks = arguments("--batch-size", 16), g.integers(0, 7, 41).tolist(), []
    clips = tv.Clips(paths, y, args, (2, 3))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4 * 3 * 16 * 16, 7))
    model[1].weight.data *= 10
    for i in range(40):
        views, label = clips[i, 0]
        assert views.shape == (6, 4, 3, 16, 16) and label == y[i]
        logits = torch.cat([model(tv.prepare(view[None], args)) for view in views])
        means = logits.softmax(1).mean(0), logits.mean(0), logits[0]
        ranks.append([(mean > mean[label]).sum().item() for mean in means])
    counts = [
        [100 * sum(r < k for r in rank) / 40 for k in (1, 5)] for rank in zip(*ranks, strict=True)
    ]
    assert counts[0] not in counts[1:]
    capsys.readouterr()
    assert [*tv.evaluate(model, [clips], args).values()] == counts[0]
    assert "evaluation: 1 of 41 samples are broken and were skipped" in capsys.readouterr().err


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_its_classes_labels_and_frames(tmp_path, layout):
    names, lengths = write_tree(tmp_path, layout), []
    argv = "--data", LAYOUTS[layout][0], "--split", 2, "--views", "2x1"
    data = tv.load_data(arguments("--root", tmp_path, *argv))
    assert data["meta"] == {"classes": names}
    for clips, size in zip([data["train"], *data["val"], *data["test"]], (18, 2, 6), strict=True):
        assert len(clips) == size
        for i in range(size):
            x, y = clips[i, i]
            colour = x.float().mean((-2, -1)) / torch.tensor([12, 12, 60])
            frames, length, label = colour.round().long().movedim(-1, 0)  # each (V, T)
            lengths.append(n := length.unique().item())
            assert label.unique().tolist() == [y]
            if clips.views:
                assert torch.equal(frames, tv.view_frames(n, 4, clips.views[0]))
            else:
                parts = [range(t * n // 4, -(-(t + 1) * n // 4)) for t in range(4)]
                assert all(f in part for f, part in zip(frames[0].tolist(), parts, strict=True))
    assert sorted(lengths[:20]) == sorted(3 + k % 8 for k in range(20))
    assert sorted(lengths[20:]) == list(range(11, 17))


def test_of_a_long_video_only_what_holds_chosen_frames_is_decoded(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), dtype=np.uint8)
    path, calls, decode = write_clip(tmp_path / "a.mp4", noise), [], tv.decode
    with pytest.importorskip("av").open(str(path)) as file:
        whole = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]

    def counted(codec, packets):
        calls.append([len(packets), 0])
        for frame in decode(codec, packets):
            calls[-1][1] += 1
            yield frame

    monkeypatch.setattr(tv, "decode", counted)
    for choice in (torch.tensor([[3, 4, 31, 32], [3, 31, 41, 49]]), torch.arange(50)[None]):
        read = tv.read_clip(path, {50: choice}.get)
        assert torch.equal(read, torch.from_numpy(np.stack(whole))[choice].movedim(-1, -3))
    assert calls == [[10, 5], [10, 3], [10, 10]] + 5 * [[10, 10]]


def test_pyav_is_asked_for_by_videos_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tv, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    for layout in ("gif", "frames"):
        write_tree(tmp_path / layout, layout)
        data = tv.load_data(arguments("--data", "folder", "--root", tmp_path / layout))
        assert data["train"][0, 0][1] >= 0
    write_tree(tmp_path / "mp4", "mp4", touch)
    argv = ["--data", "folder", "--root", str(tmp_path / "mp4"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="pip install av"):
        tv.main([*TINY, *argv])
    assert not (tmp_path / "out").exists()


def test_broken_clips_are_skipped_and_many_are_an_error(tmp_path, capsys):
    args, good = arguments("--batch-size", 100), write_clip(tmp_path / "good.gif", numbered(2, 1))
    broken = [tmp_path / name for name in ("empty", "text.gif", "cut.gif")]
    broken[0].mkdir()
    broken[1].write_text("no picture")
    broken[2].write_bytes(good.read_bytes()[:-60])
    if tv.find_spec("av"):
        broken.append(write_clip(tmp_path / "cut.mp4", numbered(9, 1)))
        broken[3].write_bytes(broken[3].read_bytes()[:900])
    for path in broken:
        x, y = tv.Clips([path], [1], args)[0, 0]
        assert y == -1 and x.shape == (1, 4, 3, 16, 16) and not x.any()
        assert capsys.readouterr().err.startswith(f"skipped {path}: ")
    batches = batches_of(tv.Clips([*broken[:2], *[good] * 198], [1] * 200, args))
    assert "this epoch: 2 of 200 samples are broken and were skipped" in capsys.readouterr().err
    assert sum(targets.sum() for _, targets in batches) == 198
    x, targets = next(batch for batch in batches if batch[1].sum() < 100)
    kept, model = targets.sum(1) > 0, build(args, C=3)
    losses = [tv.compute_loss(model, batch) for batch in ((x, targets), (x[kept], targets[kept]))]
    assert torch.allclose(*losses, rtol=1e-5) and losses[0] > 0.1
    with pytest.raises(UserError, match="3 of 200 samples are broken, more than 1%"):
        batches_of(tv.Clips([*broken[:3], *[good] * 197], [1] * 200, args))


@pytest.mark.parametrize("layout", ["gif", "ucf101", "ssv2", "list"])
def test_a_wrong_directory_is_one_line(tmp_path, layout):
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises((UserError, OSError)) as caught:  # the script shows both as one line
            tv.load_data(arguments("--root", root, "--data", LAYOUTS[layout][0]))
        assert str(root) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layout, file, text",
    [
        ("list", "train.csv", "clip.gif\n"),
        ("list", "train.csv", "my clips/0.gif walk\n"),
        ("list", "val.csv", "my clips/20.gif 7\n"),  # a class of no line of train.csv
        ("ucf101", "ucfTrainTestlist/classInd.txt", "1\n"),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "1 Yoga\n2 Archery\n"),  # Lunges is missing
        ("ucf101", "ucfTrainTestlist/trainlist02.txt", ""),
        ("ssv2", "labels/labels.json", "{"),
        ("ssv2", "labels/labels.json", '{"Turn something": "0"}'),
        ("ssv2", "labels/train.json", '[{"id": "1"}]'),
        ("gif", "val/walk/0.gif", ""),  # a class that train has not
    ],
)
def test_a_malformed_list_is_one_line(tmp_path, layout, file, text):
    write_tree(tmp_path, layout, touch)
    touch(tmp_path / file, None)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"is not laid out like {LAYOUTS[layout][0]}: "):
        tv.load_data(arguments("--root", tmp_path, "--data", LAYOUTS[layout][0], "--split", 2))


def test_one_missing_clip_is_reported_and_two_of_twenty_are_an_error(tmp_path, capsys):
    write_tree(tmp_path, "list", touch)
    args = arguments("--root", tmp_path, "--data", "list")
    (tmp_path / "my clips/5.gif").unlink()
    assert tv.load_data(args)["sizes"] == "18 train, 1 val, 6 test clips, 3 classes"
    assert f"{tmp_path}: 1 of 20 samples are broken" in capsys.readouterr().err
    (tmp_path / "my clips/6.gif").unlink()
    with pytest.raises(UserError, match="2 of 20 samples are broken, more than 1%"):
        tv.load_data(args)


# ---------------------------------------------------------------- toy

draw_toy = functools.cache(lambda n, seed: tv.draw_toy(n, seed, 8, 32))


def angle(mask, dim):
    """Where the sprite is in each frame (n, T), as an angle: frames wrap around at their edges."""
    weight, grid = mask.sum(dim).float(), (torch.arange(32) + 0.5) * math.pi / 16
    return torch.atan2(weight @ grid.sin(), weight @ grid.cos())


def test_toy_clips_move_as_their_class_says():
    x, y, mask = draw_toy(1000, 0)
    assert ((x.float().mean(2) > 160) == mask).float().mean() > 0.98  # the brightest
    dx, dy = ((angle(mask, d).diff() + 9.5 * math.pi) % (2 * math.pi) - math.pi / 2 for d in (2, 3))
    print(dx.min(), dx.max())
