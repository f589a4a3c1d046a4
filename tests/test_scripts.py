"""What every training script promises, tested once over all of them."""

import json
import multiprocessing as mp
import runpy
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_llmblock import Malicious
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from llmblock import KINDS, UserError, hash_weights, read

NAMES = ["image", "motion", "pointcloud", "retrieval", "video", "vqa"]
SCRIPTS = {name: import_module(f"train_{name}") for name in NAMES}
SMALL = ["--limit", "32", "--epochs", "3", "--batch-size", "16", "--workers", "0", "--warmup", "0"]
RECIPES = {"image": ["--recipe", "deit"], "video": ["--recipe", "videomae"]}
mp.set_forkserver_preload(["llmblock", "torchvision"])  # imported once for all processes


def flags(name, out, *argv):
    few = ["--limit", "16", "--batch-size", "8"] * (name == "retrieval")  # it scores all pairs
    return [*SMALL, *few, "--out", str(out), *argv]


def run(name, out, *argv):
    return SCRIPTS[name].main(flags(name, out, *argv))


def folder(out):
    return next(out.glob("*/*-s0"))


def as_a_user(monkeypatch, name, out, *argv):
    """What runpy.run_path needs to run the script as a user does, in a process of its own."""
    path = SCRIPTS[name].__file__
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
    script = SCRIPTS[name]
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
    script = SCRIPTS[name]
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
    assert hash_weights(model.llm.layers) == model.llm.record["hash"]  # frozen
    # A sample's loss depends neither on its neighbours in the batch nor is it that of any other.
    samples = [data["train"][0, i] for i in range(4)]
    with torch.no_grad():
        torch.manual_seed(0)
        alone = [script.compute_loss(args, model.eval(), script.collate([s])) for s in samples]
        assert len({round(loss.item(), 6) for loss in alone}) == 4
        if name != "retrieval":  # whose matching loss swaps the images of a batch
            together = script.compute_loss(args, model, script.collate(samples))
            torch.testing.assert_close(together, sum(alone) / 4, rtol=1e-4, atol=1e-5)


def test_what_a_run_leaves_behind(once, monkeypatch):
    name, out, trained = once
    script = SCRIPTS[name]
    last = read(folder(out) / "last.pt")
    held = {k for k in last["model"] if k.startswith("llm.")}
    assert held == {"llm.proj_in.weight", "llm.proj_out.weight"}  # no frozen weight
    rows = [json.loads(line) for line in (folder(out) / "metrics.jsonl").open()]
    assert [row["epoch"] for row in rows] == [1, 2, 3] and rows == last["history"]
    assert {"task", "data", "kind", "seed", "lr", "proj_lr", "versions", "date"} <= set(trained)
    assert trained["params_frozen"] == 442_752 and trained["llm"] == "tiny_llm"
    # The same command reprints; --eval needs the test split alone and writes nothing.
    monkeypatch.setattr(script, "compute_loss", None)
    assert run(name, out, "--lr", "1e-4")[0] == trained
    limit = ["--limit", "16" if name == "retrieval" else "32"]
    tested = script.main(["--eval", str(folder(out) / "best.pt"), "--out", "nowhere", *limit])[0]
    assert tested["metrics"] == trained["metrics"] and not Path("nowhere").exists()


@pytest.mark.parametrize("name", NAMES)
def test_validation_selects_the_epoch_and_the_test_set_is_used_once(name, tmp_path, monkeypatch):
    script = SCRIPTS[name]
    load_data = script.load_data
    values = [3.0, 1.0, 2.0, 0.0]  # the best is neither the last nor the one on test data
    splits = {}
    tested = []

    def remember(args):
        splits.update(load_data(args))
        return splits

    def record(args, model, dataset):
        split = next(k for k, d in splits.items() if d is dataset)
        tested.append((split, model.state_dict()["llm.proj_in.weight"].clone()))
        return {"metric": values[len(tested) - 1]}

    monkeypatch.setattr(script, "load_data", remember)
    monkeypatch.setattr(script, "evaluate", record)
    run(name, tmp_path)
    assert [split for split, _ in tested] == ["val", "val", "val", "test"]
    best = values.index(script.BEST(values[:3]))
    assert len(read(folder(tmp_path) / "best.pt")["history"]) == 1 + best
    assert [torch.equal(tested[3][1], w) for _, w in tested[:3]].index(True) == best


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
    assert 1 <= len(read(folder(tmp_path / "a") / "last.pt")["history"]) <= 3
    killed = run(name, tmp_path / "a", *argv, "--workers", "1")[0]
    whole = run(name, tmp_path / "b", *argv)[0]
    assert killed["metrics"] == whole["metrics"]
    a, b = (read(folder(tmp_path / x) / "last.pt")["model"] for x in "ab")
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
    a, b = (read(folder(x) / "last.pt")["model"] for x in (out, tmp_path))
    # The mean, not the largest: where a gradient is rounding noise (as of a bias in front of a
    # BatchNorm), AdamW makes a step of it all the same. In point clouds, each process has its own
    # BatchNorm statistics and stretches its own clouds.
    change = torch.cat([(a[k] - b[k]).flatten().float() for k in a if "running" not in k])
    assert change.abs().mean() < (1e-4 if name == "pointcloud" else 2e-6)


def test_mistakes_are_refused(tmp_path, monkeypatch):
    """For one script: the code is the same in all."""
    monkeypatch.chdir(tmp_path)
    image = SCRIPTS["image"]
    run("image", tmp_path, "--epochs", "1")
    last = folder(tmp_path) / "last.pt"
    for flag, words in {"--lr=1": "lr 0.002, not 1", "--limit=24": "limit 32, not 24"}.items():
        with pytest.raises(UserError, match=f"has {words}"):
            run("image", tmp_path, "--epochs", "1", flag)
    with pytest.raises(UserError, match="frozen_hash"):  # it is that of its own LLM layer
        image.main(["--eval", str(last), "--layers", "0", "--limit", "8"])
    good = last.read_bytes()
    flipped = bytearray(good)  # a bit in the middle of the largest tensor
    largest = max(zipfile.ZipFile(last).infolist(), key=lambda entry: entry.file_size)
    flipped[largest.header_offset + largest.file_size // 2] ^= 1
    malicious = {"task": "image", "model": Malicious()}
    for damaged in (good[: len(good) // 2], flipped, malicious, {"task": "video"}):
        if isinstance(damaged, dict):
            torch.save(damaged, last)
        else:
            last.write_bytes(damaged)
        for command in (flags("image", tmp_path, "--epochs", "1"), ["--eval", str(last)]):
            with pytest.raises(UserError, match="cannot use .*last.pt"):
                image.main(command)
    assert not Path("made").exists()
    with pytest.raises(UserError, match="the loss is nan"):
        run("image", tmp_path / "nan", "--lr", "1e30")
    for argv in (["--llm", "no/such/dir"], ["--layers", "9"], ["--data", "folder", "--root", "no"]):
        with pytest.raises(UserError):
            run("image", tmp_path / "new", *argv)
    assert not Path("new").exists()
    with pytest.raises(SystemExit, match="2"):
        image.main(["--block", "unheard-of"])
