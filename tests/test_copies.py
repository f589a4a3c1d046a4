"""Every script can be read and copied alone, so some code stands in several: held identical here.

python -m pytest tests/test_copies.py -q
"""

import ast
from pathlib import Path

SCRIPTS = {p.name: p.read_text() for p in sorted(Path(__file__).parent.parent.glob("train_*.py"))}
MARK = "# ---------------------------------------------------------------- the same in every script"
# What each task writes for itself, under one name. (Attention: with biases as in published files.)
OWN = {"Attention", "Block", "compute_loss", "evaluate", "collate", "load_data", "draw_toy"}
OWN |= {"parse_args", "build_model", "load_init", "param_groups", "normalise", "make_transform"}


def parts(text):
    """{name: source} of what must be the same wherever it stands."""
    above, mark, below = text.partition(MARK)
    found = {"below the mark": below if mark else "nothing: the mark is missing"}
    for node in ast.parse(above).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(above.splitlines()[first - 1 : node.end_lineno])
    return found


def differences(scripts):
    """(part, script, other script) for each part that differs."""
    found = []
    first = {}  # part: (script, source)
    for script, text in scripts.items():
        for part, source in parts(text).items():
            other, original = first.setdefault(part, (script, source))
            if source != original:
                found.append((part, other, script))
    return found


def test_copies_are_identical():
    assert len(SCRIPTS) == 6
    assert differences(SCRIPTS) == []


def test_a_changed_copy_is_found():
    text = SCRIPTS["train_image.py"]
    for old, new, part in [
        ("def batches(args, dataset,", "def batches(args, data,", "batches"),
        ("def resume(args, path,", "def resume(args, file,", "below the mark"),
        (MARK, "# elsewhere", "below the mark"),
    ]:
        assert text.count(old) == 1
        found = differences({"a": text, "b": text.replace(old, new)})
        assert (part, "a", "b") in found
    own = text.replace("def compute_loss(args,", "def compute_loss(settings,")
    assert differences({"a": text, "b": own}) == []
