"""train_retrieval.py: recall, scores of all pairs, false captions, files of all kinds. Offline.

python -m pytest tests/test_retrieval.py -q     # LLMBLOCK_DATA=DIR adds DIR/retrieval/flickr8k
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from test_vqa import find_objects, written_out
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_retrieval as tr  # noqa: E402
from llmblock import UserError  # noqa: E402

torch.set_num_threads(1)
SIZES = {"train": 5, "restval": 1, "val": 3, "test": 4}


def arguments(*argv):
    argv = ["--workers", "0", "--device", "cpu", "--batch-size", "4", *argv]
    return tr.parse_args([str(word) for word in argv])


@pytest.fixture
def args(tmp_path):
    """Karpathy's layout, 1 to 3 captions an image, each image of a colour of its own."""
    (tmp_path / "images/val2014").mkdir(parents=True)
    images = [{"filename": "no.png", "split": "test", "sentences": []}]  # is left out
    for split, n in SIZES.items():
        for i in range(n):
            image = {"filename": f"{split}{i}.png", "split": split}
            image["sentences"] = [{"raw": f"A dog, {split} {i} {k}."} for k in range(1 + i % 3)]
            if split == "restval":  # as COCO has it
                image["filepath"] = "val2014"
            file = tmp_path / "images" / image.get("filepath", "") / image["filename"]
            Image.new("RGB", (60, 44), (40 * i, 255 - 40 * i, 9 * len(split))).save(file)
            images.append(image)
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    return arguments("--data", "karpathy", "--root", tmp_path)


def large_model(args):
    """Its weights are so large that differences of scores show."""
    model = tr.build_model(args, "none", 0)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return model.eval()


def test_recalls_equal_sorting():
    g = torch.Generator().manual_seed(0)
    owner = torch.arange(30).repeat_interleave(torch.randint(1, 4, (30,), generator=g))
    true = owner == torch.arange(30)[:, None]
    scores = torch.randn(30, len(owner), generator=g) + 1.5 * true
    found = tr.recalls(scores, owner)
    assert list(found) == ["ir1", "ir5", "ir10", "tr1", "tr5", "tr10"]
    for way, dim in {"ir": 0, "tr": 1}.items():  # images are sought with captions, or captions
        for k in (1, 5, 10):
            first = scores.argsort(dim, descending=True).narrow(dim, 0, k)
            hits = true.gather(dim, first).any(dim)
            assert found[f"{way}{k}"] == pytest.approx(100 * hits.float().mean().item(), abs=1e-3)
    assert 0 < found["ir1"] < found["ir5"] < found["ir10"] and found["ir1"] < found["tr1"]
    many = torch.arange(20).repeat_interleave(5)
    for nothing in (torch.zeros(20, 100), torch.full((20, 100), torch.nan)):
        assert set(tr.recalls(nothing, many).values()) == {0.0}  # no luck with the order


def test_every_pair_is_scored_as_alone_and_processes_share_the_images(args, monkeypatch):
    test = tr.load_data(args)["test"]
    model = large_model(args)
    tables = []
    monkeypatch.setattr(tr, "recalls", lambda scores, owner: tables.append(scores) or {})
    tr.evaluate(args, model, test)
    assert tables[0].shape == (4, 7) and tables[0].std() > 0.05
    for i in range(4):
        x = tr.to_pixels(test.images[i], args.size)[None]
        for c in range(7):
            ids = test.ids[c][test.ids[c] != tr.PAD]
            assert torch.allclose(model(x, x, ids[None, None])[0], tables[0][i, c], atol=1e-5)
    monkeypatch.setattr(tr, "WORLD", 2)
    monkeypatch.setattr(tr.dist, "all_reduce", lambda scores: None)
    for rank in (0, 1):
        monkeypatch.setattr(tr, "RANK", rank)
        tr.evaluate(args, model, test)
    assert not tables[1][1::2].any() and not tables[2][::2].any()
    assert torch.allclose(tables[1] + tables[2], tables[0], atol=1e-6)


@torch.no_grad()
def test_the_block_gets_the_visual_tokens_of_meters_fusion(args):
    tr.load_data(args)
    model = large_model(args)
    image, text = torch.randn(2, 10, 64), torch.randn(2, 4, 64)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    model.llm.forward = lambda x: -x
    features = model.fuse(image, text, mask)
    image, text = written_out(model.image_layers, model.text_layers, image, text, mask)
    expected = [model.image_pooler(-image[:, 0]), model.text_pooler(text[:, 0])]
    assert torch.allclose(features, torch.cat(expected, dim=1), atol=1e-5)


def test_loss_is_the_plain_sum(args):
    train = tr.load_data(args)["train"]
    model = tr.build_model(args, "none", 0)
    assert torch.equal(model.rank_output.weight[0], model.itm_score.weight[1])
    batch = next(iter(tr.batches(args, train, 0)))
    x, itm_x, ids, match = batch
    scores, itm_logits = model(x, itm_x, ids)
    assert scores.shape == (4, 16) and itm_logits.shape == (4, 2)
    rank = -scores.log_softmax(dim=1)[:, 0].mean()
    itm = -itm_logits.log_softmax(dim=1)[range(4), match].mean()
    loss = tr.compute_loss(args, model, batch)
    assert loss.item() == pytest.approx((rank + itm).item(), rel=1e-5)
    # ITM is of the true captions with the images that it was given
    other = model(x, itm_x.flip(0), ids)
    assert torch.equal(other[0], scores) and not torch.allclose(other[1], itm_logits)


def test_pretrained_encoders_have_a_rate_of_their_own(args):
    tr.load_data(args)
    model = tr.build_model(args, "linear", 0)  # the encoders have the same parts
    args.vision = "a CLIP"
    args.proj_lr = 10
    rates = {p: g["lr_scale"] for g in tr.param_groups(args, model) for p in g["params"]}
    for name, p in model.named_parameters():
        old = ".encoder." in name or name == "rank_output.weight"
        rate = 10 if name.startswith("llm.") else 1 if old else 5
        assert rates.get(p) == (rate if p.requires_grad else None)  # ITM's head is not trained


def test_samples(args):
    train = tr.load_data(args)["train"]
    assert train.owner.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5] and len(train) == 10
    images = [tr.to_pixels(image, args.size) for image in train.images]
    rows = [ids.tolist() for ids in train.ids]
    matches = []
    for seed in range(100):
        x, itm_x, ids, match = train[seed, 4]
        assert torch.equal(x, images[2]) and torch.equal(itm_x, x) == bool(match)
        assert ids[0].tolist() == rows[4] and len(ids) == 16
        assert not any(row in rows[3:6] for row in ids[1:].tolist())  # false ones are others'
        matches.append(match)
    assert 30 < sum(matches) < 70
    assert not torch.equal(train[0, 4][2], train[1, 4][2])


def test_karpathys_file(args, tmp_path):
    data = tr.load_data(args)
    assert args.sizes == {"train": 6, "val": 3, "test": 4}
    names = {split: [file.name[:-5] for file in data[split].images] for split in data}
    assert names == {"train": ["train"] * 5 + ["restval"], "val": ["val"] * 3, "test": ["test"] * 4}
    assert data["train"].images[5] == tmp_path / "images/val2014/restval0.png"


def test_texts_become_tokens():
    ids = tr.tokenise(["What is it?", "", "IS red " * 9], ["?", "is", "red"], None, 6)
    assert ids.tolist() == [[0, 2, 4, 2, 3, 1], [0] + [1] * 5, [0, 4, 5, 4, 5, 4]]
    assert tr.find_words(["A dog!", "a dog?"]) == ["a", "dog"]


MISTAKES = [  # what becomes of which file, and what is said of it
    ("dataset_x.json", None, "dataset_"),
    ("dataset_y.json", "{}", "dataset_"),
    ("dataset_x.json", "{", "JSONDecodeError"),
    ("dataset_x.json", "{}", "KeyError: 'images'"),
    ("dataset_x.json", '{"images": []}', "has 0 train images"),
    ("images/val1.png", None, "images/val1.png"),
    ("images/train3.png", "no image", "images/train3.png"),
]


@pytest.mark.parametrize("file, text, words", MISTAKES)
def test_mistakes_are_one_line_that_names_the_file(args, tmp_path, file, text, words):
    (tmp_path / file).unlink(missing_ok=True)
    if text:
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}.*{words}"):
        list(tr.batches(args, tr.load_data(args)["train"]))


def test_toy_shows_what_it_says_and_every_scene_has_a_twin():
    scenes = [tr.draw_toy(i) for i in tr.TOY["test"]]
    texts = [captions[0] for _, captions in scenes]
    assert len(set(texts)) == len(texts) == 40
    for image, (caption, reverse) in scenes:
        a, b, _, c, d = caption.split()
        assert reverse == f"{c} {d} and {a} {b}"
        assert f"{c} {b} and {a} {d}" in texts  # the twin
        found = {size: colour for size, (colour, _) in find_objects(image, 105).items()}
        assert found == {tr.SHAPES[b]: ImageColor.getrgb(a), tr.SHAPES[d]: ImageColor.getrgb(c)}


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="LLMBLOCK_DATA is not set")
def test_flickr8k():
    root = Path(os.environ["LLMBLOCK_DATA"]) / "retrieval/flickr8k"
    data = tr.load_data(arguments("--data", "karpathy", "--root", root, "--limit", 20))
    for captions in data.values():
        assert captions.owner.bincount().tolist() == [5] * 20
        assert tr.to_pixels(captions.images[3], 96).float().std() > 20
