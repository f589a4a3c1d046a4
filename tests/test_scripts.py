"""What every training script promises: arms that differ in the block alone, checkpoints without
frozen weights, exact resume, the same result on two processes, --eval. CPU, offline.

python -m pytest tests/test_scripts.py -q
"""

import functools
import json
import multiprocessing as mp
import os
import runpy
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from llmblock import KINDS  # noqa: E402

SMALL = ["--limit", "64", "--epochs", "4", "--batch-size", "32", "--workers", "0"]
ONE_EPOCH = ["--epochs", "1", "--precision", "fp32", "--lr", "1e-4"]
NAMES = sorted(p.stem.removeprefix("train_") for p in ROOT.glob("train_*.py"))
RECIPES = {"image": ["--recipe", "deit"], "video": ["--recipe", "videomae", "--layer-decay", "0.7"]}
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
mp.set_forkserver_preload(["llmblock", "torchvision"])  # imported once for all processes
for name in NAMES:  # the same toy data again and again: drawn once
    script = import_module(f"train_{name}")
    script.draw_toy = functools.cache(script.draw_toy)


def flags(name, out, *argv):
    few = ["--limit", "24", "--batch-size", "16"] * (name == "retrieval")  # it scores all pairs
    return [*SMALL, *few, "--out", str(out), *argv]


def run(name, out, *argv):
    return import_module(f"train_{name}").main(flags(name, out, *argv))


def as_a_user(monkeypatch, name, out, *argv):
    """What runpy.run_path needs to run the script as a user does, in a process of its own."""
    path = str(ROOT / f"train_{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *flags(name, out, *argv)])  # also over there
    return path, None, "__main__"


def run_path(*args):
    runpy.run_path(*args)  # and return nothing: torchrun would send it


def folder(name, out):
    return out / f"{name}-{'toy2d' if name == 'vqa' else 'toy'}-micro/pretrained-s0"


def read(name, out):
    return torch.load(folder(name, out) / "last.pt", weights_only=True)


def tensors(name, out):
    return {k: v for k, v in read(name, out)["model"].items() if torch.is_tensor(v)}


@pytest.mark.parametrize("name", NAMES)
def test_arms_differ_in_the_block_and_in_nothing_else(name):
    script = import_module(f"train_{name}")
    args, meta = script.parse_args([]), {"classes": list("abc"), "line": [[0.0] * 19] * 30}
    meta |= {"words": ["is", "red"], "answers": ["yes", "no"]}
    models = {kind: script.build_model(args, kind, 0, meta) for kind in KINDS}
    host = dict(models["none"].named_parameters())
    for model in models.values():
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[k], v) for k, v in host.items())
        groups = script.param_groups(model, args)
        trained = [id(p) for group in groups for p in group["params"]]
        assert sorted(trained) == sorted(id(p) for p in parameters.values())
        if model.llm.kind != "none":
            assert torch.equal(model.llm.proj_in.weight, models["linear"].llm.proj_in.weight)


@pytest.fixture(scope="module", params=NAMES)
def once(request, tmp_path_factory):
    """An epoch of a script: its name, its directory, its result."""
    out = tmp_path_factory.mktemp(request.param)
    return request.param, out, run(request.param, out, *ONE_EPOCH)[0]


def test_checkpoints_hold_no_frozen_weight_and_training_changes_none(once):
    name, out, trained = once
    script, state = import_module(f"train_{name}"), read(name, out)
    held = {k for k in state["model"] if k.startswith("llm.")}
    assert held == {"llm.proj_in.weight", "llm.proj_out.weight", "llm._extra_state"}
    model = script.build_model(script.parse_args([]), "pretrained", 0, state["meta"])
    model.load_state_dict(state["model"])  # verifies the hash of the frozen tensors
    ckpt = folder(name, out) / "best.pt"
    tested = script.main(["--eval", str(ckpt), "--out", "nowhere"])[0]
    assert tested["metrics"] == trained["metrics"] and not Path("nowhere").exists()


def test_two_processes_equal_one(once, tmp_path, monkeypatch):
    name, out, _ = once
    args = as_a_user(monkeypatch, name, tmp_path, *ONE_EPOCH)
    logs = DefaultLogsSpecs(tmp_path / "logs", Std.ALL)
    torchrun = LaunchConfig(1, 1, 2, logs, name, rdzv_endpoint="localhost:0", rdzv_backend="c10d",
                            max_restarts=0, start_method="forkserver")  # fmt: skip
    elastic_launch(torchrun, run_path)(*args)
    printed = [p.read_text() for p in sorted(tmp_path.glob("logs/**/stdout.log"))]
    assert printed[0].count("RESULT ") == 1 and not printed[1]
    rows = [json.loads((folder(name, k) / "metrics.jsonl").read_text()) for k in (out, tmp_path)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    a, b = tensors(name, out), tensors(name, tmp_path)
    # The mean, not the largest: where a gradient is rounding noise (as of a bias in front of a
    # BatchNorm), AdamW makes a step of it all the same.
    change = torch.cat([(a[k] - b[k]).flatten().float() for k in a]).abs().mean()
    assert change < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_continued_equals_uninterrupted(name, tmp_path, monkeypatch):
    argv = RECIPES.get(name, [])  # with all randomness that there is
    args = as_a_user(monkeypatch, name, tmp_path / "a", *argv)
    process = mp.get_context("forkserver").Process(target=runpy.run_path, args=args)
    process.start()
    while not (folder(name, tmp_path / "a") / "last.pt").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert 1 <= len(read(name, tmp_path / "a")["history"]) < 4
    killed, whole = run(name, tmp_path / "a", *argv), run(name, tmp_path / "b", *argv)
    assert killed[0]["metrics"] == whole[0]["metrics"]
    a, b = tensors(name, tmp_path / "a"), tensors(name, tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert run(name, tmp_path / "a", *argv) == killed  # done: printed again, nothing trained
