"""train_retrieval.py: recall, scores, false captions, captions and files of all kinds. Offline.

python -m pytest tests/test_retrieval.py -q     # LLMBLOCK_DATA=DIR adds DIR/retrieval/flickr8k
"""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_retrieval as tr  # noqa: E402
import visualize  # noqa: E402
from llmblock import UserError  # noqa: E402

SMALL = "--workers 0 --device cpu --precision fp32 --epochs 1 --batch-size 4 --size 12".split()
WORDS = ["a", "dog", "red", "runs"]
torch.set_num_threads(1)


def arguments(root, *argv):
    argv = ["--out", root / "runs", *argv] if root else argv
    return tr.parse_args([*SMALL, "--root", str(root), *map(str, argv)])


def model_of(args, kind="pretrained"):
    """With heads and projections large enough for a difference to be seen."""
    model = tr.build_model(args, kind, 0, {"words": WORDS}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    return model


def write_json(root, rows, name="dataset_x.json"):
    """rows: (file name, split, captions)."""
    root.mkdir(exist_ok=True)
    images = [
        {"filename": file, "split": split, "sentences": [{"raw": text} for text in texts]}
        for file, split, texts in rows
    ]
    (root / name).write_text(json.dumps({"images": images}), encoding="utf-8")


def write_images(root, names):
    (root / "some where").mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        colour = (37 * i % 256, 91 * i % 256, 53 * i % 256)
        Image.new("RGB", (20, 14), colour).save(root / "some where" / name)


def write_data(root, n=(12, 3, 4), **changes):
    """Karpathy's layout: 1 to 3 captions of each image."""
    rows = []
    for split, number in zip(("train", "val", "test"), n, strict=True):
        for i in range(number):
            texts = [f"a dog runs {split} {i} {k}" for k in range(1 + i % 3)]
            rows.append((f"{split}{i}.png", split, texts))
    write_json(root, rows)
    write_images(root, [row[0] for row in rows])
    return rows


# Recall


def slow_recalls(scores, owner):
    """By definition, in words: one query after the other."""
    n, C = len(scores), len(owner)
    found = {f"{way}{k}": [] for way in ("ir", "tr") for k in (1, 5, 10)}
    for c in range(C):
        mine = scores[owner[c]][c]
        before = sum(1 for i in range(n) if i != owner[c] and scores[i][c] >= mine)
        for k in (1, 5, 10):
            found[f"ir{k}"].append(before < k)
    for i in range(n):
        mine = max(scores[i][c] for c in range(C) if owner[c] == i)
        before = sum(1 for c in range(C) if owner[c] != i and scores[i][c] >= mine)
        for k in (1, 5, 10):
            found[f"tr{k}"].append(before < k)
    return {name: 100 * sum(hits) / len(hits) for name, hits in found.items()}


@pytest.mark.parametrize("levels", [4, 1000])  # many ties, and nearly none
def test_recall_equals_brute_force(levels):
    g, seen = torch.Generator().manual_seed(0), set()
    for n in (2, 3, 12, 30):
        each = torch.randint(1, 6, (n,), generator=g)
        owner = torch.arange(n).repeat_interleave(each)[torch.randperm(each.sum(), generator=g)]
        scores = torch.randint(levels, (n, len(owner)), generator=g).float()
        scores[owner, torch.arange(len(owner))] += (
            levels * torch.rand(len(owner), generator=g).round()
        )
        found = tr.recalls(scores, owner)
        assert list(found) == ["ir1", "ir5", "ir10", "tr1", "tr5", "tr10"]
        assert found == pytest.approx(slow_recalls(scores.tolist(), owner.tolist()), abs=1e-3)
        seen.update(found.values())
    assert len(seen) > 8


def test_recall_of_known_cases():
    owner = torch.tensor([0, 0, 1])
    scores = torch.tensor([[0.0, 9.0, 5.0], [1.0, 2.0, 3.0]])
    # Image 0 finds its second caption, image 1 its only one; captions 0 and 2 prefer the other's.
    assert tr.recalls(scores, owner) == pytest.approx(
        {"ir1": 33.333, "ir5": 100, "ir10": 100, "tr1": 100, "tr5": 100, "tr10": 100}
    )
    many = torch.arange(20).repeat_interleave(5)
    for nothing in (torch.zeros(20, 100), torch.full((20, 100), torch.nan)):
        assert set(tr.recalls(nothing, many).values()) == {0.0}  # no luck with the order
    right = (many == torch.arange(20)[:, None]).float()
    assert set(tr.recalls(right, many).values()) == {100.0}
    assert set(tr.recalls(1 - right, many).values()) == {0.0}


# The model and its scores


@pytest.fixture(scope="module")
def gallery():
    """Five images, and captions of all lengths, one empty, one of 200 words."""
    texts = [["a dog", ""], ["red " * 200], ["a red dog runs"], ["dog"], ["runs a dog", "red red"]]
    args, g = arguments(None), torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, 3, 12, 12), generator=g, dtype=torch.uint8)
    return tr.Gallery("val", list(enumerate(texts)), images, list(range(5)), WORDS, args), args


def test_every_pair_is_scored_as_if_it_were_alone(gallery, monkeypatch):
    s, args = gallery
    model, scored = model_of(args), []
    monkeypatch.setattr(tr, "PAIRS", 3)  # chunks, and padding that differs between them
    monkeypatch.setattr(tr, "recalls", lambda scores, owner: scored.append(scores) or {})
    tr.evaluate(model, [s], args)
    for i in range(5):
        for c in range(len(s)):
            ids = s.ids[c][s.ids[c] >= 0][None, None]  # without padding
            alone = model(s.visuals[i : i + 1], ids)[0].item()
            assert scored[0][i, c].item() == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert scored[0].std() > 0.05


def test_each_image_and_caption_is_encoded_once(gallery):
    s, args = gallery
    model, seen = model_of(args, "none"), {"images": 0, "texts": 0}
    for name in seen:

        def count(module, inputs, output, name=name):
            seen[name] += len(inputs[0])

        getattr(model, f"encode_{name}").register_forward_hook(count)
    tr.evaluate(model, [s], args)
    assert seen == {"images": 5, "texts": len(s)}
    seen.update(images=0, texts=0)
    model(s.visuals[:2], s.ids[:6].view(2, 3, -1))
    assert seen == {"images": 2, "texts": 6}


@pytest.mark.parametrize("kind", ["none", "pretrained"])
def test_padding_and_company_never_change_a_score(gallery, kind):
    s, args = gallery
    model, ids = model_of(args, kind), s.ids[[0, 3, 4, 6]].view(2, 2, -1)  # (B, K, M)
    x = s.visuals[:2]
    want = model(x, tr.trim(ids))
    for more in (1, 7, tr.LONGEST - tr.trim(ids).shape[-1]):
        padded = nn.functional.pad(tr.trim(ids), (0, more), value=-1)
        for a, b in zip(want, model(x, padded), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    swapped = model(x, tr.trim(ids.flip(1)))[0].flip(1)  # the order of an image's captions
    torch.testing.assert_close(swapped, want[0], rtol=1e-5, atol=2e-5)
    assert (model(x.flip(0), ids)[0] - want[0]).abs().min() > 1e-3  # it does look at the image
    other = ids.clone()
    other[0, 0, 1] = 5
    assert (model(x, other)[0] - want[0])[0, 0].abs() > 1e-3  # and reads


def test_captions_of_all_kinds(gallery):
    s, args = gallery
    assert s.ids.shape == (7, tr.LONGEST) and s.cut == 1  # CLS and 39 of 200 words
    assert s.ids[1].tolist() == [0] + [-1] * 39  # an empty one is CLS alone
    ids, cut = tr.tokenise(["A  DOG!", "Ünknown 犬 dog", "\n"], WORDS, tr.LONGEST, args)
    assert ids.tolist() == [[0, 2, 3, 1], [0, 1, 1, 3], [0, -1, -1, -1]] and cut == 0
    score, match = model_of(args)(s.visuals[:3], ids[:, None])
    assert score.shape == (3, 1) and match.shape == (3, 1, 2) and score.isfinite().all()


def test_words_come_from_training_and_are_seen_twice():
    rows = [("a", ["red dog", "Red cat"]), ("b", ["dog"])]
    assert tr.find_words(rows, arguments(None)) == ["dog", "red"]


# False captions and the loss


def test_false_captions_are_of_other_images_and_of_other_texts():
    texts = [["one", "two"], ["ONE", "three", "four"], ["two", "five"], ["six"]]
    s = tr.Gallery("train", list(enumerate(texts)), None, list(range(4)), WORDS, arguments(None))
    true, g = torch.arange(len(s)).repeat(50), torch.Generator().manual_seed(0)
    false = s.draw_false(true, 15, g)
    assert false.shape == (len(true), 15)
    assert (s.owner[false] != s.owner[true][:, None]).all()
    assert (s.text[false] != s.text[true][:, None]).all()
    flat, plain = [text.lower() for row in texts for text in row], s.owner.tolist()
    for c in range(len(s)):  # and every one that may be drawn is
        allowed = {k for k in range(len(s)) if plain[k] != plain[c] and flat[k] != flat[c]}
        assert set(false[true == c].flatten().tolist()) == allowed
    assert s.has_false()
    for texts in ([["one", "two"], ["one"], ["one"]], [["one", "two", "three"]]):
        s = tr.Gallery("", list(enumerate(texts)), None, [0, 1, 2], WORDS, arguments(None))
        assert not s.has_false()  # of the first "one" there is no false caption: no endless search


def batches(data, args, seed=0):
    return list(tr.train_batches(data, args, torch.Generator().manual_seed(seed)))


def test_batches_hold_every_caption_once_with_its_image_in_front(gallery, monkeypatch):
    s, args = gallery
    args = arguments(None, "--false", 3, "--batch-size", 3)
    whole, words = batches({"train": s}, args), [tuple(row[row >= 0].tolist()) for row in s.ids]
    assert len(whole) == 2  # the seventh caption waits for another epoch
    for x, ids, judged in whole:
        assert x.shape == (3, 3, 12, 12) and ids.shape[:2] == (3, 4)
        assert (ids[..., -1] >= 0).any()  # not a column of padding too many
        assert sorted(judged.tolist()) in ([0, 0, 1], [0, 1, 1])
        for image, captions in zip(x, ids, strict=True):
            i = next(i for i in range(5) if torch.equal(image, s.visuals[i]))
            owners = [s.owner[words.index(tuple(c[c >= 0].tolist()))].item() for c in captions]
            assert owners[0] == i and i not in owners[1:]
    assert not torch.equal(batches({"train": s}, args, 1)[0][1][:, 0, :2], whole[0][1][:, 0, :2])
    args.batch_size = 6
    one = batches({"train": s}, args)[0]
    monkeypatch.setattr(tr, "WORLD", 2)
    for rank in (0, 1):  # two processes share the same batch
        monkeypatch.setattr(tr, "RANK", rank)
        x, ids, judged = batches({"train": s}, args)[0]
        assert torch.equal(x, one[0][rank::2]) and torch.equal(judged, one[2][rank::2])
        assert torch.equal(ids, one[1][rank::2][..., : ids.shape[-1]])


def test_loss_is_ranking_plus_matching_without_a_weight():
    score = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, -1.0]])
    match = torch.tensor(
        [[[0.0, 1.0], [2.0, 0.0], [9.0, 9.0]], [[5.0, 5.0], [0.0, 4.0], [7.0, 0.0]]]
    )
    judged = torch.tensor([0, 1])  # the first's true caption, the second's first false one
    loss = tr.compute_loss(lambda x, ids: (score, match), (torch.zeros(2), None, judged))
    rank = -(score.log_softmax(1)[0, 0] + score.log_softmax(1)[1, 0]) / 2
    itm = -(match[0, 0].log_softmax(0)[1] + match[1, 1].log_softmax(0)[0]) / 2
    assert loss.item() == pytest.approx((rank + itm).item(), abs=1e-6)


# The toy


def places_in(image):
    """{colour: (row, column)}: all shapes cover much of their cell."""
    found = {}
    for name, tint in tr.COLOURS.items():
        near = (image.float() - torch.tensor(tint)[:, None, None]).abs().amax(0) < 40
        cells = near.view(3, 12, 3, 12).sum((1, 3))
        if cells.max() > 15:
            found[name] = divmod(cells.argmax().item(), 3)
    return found


def is_true(caption, image):
    """Whether all objects are there, and lie to the first as told. Shapes are not looked at."""
    words, places = caption.replace(" of ", " ").split(), places_in(image)
    named = [word for word in words if word in tr.COLOURS]
    if set(named) != set(places):
        return False
    sides = [word for word in words if word in ("left", "right", "above", "below")]
    (row, column), others = places[named[0]], [places[name] for name in named[1:]]
    truth = [
        {"left": column < c, "right": column > c, "above": row < r, "below": row > r}[side]
        for side, (r, c) in zip(sides, others, strict=True)
    ]
    return all(truth)


def test_toy_captions_are_true_and_need_binding():
    x, captions = tr.draw_toy(100, 2, 36)
    assert x.shape == (100, 3, 36, 36) and x.dtype == torch.uint8 and len(captions) == 100
    assert all(
        is_true(text, image) for image, texts in zip(x, captions, strict=True) for text in texts
    )
    others = [is_true(texts[0], image) for image, texts in zip(x[2:], captions, strict=False)]
    assert sum(others) < 10
    number = set()
    for i in range(25):
        objects = []  # (colour, shape) of an image and of its twin
        for text in (captions[i][0], captions[25 + i][0]):
            words = text.split()
            objects.append({(a, b) for a, b in pairwise(words) if b in tr.SHAPES})
        for k in (0, 1):  # the same colours and the same shapes, but two have changed colours
            assert {pair[k] for pair in objects[0]} == {pair[k] for pair in objects[1]}
        assert len(objects[0] - objects[1]) == 2
        number.add(len(objects[0]))
    assert number == {2, 3}


# Real files


def test_reads_karpathys_json_and_images_anywhere(tmp_path):
    rows = write_data(tmp_path, (12, 3, 4))
    rows += [("extra.png", "restval", ["a red dog"]), ("none.png", "train", [])]
    write_json(tmp_path, rows)
    write_images(tmp_path / "coco", ["extra.png"])
    args = arguments(tmp_path, "--data", "karpathy")
    data = tr.load_data(args)
    s, test = data["train"], data["test"][0]
    assert len(s.which) == 13 and len(test.which) == 4 and len(data["val"][0].which) == 3
    assert test.owner.tolist() == [0, 1, 1, 2, 2, 2, 3]  # several captions, in the file's order
    assert "4 test images with 7 captions (ir1, tr1 by chance: 25.00)" in data["sizes"]
    for i, (name, _, texts) in enumerate(row for row in rows if row[1] == "test"):
        want = tr.read_image(tmp_path / "some where" / name, (3, 12, 12))
        assert torch.equal(test.visuals[test.which[i]], want)
        ids, _ = tr.tokenise(texts, data["meta"]["words"], tr.LONGEST, args)
        assert [r[r >= 0].tolist() for r in test.ids[test.owner == i]] == [
            r[r >= 0].tolist() for r in ids
        ]
    cut = tr.load_data(arguments(tmp_path, "--data", "karpathy", "--limit", 2))
    assert [
        len(cut[k].which if k == "train" else cut[k][0].which) for k in ("train", "val", "test")
    ] == [2, 2, 2]


def test_validation_is_limited_and_held_out_of_train_where_there_is_none(tmp_path, monkeypatch):
    rows = [row for row in write_data(tmp_path, (40, 5, 4)) if row[1] != "val"]
    monkeypatch.setattr(tr, "VALIDATE", 3)
    data = tr.load_data(arguments(tmp_path, "--data", "karpathy"))
    assert len(data["val"][0].which) == 3 and len(data["train"].which) == 40
    write_json(tmp_path, rows)
    data = tr.load_data(arguments(tmp_path, "--data", "karpathy"))
    val, train = data["val"][0], data["train"]
    assert len(val.which) == 3 and len(train.which) == 36  # of 4 that are held out, 3 are looked at
    assert not set(val.which.tolist()) & set(train.which.tolist())


def test_missing_and_broken_images_are_named_and_skipped(tmp_path, capsys):
    write_data(tmp_path, (190, 5, 5))
    (tmp_path / "some where" / "test3.png").unlink()
    (tmp_path / "some where" / "train7.png").write_bytes(b"no image")
    args = arguments(tmp_path, "--data", "karpathy")
    for _ in range(2):  # also when the images come from the cache
        data = tr.load_data(args)
        assert "2 images are missing or broken: test3.png, train7.png" in data["sizes"]
        assert "2 of 200 samples are broken" in capsys.readouterr().err
    assert len(data["test"][0].which) == 4 and data["test"][0].owner.max() == 3
    for i in range(3):
        (tmp_path / "some where" / f"train{i}.png").unlink()
    with pytest.raises(UserError, match="4 of 200 images are not there, such as test3.png"):
        tr.load_data(args)


def mistakes():
    """A change of good data or of the flags, and what the one line must say."""

    def rewrite(text):
        return lambda root: (root / "dataset_x.json").write_text(text)

    def splits(*names):
        return lambda root: write_json(
            root, [(f"{s}{i % 2}.png", s, ["a"]) for i, s in enumerate(names)]
        )

    good = {"filename": "test0.png", "split": "test", "sentences": [{"raw": "a"}]}
    wrong = [{**good, "filename": 3}, {**good, "split": ["test"]}, {**good, "sentences": "a"},
             {**good, "sentences": [{"raw": None}]}, {"filename": "x"}, 3, None]  # fmt: skip
    for image in wrong:
        yield (
            rewrite(json.dumps({"images": [image]})),
            [],
            "dataset_x.json is not in Karpathy's format",
        )
    for text in ("", "{", "[]", "{}", '{"images": 3}', '{"images": null}', "\x00"):
        yield rewrite(text), [], "dataset_x.json is not in Karpathy's format"
    yield rewrite('{"images": []}'), [], "lacks a train or a test split, it has images: none"
    yield splits("train", "val"), [], "lacks a train or a test split, it has images: 1 train, 1 val"
    yield splits("test"), [], "lacks a train or a test split"
    yield splits("train", "train", "test", "test"), [], "0 val images are too few"
    yield splits("train", "val", "val", "test"), [], "1 train images are too few"
    yield (
        splits(*["train"] * 2, *["val"] * 2, *["test"] * 2),
        [],
        "too few different train captions",
    )
    yield (lambda root: (root / "dataset_x.json").unlink()), [], "has these .json files: none"
    yield (lambda root: write_json(root, [], "b.json")), [], "files: b.json, dataset_x.json. Name"
    yield (
        lambda root: write_images(root / "thumbs", ["test0.png"]),
        [],
        "several files have the name test0.png",
    )
    yield (lambda root: None), ["--json", "y.json"], "files: dataset_x.json. Name"
    yield (lambda root: None), ["--root", "/nowhere"], "/nowhere has these .json files: none"
    yield (lambda root: None), ["--false", 0], "--false 0 must be at least 1"
    yield (lambda root: None), ["--size", 13], "--size 13 is not a multiple of 12"
    yield (lambda root: None), ["--vision", "/nowhere"], "transformers finds no encoder /nowhere"
    yield (lambda root: None), ["--text", "/nowhere"], "transformers finds no encoder /nowhere"


@pytest.mark.parametrize("change, argv, text", [*mistakes()])
def test_mistakes_are_one_line_before_anything_is_written(tmp_path, change, argv, text):
    root = tmp_path / "data"
    write_data(root, (3, 3, 3))
    change(root)
    argv = [*SMALL, "--data", "karpathy", "--root", root, "--out", tmp_path / "runs", *argv]
    with pytest.raises(UserError) as e:
        tr.main([str(word) for word in argv])
    assert text in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.glob("runs/retrieval*"))


def test_several_lists_of_which_one_is_named(tmp_path):
    write_data(tmp_path)
    write_json(tmp_path, [], "captions.json")
    data = tr.load_data(arguments(tmp_path, "--data", "karpathy", "--json", "dataset_x.json"))
    assert len(data["train"].which) == 12


# Pre-trained encoders


def test_pretrained_encoders_train_offline(tmp_path):
    write_data(tmp_path / "data")
    clip, roberta = tmp_path / "clip", tmp_path / "roberta"
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    vision = {**small, "image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=vision, text_config=small)).save_pretrained(clip)
    CLIPImageProcessor(size=24, crop_size=24).save_pretrained(clip)
    vocab = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 0), ("</s>", 2)]
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=50,
    ).save_pretrained(roberta)  # fmt: skip
    RobertaModel(RobertaConfig(vocab_size=8, max_position_embeddings=60, pad_token_id=1, **small)
                 ).save_pretrained(roberta)  # fmt: skip
    argv = ["--data", "karpathy", "--vision", clip, "--text", roberta, "--out", tmp_path / "runs"]
    args = arguments(tmp_path / "data", *argv, "--size", 32, "--false", 3, "--block", "none")
    before = tr.build_model(args, "none", 0, {"words": []})
    rates = {g["lr_scale"] for g in tr.param_groups(before, args)}
    assert rates == {0.2, 1.0}
    argv = [
        *SMALL,
        "--root",
        tmp_path / "data",
        *argv,
        "--size",
        32,
        "--false",
        3,
        "--block",
        "none",
    ]
    result = tr.main([str(word) for word in argv])[0]
    assert 0 <= result["metrics"]["ir1"] <= 100
    state = tr.load(tmp_path / "runs/retrieval-karpathy-micro/none-s0/last.pt")
    old = before.state_dict()
    for name in ("encode_images.encoder", "encode_texts.encoder"):
        moved = [not torch.equal(old[k], v) for k, v in state["model"].items() if name in k]
        assert sum(moved) > 0.7 * len(moved) > 10  # trained along
    ids, _ = tr.tokenise(["a dog", "", "red " * 200], [], tr.LONGEST, args)
    assert ids[0].tolist()[:5] == [0, 4, 5, 2, -1] and ids[1].tolist()[:3] == [0, 2, -1]
    assert ids[2].tolist() == [0, *[6] * 38, 2]
    visualize.main([str(tmp_path / "runs"), "--n", "2", "--out", str(tmp_path / "figures")])
    assert (tmp_path / "figures/retrieval-karpathy-micro-none-s0.png").exists()


# It learns, and it runs on real data


def test_one_batch_is_learned_by_heart(gallery):
    s, args = gallery
    args = arguments(None, "--false", 3)
    model = tr.build_model(args, "pretrained", 0, {"words": WORDS})
    batch = next(tr.train_batches({"train": s}, args, torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW(tr.param_groups(model, args), lr=3e-3)
    first = tr.compute_loss(model, batch).item()
    for _ in range(60):
        loss = tr.compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 1.5 and loss.item() < 0.05


def test_speed_is_told_of_the_test_alone(tmp_path, capsys):
    write_data(tmp_path)
    argv = [*SMALL, "--data", "karpathy", "--root", tmp_path, "--out", tmp_path / "runs"]
    tr.main([str(word) for word in [*argv, "--block", "none", "--false", 2]])
    out = capsys.readouterr().out
    assert out.count("scored ") == 1 and "scored 28 pairs at " in out and "would take" in out


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="LLMBLOCK_DATA is not set")
def test_flickr8k(tmp_path):
    root = Path(os.environ["LLMBLOCK_DATA"]) / "retrieval/flickr8k"
    argv = ["--data", "karpathy", "--root", root, "--out", tmp_path, "--limit", 20]
    data = tr.load_data(tr.parse_args([*SMALL, *map(str, argv)]))
    for s in (data["train"], data["val"][0], data["test"][0]):
        assert len(s) == 100 and s.owner.bincount().tolist() == [5] * 20 and s.cut == 0
    s = data["train"]
    unknown = (s.ids == 1).sum() / (s.ids > 0).sum()
    assert 0.05 < unknown < 0.5 and s.visuals.float().std() > 30
