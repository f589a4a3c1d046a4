"""What every training script promises, tested once over all of them. CPU, offline.

python -m pytest tests/test_scripts.py -q
"""

import json
import multiprocessing as mp
import os
import runpy
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from llmblock import KINDS, UserError  # noqa: E402

NAMES = sorted(p.stem.removeprefix("train_") for p in ROOT.glob("train_*.py"))
SMALL = ["--limit", "32", "--epochs", "3", "--batch-size", "16", "--workers", "0", "--warmup", "0"]
RECIPES = {"image": ["--recipe", "deit"], "video": ["--recipe", "videomae"]}
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
mp.set_forkserver_preload(["llmblock", "torchvision"])  # imported once for all processes


def module(name):
    return import_module(f"train_{name}")


def flags(name, out, *argv):
    few = ["--limit", "16", "--batch-size", "8"] * (name == "retrieval")  # it scores all pairs
    return [*SMALL, *few, "--out", str(out), *argv]


def run(name, out, *argv):
    return module(name).main(flags(name, out, *argv))


def folder(out, kind="pretrained"):
    return next(out.glob(f"*/{kind}-s0"))


def load(path):
    return torch.load(path, weights_only=True)


def as_a_user(monkeypatch, name, out, *argv):
    """What runpy.run_path needs to run the script as a user does, in a process of its own."""
    path = str(ROOT / f"train_{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *flags(name, out, *argv)])  # also over there
    return path, None, "__main__"


def run_path(*args):
    runpy.run_path(*args)  # and return nothing: torchrun would send it


@pytest.fixture(scope="module", params=NAMES)
def once(request, tmp_path_factory):
    """A run of a script: its name, its directory, its result."""
    out = tmp_path_factory.mktemp(request.param)
    return request.param, out, run(request.param, out, "--lr", "1e-4")[0]


@pytest.mark.parametrize("name", NAMES)
def test_arms_differ_in_the_block_and_in_nothing_else(name):
    script = module(name)
    args = script.parse_args(["--limit", "8", "--proj-lr", "0.25"])
    script.load_data(args)
    models = {kind: script.build_model(args, kind, 0) for kind in KINDS}
    host = dict(models["none"].named_parameters())
    for kind, model in models.items():
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[k], v) for k, v in host.items())
        groups = script.param_groups(args, model)
        trained = [id(p) for group in groups for p in group["params"]]
        assert sorted(trained) == sorted(id(p) for p in parameters.values() if p.requires_grad)
        if kind == "none":
            continue
        assert torch.equal(model.llm.proj_in.weight, models["linear"].llm.proj_in.weight)
        scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        assert scale[id(model.llm.proj_in.weight)] == scale[id(model.llm.proj_out.weight)] == 0.25
    twins = [models[k].llm.layers[0].state_dict() for k in ("pretrained", "finetuned")]
    assert all(torch.equal(t, twins[1][k]) for k, t in twins[0].items())  # no host overwrites it


@pytest.mark.parametrize("name", NAMES)
def test_one_batch_is_learned_by_heart_from_its_inputs(name):
    script = module(name)
    args = script.parse_args(["--limit", "8", "--batch-size", "8", "--workers", "0"])
    data = script.load_data(args)
    model = script.build_model(args, "pretrained", 0)
    batch = next(iter(script.batches(args, data["train"], 0)))
    optimizer = torch.optim.AdamW(script.param_groups(args, model), 1e-3)
    losses = []
    for _ in range(60):
        torch.manual_seed(0)
        loss = script.compute_loss(args, model.train(), batch)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    weights = [p for layer in model.llm.layers for p in layer.parameters()]
    fresh = script.build_model(args, "pretrained", 0).llm.layers
    expected = [p for layer in fresh for p in layer.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(weights, expected, strict=True))
    # A sample's loss depends neither on its neighbours in the batch nor is it that of any other.
    samples = [data["train"][0, i] for i in range(4)]
    with torch.no_grad():
        torch.manual_seed(0)
        alone = [script.compute_loss(args, model.eval(), script.collate([s])) for s in samples]
        assert len({round(loss.item(), 6) for loss in alone}) == 4
        if name != "retrieval":  # whose matching loss swaps the images of a batch
            together = script.compute_loss(args, model, script.collate(samples))
            torch.testing.assert_close(together, sum(alone) / 4, rtol=1e-4, atol=1e-5)


def test_what_a_run_leaves_behind(once, capsys, monkeypatch):
    name, out, trained = once
    script = module(name)
    last = load(folder(out) / "last.pt")
    held = {k for k in last["model"] if k.startswith("llm.")}
    assert held == {"llm.proj_in.weight", "llm.proj_out.weight"}  # no frozen weight
    rows = [json.loads(line) for line in (folder(out) / "metrics.jsonl").open()]
    assert [row["epoch"] for row in rows] == [1, 2, 3] and rows == last["history"]
    values = [next(iter(row["val"].values())) for row in rows]
    best = load(folder(out) / "best.pt")["history"][-1]
    assert next(iter(best["val"].values())) == script.BEST(values)
    fields = "task data model kind llm layers seed metrics params_trainable params_frozen date"
    assert set(f"{fields} samples_per_s seconds versions proj_lr".split()) <= set(trained)
    assert trained["params_frozen"] == 442_752 and trained["llm"] == "tiny_llm"
    # The same command reprints; --eval needs the test split alone and writes nothing.
    monkeypatch.setattr(script, "compute_loss", None)
    assert run(name, out, "--lr", "1e-4")[0] == trained
    limit = ["--limit", "16" if name == "retrieval" else "32"]
    tested = script.main(["--eval", str(folder(out) / "best.pt"), "--out", "nowhere", *limit])[0]
    assert tested["metrics"] == trained["metrics"] and not Path("nowhere").exists()


def test_the_test_set_is_used_once_and_last(once, tmp_path, monkeypatch):
    name, _, _ = once
    script = module(name)
    seen, evaluate, load_data = [], script.evaluate, script.load_data
    splits = {}

    def remember(args):
        splits.update(load_data(args))
        return splits

    def record(args, model, dataset):
        seen.append(next(k for k, d in splits.items() if d is dataset))
        value = {"image": [3.0, 1.0, 2.0]}.get(name, [1.0, 1.0, 1.0])[min(len(seen), 3) - 1]
        return {"metric": value} if name == "image" else evaluate(args, model, dataset)

    monkeypatch.setattr(script, "load_data", remember)
    monkeypatch.setattr(script, "evaluate", record)
    run(name, tmp_path)
    assert seen == ["val", "val", "val", "test"]
    if name == "image":  # validation said: the first epoch is the best
        assert len(load(folder(tmp_path) / "best.pt")["history"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_continued_equals_uninterrupted(name, tmp_path, monkeypatch):
    argv = RECIPES.get(name, [])  # with all randomness that there is
    args = as_a_user(monkeypatch, name, tmp_path / "a", *argv)
    process = mp.get_context("forkserver").Process(target=runpy.run_path, args=args)
    process.start()
    while not list(tmp_path.glob("a/*/*/last.pt")):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert 1 <= len(load(folder(tmp_path / "a") / "last.pt")["history"]) <= 3
    killed = run(name, tmp_path / "a", *argv, "--workers", "1")[0]
    whole = run(name, tmp_path / "b", *argv)[0]
    assert killed["metrics"] == whole["metrics"]
    a, b = (load(folder(tmp_path / x) / "last.pt")["model"] for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_two_processes_equal_one(once, tmp_path, monkeypatch):
    name, out, _ = once
    args = as_a_user(monkeypatch, name, tmp_path, "--lr", "1e-4")
    logs = DefaultLogsSpecs(tmp_path / "logs", Std.ALL)
    torchrun = LaunchConfig(1, 1, 2, logs, name, rdzv_endpoint="localhost:0", rdzv_backend="c10d",
                            max_restarts=0, start_method="forkserver")  # fmt: skip
    elastic_launch(torchrun, run_path)(*args)
    printed = [p.read_text() for p in sorted(tmp_path.glob("logs/**/stdout.log"))]
    assert printed[0].count("RESULT ") == 1 and not printed[1]
    a, b = (load(folder(x) / "last.pt")["model"] for x in (out, tmp_path))
    # The mean, not the largest: where a gradient is rounding noise (as of a bias in front of a
    # BatchNorm), AdamW makes a step of it all the same. In point clouds, each process has its own
    # BatchNorm statistics and stretches its own clouds.
    change = torch.cat([(a[k] - b[k]).flatten().float() for k in a if "running" not in k])
    assert change.abs().mean() < (1e-4 if name == "pointcloud" else 2e-6)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":  # a bit in the middle of the largest tensor
        with zipfile.ZipFile(path) as file:
            largest = max(file.infolist(), key=lambda entry: entry.file_size)
        data[largest.header_offset + largest.file_size // 2] ^= 1
        path.write_bytes(data)
    elif how == "malicious":
        torch.save({"task": "image", "model": Malicious(str(path.parent / "made"))}, path)
    else:
        torch.save({"task": "video"}, path)


def test_mistakes_are_refused(tmp_path):
    """For one script: the code is the same in all."""
    image = module("image")
    run("image", tmp_path, "--epochs", "1", "--block", "none")
    last = folder(tmp_path, "none") / "last.pt"
    good = last.read_bytes()
    for argv, words in {
        ("--lr", "1"): "has lr 0.002, not 1",
        ("--limit", "24"): "has limit 32, not 24",
        ("--epochs", "2"): "has epochs 1, not 2",
    }.items():
        with pytest.raises(UserError, match=words):
            run("image", tmp_path, "--epochs", "1", "--block", "none", *argv)
    for how in ("cut", "flipped", "malicious", "another task"):
        damage(last, how)
        with pytest.raises(UserError, match="cannot use .*last.pt"):
            run("image", tmp_path, "--epochs", "1", "--block", "none")
        with pytest.raises(UserError, match="cannot use .*last.pt"):
            image.main(["--eval", str(last)])
        last.write_bytes(good)
    assert not (last.parent / "made").exists()
    with pytest.raises(UserError, match="the loss is nan"):
        run("image", tmp_path / "nan", "--lr", "1e30")
    for argv in (["--llm", "no/such/dir"], ["--layers", "9"], ["--data", "folder", "--root", "no"]):
        with pytest.raises(UserError):
            run("image", tmp_path / "new", *argv)
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="2"):
        image.main(["--block", "unheard-of"])


def test_a_checkpoint_is_that_of_its_own_llm(tmp_path):
    for kind in ("shuffled", "pretrained"):
        run("image", tmp_path, "--epochs", "1", "--block", kind)
        best = str(folder(tmp_path, kind) / "best.pt")
        with pytest.raises(UserError, match="frozen_hash"):
            module("image").main(["--eval", best, "--layers", "0", "--limit", "8"])
