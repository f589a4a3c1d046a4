"""train_retrieval.py: recall, scores of all pairs, false captions, files of all kinds. Offline.

python -m pytest tests/test_retrieval.py -q     # LLMBLOCK_DATA=DIR adds DIR/retrieval/flickr8k
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel, RobertaConfig, RobertaModel

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_retrieval as tr  # noqa: E402
from llmblock import UserError  # noqa: E402

SMALL = ["--workers", "0", "--device", "cpu", "--epochs", "1", "--batch-size", "4"]
torch.set_num_threads(1)


def write_data(root, numbers=(6, 3, 4), folder="", splits=("train", "val", "test")):
    """Karpathy's layout, 1 to 3 captions an image, each image of a colour of its own."""
    (root / "images" / folder).mkdir(parents=True)
    images = []
    for split, n in zip(splits, numbers, strict=True):
        for i in range(n):
            name = f"{split}{i}.png"
            colour = (40 * i, 255 - 40 * i, 9 * len(split))
            Image.new("RGB", (60, 44), colour).save(root / "images" / folder / name)
            sentences = [{"raw": f"A dog runs, {split} {i} {k}."} for k in range(1 + i % 3)]
            image = {"filename": name, "split": split, "sentences": sentences}
            images.append(image | ({"filepath": folder} if folder else {}))
    (root / "dataset_x.json").write_text(json.dumps({"images": images}))
    return root


def flags(root, *argv):
    argv = [*SMALL, "--data", "karpathy", "--root", root, "--out", root / "runs", *argv]
    return [str(word) for word in argv]


def arguments(root, *argv):
    return tr.parse_args(flags(root, *argv))


def large_weights(model):
    """Weights so large that differences of scores show."""
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return model.eval()


def test_recalls_of_known_cases():
    owner = torch.tensor([0, 0, 1])
    scores = torch.tensor([[0.0, 9.0, 5.0], [1.0, 2.0, 3.0]])
    # Captions 0 and 2 prefer the other image; image 0 finds its second caption, image 1 its own.
    found = tr.recalls(scores, owner)
    assert list(found) == ["ir1", "ir5", "ir10", "tr1", "tr5", "tr10"]
    assert found["ir1"] == pytest.approx(100 / 3) and found["ir5"] == found["tr1"] == 100
    many = torch.arange(20).repeat_interleave(5)
    for nothing in (torch.zeros(20, 100), torch.full((20, 100), torch.nan)):
        assert set(tr.recalls(nothing, many).values()) == {0.0}  # no luck with the order
    right = (many == torch.arange(20)[:, None]).float()
    assert set(tr.recalls(right, many).values()) == {100.0}


def test_recalls_equal_sorting():
    g = torch.Generator().manual_seed(0)
    owner = torch.arange(30).repeat_interleave(torch.randint(1, 4, (30,), generator=g))
    scores = torch.randn(30, len(owner), generator=g) + 1.5 * (owner == torch.arange(30)[:, None])
    found = tr.recalls(scores, owner)
    for k in (1, 5, 10):
        images = scores.topk(k, dim=0).indices  # (k, C)
        hits = (images == owner).any(dim=0).float()
        assert found[f"ir{k}"] == pytest.approx(100 * hits.mean().item(), abs=1e-3)
        captions = scores.topk(k, dim=1).indices  # (n, k)
        hits = (owner[captions] == torch.arange(30)[:, None]).any(dim=1).float()
        assert found[f"tr{k}"] == pytest.approx(100 * hits.mean().item(), abs=1e-3)
    assert 0 < found["ir1"] < found["ir5"] < found["ir10"]


def test_every_pair_is_scored_as_alone_and_processes_share_the_images(tmp_path, monkeypatch):
    args = arguments(write_data(tmp_path))
    test = tr.load_data(args)["test"]
    model = large_weights(tr.build_model(args, "pretrained", 0))
    tables = []
    monkeypatch.setattr(tr, "recalls", lambda scores, owner: tables.append(scores) or {})
    tr.evaluate(args, model, test)
    assert tables[0].shape == (4, 7) and tables[0].std() > 0.05
    for i in range(4):
        for c in range(7):
            ids = test.ids[c][test.ids[c] >= 0]  # no padding
            x = test.look(i)[None]
            score = model(x, x, ids[None, None])[0]
            assert torch.allclose(score, tables[0][i, c], atol=1e-5)
    monkeypatch.setattr(tr, "WORLD", 2)
    monkeypatch.setattr(tr.dist, "all_reduce", lambda scores: None)
    for rank in (0, 1):
        monkeypatch.setattr(tr, "RANK", rank)
        tr.evaluate(args, model, test)
    assert not tables[1][1::2].any() and not tables[2][::2].any()
    assert torch.allclose(tables[1] + tables[2], tables[0], atol=1e-6)


def test_block_works_on_the_visual_tokens_after_the_fusion(tmp_path):
    args = arguments(write_data(tmp_path))
    tr.load_data(args)
    model = large_weights(tr.build_model(args, "none", 0))
    image, text, mask = torch.randn(2, 10, 64), torch.randn(2, 5, 64), torch.ones(2, 5).bool()
    before = model.fuse(image, text, mask)
    got = []
    model.llm.forward = lambda x: got.append(x) or -x
    after = model.fuse(image, text, mask)
    assert torch.equal(got[0], model.fusion(image, text, mask)[0])
    assert not torch.allclose(before[:, :64], after[:, :64])
    assert torch.equal(before[:, 64:], after[:, 64:])  # the text's feature


def test_loss_is_the_plain_sum_and_itm_head_is_frozen(tmp_path):
    args = arguments(write_data(tmp_path))
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
    optimizer = torch.optim.AdamW(tr.param_groups(args, model), lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss.backward()
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == ["itm_score.weight", "itm_score.bias"]


def test_samples(tmp_path):
    train = tr.load_data(arguments(write_data(tmp_path)))["train"]
    assert train.owner.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5] and len(train) == 12
    lengths = (train.ids >= 0).sum(dim=1)
    assert (lengths == 9).all() and (train.ids[:, 0] == 0).all()  # CLS and 8 words and signs
    rows = [tuple(ids.tolist()) for ids in train.ids]
    matches = []
    for seed in range(100):
        x, itm_x, ids, match = train[seed, 4]
        again = train[seed, 4]
        assert torch.equal(ids, again[2]) and torch.equal(itm_x, again[1])
        assert torch.equal(x, train.look(2)) and tuple(ids[0].tolist()) == rows[4]
        assert not set(map(lambda row: tuple(row.tolist()), ids[1:])) & set(rows[3:6])
        assert torch.equal(itm_x, x) == bool(match)
        matches.append(match)
    assert 30 < sum(matches) < 70
    assert not torch.equal(train[0, 4][2], train[1, 4][2])


def test_coco_has_folders_and_restval(tmp_path):
    splits = ("train", "restval", "val", "test")
    root = write_data(tmp_path, (3, 2, 2, 3), "val2014", splits)
    file = root / "dataset_x.json"
    images = json.loads(file.read_text())["images"]
    bare = {"filename": "no.png", "split": "test", "sentences": []}  # is left out
    file.write_text(json.dumps({"images": [bare, *images]}))
    args = arguments(root)
    data = tr.load_data(args)
    assert args.sizes == {"train": 5, "val": 2, "test": 3}
    assert data["train"].images[4] == root / "images/val2014/restval1.png"
    args = arguments(root, "--limit", 2)
    tr.load_data(args)
    assert set(args.sizes.values()) == {2}


def test_eval_needs_the_test_images_alone(tmp_path):
    root = write_data(tmp_path)
    result = tr.main(flags(root, "--block", "none"))[0]
    for file in [*root.glob("images/train*"), *root.glob("images/val*")]:
        file.unlink()
    ckpt = root / "runs/retrieval-karpathy-micro/none-s0/best.pt"
    assert tr.main(["--eval", str(ckpt), "--root", str(root)])[0]["metrics"] == result["metrics"]


MISTAKES = [
    (lambda root: (root / "dataset_x.json").unlink(), "has 0 .json files"),
    (lambda root: (root / "other.json").write_text("{}"), "has 2 .json files"),
    (lambda root: (root / "dataset_x.json").write_text("{"), "dataset_x.json: JSONDecodeError"),
    (lambda root: (root / "dataset_x.json").write_text("{}"), "dataset_x.json: KeyError: 'images'"),
    (lambda root: (root / "dataset_x.json").write_text('{"images": []}'), "has 0 train images"),
    (lambda root: (root / "images/val1.png").unlink(), "images/val1.png"),
    (lambda root: (root / "images/train3.png").write_bytes(b"no image"), "images/train3.png"),
]


@pytest.mark.parametrize("change, text", MISTAKES)
def test_mistakes_are_one_line_that_names_the_file(tmp_path, change, text):
    change(write_data(tmp_path))
    with pytest.raises(UserError) as e:
        tr.main(flags(tmp_path, "--block", "none"))
    assert text in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "runs").exists()


def test_toy_has_no_scene_twice_and_every_scene_has_a_twin():
    scenes = [tr.draw_toy(i) for i in tr.TOY["test"]]
    texts = [captions[0] for _, captions in scenes]
    assert len(set(texts)) == len(texts) == 40
    for image, (caption, reverse) in scenes:
        first, second = caption.split(" and ")
        assert reverse == f"{second} and {first}"
        (a, b), (c, d) = first.split(), second.split()
        assert f"{c} {b} and {a} {d}" in texts  # the twin
        x = tr.to_pixels(image, 36)
        patches = F.unfold(x[None].float(), 12, stride=12)[0]  # (3 * 144, 9)
        drawn = patches.amax(dim=0) != patches.amin(dim=0)
        assert drawn.sum() == 2  # either object in a patch of its own


def test_pretrained_encoders_have_a_rate_of_their_own(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    vision = {**small, "image_size": 24, "patch_size": 8}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=small)).save_pretrained(tmp_path / "c")
    RobertaModel(RobertaConfig(**small, vocab_size=7)).save_pretrained(tmp_path / "r")
    argv = ["--vision", tmp_path / "c", "--text", tmp_path / "r", "--size", 32, "--proj-lr", 10]
    args = arguments(tmp_path, *argv)
    args.classes = []
    model = tr.build_model(args, "pretrained", 0)
    rates = {id(p): g["lr_scale"] for g in tr.param_groups(args, model) for p in g["params"]}
    for name, p in model.named_parameters():
        old = ".encoder." in name or name == "rank_output.weight"
        rate = 10 if name.startswith("llm.") else 1 if old else 5
        assert rates.get(id(p)) == (rate if p.requires_grad else None), name
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    ids = torch.tensor([[[0, 4, 5, 2], [0, 4, 2, -1]]] * 2)
    scores, itm_logits = model(images, images, ids)
    assert scores.shape == (2, 2) and itm_logits.shape == (2, 2)


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="LLMBLOCK_DATA is not set")
def test_flickr8k(tmp_path):
    root = Path(os.environ["LLMBLOCK_DATA"]) / "retrieval/flickr8k"
    args = arguments(root, "--limit", 20, "--size", 96, "--out", tmp_path)
    data = tr.load_data(args)
    for captions in data.values():
        assert captions.owner.bincount().tolist() == [5] * 20
        assert captions.look(3).float().std() > 20
    unknown = (data["test"].ids == 1).sum() / (data["test"].ids > 0).sum()
    assert 0.05 < unknown < 0.5
