"""train_retrieval.py: recall, samples, files. LLMBLOCK_DATA=DIR adds DIR/retrieval/flickr8k."""

import json

import pytest
import torch
from PIL import Image, ImageColor
from test_vqa import find_objects
from torch import nn

import train_retrieval as tr
from llmblock import UserError


def arguments(*argv):
    argv = ["--workers", "0", "--device", "cpu", "--batch-size", "4", *argv]
    return tr.parse_args([str(word) for word in argv])


@pytest.fixture
def args(tmp_path):
    """Karpathy's layout, 1 to 3 captions an image, each image of a colour of its own."""
    (tmp_path / "images/val2014").mkdir(parents=True)
    images = [{"filename": "no.png", "split": "test", "sentences": []}]  # is left out
    for i, split in enumerate(5 * ["train"] + ["restval"] + 3 * ["val"] + 4 * ["test"]):
        image = {"filename": f"{i}.png", "split": split}
        image["sentences"] = [{"raw": f"A dog, {split} {i} {k}."} for k in range(1 + i % 3)]
        image["filepath"] = "val2014" if split == "restval" else ""  # as COCO has it
        file = tmp_path / "images" / image["filepath"] / image["filename"]
        Image.new("RGB", (60, 44), (20 * i, 255 - 20 * i, 0)).save(file)
        images.append(image)
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    return arguments("--data", "karpathy", "--root", tmp_path)


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
    many = torch.arange(20).repeat_interleave(5)
    for nothing in (torch.zeros(20, 100), torch.full((20, 100), torch.nan)):
        assert set(tr.recalls(nothing, many).values()) == {0.0}  # no luck with the order


def test_every_pair_is_scored_as_alone_and_processes_share_the_images(args, monkeypatch):
    test = tr.load_data(args)["test"]
    model = tr.build_model(args, "none", 0)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)  # so large that differences of scores show
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
    monkeypatch.setattr(tr, "RANK", 1)
    monkeypatch.setattr(tr.dist, "all_reduce", lambda scores: scores[::2].add_(tables[0][::2]))
    tr.evaluate(args, model, test)
    assert torch.allclose(tables[1], tables[0], atol=1e-6)


def test_loss_is_the_plain_sum(args):
    train = tr.load_data(args)["train"]
    model = tr.build_model(args, "none", 0)
    assert torch.equal(model.rank_output.weight[0], model.itm_score.weight[1])
    batch = next(iter(tr.batches(args, train, 0)))
    x, itm_x, ids, match = batch
    scores, itm_logits = model(x, itm_x, ids)
    rank = -scores.log_softmax(dim=1)[:, 0].mean()
    itm = -itm_logits.log_softmax(dim=1)[range(4), match].mean()
    loss = tr.compute_loss(args, model, batch)
    assert loss.item() == pytest.approx((rank + itm).item(), rel=1e-5)
    other = model(x, itm_x.flip(0), ids)
    assert torch.equal(other[0], scores) and not torch.allclose(other[1], itm_logits)


def test_karpathys_file_and_samples(args):
    data = tr.load_data(args)
    assert args.sizes == {"train": 6, "val": 3, "test": 4}
    files = [file.name for split in ("train", "val", "test") for file in data[split].images]
    assert files == [f"{i}.png" for i in range(13)]
    train = data["train"]
    assert train.owner.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5] and len(train) == 12
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


@pytest.mark.parametrize("file, text, words", [  # without text, the file is removed
    ("dataset_x.json", "", "dataset_"),
    ("dataset_y.json", "{}", "dataset_"),
    ("dataset_x.json", "{}", "KeyError: 'images'"),
    ("dataset_x.json", '{"images": []}', "has 0 train images"),
    ("images/7.png", "", "images/7.png"),
])  # fmt: skip
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


def test_flickr8k(real):
    root = real / "retrieval/flickr8k"
    data = tr.load_data(arguments("--data", "karpathy", "--root", root, "--limit", 20))
    for captions in data.values():
        assert captions.owner.bincount().tolist() == [5] * 20
        assert tr.to_pixels(captions.images[3], 96).float().std() > 20
