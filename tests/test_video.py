"""train_video.py: frames, views, layouts, VideoMAE's recipe and weights. CPU, offline.

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
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_video  # noqa: E402
from llmblock import UserError  # noqa: E402

SMALL = ["--limit", "8", "--epochs", "1", "--batch-size", "4", "--workers", "0"]
T = train_video.MODELS["micro"]["T"]
S = train_video.MODELS["micro"]["S"]
torch.set_num_threads(1)


def write_frames(path, n, size=(60, 50)):
    """A clip as a folder of frames; frame i has the brightness 5 i."""
    path.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", size, (5 * i, 5 * i, 5 * i)).save(path / f"{i:03}.png")


def write_folder(root):
    for split in ("train", "val"):
        for name in ("fall", "rise"):
            for k in range(10):
                write_frames(root / split / name / str(k), 8 + k)
    return root


def brightness(x):
    return (x.float().mean(dim=(-3, -2, -1)) / 5).round()  # (V, T): numbers of the frames


def test_a_frame_of_each_segment_is_shown(tmp_path):
    write_frames(tmp_path / "clip", 2 * T)
    first = train_video.read_clip(tmp_path / "clip", torch.zeros(1, T), S)
    assert brightness(first)[0].tolist() == list(range(0, 2 * T, 2))
    last = train_video.read_clip(tmp_path / "clip", torch.full((1, T), 0.999), S)
    assert brightness(last)[0].tolist() == list(range(1, 2 * T, 2))
    # Two temporal views: the middle and the beginning of each segment; three crops of each.
    args = train_video.parse_args(["--views", "2x3"])
    views, label = train_video.Clips([(tmp_path / "clip", 1)], args, "2x3")[0, 0]
    assert views.shape == (6, T, 3, S, S) and label == 1
    shown = {tuple(row) for row in brightness(views).tolist()}
    assert shown == {tuple(range(1, 2 * T, 2)), tuple(range(0, 2 * T, 2))}
    with pytest.raises(UserError, match="empty"):
        (tmp_path / "empty").mkdir()
        train_video.read_clip(tmp_path / "empty", torch.zeros(1, T), S)


def test_copies_of_a_clip_share_their_frames_and_are_never_mixed_with_each_other(
    tmp_path, monkeypatch
):
    args = train_video.parse_args(["--recipe", "videomae", "--limit", "8"])
    monkeypatch.setattr(train_video.v2, "RandAugment", lambda *args: torch.nn.Identity())
    data = train_video.load_data(args)["train"]
    samples = [data[5, i] for i in range(4)]
    assert all(x.shape[0] == 2 for x, _ in samples)
    write_frames(tmp_path / "clip", 45)
    copies, _ = train_video.Clips([(tmp_path / "clip", 0)], args)[7, 0]
    assert torch.equal(*brightness(copies))
    # All clips of different classes: a target that names one class was mixed with its twin.
    targets = []

    def remember(logits, y, label_smoothing):
        targets.append(y)
        return logits.sum()

    monkeypatch.setattr(train_video.F, "cross_entropy", remember)
    x = torch.stack([x for x, _ in samples])
    for seed in range(8):
        torch.manual_seed(seed)
        model = lambda x: torch.zeros(len(x), len(args.classes))  # noqa: E731
        train_video.compute_loss(args, model, [x, torch.arange(4)])
    for y in targets:
        assert y.shape == (8, len(args.classes))
        assert ((y > 0).sum(1) == 2).all() or (y.max(1).values > 0.999).all()


def test_published_weights_give_the_features_of_transformers(tmp_path):
    m = train_video.MODELS["micro"]
    config = VideoMAEConfig(
        hidden_size=m["D"], num_hidden_layers=m["depth"], num_attention_heads=m["heads"],
        intermediate_size=4 * m["D"], image_size=m["S"], patch_size=m["patch"], num_frames=m["T"],
        num_labels=12, layer_norm_eps=1e-6, use_mean_pooling=True,
    )  # fmt: skip
    theirs = VideoMAEForVideoClassification(config).eval()
    for p in theirs.parameters():
        p.data = 0.2 * torch.randn_like(p) + (p.data.mean() > 0.9)
    args = train_video.parse_args(["--recipe", "videomae"])
    args.classes = list("abcdefghijkl")
    ours = train_video.build_model(args, "none", 0).eval()
    state = theirs.state_dict()
    patch = [k for k in state if k.endswith("projection.weight")]
    norms = [k for k in state if k.startswith("fc_norm")]
    weights = {
        "patch_embed.proj.weight": state[patch[0]],
        "patch_embed.proj.bias": state[patch[0].replace("weight", "bias")],
        "fc_norm.weight": state[norms[0]], "fc_norm.bias": state["fc_norm.bias"],
        "head.weight": state["classifier.weight"], "head.bias": state["classifier.bias"],
    }  # fmt: skip
    mapping = dict(norm1="layernorm_before", norm2="layernorm_after")
    for i, layer in enumerate(find_layers(theirs)):
        own = dict(layer.named_parameters())
        for ours_name, name in mapping.items():
            for part in ("weight", "bias"):
                weights[f"blocks.{i}.{ours_name}.{part}"] = own[f"{name}.{part}"]
        matrices = [p for name, p in own.items() if p.ndim == 2]
        q, k, v, proj, fc1, fc2 = matrices  # in the order of the computation
        weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat([q, k, v])
        names = {id(p): name for name, p in own.items()}
        for target, p in (("attn.proj", proj), ("mlp.fc1", fc1), ("mlp.fc2", fc2)):
            weights[f"blocks.{i}.{target}.weight"] = p
            weights[f"blocks.{i}.{target}.bias"] = own[names[id(p)].replace("weight", "bias")]
        for letter, p in (("q", q), ("v", v)):
            bias = names[id(p)].replace("weight", "bias")
            weights[f"blocks.{i}.attn.{letter}_bias"] = own[bias]
    torch.save({"module": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "videomae.pth")
    train_video.load_init(ours, tmp_path / "videomae.pth")
    x = torch.randn(2, m["T"], 3, m["S"], m["S"])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-3)

    # A pre-training file: its names have a prefix, and no head; a new one starts near nothing.
    bare = {f"encoder.{k}": w for k, w in weights.items() if not k.startswith(("head", "fc_norm"))}
    torch.save({"model": bare}, tmp_path / "bare.pth")
    train_video.load_init(ours, tmp_path / "bare.pth")
    assert ours.head.bias.eq(0).all() and ours.head.weight.abs().max() < 0.01
    del bare["encoder.blocks.1.norm1.bias"]
    torch.save({"model": bare}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="lacks blocks.1.norm1.bias"):
        train_video.load_init(ours, tmp_path / "bare.pth")


def find_layers(model):
    """The transformer layers of transformers' VideoMAE, whatever it calls their list."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            return list(module)


def test_class_folders_of_frames(tmp_path):
    root = write_folder(tmp_path / "data")
    argv = [*SMALL, "--data", "folder", "--root", str(root), "--block", "none"]
    argv += ["--out", str(tmp_path / "runs")]
    trained = train_video.main(argv)[0]
    best = next((tmp_path / "runs").rglob("best.pt"))
    (root / "train").rename(tmp_path / "elsewhere")  # --eval needs the test clips alone
    tested = train_video.main(["--eval", str(best), *argv])[0]
    assert tested["metrics"] == trained["metrics"]
    with pytest.raises(UserError, match="nowhere"):
        train_video.main([*argv[:6], "--data", "ssv2", "--root", str(tmp_path / "nowhere")])
    (root / "val/fall/3/002.png").write_bytes(b"no picture")
    args = train_video.parse_args(["--data", "folder", "--root", str(root), "--eval", str(best)])
    clips = train_video.load_data(args)["test"]
    with pytest.raises(UserError, match="fall/3"):
        for i in range(len(clips)):
            clips[0, i]


def test_ssv2s_labels(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "20bn-something-something-v2").mkdir()
    (tmp_path / "labels/labels.json").write_text(json.dumps({"Turning [something]": "1", "A": "0"}))
    rows = []
    for i in range(4):
        rows.append({"id": str(i), "template": "Turning [something]"})
        (tmp_path / f"20bn-something-something-v2/{i}.webm").write_bytes(b"")
    for file in ("train", "validation"):
        (tmp_path / f"labels/{file}.json").write_text(json.dumps(rows))
    args = train_video.parse_args(["--data", "ssv2", "--root", str(tmp_path)])
    names = {"Turning something": "1", "A": "0"}
    (tmp_path / "labels/labels.json").write_text(json.dumps(names))
    pairs = train_video.find_clips(args, "val")
    assert args.classes == ["A", "Turning something"] and {label for _, label in pairs} == {1}
    assert {clip.name for clip, _ in pairs} == {f"{i}.webm" for i in range(4)}


def test_toy_masks_cover_the_moving_disc():
    frames, _, masks = train_video.draw_toy(3, T, S)
    frames = np.stack(frames).astype(int)
    background = frames[0][~masks[0]][0]
    assert (frames[~masks] == background).all() and (frames[masks] != background).any(1).all()
    assert len({mask.tobytes() for mask in masks}) == T  # it moves in every step


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="LLMBLOCK_DATA is not set")
def test_real_video_files():
    pytest.importorskip("av")
    folder = Path(os.environ["LLMBLOCK_DATA"]) / "video"
    files = [p for p in (folder / "formats").rglob("*") if p.suffix in (".mp4", ".avi", ".webm")]
    files += sorted(folder.glob("sprites_ssv2/*/*.webm"))[:3]
    assert len(files) > 5
    for file in files:
        x = train_video.read_clip(file, torch.full((1, T), 0.5), S)
        assert x.shape[:3] == (1, T, 3) and x.float().std() > 5
