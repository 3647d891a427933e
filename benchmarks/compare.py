"""Several results of `magmax bench` side by side: does MagMax's lead survive, and what does each method cost?

    .venv/bin/python benchmarks/compare.py FOLDER ... --out TABLES.md

The first tables have a row for each folder and a column for each rule on a training; their last row is what MagMax
leads
by in the mean over folders, with the p of a paired t-test whose pairs are the folders' means over seeds. The next has,
for each folder, training and choice of scaling factors, MagMax's accuracy and what it leads each other method by,
over the same seeds: mean, 95 % interval, p of the paired t-test. The last has time and bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magmax.continual.evaluation.tables import MAIN_MEASURE, SeedMean, as_csv, compare_paired, tidy

FACTOR_VARIANTS = {"default": "own", "chosen": "chosen"}
COSTS = {"training seconds": 1, "merging seconds": 1, "peak memory bytes": 1e6, "stored bytes": 1e6}


class FolderResults:
    """One folder's tidy rows."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        content = json.loads((folder / "results.json").read_text())
        self.rows = list(csv.DictReader(as_csv(tidy(content["records"])).splitlines()))
        self.recipe = content["recipe"]

    def values(self, method: str, variant: str, measure: str = MAIN_MEASURE) -> dict[int, float]:
        """By seed; a method without a scaling factor has the same in every variant."""
        return {
            int(row["seed"]): float(row["value"])
            for row in self.rows
            if (row["method"], row["measure"]) == (method, measure)
            and (row["variant"] == variant or not row["scaling_factor"])
        }

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row["method"] for row in self.rows))

    @property
    def num_tasks(self) -> int:
        told = {row["measure"] for row in self.rows if row["measure"].startswith("accuracy on task")}
        return len(told)


def overview_rows(results: Sequence[FolderResults], training: str, variant: str) -> list[list[str]]:
    """The names of all methods on a training, a line for each result, and what MagMax leads by in the mean over
    these.
    """
    told = [m for result in results for m in result.methods if m.endswith(f"/{training}")]
    rules = sorted(dict.fromkeys(m for m in told if m != f"last/{training}"), key=lambda m: m.startswith("magmax"))
    methods = ["zero_shot", f"last/{training}", *rules, "last/joint"]
    if training == "independent":
        methods.remove(f"last/{training}")
    means = [
        {m: float(np.mean(list(found.values()))) for m in methods if (found := result.values(m, variant))}
        for result in results
    ]
    lines = [["results", *(m.partition("/")[0] if m != "last/joint" else "joint" for m in methods)]]
    lines += [
        [r.name, *(format_percent(r.values(m, variant)) if m in of else "-" for m in methods)]
        for r, of in zip(results, means, strict=True)
    ]
    ours, last = f"magmax/{training}", ["**MagMax leads by**"]
    for method in methods:
        both = [of for of in means if method in of and ours in of]
        if method in (ours, "last/joint") or len(both) < 2:
            last.append("")
            continue
        pair = compare_paired(ours, method, variant, [of[ours] for of in both], [of[method] for of in both])
        last.append(f"{100 * pair.difference.mean:+.1f} (p = {pair.p_t:.2g})")
    return [*lines, last]


def lead_rows(results: Sequence[FolderResults]) -> list[list[str]]:
    """MagMax against every other method on the same training."""
    lines: list[list[str]] = []
    for result in results:
        warm = result.recipe["fit"]["warmup"]
        about = [result.name, str(result.num_tasks), f"{warm:.0%}" if warm < 1 else f"{warm:g} steps"]
        for ours in (method for method in result.methods if method.startswith("magmax/")):
            training = ours.partition("/")[2]
            others = [m for m in result.methods if m.endswith(f"/{training}") and m != ours] + ["zero_shot"]
            for variant, factor in FACTOR_VARIANTS.items():
                mine = result.values(ours, variant)
                for other in others:
                    theirs = result.values(other, variant)
                    seeds = sorted(mine.keys() & theirs.keys())
                    if not seeds:
                        continue
                    pair = compare_paired(ours, other, variant, [mine[s] for s in seeds], [theirs[s] for s in seeds])
                    d = pair.difference
                    told = [f"{100 * d.mean:+.1f}", "-", "-"]
                    if d.n > 1:
                        told[1] = f"{100 * (d.mean - d.half):+.1f} .. {100 * (d.mean + d.half):+.1f}"
                        told[2] = f"{pair.p_t:.2g}"
                    lines.append(
                        [*about, training, factor, format_percent(mine), other.partition("/")[0], *told, f"{d.n}"]
                    )
    return lines


def cost_rows(results: Sequence[FolderResults]) -> list[list[str]]:
    """What each method took, against the number of tasks."""
    lines: list[list[str]] = []
    for result in sorted(results, key=lambda each: each.num_tasks):
        for method in result.methods:
            found = [list(result.values(method, "default", measure).values()) for measure in COSTS]
            means = [
                f"{SeedMean.of(own).mean / unit:,.1f}" if own else "-"
                for own, unit in zip(found, COSTS.values(), strict=True)
            ]
            lines.append([result.name, str(result.num_tasks), method, *means])
    return lines


def format_percent(values: dict[int, float]) -> str:
    mean = SeedMean.of(list(values.values()))
    return f"{100 * mean.mean:.1f}" + ("" if mean.n == 1 else f" ± {100 * mean.std:.1f}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results = [FolderResults(folder) for folder in given.folders]
    head = [
        "results",
        "tasks",
        "warm-up",
        "training",
        "factor",
        "MagMax",
        "against",
        "leads by",
        "95 % interval",
        "p",
        "seeds",
    ]
    text = "Accuracies in %, average over tasks after the last, mean ± standard deviation over seeds.\n\n"
    for training in ("sequential", "independent"):
        for variant, factor in FACTOR_VARIANTS.items():
            title, *lines = overview_rows(results, training, variant)
            text += f"## {training} checkpoints, {factor} scaling factors\n\n{markdown_table(title, lines)}\n\n"
    text += "## Pair by pair\n\nWhat MagMax leads the other by, over the same seeds.\n\n"
    text += (
        markdown_table(head, lead_rows(results))
        + "\n\n## Costs\n\nMeans over seeds; the training is the training's.\n\n"
    )
    text += markdown_table(
        ["results", "tasks", "method", "training s", "merging s", "peak MB", "stored MB"], cost_rows(results)
    )
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
