"""The scaffold stands in every training script, so that each can be read and copied alone: this
test holds the copies identical.

python -m pytest tests/test_copies.py -q
"""

import ast
from pathlib import Path

SCRIPTS = {p.name: p.read_text() for p in sorted(Path(__file__).parent.parent.glob("train_*.py"))}
MARK = "# ---------------------------------------------------------------- the same in every script"
# What each task writes for itself, under one name.
OWN = {"parse_args", "load_data", "train_batches", "build_model", "example", "compute_loss"}
OWN |= {"draw_toy", "init_from", "param_groups", "evaluate"}


def differences(scripts):
    """What is not the same: text below the mark, and functions or classes of one name above it."""
    found, seen = [], {}
    for name, text in scripts.items():
        above, mark, below = text.partition(MARK)
        if not mark:
            found.append(f"{name} lacks the line '{MARK}'")
        parts = {"below the mark": below}
        for node in ast.parse(above).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                parts[node.name] = "\n".join(above.splitlines()[first - 1 : node.end_lineno])
        for part, source in parts.items():
            other, original = seen.setdefault(part, (name, source))
            if source != original:
                found.append(f"{part} differs between {other} and {name}")
    return found


def test_copies_are_identical():
    assert SCRIPTS and differences(SCRIPTS) == []


def test_a_changed_copy_is_found():
    text = SCRIPTS["train_image.py"]
    for old, new, part in [
        ("def lr_at(step, steps,", "def lr_at(step, all_steps,", "below the mark"),
        ("def crop(S, resize)", "def crop(S, side)", "crop"),
        ("def compute_loss(model,", "def compute_loss(net,", None),
        (MARK, "# elsewhere", "lacks the line"),
    ]:
        found = differences({"train_image.py": text, "train_copy.py": text.replace(old, new)})
        assert bool(found) == bool(part) and (not part or any(part in f for f in found))
