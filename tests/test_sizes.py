"""Files stay small and plain: lines, and how dense they are."""

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
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def is_nested(node):
    """Comprehensions and the like, and a, b = c, d."""
    pair = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
    return isinstance(node, NESTED) or (pair and isinstance(node.value, ast.Tuple))


def count_code(text, nodes):
    """How many lines are neither blank, comment nor docstring."""
    lines = text.splitlines()
    for node in nodes:
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            for i in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[i] = ""
    return sum(line.strip()[:1] not in ("", "#") for line in lines)


@pytest.mark.parametrize("name", LINES)
def test_a_file_is_short_and_plain(name):
    text = (ROOT / f"{name}.py").read_text()
    nodes = [node for node in ast.walk(ast.parse(text)) if not isinstance(node, SMALL)]
    code = count_code(text, nodes)
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


@pytest.mark.parametrize("files, most", [("*.py", 4100), ("tests/*.py", 2400)])
def test_all_is_short(files, most):
    assert sum(len(path.read_text().splitlines()) for path in ROOT.glob(files)) <= most
