"""train_vqa.py: answers, readers, encoders, metrics. LLMBLOCK_DATA=DIR adds DIR/vqa, vqa3d."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import ImageColor
from torch import nn

import train_retrieval as tr
import train_vqa as tv
from llmblock import UserError


def arguments(data, *argv):
    argv = ["--workers", "0", "--device", "cpu", "--size", "24", "--data", data, *argv]
    args = tv.parse_args([str(word) for word in argv])
    args.classes = {"answers": ["no", "red", "yes"], "words": ["?", "is", "it", "red"]}
    return args


def test_answers_are_normalised_as_vqa_does_and_questions_become_tokens():
    normal = {
        "Yes": "yes", " The  red  CAR": "red car", "an apple on a table": "apple on table",
        "theatre": "theatre", "two": "2", "None": "0", "someone": "someone", "1,000": "1000",
        "red, blue": "red blue", "3.14": "3.14", "5.": "5", "u.s.": "us", "t-shirt": "t shirt",
        "why?!": "why", "black/white": "black white", "the": "", "don't": "don't", "dont": "dont",
    }  # fmt: skip
    assert {said: tv.normalise_answer(said) for said in normal} == normal
    texts = ["What's on it?", " Is it?", "HOW", "can I", "Which one", "Does it?", "There is", ""]
    kinds = ["What", "Is", "How", "Can", "Which", "Others", "Others", "Others"]
    assert [tv.question_type(text) for text in texts] == kinds
    ids = tv.tokenise(["What is it?", "", "IS red " * 9], ["?", "is", "red"], None, 6)
    assert ids.tolist() == [[0, 2, 4, 2, 3, 1], [0] + [1] * 5, [0, 4, 5, 4, 5, 4]]
    assert tv.find_words(["A dog!", "a dog?"]) == ["a", "dog"]


def test_soft_scores_are_the_means_over_the_one_left_out():
    answers = ["a dog"] * 4 + ["Cat"] * 3 + ["2", "two", "cow"]
    plain = ["dog"] * 4 + ["cat"] * 3 + ["2", "2", "cow"]
    scores = tv.soft_scores(answers[::-1])
    assert list(scores)[:2] == ["dog", "cat"]  # the most frequent one is first
    for answer, score in scores.items():
        others = [plain[:i] + plain[i + 1 :] for i in range(10)]
        assert score == pytest.approx(np.mean([min(1, rest.count(answer) / 3) for rest in others]))


ROW = {"question_id": 3, "question": "Is it red?", "image_id": 7, "answer_type": "yes/no"}
ROW |= {"scene_id": "scene7", "situation": "I sit."}
ROW["answers"] = [{"answer": "Yes"}] * 9 + [{"answer": "the Zebra"}]
ROWS = {"questions": [ROW], "annotations": [{"question_id": 4}, ROW]}


# Two splits as they are called, files, an image or scene, and how its question is read.
@pytest.mark.parametrize("data, splits, files, visual, question", [
    ("easyvqa", ["train", "test"], ["{}/questions.json"],
     "{0}/images/7.png", ("Is it red?", {"Yes": 1.0}, "Is")),
    ("vqav2", ["train2014", "val2014"],
     ["v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"],
     "{0}/COCO_{0}_000000000007.jpg", ("Is it red?", {"yes": 1.0, "zebra": 0.3}, "yes/no")),
    ("sqa3d", ["train", "test"],
     ["v1_balanced_questions_{}_scannetv2.json", "v1_balanced_sqa_annotations_{}_scannetv2.json"],
     "scenes/{0}/scene7.npz", ("I sit. Is it red?", {"Yes": 1.0, "the Zebra": 1.0}, "Is")),
])  # fmt: skip
def test_every_format_is_read(data, splits, files, visual, question, tmp_path):
    args = arguments(data, "--root", tmp_path)
    content = [["Is it red?", "Yes", 7]] if data == "easyvqa" else ROWS
    for split, folder in zip(("train", "test"), splits, strict=True):
        for name in files:
            file = tmp_path / name.format(folder)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content))
        assert tv.read_split(args, split) == [(tmp_path / visual.format(folder), *question)]
    args.eval = "a checkpoint"  # which needs the test questions alone
    with pytest.raises(UserError, match=f"{tmp_path}.*{visual.format(folder)}"):
        tv.load_data(args)
    args.blind = True  # needs no images
    x, ids, scores = tv.load_data(args)["test"][0, 0]
    assert not x.any() and scores.tolist() == [0, 0, 1.0 * (data == "vqav2")]
    file.write_text(file.read_text().replace('"Yes"', ""))
    with pytest.raises(UserError, match=f"cannot use {tmp_path}"):
        tv.load_data(args)


def test_scenes_are_grouped_and_what_is_broken_is_named(tmp_path):
    args = arguments("sqa3d")
    colours = np.random.default_rng(0).normal(size=(400, 3))
    np.savez(tmp_path / "a.npz", points=np.hstack([40 * colours + 7, colours]))
    groups = tv.look(args, tmp_path / "a.npz")  # places beside the centres, colours, centres
    assert groups.shape == (16, 32, 9)
    offsets = groups[..., 3:6] - groups[:, :1, 3:6]  # the first one is the centre itself
    assert torch.allclose(groups[..., :3], offsets / offsets.std(), atol=1e-4)
    for points in (np.ones((9, 2)), np.ones((0, 3)), np.full((9, 3), np.nan), np.ones(9)):
        np.savez(tmp_path / "a.npz", points=points)
        with pytest.raises(UserError, match="a.npz.*not finite"):
            tv.look(args, tmp_path / "a.npz")
    (tmp_path / "a.png").write_bytes(b"something else")
    with pytest.raises(UserError, match="a.png"):
        tv.look(arguments("vqav2"), tmp_path / "a.png")


def test_validation_is_of_other_images():
    args = arguments("toy2d")
    data = tv.load_data(args)
    train, val, test = ({row.visual for row in data[k].rows} for k in ("train", "val", "test"))
    assert not train & val and not train & test
    assert args.sizes == {"train": 5760, "val": 640, "test": 1600}  # four of each image


def find_objects(image, background):
    """{(half width, half height): (colour, column)} of what a toy's image shows."""
    objects = {}
    cells = np.array(image).reshape(3, 12, 3, 12, 3).swapaxes(1, 2)  # of 12 x 12 pixels
    for row, column in np.ndindex(3, 3):
        cell = cells[row, column]
        drawn = (cell != background).any(2)
        if drawn.any():
            size = ((drawn.any(0).sum() - 1) // 2, (drawn.any(1).sum() - 1) // 2)
            objects[size] = (tuple(cell[drawn][0].tolist()), column)
    return objects


def test_toy_answers_are_true():
    for index in range(20):
        image, questions = tv.draw_toy(index)
        objects = find_objects(image, background=0)
        for text, answer in questions:
            word = text.rstrip("?").split()[-1]
            if word in tv.COLOURS:
                colours = [colour for colour, _ in objects.values()]
                assert answer == str(colours.count(ImageColor.getrgb(word)))
            else:
                colour, column = objects[tv.SHAPES[word]]
                place = ("left", "middle", "right")[column]
                assert answer == place or ImageColor.getrgb(answer) == colour


@torch.no_grad()
def test_clip_without_its_last_layer_and_roberta(tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = size | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 16}
    text = size | {"num_hidden_layers": 1, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text)
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", "?", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = {token: i for i, token in enumerate(marks)}
    transformers.RobertaTokenizer(vocab=tokens, merges=[]).save_pretrained(tmp_path / "roberta")
    config = size | {"num_hidden_layers": 2, "vocab_size": len(tokens), "type_vocab_size": 1}
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**config)).eval()
    roberta.save_pretrained(tmp_path / "roberta")
    args = arguments("vqav2", "--vision", tmp_path / "clip", "--text", tmp_path / "roberta")
    model = tv.build_model(args, "pretrained", 0).eval()
    x = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    process = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)
    pixels = process(list(x), return_tensors="pt").pixel_values
    hidden = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    expected = model.image_encoder.join(clip.vision_model.post_layernorm(hidden))
    assert torch.allclose(model.image_encoder(x), expected, atol=1e-4)
    ids = tv.tokenise(["is it red?", "why"], [], args.text, 50)
    tokens, mask = model.text_encoder(ids)
    assert mask.tolist() == [[True] * 12, [True] * 5 + [False] * 7]
    expected = model.text_encoder.join(roberta(ids[1:, :5]).last_hidden_state)
    assert torch.allclose(tokens[1:, :5], expected, atol=1e-5)
    scales = {group["lr_scale"] for group in tv.param_groups(args, model)}
    assert scales == {1, 5, 50}  # of pre-trained parts, of new ones, of the head
    with pytest.raises(UserError, match="it is a roberta, only clip"):
        tv.build_model(arguments("vqav2", "--vision", tmp_path / "roberta"), "none", 0)


def meters_fusion(image_layers, text_layers, image, text, mask):
    def attend(layer, x, other, padding, other_padding):
        x = layer.norm1(x + layer.self_attn(x, x, x, key_padding_mask=padding)[0])
        seen = layer.multihead_attn(x, other, other, key_padding_mask=other_padding)[0]
        x = layer.norm2(x + seen)
        return layer.norm3(x + layer.linear2(F.gelu(layer.linear1(x))))

    for image_layer, text_layer in zip(image_layers, text_layers, strict=True):
        before = image
        image = attend(image_layer, image, text, None, ~mask)
        text = attend(text_layer, text, before, ~mask, None)
    return image, text


@torch.no_grad()
@pytest.mark.parametrize("script", [tv, tr])
def test_the_block_gets_the_visual_tokens_of_meters_fusion(script):
    args = script.parse_args(["--limit", "8"])
    script.load_data(args)
    model = script.build_model(args, "none", 0).eval()
    image, text = torch.randn(2, 5, 64), torch.randn(2, 4, 64)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    model.image_encoder.forward = lambda x: image
    model.text_encoder.forward = lambda ids: (text, mask)
    model.llm.forward = lambda x: -x
    model.head = nn.Identity()
    ids = torch.zeros(2, 4, dtype=torch.long)
    features = model(None, ids) if script is tv else model.fuse(image, text, mask)
    fusion = next(m for m in model.modules() if hasattr(m, "image_layers"))
    image, text = meters_fusion(fusion.image_layers, fusion.text_layers, image, text, mask)
    expected = [model.image_pooler(-image[:, 0]), model.text_pooler(text[:, 0])]
    assert torch.allclose(features, torch.cat(expected, dim=1), atol=1e-5)


@pytest.mark.parametrize("data", ["vqav2", "sqa3d"])
def test_metrics_worked_by_hand(data, monkeypatch):
    logits = torch.arange(12.0).repeat(4, 1)  # 11 is the best answer, 2 the tenth
    scores = torch.zeros(4, 12)
    scores[[0, 2, 3], [11, 2, 1]] = 1
    scores[1, [1, 2, 11]] = torch.tensor([1.0, 0.9, 0.5])
    monkeypatch.setattr(tv, "batches", lambda *args: [(logits, logits, scores)])
    rows = [tv.Question(0, "", {}, kind) for kind in ("Is", "Is", "What", "Is")]
    model = nn.Module()
    model.forward = lambda x, ids: x
    metrics = tv.evaluate(arguments(data), model, SimpleNamespace(rows=rows))
    values = {"acc": 37.5, "acc_Is": 50.0, "acc_What": 0.0}
    if data == "sqa3d":
        values = {"em1": 37.5, "em10": 72.5, "em1_Is": 50.0, "em1_What": 0.0}
    assert metrics == pytest.approx(values) and list(metrics)[0] == list(values)[0]


def test_real_files_are_read(real):
    rows = tv.read_split(arguments("sqa3d", "--root", real / "vqa3d/sqa3d"), "test")
    counts = {"What": 1147, "Is": 652, "How": 465, "Can": 338, "Which": 351, "Others": 566}
    assert Counter(row.kind for row in rows) == counts
    for data, folder in {"easyvqa": "easy_vqa", "vqav2": "daquar_vqav2"}.items():
        args = arguments(data, "--root", real / "vqa" / folder, "--limit", 8)
        x, ids, scores = next(iter(tv.batches(args, tv.load_data(args)["test"])))
        assert x.float().std() > 0 and len(ids) == len(x) == 8 and scores.sum() > 0
