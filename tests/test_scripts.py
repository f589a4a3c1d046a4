"""What every training script promises: arms that differ in the block alone, checkpoints without
frozen weights, exact resume, the same result on two processes, --eval. CPU, offline.

python -m pytest tests/test_scripts.py -q
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from llmblock import KINDS  # noqa: E402

SMALL = ["--limit", "192", "--epochs", "2", "--batch-size", "32", "--workers", "0"]
NAMES = sorted(p.stem.removeprefix("train_") for p in ROOT.glob("train_*.py"))
RECIPES = {"image": ["--recipe", "deit"], "video": ["--recipe", "videomae", "--layer-decay", "0.7"]}
torch.set_num_threads(1)
for name in NAMES:  # the same toy data again and again: drawn once
    script = import_module(f"train_{name}")
    script.draw_toy = functools.cache(script.draw_toy)


def run(name, out, *argv):
    return import_module(f"train_{name}").main([*SMALL, "--out", str(out), *argv])


def start(name, out, *argv, launcher=()):
    """The script as a user starts it, in a process of its own."""
    command = [sys.executable, *launcher, str(ROOT / f"train_{name}.py"), *SMALL, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *argv], env=env, text=True, cwd=out.parent, **pipes)


def folder(name, out):
    return out / f"{name}-toy-micro/pretrained-s0"


def tensors(path):
    state = torch.load(path, weights_only=True)["model"]
    return {k: v for k, v in state.items() if torch.is_tensor(v)}


@pytest.mark.parametrize("name", NAMES)
def test_arms_differ_in_the_block_and_in_nothing_else(name):
    script = import_module(f"train_{name}")
    args, meta = script.parse_args([]), {"classes": list("abc"), "line": [[0.0] * 19] * 30}
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


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_hold_no_frozen_weight_and_training_changes_none(name, tmp_path):
    script = import_module(f"train_{name}")
    trained = run(name, tmp_path, "--epochs", "1")[0]
    state = torch.load(folder(name, tmp_path) / "last.pt", weights_only=True)
    held = {k for k in state["model"] if k.startswith("llm.")}
    assert held == {"llm.proj_in.weight", "llm.proj_out.weight", "llm._extra_state"}
    model = script.build_model(script.parse_args([]), "pretrained", 0, state["meta"])
    model.load_state_dict(state["model"])  # verifies the hash of the frozen tensors
    ckpt = folder(name, tmp_path) / "best.pt"
    tested = script.main(["--eval", str(ckpt), "--out", "nowhere"])[0]
    assert tested["metrics"] == trained["metrics"] and not Path("nowhere").exists()


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_continued_equals_uninterrupted(name, tmp_path):
    argv = [*RECIPES.get(name, []), "--epochs", "4"]  # with all randomness that there is
    process = start(name, tmp_path / "a", *argv)
    last = folder(name, tmp_path / "a") / "last.pt"
    while not last.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 1 <= len(torch.load(last, weights_only=True)["history"]) < 4
    killed, whole = run(name, tmp_path / "a", *argv), run(name, tmp_path / "b", *argv)
    assert killed[0]["metrics"] == whole[0]["metrics"]
    a, b = (tensors(folder(name, tmp_path / k) / "last.pt") for k in "ab")
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert run(name, tmp_path / "a", *argv) == killed  # done: printed again, nothing trained


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(name, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    argv = ["--epochs", "1", "--precision", "fp32", "--lr", "1e-4"]
    process = start(name, tmp_path / "two", *argv, launcher=launcher)
    run(name, tmp_path / "one", *argv)
    out, text = process.communicate()
    assert process.returncode == 0, text
    assert out.count("RESULT ") == 1
    one, two = (folder(name, tmp_path / k) for k in ("one", "two"))
    rows = [json.loads((k / "metrics.jsonl").read_text()) for k in (one, two)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    a, b = tensors(one / "last.pt"), tensors(two / "last.pt")
    # The mean, not the largest: where a gradient is rounding noise (as of a bias in front of a
    # BatchNorm), AdamW makes a step of it all the same.
    change = torch.cat([(a[k] - b[k]).flatten().float() for k in a]).abs().mean()
    assert change < 2e-6
