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
DOCS = "\n".join([README, *(import_module(p.stem).__doc__ for p in ROOT.glob("train_*.py"))])
DOCS = DOCS.replace("\\\n", " ")  # commands that go on in the next line
COMMANDS = sorted(set(re.findall(r"(train_\w+)\.py ([^`#\n]*)", DOCS)))


@pytest.mark.parametrize("script, argv", COMMANDS)
def test_command_parses(script, argv, monkeypatch):
    module = import_module(script)
    argv = [word for word in shlex.split(argv) if word != "..."]
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
