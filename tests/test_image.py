"""train_image.py: it learns, resumes, shards, tests and fails as it says. CPU, offline.

python -m pytest tests/test_image.py -q         # LLMBLOCK_DATA=DIR adds DIR/images/cifar10
"""

import json
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train_image  # noqa: E402
from llmblock import KINDS, UserError  # noqa: E402

SMALL = ["--limit", "192", "--epochs", "2", "--batch-size", "32", "--workers", "0"]
torch.set_num_threads(1)


def run(out, *argv):
    return train_image.main([*SMALL, "--out", str(out), *argv])


@pytest.fixture(scope="module")
def epoch(tmp_path_factory):
    run(out := tmp_path_factory.mktemp("epoch"), "--epochs", "1")
    return out


@pytest.fixture
def trained(epoch, tmp_path):
    """A directory of runs with an epoch of the toy, of each test's own."""
    return shutil.copytree(epoch, tmp_path, dirs_exist_ok=True)


def make_folder(root, split, classes=("cat", "dog"), n=20, size=40):
    """Class folders of plain images, one colour per class with some noise."""
    g = torch.Generator().manual_seed(len(split))
    for i, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for j in range(n):
            x = (80 + 90 * i + 40 * torch.rand(size, size, 3, generator=g)).to(torch.uint8)
            Image.fromarray(x.numpy()).save(root / split / name / f"{j}.jpg")
    return root


def test_every_kind_runs_and_reports(tmp_path, capsys):
    results = run(tmp_path, "--epochs", "1", "--limit", "64", "--block", *KINDS)
    printed = capsys.readouterr().out
    assert printed.count("RESULT {") == len(KINDS)
    assert [r["kind"] for r in results] == list(KINDS)
    frozen = {r["kind"]: r["params_frozen"] for r in results}
    assert {k for k, n in frozen.items() if n} == {"random", "shuffled", "pretrained"}
    lines = printed.strip().splitlines()  # the summary stands at the end, one line for each arm
    assert [line.split()[0] for line in lines[-len(KINDS) :]] == list(KINDS)
    row = json.loads((tmp_path / "image-toy-micro/none-s0/metrics.jsonl").read_text())
    assert {"epoch", "loss", "lr", "samples_per_s", "val_top1", "val_top5"} == set(row)


def test_one_batch_is_learned_by_heart():
    args = train_image.parse_args(["--limit", "16"])
    data = train_image.load_data(args)
    model = train_image.build_model(args, "pretrained", 0, data["meta"])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    x, y = data["train"].x, data["train"].y
    batch = train_image.normalise(x), F.one_hot(y, 12).float()
    for _ in range(60):
        loss = train_image.compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    assert train_image.evaluate(model, [data["train"]], args)["top1"] > 90


def test_toy_masks_cover_the_shapes_and_only_the_shapes():
    x, y, mask = train_image.draw_toy(200, 0, 36)
    colours = torch.tensor(list(train_image.TOY_COLOURS.values()))[y // 4].float()  # (n, 3)
    distance = (x.float() - colours[:, :, None, None]).abs().mean(1)  # (n, S, S)
    inside = torch.stack([d[m].mean() for d, m in zip(distance, mask, strict=True)])
    outside = torch.stack([d[~m].mean() for d, m in zip(distance, mask, strict=True)])
    assert (inside < outside).all()
    assert y.unique().tolist() == list(range(12))
    again = train_image.draw_toy(200, 0, 36)
    assert all(torch.equal(a, b) for a, b in zip(again, (x, y, mask), strict=True))


def test_top1_and_top5_equal_a_count_by_hand():
    args = train_image.parse_args([])
    data = train_image.load_data(args)
    images = data["test"][0].subset(range(100), None)
    model = train_image.build_model(args, "none", 0, data["meta"])
    nn_init = torch.Generator().manual_seed(1)
    model.head.weight.data = torch.randn(model.head.weight.shape, generator=nn_init)
    with torch.no_grad():
        order = model(train_image.normalise(images.x)).argsort(1, descending=True)
    ranks = [row.index(label) for row, label in zip(order.tolist(), images.y.tolist(), strict=True)]
    expected = {"top1": sum(r < 1 for r in ranks), "top5": sum(r < 5 for r in ranks)}
    halves = [images.subset(range(50), None), images.subset(range(50, 100), None)]
    assert train_image.evaluate(model, [images], args) == pytest.approx(expected)
    assert train_image.evaluate(model, halves, args) == pytest.approx(expected, abs=0.001)


def test_flips_and_shifts_move_pixels_and_make_none():
    x = torch.arange(3 * 16 * 16, dtype=torch.uint8).view(1, 3, 16, 16).expand(2, -1, -1, -1)
    same = torch.tensor([[0.9, 0.1], [0.5, 0.99], [0.5, 0.5]])  # middle; flipped and 2 rows down
    y = train_image.flip_and_shift(x, same)
    assert torch.equal(y[0], x[0])
    assert torch.equal(y[1, :, :-2], x[1].flip(-1)[:, 2:]) and (y[1, :, -2:] == 0).all()


def test_folder_streamed_and_in_memory(tmp_path, monkeypatch):
    root = make_folder(make_folder(tmp_path / "data", "train"), "val", n=5)
    argv = ["--data", "folder", "--root", str(root), "--batch-size", "8", "--epochs", "3"]
    in_memory = run(tmp_path / "a", *argv)[0]
    read = train_image.read_folder

    def stream(path, S, workers, names=None, transform=None):
        return read(path, S, workers, names, train_image.crop(S, S))

    monkeypatch.setattr(train_image, "read_folder", stream)  # as for more than 1 GB
    streamed = run(tmp_path / "b", *argv, "--workers", "2")[0]
    assert in_memory["metrics"]["top1"] == streamed["metrics"]["top1"] == 100
    repeated = run(tmp_path / "c", *argv, "--workers", "0")[0]
    assert repeated["metrics"] == streamed["metrics"]
    logs = [(tmp_path / k / "image-folder-micro/pretrained-s0/metrics.jsonl") for k in "bc"]
    losses = [[json.loads(row)["loss"] for row in log.open()] for log in logs]
    assert losses[0] == losses[1]  # augmentation does not depend on the number of workers


def test_robustness_sets(tmp_path):
    """One checkpoint on tiny trees laid out like ImageNet-C, -A, -R and -Sketch."""
    names = ("cat", "dog", "owl")
    root = make_folder(make_folder(tmp_path / "data", "train", names), "val", names, n=5)
    run(tmp_path, "--data", "folder", "--root", str(root), "--batch-size", "8", "--epochs", "3")
    ckpt = str(tmp_path / "image-folder-micro/pretrained-s0/best.pt")
    for corruption in ("gaussian_noise", "fog", "spatter"):  # the last one is an extra
        for severity in "12345":
            wrong = corruption == "spatter" or corruption == "fog" and severity == "5"
            classes = names[::-1] if wrong else names
            made = make_folder(tmp_path / "made", f"{corruption}{severity}", classes, n=2)
            target = tmp_path / "c/extra" / corruption / severity
            target.parent.mkdir(parents=True, exist_ok=True)
            (made / f"{corruption}{severity}").rename(target)
    evaluate = ["--eval", ckpt, "--data"]
    result = train_image.main([*evaluate, "imagenet-c", "--root", str(tmp_path / "c")])[0]
    # nine right sets, and one where only the dogs are in their folder
    assert result["metrics"]["top1"] == pytest.approx((9 * 100 + 100 / 3) / 10, abs=0.1)
    make_folder(tmp_path, "a", ("cat", "owl"), n=3)  # these owls have the colour of dogs
    result = train_image.main([*evaluate, "imagenet-sketch", "--root", str(tmp_path / "a")])[0]
    assert result["metrics"]["top1"] == 50  # all three classes compete, and dogs win
    args = train_image.parse_args([*evaluate, "imagenet-a", "--root", str(tmp_path / "a")])
    saved = train_image.load(ckpt)
    model = train_image.build_model(args, saved["kind"], saved["seed"], saved["meta"])
    images = train_image.load_data(args, saved["meta"])["test"]
    with torch.no_grad():  # cats and owls alone compete: prefer dogs to all, and owls to cats
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
    for data, top1 in (("imagenet-a", 50), ("imagenet-r", 50), ("imagenet-sketch", 0)):
        args.data = data
        assert train_image.evaluate(model, images, args)["top1"] == top1
    with pytest.raises(UserError, match="no <corruption>"):
        train_image.main([*evaluate, "imagenet-c", "--root", str(tmp_path / "a")])


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--llm", "no/such-llm"], "no/such-llm"),
        (["--layers", "999"], "layer 999"),
        (["--block", "magic"], "magic"),
        (["--epochs", "-1"], "--epochs"),
        (["--lr", "-1"], "--lr"),
        (["--data", "folder", "--root", "no/such/directory"], "no/such/directory/train"),
        (["--data", "imagenet-c"], "--eval"),
        (["--eval", "missing.pt"], "missing.pt"),
        (["--patch", "7"], "--patch 7"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    tmp_path, monkeypatch, capsys, argv, text
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((UserError, SystemExit)) as caught:
        run(tmp_path / "out", *argv)
    shown = str(caught.value) if caught.type is UserError else capsys.readouterr().err
    assert text in shown and "\n" not in shown.strip()
    if caught.type is SystemExit:
        assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


def test_exit_code_and_message_of_the_script(tmp_path, monkeypatch, capsys):
    argv = ["train_image.py", *SMALL, "--out", str(tmp_path / "out"), "--layers", "999"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "train_image.py"), run_name="__main__")
    assert re.fullmatch("error: .*layer 999.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_other_settings_on_the_same_directory_are_refused(trained):
    with pytest.raises(UserError, match="--epochs 1"):
        run(trained, "--epochs", "2")


def test_other_data_in_the_same_directory_is_refused(tmp_path):
    root = make_folder(make_folder(tmp_path / "data", "train", n=20), "val", n=5)
    argv = ["--data", "folder", "--root", str(root), "--epochs", "1", "--block", "none", "none"]
    assert len(run(tmp_path, *argv)) == 1  # an arm named twice is one arm
    extra = next(root.glob("val/*/*"))
    extra.rename(extra.with_name("elsewhere.txt"))
    with pytest.raises(UserError, match="begun with other data, 36 train, 4 val, 10 test"):
        run(tmp_path, *argv)


def test_truncated_and_foreign_checkpoints(trained, tmp_path):
    directory = trained / "image-toy-micro/pretrained-s0"
    state = torch.load(directory / "last.pt", weights_only=True)
    other = json.loads(bytes(state["model"]["llm._extra_state"].tolist()))
    other = json.dumps(other | {"hash": "0" * 16, "llm": "another-llm"}).encode()
    other = torch.tensor(list(other), dtype=torch.uint8)
    torch.save(state | {"model": state["model"] | {"llm._extra_state": other}}, tmp_path / "o.pt")
    with pytest.raises(UserError, match="another block.*another-llm"):
        train_image.main(["--eval", str(tmp_path / "o.pt")])
    torch.save(state | {"task": "video"}, tmp_path / "video.pt")
    with pytest.raises(UserError, match="not written by train_image.py"):
        train_image.main(["--eval", str(tmp_path / "video.pt")])
    with pytest.raises(UserError, match="another shape"):
        train_image.main(["--eval", str(directory / "best.pt"), "--patch", "9"])
    data = (directory / "last.pt").read_bytes()
    (directory / "last.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        run(trained, "--epochs", "1")
    assert (directory / "last.pt").stat().st_size == len(data) // 2  # left for the user to judge


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_checkpoints_execute_nothing(tmp_path):
    torch.save({"task": "image", "model": Malicious(str(tmp_path / "made"))}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        train_image.main(["--eval", str(tmp_path / "bad.pt")])
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "made").exists()  # it would have been made


def test_a_flipped_byte_is_noticed(trained, tmp_path):
    directory = trained / "image-toy-micro/pretrained-s0"
    data = bytearray((directory / "best.pt").read_bytes())
    weight = torch.load(directory / "best.pt", weights_only=True)["model"]["head.weight"]
    at = data.index(weight.numpy().tobytes())  # torch.load reads what is there
    data[at + 5] ^= 1
    (tmp_path / "best.pt").write_bytes(data)
    with pytest.raises(UserError, match="damaged.*checksum"):
        train_image.main(["--eval", str(tmp_path / "best.pt")])


def test_a_loss_that_is_no_number_stops_and_keeps_what_there_was(trained):
    argv = ["--block", "none", "--lr", "1e9"]
    with pytest.raises(UserError, match=r"loss is nan at step \d+, learning rate .*e\+0\d.*--lr"):
        run(trained, *argv)
    assert not list(trained.glob("*/none-s0/*"))
    directory = trained / "image-toy-micro/pretrained-s0"
    state = torch.load(directory / "last.pt", weights_only=True)
    state["settings"] |= {"lr": 1e9, "epochs": 2}  # as if the second epoch went wrong
    torch.save(state | {"result": None}, directory / "last.pt")
    before = [(directory / name).read_bytes() for name in ("last.pt", "best.pt")]
    with pytest.raises(UserError, match="What was saved before is kept"):
        run(trained, "--lr", "1e9")
    assert before == [(directory / name).read_bytes() for name in ("last.pt", "best.pt")]


def test_an_infinite_gradient_stops_before_anything_is_saved(tmp_path, monkeypatch):
    def steep(model, batch):
        return (0 * model(batch[0])).sum().sqrt()  # is 0, its slope infinite

    monkeypatch.setattr(train_image, "compute_loss", steep)
    with pytest.raises(UserError, match="loss is nan at step 1"):
        run(tmp_path, "--block", "none", "--epochs", "1")
    assert not list(tmp_path.glob("*/none-s0/*"))


def test_ctrl_c(tmp_path):
    argv = [sys.executable, "train_image.py", "--epochs", "99", "--limit", "64", "--out", tmp_path]
    process = subprocess.Popen(
        argv, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as on a terminal
    )  # fmt: skip
    while not (tmp_path / "image-toy-micro/pretrained-s0/last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    assert process.returncode == 130
    assert printed == "stopped: the same command resumes after the last finished epoch\n"


def test_broken_images(tmp_path, capsys):
    root = make_folder(make_folder(tmp_path / "data", "train", n=80), "val", n=5)
    argv = ["--data", "folder", "--root", str(root), "--batch-size", "8", "--epochs", "1"]
    broken = root / "train/cat/0.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    run(tmp_path / "a", *argv)
    assert "1 of 160 samples are broken" in capsys.readouterr().err
    Image.new("RGB", (1, 1)).save(tmp_path / "bomb.png")
    bomb = bytearray((tmp_path / "bomb.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)  # 10 GB when decoded
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    broken.unlink()
    broken.with_suffix(".png").write_bytes(bomb)
    run(tmp_path / "bomb", *argv)
    printed = capsys.readouterr().err
    assert "decompression bomb" in printed and "1 of 160 samples are broken" in printed
    deep = torch.full((40, 40), 30_000).to(torch.uint16)  # which Pillow would make white
    Image.fromarray(deep.numpy()).save(broken.with_suffix(".png"))
    run(tmp_path / "deep", *argv)
    assert "only 8 bits a channel are read" in capsys.readouterr().err
    for i in range(1, 4):
        (root / f"train/cat/{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="4 of 160 samples are broken, more than 1%"):
        run(tmp_path / "b", *argv)
    (root / "train/emu").mkdir()
    with pytest.raises(UserError, match="emu"):
        run(tmp_path / "c", *argv)


@pytest.fixture
def little_room():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # beyond, as on a full disk
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_the_last_checkpoint(trained, little_room):
    directory = trained / "image-toy-micro/pretrained-s0"
    before = (directory / "best.pt").read_bytes()
    with pytest.raises(UserError, match="cannot write"):
        run(trained, "--seed", "1")
    assert list((trained / "image-toy-micro/pretrained-s1").iterdir()) == []
    assert (directory / "best.pt").read_bytes() == before


@pytest.mark.skipif("LLMBLOCK_DATA" not in os.environ, reason="LLMBLOCK_DATA is not set")
def test_real_photos_and_a_real_llama(tmp_path):
    data = Path(os.environ["LLMBLOCK_DATA"])
    argv = ["--data", "folder", "--root", str(data / "images/cifar10"), "--limit", "1280"]
    argv += ["--epochs", "1", "--llm", str(data / "lm/babyllama105")]
    result = run(tmp_path, *argv)[0]
    assert result["params_frozen"] == 184_576
    assert result["metrics"]["top1"] > 14  # chance: 10 ± 0.8
