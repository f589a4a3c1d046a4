"""README's and the docstrings' commands parse, README's Python runs, its numbers are results."""

import json
import re
import shlex
from importlib import import_module

import make_results
import pytest
from test_sizes import LINES, ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(p.stem for p in ROOT.glob("train_*.py"))
DOCS = "\n".join([README, *(import_module(name).__doc__ for name in SCRIPTS)])
DOCS = DOCS.replace("\\\n", " ")  # commands that go on in the next line
COMMANDS = sorted(set(re.findall(r"\b(train_[a-z]+)\.py ([^`#;\n)]*)", DOCS)))


@pytest.mark.parametrize("script, argv", COMMANDS)
def test_command_parses(script, argv, monkeypatch):
    module = import_module(script)
    # The checkpoint is the reader's: let it have no settings of its own.
    monkeypatch.setattr(module, "read", lambda path, task: {"settings": {}})
    words = [word for word in shlex.split(argv) if word not in ("...", "done")]
    module.parse_args(words)  # exits on a flag or a value that is not there


def test_python_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(code, scope)
    assert scope["loss"].isfinite()
    trained = {id(p) for group in scope["optimizer"].param_groups for p in group["params"]}
    block = scope["vit"].encoder.layers[-1]
    assert id(block.proj_in.weight) in trained
    assert not any(id(p) in trained for p in block.layers[0].parameters())


def test_the_forward_pass_in_readme_is_that_of_the_script():
    (quoted,) = re.findall(r"```\n(x = self.patch_embed.*?)```", README, re.DOTALL)
    script = (ROOT / "train_image.py").read_text()
    for line in quoted.strip().splitlines():
        assert line.partition("#")[0].strip() in script


def test_tables_are_made_from_results():
    assert make_results.make(README) == (README, (ROOT / "tests/RESULTS.md").read_text())
    for line in (ROOT / "tests/results.jsonl").open():
        assert {"commit", "machine", "command", "val", "date", "versions"} <= set(json.loads(line))


def test_readme_is_short_and_has_the_sizes_of_files_and_commands_for_every_script():
    rows = re.findall(r"\| `(\w+)\.py` \| (\d+) \|", README)
    assert {name: int(lines) for name, lines in rows} == LINES
    assert len(README.encode()) <= 12_288
    assert {script for script, _ in COMMANDS} == set(SCRIPTS)
