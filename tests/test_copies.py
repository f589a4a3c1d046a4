"""Every script can be read and copied alone, so some code stands in several: kept identical."""

import ast

from test_sizes import MARK, ROOT

# What each task writes for itself, under one name. (Attention: with biases as in published files.)
OWN = {"Attention", "Block", "compute_loss", "evaluate", "collate", "load_data", "draw_toy"}
OWN |= {"parse_args", "build_model", "load_init", "param_groups", "normalise", "make_transform"}


def parts(text):
    """{name: source} of what must be the same wherever it stands."""
    above, _, below = text.partition(MARK)
    found = {"below the mark": below}
    for node in ast.parse(above).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(above.splitlines()[first - 1 : node.end_lineno])
    return found


def test_copies_are_identical():
    first = {}
    for path in sorted(ROOT.glob("train_*.py")):
        for name, source in parts(path.read_text()).items():
            assert source == first.setdefault(name, source), (path.name, name)
    assert "batches" in first and "def main" in first["below the mark"]
