"""Make README's two tables and RESULTS.md from results.jsonl.

    python tests/make_results.py

A line of results.jsonl is a RESULT line as it was printed, with five things added: the best value
on validation data ("val"), command, commit, machine, and other flags that tell runs apart.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
import visualize  # noqa: E402

ARMS = ("none", "random", "shuffled", "pretrained")
PAPER = {  # none -> pretrained, its own setting
    "image": "80.1 → 80.7", "pointcloud": "83.1 → 83.8", "video": "64.7 → 65.9",
    "motion": "0.77 → 0.76 m", "vqa": "69.6 → 70.2", "retrieval": "49.7 → 50.2",
}  # fmt: skip
NAMES = {  # what the real data are
    "image folder": "image, 8,000 of CIFAR-10", "pointcloud h5": "point clouds, 300 of DALES",
    "video ssv2": "video, 1,575 of Sprites", "motion argoverse1": "motion, Argoverse 1, no maps",
    "vqa easyvqa": "VQA, easy-VQA (blind 66.9)", "vqa vqav2": "VQA, DAQUAR (blind 20.4)",
    "vqa sqa3d": "3D VQA, scenes (blind 64.4)", "retrieval karpathy": "captions, Flickr (chance 1)",
}  # fmt: skip
HEAD = (TESTS / "about_results.md").read_text().strip()


def choose(arms, kind, task, llm):
    """The runs of a kind, at the rate of its projections that is best on validation, seed 0."""
    best = min if task == "motion" else max
    runs = [r for arm, r in arms.items() if arm[0] == kind and arm[1] in ("", llm)]
    return best(runs, key=lambda r: r[0]["val"], default=[])


def summary(groups, real):
    """README's table: a row for each data set, arms in columns, the first metric."""
    head = ["task, data", "metric", *[f"`{kind}`" for kind in ARMS], *["paper, its data"] * real]
    rows = {}  # of groups of the same data, that of most results is the last, and stays
    for name, arms in sorted(groups.items(), key=lambda item: sum(map(len, item[1].values()))):
        task, data = name.split()[:2]
        if "--blind" not in name and (f"{task} {data}" in NAMES if real else "toy" in data):
            metric = next(iter(next(iter(arms.values()))[0]["metrics"]))
            row = [NAMES.get(f"{task} {data}", f"{task}, {data}".removesuffix(", toy")), metric]
            for kind in ARMS:
                runs = choose(arms, kind, task, "smollm2-135m-instruct" if real else "tiny_llm")
                cell = visualize.spread([r["metrics"][metric] for r in runs]) if runs else "not run"
                row.append(cell + " †" * bool(runs and runs[0]["proj_lr"] < 1))
            paper = "(47.2) → 48.1" if data == "sqa3d" else PAPER[task]
            rows[task, data] = [*row, *[paper] * real]
    keys = sorted(rows, key=lambda key: list(PAPER).index(key[0]))
    return visualize.markdown([head, *[rows[key] for key in keys]])


def make(readme):
    """README's text with its two tables made anew, and the text of RESULTS.md."""
    results = visualize.read_results(TESTS / "results.jsonl")
    results.sort(key=lambda r: (r["kind"] != "none", r["kind"], r["layers"] or [], r["seed"]))
    groups = visualize.group_results(results)
    for mark, real in (("toys", False), ("real", True)):
        before, _, rest = readme.partition(f"<!-- {mark} -->\n")
        after = rest.partition("<!-- end -->")[2]
        readme = f"{before}<!-- {mark} -->\n{summary(groups, real)}\n<!-- end -->{after}"
    parts = [f"## {name}\n\n{visualize.results_table(arms)}" for name, arms in groups.items()]
    return readme, "\n\n".join([HEAD, *parts, (TESTS / "filtering.md").read_text()])


if __name__ == "__main__":
    path = TESTS.parent / "README.md"
    readme, tables = make(path.read_text())
    path.write_text(readme)
    (TESTS / "RESULTS.md").write_text(tables)
