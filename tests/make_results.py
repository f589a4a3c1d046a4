"""Make README's two tables and RESULTS.md from results.jsonl.

    python tests/make_results.py                        # rewrite them
    grep -h ^RESULT LOG... >> tests/results.jsonl       # how a line gets in: as it was printed

Each line there is a RESULT line as printed, with the commit and the machine added.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
from visualize import group_results, read_results, results_table, spread  # noqa: E402

ARMS = ("none", "random", "shuffled", "pretrained")
PAPER = {  # none -> pretrained, its own setting
    "image": "80.1 → 80.7 (ImageNet)", "pointcloud": "83.1 → 83.8 (ScanObjectNN)",
    "video": "64.7 → 65.9 (SSv2)", "motion": "0.77 → 0.76 m (Argoverse)",
    "vqa": "69.6 → 70.2 (VQA v2), 47.2 → 48.1 (SQA3D)", "retrieval": "49.7 → 50.2 (Flickr30k)",
}  # fmt: skip


def summary(results, real):
    """A row for each data set, arms in columns: the first metric, of the runs with most seeds."""
    lines = ["| task, data | metric | " + " | ".join(f"`{arm}`" for arm in ARMS)]
    lines[0] += " | paper |" if real else " |"
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for name, arms in group_results(results).items():
        task, data = name.split()[:2]
        if data.startswith("toy") == real:
            continue
        first = next(iter(arms.values()))[0]
        cells = [f"{task}, {data}", next(iter(first["metrics"]))]
        for kind in ARMS:
            runs = [r for arm, r in arms.items() if arm[0] == kind and arm[3] in ("", "1.0")]
            best = max(runs, key=len, default=[])
            cells.append(
                spread([next(iter(r["metrics"].values())) for r in best]) if best else "not run"
            )
        lines.append("| " + " | ".join(cells + [PAPER[task]] * real) + " |")
    there = {name.split()[0] for name in group_results(results) if " toy" not in name}
    for task in sorted(PAPER.keys() - there) if real else ():
        lines.append(f"| {task} | |" + " not run |" * len(ARMS) + f" {PAPER[task]} |")
    return "\n".join(lines)


def fill(text, mark, table):
    """README's text with a table between its two marks."""
    before, _, rest = text.partition(f"<!-- {mark} -->\n")
    after = rest.partition("<!-- end -->")[2]
    return f"{before}<!-- {mark} -->\n{table}\n<!-- end -->{after}"


def all_tables(results):
    """RESULTS.md."""
    parts = [HEAD]
    for name, arms in group_results(results).items():
        parts.append(f"## {name}\n\n{results_table(arms)}")
    return "\n\n".join(parts) + "\n"


HEAD = """# All results

Made from [results.jsonl](results.jsonl) by `python tests/make_results.py`. Mean ± standard
deviation over the seeds of an arm; the difference to `none` is paired by seed, ± its 95 % interval
(two seeds or more). proj-lr: the rate of the block's projections as a part of lr. Toys are drawn by
the scripts; tiny_llm is the bundled Llama. smollm2-135m-instruct is SmolLM2-135M-Instruct, its
layers de-quantised from a 4-bit file (Q4_1); whole, after that, it predicts TinyStories with 2.09
nats a token, 10.95 with random weights. `--llm HuggingFaceTB/SmolLM2-135M-Instruct` gets it."""


def main():
    results = read_results(TESTS / "results.jsonl")
    readme = TESTS.parent / "README.md"
    text = fill(readme.read_text(), "toys", summary(results, real=False))
    readme.write_text(fill(text, "real", summary(results, real=True)))
    (TESTS / "RESULTS.md").write_text(all_tables(results))


if __name__ == "__main__":
    main()
