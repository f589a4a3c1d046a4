"""Files stay small and plain: lines, and how dense they are.

python -m pytest tests/test_sizes.py -q
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = {"llmblock": 400, "train_image": 500, "train_pointcloud": 500, "train_video": 520}
LINES |= {"train_motion": 535, "train_vqa": 680, "train_retrieval": 530, "visualize": 430}
MARK = "# ---------------------------------------------------------------- the same in every script"
SMALL = (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)
NESTED = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.Lambda)
NESTED += (ast.NamedExpr,)


def is_nested(node):
    """Comprehensions and the like, and a, b = c, d."""
    pair = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
    return isinstance(node, NESTED) or (pair and isinstance(node.value, ast.Tuple))


def code_lines(text, tree):
    """Numbers of the lines that are neither blank, comment nor docstring."""
    documented = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return [
        i for i, line in lines if line.strip() and line.strip()[0] != "#" and i not in documented
    ]


@pytest.mark.parametrize("name", LINES)
def test_a_file_is_short_and_plain(name):
    text = (ROOT / f"{name}.py").read_text()
    tree = ast.parse(text)
    nodes = [node for node in ast.walk(tree) if not isinstance(node, SMALL)]
    code = len(code_lines(text, tree))
    assert len(text.splitlines()) <= LINES[name]
    assert round(len(nodes) / code, 1) <= 9.0
    assert 100 * sum(map(is_nested, nodes)) / code <= 12
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            longest = 25 if node.name == "forward" else 50
            assert node.end_lineno - node.lineno < longest, node.name
    if name.startswith("train_"):
        shared = text.partition(MARK)[2].partition("\n\n\n")[2]  # without its constants
        assert len(shared.splitlines()) <= 150
        line = text.partition("# the frozen LLM block: this line is the paper")[0].count("\n")
        assert line < len(text.splitlines()) / 3


@pytest.mark.parametrize("files, most", [("*.py", 4100), ("tests/test_*.py", 2400)])
def test_all_is_short(files, most):
    assert sum(len(path.read_text().splitlines()) for path in ROOT.glob(files)) <= most
