"""train_vqa.py: answers, questions, scenes, pre-trained encoders, metrics. CPU, offline.

python -m pytest tests/test_vqa.py -q           # LLMBLOCK_DATA=DIR adds DIR/vqa and DIR/vqa3d
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_vqa as tv  # noqa: E402
from llmblock import UserError  # noqa: E402

DATA = Path(os.environ.get("LLMBLOCK_DATA", "/nowhere"))
ONE = ["--workers", "0", "--device", "cpu", "--epochs", "1", "--size", "24", "--data"]
torch.set_num_threads(1)


def arguments(data, *argv, answers=("no", "red", "yes")):
    args = tv.parse_args([*ONE, data, *map(str, argv)])
    args.classes = {"answers": list(answers), "words": ["?", "is", "it", "red"]}
    return args


# ---------------------------------------------------------------- answers
def test_answers_are_normalised_as_vqa_does():
    normal = {
        "Yes": "yes", " The  red  CAR": "red car", "an apple on a table": "apple on table",
        "theatre": "theatre", "two": "2", "ten dogs": "10 dogs", "None": "0", "someone": "someone",
        "1,000": "1000", "red, blue": "red blue", "3.14": "3.14", "5.": "5", "u.s.": "us",
        "t-shirt": "t shirt", "why?!": "why", "black/white": "black white", "the": "",
        "don't": "don't", "dont": "dont", "a dog's": "dog's", "dogs": "dogs",
    }  # fmt: skip
    assert {said: tv.normalise_answer(said) for said in normal} == normal


def test_soft_scores_are_the_means_over_the_one_left_out():
    answers = ["a dog"] * 4 + ["Cat"] * 3 + ["2", "two", "cow"]
    scores = tv.soft_scores(answers[::-1])
    assert scores == pytest.approx({"dog": 1.0, "cat": 0.9, "2": 0.6, "cow": 0.3})
    assert next(iter(scores)) == "dog"  # the most frequent one, which the vocabulary counts
    plain = [tv.normalise_answer(answer) for answer in answers]
    for answer, score in scores.items():
        others = [plain[:i] + plain[i + 1 :] for i in range(10)]
        assert score == pytest.approx(np.mean([min(1, rest.count(answer) / 3) for rest in others]))


def test_questions_have_types():
    texts = ["What's on it?", " Is it?", "HOW", "can I", "Which one", "Does it?", "There is", ""]
    kinds = ["What", "Is", "How", "Can", "Which", "Others", "Others", "Others"]
    assert [tv.question_type(text) for text in texts] == kinds


# ---------------------------------------------------------------- files
QUESTIONS = [("Is it red?", "Yes"), ("Is it big?", "no")]
SPLITS = {"easyvqa": ["train", "test"], "vqav2": ["train2014", "val2014"]}
SPLITS["sqa3d"] = ["train", "val", "test"]
FILES = {
    "easyvqa": ["{}/questions.json"],
    "vqav2": ["v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"],
    "sqa3d": ["v1_balanced_questions_{}_scannetv2.json",
              "v1_balanced_sqa_annotations_{}_scannetv2.json"],
}  # fmt: skip
VISUALS = {"easyvqa": "{0}/images/{1}.png", "vqav2": "{0}/COCO_{0}_{1:012}.jpg"}
VISUALS["sqa3d"] = "scenes/{0}/scene{1}.npz"


def write(root, data, splits):
    """A data set of 20 images or scenes in each split, with two questions about each."""
    for split in splits:
        rows = [[text, answer, i] for i in range(20) for text, answer in QUESTIONS]
        for i in range(20):
            path = root / VISUALS[data].format(split, i)
            path.parent.mkdir(parents=True, exist_ok=True)
            if data == "sqa3d":  # without colours and with them
                np.savez(path, points=np.random.default_rng(i).normal(size=(50, 3 + 3 * (i % 2))))
            else:
                Image.new("RGB", (50, 30), (10 * i, 99, 0)).save(path)
        questions = []
        annotations = []
        for k, (text, answer, i) in enumerate(rows):
            q = {"question_id": k, "question": text, "image_id": i}
            questions.append(q | {"scene_id": f"scene{i}", "situation": "I sit."})
            people = [answer] * 9 + ["the Zebra"] if data == "vqav2" else [answer]
            answers = [{"answer": person} for person in people]
            a = {"question_id": k, "answer_type": "yes/no", "answers": answers}
            annotations.insert(0, a)
        contents = [{"questions": questions}, {"annotations": annotations}]
        contents = [rows] if data == "easyvqa" else contents
        for name, content in zip(FILES[data], contents, strict=True):
            (root / name.format(split)).write_text(json.dumps(content))
    return [*ONE, data, "--root", str(root), "--out", str(root / "runs")]


FIRST = {  # the first question as it is read, and the metrics
    "easyvqa": ("Is it red?", {"Yes": 1.0}, "Is", ["acc", "acc_Is"]),
    "vqav2": ("Is it red?", {"yes": 1.0, "zebra": 0.3}, "yes/no", ["acc", "acc_yes/no"]),
    "sqa3d": ("I sit. Is it red?", {"Yes": 1.0}, "Is", ["em1", "em10", "em1_Is"]),
}


@pytest.mark.parametrize("data", SPLITS)
def test_every_format_is_read_trained_on_and_tested_alone(data, tmp_path):
    argv = write(tmp_path, data, SPLITS[data])
    args = tv.parse_args(argv)
    first = tv.read_split(args, "train")[0]
    assert first.visual == tmp_path / VISUALS[data].format(SPLITS[data][0], 0)
    assert first[1:] == FIRST[data][:3]
    sets = tv.load_data(args)
    assert args.sizes == {"test": 40, "train": 36, "val": 4}
    visuals = {split: {row.visual for row in sets[split].rows} for split in sets}
    assert not visuals["train"] & visuals["val"]  # held out are images with all their questions
    assert args.classes["answers"] == sorted(["no", next(iter(first.scores))])  # no zebra
    metrics = tv.main(argv)[0]["metrics"]
    assert list(metrics) == FIRST[data][3]
    for path in [*tmp_path.rglob("*train*.json"), *tmp_path.glob("train/*.json")]:
        path.unlink()
    argv += ["--eval", str(next(tmp_path.rglob("best.pt")))]
    assert tv.main(argv)[0]["metrics"] == metrics
    for visual in visuals["test"]:
        visual.unlink()
    assert tv.main([*argv, "--blind"])[0]["metrics"].keys() == metrics.keys()
    with pytest.raises(UserError, match=f"{tmp_path}.*(png|jpg|npz)"):
        tv.main(argv)


def test_sqa3d_without_test_files_is_tested_on_val(tmp_path):
    args = tv.parse_args(write(tmp_path, "sqa3d", ["train", "val"]))
    assert {row.visual.parent.name for row in tv.load_data(args)["test"].rows} == {"val"}


VAL = "v2_OpenEnded_mscoco_val2014_questions.json"
MISTAKES = [  # in which file, what is replaced by what, and what is said
    ("easyvqa", "test/questions.json", '["Is it red?", "Yes", 0]', '["Yes", 0]', "unpack"),
    ("easyvqa", "train/questions.json", '"Is it red?"', "5", "int"),
    ("vqav2", "v2_mscoco_train2014_annotations.json", '"question_id": 7,', "", "question_id"),
    ("vqav2", VAL, '"image_id": 3', '"image_ids": 3', "image_id"),
    ("sqa3d", "v1_balanced_questions_test_scannetv2.json", "situation", "x", "situation"),
]


@pytest.mark.parametrize(("data", "file", "old", "new", "message"), MISTAKES)
def test_mistakes_in_files_are_named(data, file, old, new, message, tmp_path):
    argv = write(tmp_path, data, SPLITS[data])
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=f"{tmp_path}.*{message}"):
        tv.main(argv)
    assert not (tmp_path / "runs").exists()


def test_broken_scenes_images_and_settings_are_named(tmp_path):
    args = arguments("sqa3d")
    for points in (np.ones((9, 2)), np.ones((0, 3)), np.full((9, 3), np.nan), np.ones(9)):
        np.savez(tmp_path / "a.npz", points=points)
        with pytest.raises(UserError, match="a.npz.*not finite"):
            tv.look(args, tmp_path / "a.npz")
    for name in ("a.npz", "a.png"):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(UserError, match=name):
            tv.look(args if name == "a.npz" else arguments("vqav2"), tmp_path / name)
    for argv in (["--points", "31"], ["--vision", "x", "--data", "toy3d"]):
        with pytest.raises(UserError, match="--vision is for images.*at least 32"):
            tv.parse_args(argv)


def test_groups_are_the_nearest_points_whatever_the_scale_of_a_scene(tmp_path):
    points = np.random.default_rng(0).normal(size=(400, 3))
    np.savez(tmp_path / "a.npz", points=40 * points + 7)
    groups = tv.look(arguments("sqa3d", "--points", 400), tmp_path / "a.npz")
    places = torch.tensor(points - points.mean(0)).float()
    places /= places.norm(dim=1).max()
    assert groups.shape == (25, 32, 9) and not groups[..., 3:6].any()  # without colours: black
    for group in groups:
        distance = (places - group[0, 6:]).norm(dim=1).sort().values[:32]
        assert distance[0] < 1e-5  # centres are points of the scene
        offsets = group[:, :3].norm(dim=1).sort().values
        assert torch.allclose(offsets / offsets[-1], distance / distance[-1], atol=1e-3)


# ---------------------------------------------------------------- text, encoders, fusion
def test_texts_become_tokens():
    ids = tv.tokenise(["What is it?", "", "IS red " * 9], ["?", "is", "red"], None, 6)
    assert ids.tolist() == [[0, 1, 3, 1, 2, -1], [0] + [-1] * 5, [0, 3, 4, 3, 4, 3]]


@torch.no_grad()
def test_clip_without_its_last_layer_and_roberta(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = sizes | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 16}
    text = sizes | {"num_hidden_layers": 1, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text)
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", "?", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = {token: i for i, token in enumerate(marks)}
    transformers.RobertaTokenizer(vocab=tokens, merges=[]).save_pretrained(tmp_path / "roberta")
    config = {"num_hidden_layers": 2, "vocab_size": len(tokens), "type_vocab_size": 1}
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**sizes, **config)).eval()
    roberta.save_pretrained(tmp_path / "roberta")

    flags = ["--vision", tmp_path / "clip", "--text", tmp_path / "roberta", "--proj-lr", 10]
    args = arguments("vqav2", *flags)
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

    names = {p: name for name, p in model.named_parameters()}
    rates = {}  # METER's, and for the projections the paper's ten times the image encoder's
    for group in tv.param_groups(args, model):
        for p in group["params"]:
            part = "encoder" if ".encoder." in names[p] else names[p].split(".")[0]
            rates.setdefault(part, set()).add(group["lr_scale"])
    new = ("image_encoder", "text_encoder", "fusion", "image_pooler", "text_pooler")
    assert rates == dict.fromkeys(new, {5.0}) | {"encoder": {1.0}, "head": {50.0}, "llm": {10.0}}
    with pytest.raises(UserError, match="it is a roberta, only clip"):
        tv.build_model(arguments("vqav2", "--vision", tmp_path / "roberta"), "none", 0)


@torch.no_grad()
def test_the_fusion_is_meters_formula():
    fusion = tv.Fusion(16, 1, 2, 0.0).eval()
    image, text = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    streams = [(image, text, None, ~mask), (text, image, ~mask, None)]
    layers = [fusion.image_layers[0], fusion.text_layers[0]]
    outputs = fusion(image, text, mask)
    for layer, (x, y, own, other), output in zip(layers, streams, outputs, strict=True):
        x = layer.norm1(x + layer.self_attn(x, x, x, key_padding_mask=own)[0])
        x = layer.norm2(x + layer.multihead_attn(x, y, y, key_padding_mask=other)[0])
        x = layer.norm3(x + layer.linear2(nn.functional.gelu(layer.linear1(x))))
        assert torch.allclose(output, x, atol=1e-5)


# ---------------------------------------------------------------- metrics
def measure(data, scores, kinds, logits, answers):
    """What evaluate gives for a model with these logits: a question's only token is its number."""
    args = arguments(data, "--blind", answers=answers)
    rows = [tv.Question(0, "", s, kind) for s, kind in zip(scores, kinds, strict=True)]
    questions = tv.Questions(args, rows)
    questions.ids = torch.arange(len(rows))[:, None]
    model = nn.Module()
    model.forward = lambda x, ids: torch.tensor(logits)[ids[:, 0]]
    return tv.evaluate(args, model, questions)


def test_metrics_worked_by_hand():
    scores = [{"yes": 1.0, "no": 0.3}, {"no": 0.6}, {"zebra": 1.0}, {"red": 0.9, "zebra": 0.3}]
    logits = [[2.0, 0, 1], [1, -1, 0], [2, 1, 3], [2, 3, 1]]  # no no yes red
    kinds = ["yes/no", "yes/no", "other", "number"]
    acc = measure("vqav2", scores, kinds, logits, ["no", "red", "yes"])
    parts = {"acc_number": 90.0, "acc_other": 0.0, "acc_yes/no": 45.0}
    assert acc == pytest.approx({"acc": 45.0} | parts)
    many = [str(i) for i in range(12)]  # 11 is the best answer, 2 the tenth
    scores = [{"11": 1.0}, {"2": 1.0, "0": 1.0}, {"1": 1.0}, {"zebra": 1.0}]
    em = measure("toy3d", scores, ["Is", "Is", "What", "Is"], 4 * [list(range(12))], many)
    assert em == pytest.approx({"em1": 25.0, "em10": 50.0, "em1_Is": 100 / 3, "em1_What": 0.0})


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="no LLMBLOCK_DATA")
def test_real_files_are_read():
    args = tv.parse_args([*ONE, "sqa3d", "--root", str(DATA / "vqa3d/sqa3d")])
    rows = tv.read_split(args, "test")
    kinds = [row.kind for row in rows]
    counts = {"What": 1147, "Is": 652, "How": 465, "Can": 338, "Which": 351, "Others": 566}
    assert {kind: kinds.count(kind) for kind in counts} == counts
    assert tv.tokenise([row.text for row in rows], [], None, 10**6).shape[1] <= args.longest
    roots = {"easyvqa": "vqa/easy_vqa", "vqav2": "vqa/daquar_vqav2", "sqa3d": "vqa3d/dales_scenes"}
    for data, root in roots.items():
        args = tv.parse_args([*ONE, data, "--root", str(DATA / root), "--limit", "8"])
        x, ids, scores = next(iter(tv.batches(args, tv.load_data(args)["test"])))
        assert x.float().std() > 0 and len(ids) == len(x) == 8 and scores.sum() > 0
