"""train_vqa.py: answers, questions, scenes, missing files, padding, metrics. CPU, offline.

python -m pytest tests/test_vqa.py -q           # LLMBLOCK_DATA=DIR adds DIR/vqa and DIR/vqa3d
"""

import functools
import json
import math
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_vqa as tv  # noqa: E402
from llmblock import UserError  # noqa: E402

SMALL = "--workers 0 --device cpu --precision fp32".split()
DATA = Path(os.environ.get("LLMBLOCK_DATA", "/nowhere"))
SPLITS = {"easyvqa": ("train", "test"), "vqav2": ("train2014", "val2014"),
          "scanqa": ("train", "val"), "sqa3d": ("train", "val", "test")}  # fmt: skip
WORDS, ANSWERS = "? color is it red the what".split(), ["yes", "no", "red"]
META = {"words": WORDS, "answers": ANSWERS}
needs_data = pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="no LLMBLOCK_DATA")
tv.draw_toy, tv.draw_toy3d = map(functools.cache, (tv.draw_toy, tv.draw_toy3d))  # drawn once
torch.set_num_threads(1)


def arguments(*argv):
    return tv.parse_args([*SMALL, *map(str, argv)])


def model_of(args, kind="pretrained"):
    return tv.build_model(args, kind, 0, META).eval()


@torch.no_grad()
def answer(model, x, texts, args, longest=50):
    return model(x, tv.tokenise(texts, WORDS, longest, args)[0])


# ---------------------------------------------------------------- answers


NORMAL = {
    "Yes": "yes", " The  red  CAR": "red car", "an apple on a table": "apple on table",
    "theatre": "theatre", "two": "2", "ten dogs": "10 dogs", "None": "0", "zero.": "0", "": "",
    "eleven": "eleven", "someone": "someone", "1,000": "1000", "red,blue": "red blue",
    "red, blue": "red blue", "3.14": "3.14", ".5": ".5", "5.": "5", "u.s.a.": "usa", "the": "",
    "t-shirt": "t shirt", "why?!": "why", "(a) b": "b", "black/white": "black white",
    "1:30": "1:30", "don't": "dont", "dont": "dont", "Don’t": "dont",
}  # fmt: skip


def test_answers_are_normalised_as_vqa_does():
    assert {said: tv.normalise_answer(said) for said in NORMAL} == NORMAL


def test_soft_scores_are_the_means_over_the_one_left_out():
    ten = ["a dog"] * 4 + ["Cat"] * 3 + ["2", "two", "cow"]
    assert tv.soft_scores(ten) == {"dog": 1.0, "cat": 0.9, "2": 0.6, "cow": 0.3}
    for answers in (ten, ["x"] * 10, list("aaabbbcccd"), list("abbccc"), ["yes"]):
        plain = [tv.normalise_answer(a) for a in answers]
        for a, score in tv.soft_scores(answers).items():
            others = [plain[:i] + plain[i + 1 :] for i in range(len(plain))]
            mean = sum(min(1, rest.count(a) / 3) for rest in others) / len(plain)
            assert score == pytest.approx(mean, abs=1e-6)


def test_the_vocabulary_is_ordered_by_count_and_then_by_alphabet():
    told = [("Is it red?", "no"), ("is IT big?", "no"), ("Red", "b"), ("x", "b"), ("", "a")]
    rows = [("image", text, {a: 1.0}, "other", [a]) for text, a in told]
    for least, answers in ((1, ["b", "no", "a"]), (2, ["b", "no"])):
        found = tv.find_vocabulary(rows, arguments("--min-count", least))
        assert found == {"words": ["?", "is", "it", "red"], "answers": answers}  # big, x: once
    assert tv.find_vocabulary(rows[::-1], arguments("--min-count", 2)) == found
    with pytest.raises(UserError, match="no answer is given 3 times"):
        tv.find_vocabulary(rows, arguments("--min-count", 3))


# ---------------------------------------------------------------- questions in files


def contents(data, split, rows):
    """{name: content} of the files with these questions (image or scene, text, answers)."""
    if data == "easyvqa":
        return {f"{split}/questions.json": [[text, told[0], i] for i, text, told in rows]}
    if data == "scanqa":
        rows = [{"scene_id": i, "question": text, "answers": told} for i, text, told in rows]
        return {f"ScanQA_v1.0_{split}.json": rows}
    asked, answers = [], []
    for n, (i, text, told) in enumerate(rows):
        asked.append({"question_id": n, "image_id": i, "scene_id": i, "question": text})
        asked[-1]["situation"] = "I sit."
        answers.append({"question_id": n, "answers": [{"answer": a} for a in told]})
        answers[-1] |= {"multiple_choice_answer": told[0], "answer_type": "other"}
    a, b = f"v2_OpenEnded_mscoco_{split}_questions", f"v2_mscoco_{split}_annotations"
    if data == "sqa3d":
        a, b = (f"v1_balanced_{x}_{split}_scannetv2" for x in ("questions", "sqa_annotations"))
    return {f"{a}.json": {"questions": asked}, f"{b}.json": {"annotations": answers[::-1]}}


def write(root, files):
    """Write images, arrays, texts, or what becomes JSON; and return {name: path}."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            np.savez(path, points=content)
        elif path.suffix == ".json":
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        else:
            Image.fromarray(content).save(path)
    return {name: root / name for name in files}


def files_of(data, n):
    """Two questions about each of n images or scenes in each split."""
    rng, files = np.random.default_rng(0), {}
    asked = ("Is it red?", ["yes"]), ("Is it big?", ["no"])
    for split in SPLITS[data]:
        names = [f"{split}{i:03}_00" for i in range(n)] if data in tv.DATA_3D else range(n)
        files |= contents(data, split, [(i, *x) for i in names for x in asked])
        for i in names:
            if data in tv.DATA_3D:
                files[f"scans/{i}.npz"] = rng.normal(size=(300, 3))
            else:
                path = f"images/{i}.png" if data == "easyvqa" else f"COCO_{split}_{i:012}.jpg"
                files[f"{split}/{path}"] = rng.integers(256, size=(12, 12, 3)).astype("u1")
    return files


def prepare(root, data, files):
    """Write the files, and return the flags with which they are used."""
    write(root, files)
    size = ["--points", "256"] if data in tv.DATA_3D else ["--size", "12"]
    paths = ["--root", str(root), "--out", str(root / "runs")]
    more = "--epochs 1 --batch-size 16 --min-count 1 --data".split()
    return [*SMALL, *size, *paths, *more, data]


TOLD = ["The Cat", "cat", "two"]
READ = {  # of what is asked about image or scene 7
    "easyvqa": ("train/images/7.png", "Why?", {"cat": 1.0}, "other", ["cat"]),
    "vqav2": ("COCO_train_000000000007.jpg", "Why?", {"cat": 4 / 9, "2": 2 / 9}, "other", ["cat"]),
    "scanqa": ("s7", "Why?", {"cat": 1.0, "2": 1.0}, "Others", ["cat", "2"]),
    "sqa3d": ("s7", "I sit. Why?", {"cat": 1.0, "2": 1.0}, "Others", ["cat", "2"]),
}


@pytest.mark.parametrize("data", READ)
def test_questions_are_read_from_every_format(data, tmp_path):
    i = 7 if data in tv.DATA_2D else "s7"
    files = write(tmp_path, contents(data, "train", [(i, "Why?", TOLD), (i, "", ["12"])]))
    first, second = tv.read_questions(data, files, "train")
    assert first[:2] + first[3:] == READ[data][:2] + READ[data][3:]
    assert first[2] == pytest.approx(READ[data][2], abs=1e-6)
    kind = {"easyvqa": "number", "vqav2": "other"}.get(data, "Others")
    assert second[1].strip() in ("", "I sit.") and second[3:] == (kind, ["12"])


def test_questions_have_types():
    assert [tv.answer_type(a) for a in ("no", "3", "nobody")] == ["yes/no", "number", "other"]
    asked = ["what's on it?", " Is it?", "HOW", "can I", "Which one", "Does it?", "There is", ""]
    kinds = ["What", "Is", "How", "Can", "Which", "Others", "Others", "Others"]
    assert [tv.question_type(question) for question in asked] == kinds  # as SQA3D's prefixes


@pytest.mark.parametrize("data", SPLITS)
def test_validation_shares_no_image_with_train(data, tmp_path):
    argv, visuals = prepare(tmp_path, data, files_of(data, 20)), []
    for _ in range(2):
        d = tv.load_data(tv.parse_args(argv))
        splits = {"train": d["train"], "val": d["val"][0], "test": d["test"][0]}
        which = {k: Counter(q.which.tolist()) for k, q in splits.items()}
        assert all(set(c.values()) == {2} for c in which.values())  # with all their questions
        assert len(which["train"] | which["val"] | which["test"]) == sum(map(len, which.values()))
        own = data == "sqa3d" and not visuals
        assert [*map(len, which.values())] == ([20, 20, 20] if own else [18, 2, 20])
        visuals.append(splits["test"].visuals[splits["test"].which].unique(dim=0))
        if data == "sqa3d":  # and without its own test its val is the test
            for path in tmp_path.glob("*_test_scannetv2.json"):
                path.unlink()
    assert torch.equal(*visuals) == (data != "sqa3d")


GONE = object()
MISTAKES = [  # in which file of a data set and where, what is there instead, and what is said of it
    ("easyvqa", 0, [], GONE, "there is no train/questions.json"), ("easyvqa", 0, [], "[1", "JSON"),
    ("easyvqa", 0, [], 5, ""), ("easyvqa", 0, [], [], ""), ("easyvqa", 0, [], {}, ""),
    ("easyvqa", 0, [], [[]], ""), ("easyvqa", 0, [0, 2], GONE, ""), ("easyvqa", 0, [0, 1], 5, ""),
    ("easyvqa", 0, [0, 0], None, ""), ("easyvqa", 0, [0, 1], ["yes"], ""),
    ("vqav2", 0, ["questions"], GONE, "questions"), ("vqav2", 1, ["annotations"], {}, ""),
    ("vqav2", 0, ["questions", 0, "image_id"], GONE, "image_id"),
    ("vqav2", 0, ["questions", 0, "image_id"], None, ""),
    ("vqav2", 0, ["questions", 0, "question"], 5, ""),
    ("vqav2", 0, ["questions", 0, "question_id"], 999, "999"),
    ("vqav2", 1, ["annotations", 0, "answers"], GONE, "answers"),
    ("vqav2", 1, ["annotations", 0, "answers"], ["no"], ""),
    ("vqav2", 1, ["annotations", 0, "answer_type"], GONE, "answer_type"),
    ("sqa3d", 0, [], [], ""), ("sqa3d", 0, ["questions", 0, "situation"], GONE, "situation"),
    ("sqa3d", 0, ["questions", 0, "scene_id"], 5, ""),
    ("sqa3d", 1, ["annotations", 0, "answers"], [{"answer": None}], ""),
    ("scanqa", 0, [], None, ""), ("scanqa", 0, [], {"questions": []}, ""),
    ("scanqa", 0, [0, "scene_id"], GONE, "scene_id"), ("scanqa", 0, [0, "scene_id"], ["x"], ""),
    ("scanqa", 0, [0, "question"], GONE, "question"), ("scanqa", 0, [0, "question"], ["x"], ""),
    ("scanqa", 0, [0, "answers"], "yes", ""), ("scanqa", 0, [0, "answers"], [5], ""),
]  # fmt: skip


@pytest.mark.parametrize(("data", "n", "where", "what", "found"), MISTAKES)
def test_a_mistake_in_the_questions_is_named(data, n, where, what, found, tmp_path):
    files = files_of(data, 10)
    *path, last = [[name for name in files if name.endswith(".json")][n], *where]
    place = functools.reduce(lambda x, key: x[key], path, files)
    place.pop(last) if what is GONE else place.__setitem__(last, what)
    with pytest.raises(UserError) as caught:
        tv.main(prepare(tmp_path, data, files))
    assert str(caught.value).startswith(str(tmp_path)) and found in str(caught.value)
    assert not [p for p in tmp_path.glob("runs/**/*") if p.is_file()]


@pytest.mark.parametrize("data", SPLITS)
def test_no_questions_at_all_are_a_mistake(data, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        tv.main(prepare(tmp_path, data, files_of(data, 0)))


def test_odd_questions_are_answered(tmp_path):
    files = files_of("easyvqa", 20)
    for i, text in enumerate(["", "zebra " * 200, "?!", "Ça va"]):
        files["test/questions.json"][i][0] = text
    args = tv.parse_args(prepare(tmp_path, "easyvqa", files))
    data = tv.load_data(args)
    assert data["sizes"].endswith("; 1 texts are cut") and data["test"][0].ids.shape == (40, 50)
    metrics = tv.evaluate(tv.build_model(args, "pretrained", 0, data["meta"]), data["test"], args)
    assert list(metrics) == ["acc", "acc_yes/no"] and math.isfinite(metrics["acc"])


# ---------------------------------------------------------------- images and scenes


CLOUD = np.random.default_rng(0).normal(size=(256, 3)).astype("f4")
COLOUR = np.random.default_rng(1).integers(256, size=(256, 3)).astype("u1")
NUMBER = np.arange(256) % 3
PLY = {"f4": "float", "f8": "double", "u1": "uchar", "i2": "short", "u4": "uint32"}


def ply(form="ascii", faces=True, **columns):
    """The bytes of a .ply file with these properties {name: (type, values)}."""
    n, order = len(columns["x"][1]), ">" if "big" in form else "<"
    text = f"ply\nformat {form} 1.0\ncomment made by hand\nelement vertex {n}\n"
    text += "".join(f"property {PLY[kind]} {name}\n" for name, (kind, _) in columns.items())
    text += "element face 1\nproperty list uchar int vertex_indices\n" * faces + "end_header\n"
    table = np.zeros(n, [(name, order + kind) for name, (kind, _) in columns.items()])
    for name, (_, values) in columns.items():
        table[name] = values
    if form != "ascii":
        return text.encode() + table.tobytes() + (b"\3" + bytes(12)) * faces
    rows = [" ".join(map(str, row)) for row in table.tolist()] + ["3 0 1 2"] * faces
    return (text + "\n".join(rows)).encode()


PLACES = {name: ("f4", CLOUD[:, i]) for i, name in enumerate("xyz")}
FULL = {**PLACES, "nx": ("f8", CLOUD[:, 0] / 3), "red": ("u1", COLOUR[:, 0]),
        "green": ("u1", COLOUR[:, 1]), "blue": ("u1", COLOUR[:, 2]), "alpha": ("u1", 255),
        "instance": ("i2", NUMBER), "label": ("u4", 2**32 - 1)}  # fmt: skip
FORMS = ["ascii", "binary_little_endian", "binary_big_endian"]


def ordered(x):  # by colour
    return x[np.lexsort((255 * x[:, 3:6]).round().T.numpy())]


def points_of(path, n=256):
    return tv.read_points(path, (n, 7))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("faces", [True, False])
def test_vertices_of_a_ply_file(form, faces, tmp_path):
    path = tmp_path / "a.ply"
    path.write_bytes(ply(form, faces, **FULL))
    found = tv.read_ply(path)
    assert [*found] == [*FULL]
    assert all(np.allclose(found[k], v, 0, 1e-6) for k, (_, v) in FULL.items())
    path.write_bytes(ply(form, faces, **PLACES))
    assert not points_of(path)[:, 3:].any()  # black, of no object


def test_a_scene_is_the_same_in_every_format(tmp_path):
    same = {"a.ply": ply(FORMS[1], **FULL), "b.ply": ply(**FULL)}
    for name, content in same.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "c.npz", points=CLOUD, colors=COLOUR, instance=NUMBER)
    six = np.concatenate([CLOUD, COLOUR / 255], axis=1)  # colours from 0 to 1
    np.savez_compressed(tmp_path / "d.npz", points=six, instance=NUMBER)
    np.save(tmp_path / "e.npy", np.concatenate([six, NUMBER[:, None]], axis=1))
    first, *others = (ordered(points_of(tmp_path / f)) for f in [*same, "c.npz", "d.npz", "e.npy"])
    centred = CLOUD - CLOUD.mean(0)
    expected = np.c_[centred / np.linalg.norm(centred, axis=1).max(), COLOUR / 255, NUMBER]
    assert torch.allclose(first, ordered(torch.tensor(expected).float()), atol=1e-5)
    assert len(others) == 4 and all(torch.allclose(x, first, atol=1e-5) for x in others)
    again = points_of(tmp_path / "c.npz", 600)  # more than there are
    assert torch.equal(again[:256], again[256:512]) and torch.equal(again[512:], again[:88])
    few = points_of(tmp_path / "c.npz", 200)
    assert len(few.unique(dim=0)) == 200 and torch.equal(few, points_of(tmp_path / "c.npz", 200))


BROKEN = {  # the bytes or the arrays of a file
    "empty.ply": b"", "text.ply": "Hügel".encode(), "head.ply": ply(**PLACES)[:70],
    "ascii.ply": ply(faces=False, **PLACES)[:-3000], "none.ply": ply(x=("f4", []), y=("f4", [])),
    "little.ply": ply(FORMS[1], **PLACES)[:-100], "big.ply": ply(FORMS[2], **PLACES)[:-100],
    "list.ply": ply(**PLACES).replace(b"property float y", b"property list uchar int y"),
    "faces.ply": ply(**PLACES).replace(b"element vertex", b"element edge"),
    "type.ply": ply(FORMS[1], **PLACES).replace(b"float z", b"half z"),
    "form.ply": ply(**PLACES).replace(b"ascii", b"utf-8"), "flat.ply": ply(x=FULL["x"]),
    "formless.ply": ply(**PLACES).replace(b"format ascii 1.0\n", b""),
    "nan.npz": {"points": np.where(CLOUD < 2, CLOUD, np.nan)}, "no.npz": {"places": CLOUD},
    "zero.npz": {"points": CLOUD[:0]}, "two.npz": {"points": CLOUD[:, :2]}, "text.npz": b"points",
    "short.npz": {"points": CLOUD, "colors": COLOUR[:9]}, "four.npz": {"points": np.ones((9, 4))},
    "objects.npz": {"points": CLOUD, "instance": NUMBER[:9]}, "damaged.npz": {"points": CLOUD},
    "inf.npz": {"points": CLOUD, "colors": np.full((256, 3), np.inf)}, "void.npy": b"\x93NUMPY",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_scene_is_named(name, tmp_path, capsys):
    path, content = tmp_path / name, BROKEN[name]
    if isinstance(content, dict):
        np.savez_compressed(path, **content)
        content = path.read_bytes()
    if name == "damaged.npz":
        content = content[:200] + b"\xff" * 30 + content[230:]
    path.write_bytes(content)
    x, good = tv.decode_some(tv.read_points, (256, 7), torch.float32, [path])
    assert not good.any() and not x.any() and x.shape == (1, 256, 7)
    assert capsys.readouterr().err.startswith(f"skipped {path}: ")


def test_files_are_read_once(tmp_path):
    paths, calls = [tmp_path / f"{i}.png" for i in range(3)], []
    for i, path in enumerate(paths):
        Image.new("RGB", (5, 4), (i, 50, 90)).save(path)

    def decode(path, shape):
        calls.append(path)
        return tv.read_image(path, shape)

    args, shape = arguments("--out", tmp_path / "runs"), (3, 2, 2)

    def read():
        x, good = tv.decode_once(paths, decode, shape, torch.uint8, args)
        assert x[..., 0, 0].tolist() == [[i, 50, 90] for i in range(3)] and all(good)
        return len(calls)

    assert read() == 3 and read() == 3
    content, time = paths[1].read_bytes(), paths[1].stat().st_mtime_ns
    for more, later, calls_now in ((b"", 10**9, 6), (b" ", 0, 9)):
        paths[1].write_bytes(content + more)
        os.utime(paths[1], ns=(time, time + later))
        assert read() == calls_now == read()
    args.out, shape = str(tmp_path / "other"), (3, 3, 3)
    assert read() == 12 and not list(tmp_path.rglob(f"*.{os.getpid()}"))


def test_two_images_of_one_name_are_a_mistake(tmp_path):
    argv = prepare(tmp_path, "vqav2", files_of("vqav2", 20))
    image = next(tmp_path.rglob("*.jpg"))
    (tmp_path / "thumbs").mkdir()
    shutil.copy(image, tmp_path / "thumbs")
    with pytest.raises(UserError, match=f"several files have the name {image.name}"):
        tv.load_data(tv.parse_args(argv))


def test_broken_and_missing_images_are_named(tmp_path, capsys):
    argv = prepare(tmp_path, "easyvqa", files_of("easyvqa", 100))
    images, args = tmp_path / "test/images", tv.parse_args(argv)
    whole = tv.load_data(args)
    for hurt in (lambda path: path.write_bytes(path.read_bytes()[:60]), Path.unlink):
        hurt(images / "7.png")
        data, said = tv.load_data(args), capsys.readouterr().err
        assert f"skipped {images}/7.png: " in said or f"{tmp_path}/test/images/7.png: " in said
        assert [len(data["train"]), len(data["test"][0])] == [len(whole["train"]), 198]
        assert "; 199 images" in data["sizes"]
    for lost, count, first in ("89", "3 of 200", "7.png"), ("12", "5 of 200", "1.png"):
        for i in lost:
            (images / f"{i}.png").unlink()
        with pytest.raises(UserError) as caught:
            tv.main(argv)
        text = str(caught.value)
        assert text.startswith(f"{tmp_path}: {count}") and text.endswith(f"test/images/{first}")
    assert not list(tmp_path.rglob("*.pt"))


# ---------------------------------------------------------------- text and the model


def test_texts_become_tokens():
    args, long = arguments(), " ".join(["red"] * 200)
    ids, cut = tv.tokenise(["What is it?", "", "is blue", long], ["?", "is", "red"], 6, args)
    assert ids.tolist() == [[0, 1, 3, 1, 2, -1], [0] + [-1] * 5, [0, 3, 1, -1, -1, -1],
                            [0, 4, 4, 4, 4, 4]] and cut == 1  # fmt: skip
    assert tv.tokenise(["", "red"], ["red"], 6, args)[0].tolist() == [[0, -1], [0, 2]]
    assert tv.longest(arguments()) == 50 and tv.longest(arguments("--data", "toy3d")) == 100


@pytest.mark.parametrize("kind", ["none", "pretrained"])
@pytest.mark.parametrize("data", ["toy2d", "toy3d"])
def test_padding_never_changes_an_answer(data, kind):
    args = arguments("--data", data)
    x = tv.draw_toy(2, 0, 36)[0] if data == "toy2d" else tv.draw_toy3d(2, 0, 256)[0]
    model, texts = model_of(args, kind), ["Is it red?", "the color " * 15]
    short, long = (answer(model, x[i : i + 1], [texts[i]], args) for i in range(2))
    both = answer(model, x, texts, args)
    assert torch.allclose(both, torch.cat([short, long]), atol=1e-5)
    for other in ("Is it?", "is it red red?", "Is red it?", "it red?"):
        assert not torch.allclose(answer(model, x[:1], [other], args), short, atol=1e-4)
    assert not torch.allclose(answer(model, x[1:], texts[:1], args), short, atol=1e-4)


def test_order_and_padding_of_answers_do_not_change_targets():
    told = [{"no": 0.3, "zebra": 0.9, "red": 0.6}, {"yes": 1.0}, {}, {"red": 0.6, "no": 0.3}]
    rows = [("image", "", scores, "other", []) for scores in told]
    ids = torch.arange(4)[:, None]
    questions = tv.Questions(rows, torch.zeros(1, 3, 12, 12), [0] * 4, ids, ANSWERS, ["other"])
    _, _, targets = questions.batch(torch.tensor([3, 2, 1, 0]), arguments())
    expected = [[0, 0.3, 0.6], [0, 0, 0], [1, 0, 0], [0, 0.3, 0.6]]
    assert torch.allclose(targets, torch.tensor(expected))


def test_groups_are_objects_and_absent_ones_never_change_an_answer(monkeypatch):
    args, group = arguments("--data", "toy3d", "--objects"), tv.group_objects
    x = tv.draw_toy3d(3, 1, 256)[0].clone()
    x[0, x[0, :, 6] == 2, 6] = 9
    x[1, x[1, :, 6] == 2, 6] = -1  # of no object at all
    x[2, :40, 6] = 0
    centres, groups, real = group(x, 16, 32)
    present = [[1, 3, 4, 9], [1, 3, 4], [0, 1, 2, 3, 4]]
    for i, j in real.nonzero().tolist():
        mine = x[i, x[i, :, 6] == j]
        seen = groups[i, j].clone()
        seen[:, :3] += centres[i, j]
        assert ((seen[:, None] - mine).norm(dim=-1).amin(1) < 1e-5).all()
        assert (groups[i, j, :, :3].mean(0)).abs().max() < 1e-6
    assert [m.nonzero()[:, 0].tolist() for m in real] == present

    model, logits = model_of(args), []
    for absent, value in ((True, 0.0), (True, 99.0), (False, 99.0)):

        def garbage(x, G, K, absent=absent, value=value):
            centres, groups, real = group(x, G, K)
            where = ~real if absent else real & (torch.arange(G) == 1)
            centres[where], groups[where] = value, value
            return centres, groups, real

        monkeypatch.setattr(tv, "group_objects", garbage)
        logits.append(answer(model, x, ["Is it red?"] * 3, args))
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


@pytest.mark.parametrize("argv", [[], ["--objects"]])
def test_the_order_of_points_does_not_matter(argv):
    args, g = arguments("--data", "toy3d", *argv), torch.Generator().manual_seed(0)
    x = torch.randn(4, 256, 7, generator=g)
    x[..., 6] = torch.arange(256) // 32 + 1  # as many as are in a group
    mixed = x[:, torch.randperm(256, generator=g)]
    one, two = (answer(model_of(args), y, ["Is it red?"] * 4, args) for y in (x, mixed))
    assert (one - two).abs().max() < 1e-4 < 1e-2 < (one[0] - one[1]).abs().max()


def test_scenes_are_turned_about_the_vertical_by_up_to_five_degrees():
    args = arguments("--data", "toy3d", "--limit", 64)
    data, turns = tv.load_data(args), []
    q = data["train"]
    original = {x[:, 2:].numpy().tobytes(): x for x in q.visuals[q.which]}  # the rest stays
    for x, _, _ in tv.train_batches(data, args, torch.Generator().manual_seed(0)):
        for scene in x:
            pair = original[scene[:, 2:].numpy().tobytes()], scene
            a, b = (torch.complex(y[:, 0], y[:, 1]) for y in pair)
            turn = (b * a.conj()).sum()
            assert torch.allclose(b, a * turn / turn.abs(), atol=1e-5)
            turns.append(math.degrees(turn.angle()))
    assert len(turns) == 64 and -5.01 < min(turns) < -4 < 4 < max(turns) < 5.01


@pytest.mark.parametrize("data", ["toy2d", "toy3d"])
def test_the_blind_do_not_see(data):
    args = arguments("--data", data, "--size", 12, "--limit", 64)
    data = tv.load_data(args)
    model, questions, seen = tv.build_model(args, "none", 0, data["meta"]), data["test"][0], []
    for args.blind in (False, True):
        for _ in range(2):
            questions.visuals = questions.visuals.flip(0)
            metrics = tv.evaluate(model, [questions], args)
            x, ids, _ = questions.batch(torch.arange(64), args)
            seen.append((model(x, ids), metrics))
    assert not torch.allclose(seen[0][0], seen[1][0], atol=1e-4)
    assert torch.equal(seen[2][0], seen[3][0]) and seen[2][1] == seen[3][1]


# ---------------------------------------------------------------- metrics


class Fixed(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x, ids):  # the only token is the number of the question
        return self.logits[ids[:, 0].long()]


def measure(data, told, kinds, logits, answers):
    args, n = arguments("--data", data, "--batch-size", 7), len(told)
    rows = [("visual", "", scores, kind, []) for scores, kind in zip(told, kinds, strict=True)]
    ids, visuals = torch.arange(n)[:, None], torch.zeros(1, 3, 12, 12)
    questions = tv.Questions(rows, visuals, [0] * n, ids, answers, sorted(set(kinds)))
    return tv.evaluate(Fixed(logits), [questions], args)


def test_metrics_worked_by_hand():
    told = [{"yes": 1.0, "no": 0.3}, {"no": 0.6}, {"zebra": 1.0}, {"red": 0.9, "zebra": 0.3}]
    logits = torch.tensor([[1.0, 2, 0], [0, 1, -1], [3, 2, 1], [1, 2, 3]])  # no no yes red
    kinds = ["yes/no", "yes/no", "other", "other"]
    acc = measure("toy2d", told, kinds, logits, ANSWERS)
    assert acc == {"acc": 45.0, "acc_other": 45.0, "acc_yes/no": 45.0}
    told = [{"yes": 1.0}, {"no": 1.0, "red": 1.0}, {"zebra": 1.0}, {}]  # no no yes red
    em = measure("toy3d", told, ["Is", "Is", "What", "Is"], logits, ANSWERS)
    assert em == {"em1": 25.0, "em10": 50.0, "em1_Is": 33.333, "em1_What": 0.0}


@pytest.mark.parametrize("C", [7, 40])
@pytest.mark.parametrize("data", ["toy2d", "toy3d"])
def test_metrics_equal_a_loop_over_questions(data, C):
    rng, sums, n = np.random.default_rng(C), defaultdict(list), 60
    answers, logits = [f"a{i}" for i in range(C)], torch.tensor(rng.normal(size=(n, C))).float()
    told, kinds = [], rng.choice(["x", "y", "z"], n).tolist()
    for kind, row in zip(kinds, logits.tolist(), strict=True):
        some = rng.choice(C + 5, 3, replace=False).tolist()  # five are not in the vocabulary
        told.append({f"a{i}": 1.0 if data == "toy3d" else rng.random() for i in some})
        best = sorted(answers, key=dict(zip(answers, row, strict=True)).get)[:-11:-1]
        scores = [told[-1].get(a, 0.0) for a in best]
        name = "em1" if data == "toy3d" else "acc"
        sums[name].append(scores[0])
        sums[f"{name}_{kind}"].append(scores[0])
        if data == "toy3d":
            sums["em10"].append(max(scores))
    metrics = measure(data, told, kinds, logits, answers)
    assert metrics == pytest.approx({k: 100 * np.mean(v) for k, v in sums.items()}, abs=1e-3)
    assert next(iter(metrics)) == name and metrics[name] > 0


# ---------------------------------------------------------------- the toys


@pytest.mark.parametrize("data", ["toy2d", "toy3d"])
def test_a_toy_cannot_be_answered_blind(data):
    splits, _ = tv.find_toy(arguments("--data", data, "--size", 12))
    told = defaultdict(Counter)
    for _, text, _, _, [a] in splits["train"]:
        told[text][a] += 1
    right = [a in dict(told[text].most_common(1)) for _, text, _, _, [a] in splits["test"]]
    assert len(right) == 4000 and 0.2 < np.mean(right) < 0.45
    seen, asked = ({row[0] for row in splits[k]} for k in ("train", "test"))
    assert 4 * len(seen) == len(splits["train"]) and len(asked) == 1000 and not seen & asked


def reply(question, objects, side=None):
    """The answer from objects {shape: colour} and from a function of two names."""
    colours, word = Counter(objects.values()), r"(\w+)"
    if m := re.fullmatch(f"How many objects are {word}", question):
        return str(colours[m[1]])
    if m := re.fullmatch(f"What shape is the {word} object", question):
        [shape] = [s for s, c in objects.items() if c == m[1]]
        return shape
    if m := re.fullmatch(f"What color is the {word}", question):
        return objects[m[1]]
    if m := re.fullmatch(f"Is the {word} (left|right) of the {word}", question):
        return "yes" if side(m[1], m[3]) == m[2] else "no"
    m = re.fullmatch(f"Is the {word} {word}", question)
    return "yes" if objects[m[1]] == m[2] else "no"


def test_answers_about_drawn_images_are_right():
    images, questions = tv.draw_toy(60, 5, 180)
    tints = torch.tensor([*tv.COLOURS.values()])[:, :, None, None]
    areas = {"disc": 0.9 * math.pi, "square": 2.56, "triangle": 1.85**2 / 2, "cross": 2.04}
    found = []
    for image in images.int():
        near = ((image - tints).abs().amax(1) < 60).view(4, 3, 60, 3, 60)
        share = near.float().mean((2, 4)) / 0.16  # (colours, rows, columns), of a cell
        objects, columns = {}, {}
        for c, i, j in (share > 0.5).nonzero().tolist():
            gap, shape = min((abs(area - share[c, i, j]), shape) for shape, area in areas.items())
            assert gap < 0.1 and shape not in objects
            objects[shape], columns[shape] = [*tv.COLOURS][c], j
        found.append((objects, lambda a, b, x=columns: "left" if x[a] < x[b] else "right"))
    assert {len(objects) for objects, _ in found} == {2, 3, 4} and len(questions) == 240
    assert all(reply(text[:-1], *found[i]) == a for i, text, a in questions)
    assert {text.split()[0] for _, text, _ in questions} == {"How", "Is", "What"}


def test_answers_about_drawn_scenes_are_right():
    scenes, questions = tv.draw_toy3d(60, 5, 1024)
    sizes = {"ball": (0.1, 0.1), "box": (0.2, 0.2), "cone": (0.1, 0.2), "pole": (0.04, 0.4)}
    found = []
    for scene in scenes:
        objects, angles = {}, {}
        for n in range(1, 5):
            x = scene[scene[:, 6] == n]
            wide, _, high = ((x.amax(0) - x.amin(0))[:3] / 2).tolist()
            _, shape = min((math.dist(size, (wide, high)), s) for s, size in sizes.items())
            nearest = (torch.tensor([*tv.COLOURS.values()]) / 255 - x[0, 3:6]).norm(dim=1).argmin()
            objects[shape], middle = [*tv.COLOURS][nearest], (x.amax(0) + x.amin(0)) / 2
            angles[shape] = math.atan2(middle[1], middle[0])
        found.append((objects, angles))
    turns = {"on my left": 1, "behind me": 2, "on my right": 3}  # quarters, counterclockwise
    places = 0
    for i, text, a in questions:
        facing, question = re.fullmatch(r"I am facing the (\w+)\. (.+)\?", text).groups()
        objects, angles = found[i]
        if place := turns.get(question.removeprefix("What is ")):
            turn = {s: round((b - angles[facing]) / (math.pi / 2)) % 4 for s, b in angles.items()}
            assert turn[a] == place and len(set(turn.values())) == 4
            places += 1
        else:
            assert reply(question, objects) == a
    assert len(questions) == 240 and 40 < places < 160


# ---------------------------------------------------------------- pre-trained encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Directories of a tiny CLIP and a tiny RoBERTa with random weights."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    clip, roberta = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("roberta")
    torch.manual_seed(0)
    size = dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2)
    size |= {"hidden_size": 16, "intermediate_size": 32}
    eyes = size | {"image_size": 24, "patch_size": 12}
    config = t.CLIPConfig(text_config=size, vision_config=eyes)
    t.CLIPModel(config).save_pretrained(clip)
    t.CLIPImageProcessor().save_pretrained(clip)
    words = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    config = t.RobertaConfig(vocab_size=len(words), max_position_embeddings=60, **size)
    t.RobertaModel(config).save_pretrained(roberta)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token"), words, strict=False))
    t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(roberta)
    return ["--vision", str(clip), "--text", str(roberta)]


def test_pretrained_encoders_are_trained(encoders, tmp_path):
    argv = [*SMALL, *encoders, "--size", "12", "--limit", "64", "--epochs", "1"]
    [result] = tv.main([*argv, "--out", str(tmp_path)])
    assert math.isfinite(result["metrics"]["acc"])
    args = tv.parse_args(argv)
    data = tv.load_data(args)
    model = tv.build_model(args, "pretrained", 0, data["meta"])
    batch = next(tv.train_batches(data, args, torch.Generator()))
    tv.compute_loss(model, batch).backward()
    parameters = dict(model.named_parameters())
    assert [k for k, p in parameters.items() if p.grad is None] == []
    names, scales = {id(p): k for k, p in parameters.items()}, defaultdict(set)
    for group in tv.param_groups(model, args):
        for p in group["params"]:
            scales[group["lr_scale"]].add(re.sub(r"\..*", "", names[id(p)].replace(".e", "-e", 1)))
    assert scales[0.2] == {"vision-encoder", "text-encoder"} and scales[10.0] == {"head"}
    assert scales[2.0] == {"llm"} and {"seeing", "reading", "vision", "text"} < scales[1.0]
    assert {g["lr_scale"] for g in tv.param_groups(model, arguments())} == {1.0}


def test_padding_and_cutting_with_a_pretrained_text_encoder(encoders):
    args, texts = arguments(*encoders), ["Is it red?", "the color " * 15]
    ids, cut = tv.tokenise(["it is red red", "it zebra", ""], [], 5, args)
    assert ids.tolist() == [[0, 7, 6, 8, 2], [0, 7, 3, 2, -1], [0, 2, -1, -1, -1]] and cut == 1
    x = tv.draw_toy(2, 0, 36)[0]
    model = model_of(args)
    alone = torch.cat([answer(model, x[i : i + 1], [texts[i]], args) for i in range(2)])
    assert torch.allclose(answer(model, x, texts, args), alone, atol=1e-5)
    assert not torch.allclose(answer(model, x[:1], ["it is red?"], args), alone[:1], atol=1e-4)


@pytest.mark.parametrize("flag", ["--vision", "--text"])
def test_an_unknown_encoder_is_named(flag, tmp_path):
    with pytest.raises(UserError, match=f"finds no encoder {tmp_path}: "):
        tv.main([*SMALL, "--limit", "64", "--size", "12", "--out", str(tmp_path / "runs"), flag,
                 str(tmp_path)])  # fmt: skip
    assert not list(tmp_path.rglob("*.pt"))


# ---------------------------------------------------------------- real questions


KINDS = [  # SQA3D's are as published
    ("sqa3d", "test", 3519, 67, "Can 338 How 465 Is 652 Others 566 What 1147 Which 351"),
    ("scanqa", "val", 4675, 71, "How 276 Is 4 Others 1498 What 2874 Which 23"),
    ("scanqa", "test_w_obj", 4976, 70, "How 294 Is 16 Others 1399 What 3221 Which 46"),
]


@needs_data
@pytest.mark.parametrize(("data", "split", "n", "scenes", "kinds"), KINDS)
def test_real_questions_about_scannet(data, split, n, scenes, kinds):
    files = {p.name: p for p in (DATA / "vqa3d" / data).iterdir()}
    rows = tv.read_questions(data, files, split)
    assert len(rows) == n and len({row[0] for row in rows}) == scenes
    secret = split == "test_w_obj"
    assert all(bool(told) != secret and [*told] == answers for _, _, told, _, answers in rows)
    assert " ".join(f"{k} {n}" for k, n in sorted(Counter(r[3] for r in rows).items())) == kinds


REAL = [
    ("easyvqa", "vqa/easy_vqa --size 60", "acc acc_other acc_yes/no"),
    ("vqav2", "vqa/daquar_vqav2 --min-count 1", "acc acc_number acc_other"),
    ("scanqa", "vqa3d/dales_scenes", "em1 em10 em1_How em1_Is em1_What em1_Which"),
    ("sqa3d", "vqa3d/dales_scenes --objects", "em1 em10 em1_How em1_What"),
]


@needs_data
@pytest.mark.parametrize(("data", "argv", "metrics"), REAL)
def test_real_data_and_a_real_llama(data, argv, metrics, tmp_path, capsys):
    root, *argv = f"{argv} --limit 64 --epochs 1 --batch-size 32 --data {data}".split()
    paths = ["--root", DATA / root, "--llm", DATA / "lm/stories260K", "--out", tmp_path]
    [result] = tv.main([*SMALL, *argv, *map(str, paths)])
    assert " of 64 train, " in capsys.readouterr().out and result["params_frozen"] == 45_440
    assert list(result["metrics"]) == metrics.split()
    assert all(0 <= v <= 100 for v in result["metrics"].values())
    assert (tmp_path / f"vqa-{data}-micro/pretrained-s0/last.pt").exists()
