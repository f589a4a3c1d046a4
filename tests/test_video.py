"""train_video.py: frames, views, layouts, recipe, VideoMAE. LLMBLOCK_DATA=DIR adds DIR/video."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

import train_video as tv
from llmblock import UserError

M = tv.MODELS["micro"]
T = M["T"]
S = M["S"]


def arguments(*argv):
    args = tv.parse_args(["--workers", "0", "--device", "cpu", *map(str, argv)])
    args.classes = [str(i) for i in range(12)]
    return args


def write_frames(path, n):
    """A clip as a folder of frames; frame i has the brightness 5 i."""
    path.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (60, 50), (5 * i, 5 * i, 5 * i)).save(path / f"{i:03}.png")
    return path


def frames_in(x):
    return (x.float().mean(dim=(-3, -2, -1)) / 5).round().int().tolist()  # their numbers (V, T)


def test_a_frame_of_each_segment_is_shown_and_copies_share_theirs(tmp_path, monkeypatch):
    clip = write_frames(tmp_path / "clip", 2 * T)
    even = list(range(0, 2 * T, 2))
    odd = list(range(1, 2 * T, 2))
    assert frames_in(tv.read_clip(clip, torch.zeros(1, T), S)) == [even]
    assert frames_in(tv.read_clip(clip, torch.full((1, T), 0.999), S)) == [odd]
    x, label = tv.Clips([(clip, 1)], arguments(), "2x3")[0, 0]
    assert x.shape == (6, T, 3, S, S) and label == 1
    assert sorted(frames_in(x)) == 3 * [even] + 3 * [odd]
    monkeypatch.setattr(tv.v2, "RandAugment", lambda *args: nn.Identity())
    copies, _ = tv.Clips([(clip, 1)], arguments("--recipe", "videomae"))[7, 0]
    assert len(copies) == 2 and len({*map(tuple, frames_in(copies))}) == 1


def test_views_are_averaged_and_accuracy_equals_a_count_by_hand(monkeypatch):
    p = torch.zeros(4, 2, 7)  # what the model says of two views of four clips
    p[0] = torch.tensor([[0.7, 0.3, 0, 0, 0, 0, 0], [0.1, 0.3, 0.3, 0.3, 0, 0, 0]])
    p[1] = p[0].flip(0)  # the average says 0; the average of logarithms and one view say 1
    p[2:] = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05])
    labels = torch.tensor([0, 0, 4, 5])  # twice first, among five, not among five
    clips = list(zip(p.split(1), labels.split(1), strict=True))
    monkeypatch.setattr(tv, "batches", lambda args, clips: clips)
    monkeypatch.setattr(tv, "normalise", torch.log)
    assert tv.evaluate(arguments(), nn.Identity(), clips) == {"top1": 50.0, "top5": 75.0}


def test_copies_of_a_clip_keep_its_label_and_are_never_mixed_with_each_other(monkeypatch):
    mixed = []

    def mix(x, y):  # a clip with its neighbour
        mixed.extend(zip(x.flatten(1).median(1).values.tolist(), y.tolist(), strict=True))
        return x, y

    monkeypatch.setattr(tv.v2, "RandomChoice", lambda ways: mix)
    monkeypatch.setattr(tv, "normalise", torch.Tensor.float)
    x = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1, 1, 1).expand(4, 2, T, 3, S, S)
    batch = [x, torch.arange(4)]
    tv.compute_loss(arguments("--recipe", "videomae"), lambda x: torch.zeros(8, 12), batch)
    assert mixed == 2 * [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_the_lower_a_layer_the_slower_it_learns():
    args = arguments("--layer-decay", 0.5, "--proj-lr", 3)
    model = tv.build_model(args, "linear", 0)
    rates = {p: g["lr_scale"] for g in tv.param_groups(args, model) for p in g["params"]}
    parts = [model.patch_embed, *model.blocks, model.fc_norm, model.head, model.llm]
    scales = [rates[next(part.parameters())] for part in parts]
    assert scales == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1, 3]


def as_published(model, **parts):
    """Weights of a ViT of transformers, and of further parts, under a published file's names."""
    parts["patch_embed.proj"] = model.base_model.embeddings.patch_embeddings.projection
    parts["head"] = model.classifier
    weights = {}
    [layers] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for i, layer in enumerate(layers):
        q, k, v, *others = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat([q.weight, k.weight, v.weight])
        if k.bias is None:
            weights[f"blocks.{i}.attn.q_bias"] = q.bias
            weights[f"blocks.{i}.attn.v_bias"] = v.bias
        else:
            weights[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q.bias, k.bias, v.bias])
        others += [layer.layernorm_before, layer.layernorm_after]
        names = ("attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")
        for name, part in zip(names, others, strict=True):
            parts[f"blocks.{i}.{name}"] = part
    for name, part in parts.items():
        for key, w in part.named_parameters():
            weights[f"{name}.{key}"] = w
    return weights


@torch.no_grad()
def test_published_weights_give_the_logits_of_transformers(tmp_path):
    config = VideoMAEConfig(
        hidden_size=M["D"], num_hidden_layers=M["depth"], num_attention_heads=M["heads"],
        intermediate_size=4 * M["D"], image_size=S, patch_size=M["patch"], num_frames=T,
        num_labels=12, layer_norm_eps=1e-6, use_mean_pooling=True,
    )  # fmt: skip
    theirs = VideoMAEForVideoClassification(config).eval()
    for p in theirs.parameters():
        p.copy_(0.2 * torch.randn_like(p) + (p.mean() > 0.9))
    weights = as_published(theirs, fc_norm=theirs.fc_norm)
    file = tmp_path / "videomae.pth"
    args = arguments("--recipe", "videomae", "--init", file)
    torch.save({"module": weights, "args": argparse.Namespace(lr=1)}, file)
    x = torch.randn(2, T, 3, S, S)
    logits = tv.build_model(args, "none", 0).eval()(x)
    torch.testing.assert_close(logits, theirs(x).logits, rtol=0, atol=1e-3)
    # A pre-training file: its names have a prefix, and no head; a new one starts near nothing.
    bare = {f"encoder.{k}": w for k, w in weights.items() if not k.startswith(("head", "fc_norm"))}
    torch.save({"model": bare}, file)
    model = tv.build_model(args, "none", 0)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
    assert model.head.bias.eq(0).all() and model.head.weight.abs().max() < 0.01
    del bare["encoder.blocks.1.norm1.bias"]
    torch.save({"model": bare}, file)
    with pytest.raises(UserError, match="lacks blocks.1.norm1.bias"):
        tv.build_model(args, "none", 0)


def test_class_folders_of_frames(tmp_path):
    for k in range(20):
        write_frames(tmp_path / ("train/fall", "train/rise")[k % 2] / str(k), 2)
    write_frames(tmp_path / "val/rise/a", 2)
    args = tv.parse_args(["--data", "folder", "--root", str(tmp_path)])
    data = tv.load_data(args)
    assert args.sizes == {"test": 1, "val": 2, "train": 18} and args.classes == ["fall", "rise"]
    for clip, label in data["train"].pairs + data["val"].pairs:
        assert clip.parent == tmp_path / "train" / args.classes[label]
    assert data["test"].pairs == [(tmp_path / "val/rise/a", 1)]
    (tmp_path / "val/rise/a/000.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="rise/a: UnidentifiedImageError"):
        data["test"][0, 0]


def test_ssv2(tmp_path):
    rows = {"labels": {"Turning something": "1", "Zipping something": "0"}}
    for file, i in (("train", 1), ("validation", 2)):
        rows[file] = [{"id": f"{i}{k}", "template": "Turning [something]"} for k in range(10)]
    for path in (tmp_path / "labels", tmp_path / "20bn-something-something-v2"):
        path.mkdir()
    for row in rows["train"] + rows["validation"]:
        (path / f"{row['id']}.webm").write_bytes(b"")
    for file, content in rows.items():
        (tmp_path / f"labels/{file}.json").write_text(json.dumps(content))
    args = tv.parse_args(["--data", "ssv2", "--root", str(tmp_path)])
    data = tv.load_data(args)
    assert args.classes == ["Zipping something", "Turning something"]
    for split, start in {"train": "1", "val": "1", "test": "2"}.items():
        assert {(clip.name[0], label) for clip, label in data[split].pairs} == {(start, 1)}
    (path / "23.webm").unlink()
    with pytest.raises(UserError, match=f"{tmp_path}.*23.webm"):
        tv.load_data(args)


def test_toy_discs_move_to_the_hour_that_is_their_class():
    for i in range(20):
        frames, hour, masks = tv.draw_toy(i, T, S)
        assert len(np.unique(frames[masks], axis=0)) == len(np.unique(frames[~masks], axis=0)) == 1
        # A shift turns the phases of a picture's waves, also where what leaves it returns.
        waves = np.fft.fft2(masks)[:, :2, :2]
        turns = np.angle(waves[T // 2] / waves[0])
        angle = math.degrees(math.atan2(-turns[0, 1], turns[1, 0]))
        assert f"{round(angle / 30) % 12} o'clock" == hour


def test_real_video_files(real):
    pytest.importorskip("av")
    folder = real / "video"
    files = [*folder.glob("formats/**/*.mp4"), *folder.glob("formats/**/*.avi")]
    files += sorted(folder.glob("sprites_ssv2/*/*.webm"))[:3]
    assert len({file.suffix for file in files}) == 3
    for file in files:
        x = tv.read_clip(file, torch.full((1, T), 0.5), S)
        assert x.shape[:3] == (1, T, 3) and x.float().std() > 5
