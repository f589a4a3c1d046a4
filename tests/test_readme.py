"""README's and the docstrings' commands parse, and README's Python runs.

python -m pytest tests/test_readme.py -q
"""

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
README = (ROOT / "README.md").read_text()
SCRIPTS = [*(p.stem for p in ROOT.glob("train_*.py")), "visualize"]
DOCS = "\n".join([README, *(import_module(name).__doc__ for name in SCRIPTS)])
DOCS = DOCS.replace("\\\n", " ")  # commands that go on in the next line
COMMANDS = sorted(set(re.findall(r"\b(train_[a-z]+|visualize)\.py ([^`#\n)]*)", DOCS)))


@pytest.mark.parametrize("script, argv", COMMANDS)
def test_command_parses(script, argv, monkeypatch):
    module = import_module(script)
    argv = [word for word in shlex.split(argv) if word not in ("...", "[--foreground", "8", "9]")]
    if "--eval" in argv:  # the checkpoint is the reader's: let it have no settings of its own
        monkeypatch.setattr(module, "load", lambda path: {"settings": {}})
    module.parse_args(argv)  # exits on a flag or a value that is not there


def test_python_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks and len(COMMANDS) > 5
    for code in blocks:
        scope = {}
        exec(code, scope)
        assert scope["y"].shape == (2, 197, 384)
        assert list(scope["stages"]) == ["host", "proj_in", "attention", "ffn", "proj_out"]


def test_commands_on_toys_run(tmp_path, capsys):
    """Those that need no data of the reader's, with a few samples and for one epoch."""
    commands = re.findall(r"^python (train_[a-z]+|visualize)\.py ([^#\n]*)", README, re.MULTILINE)
    own = [
        (name, argv) for name, argv in commands if not re.search("--root|--masks|cifar|CKPT", argv)
    ]
    assert [name for name, _ in own] == ["train_image", "train_vqa", "visualize"]
    few = ["--limit", "24", "--epochs", "1", "--workers", "0", "--out", str(tmp_path / "runs")]
    for name, argv in own:
        argv = [word.replace("runs/", f"{tmp_path}/runs/") for word in shlex.split(argv)]
        argv += few if name != "visualize" else ["--out", str(tmp_path / "figures")]
        import_module(name).main(argv)
    assert "| pretrained | tiny_llm | [3] | 1 |" in capsys.readouterr().out
    assert (tmp_path / "figures/image-toy-micro-compare.png").exists()
