"""What each calibration gains over what one well-chosen scaling factor does, from results of `magmax bench`.

    .venv/bin/python benchmarks/magic.py FOLDER ... --out TABLES.md

For each folder and training a table of accuracies, a row for each rule: as merged with the rule's own scaling factor,
with
the one chosen on validation examples (the control), and calibrated in each way of the recipe. Then two tables of what
is gained over the own factor, and over the control, in points with the p of a paired t-test over seeds; their last row
is of the mean over all rules. Where nothing was chosen, the seconds that evaluating takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from compare import FolderResults, format_percent, markdown_table

from magmax.continual.evaluation.tables import SeedMean, compare_paired
from magmax.continual.experiment import rule_name

DEFAULT_FACTOR, CHOSEN_FACTOR = "own factor", "chosen factor"
Values = Mapping[int, float]


def rule_columns(result: FolderResults, rule: str, training: str, measure: str | None = None) -> dict[str, Values]:
    """A rule's accuracies by seed, or another measure: as merged, under the control, and under each calibration."""
    more = [] if measure is None else [measure]
    names = {rule_name(choice): f"{rule}+{rule_name(choice)}/{training}" for choice in result.recipe["calibrations"]}
    found = {DEFAULT_FACTOR: result.values(f"{rule}/{training}", "default", *more)}
    if control := result.values(f"{rule}/{training}", "chosen", *more):
        found[CHOSEN_FACTOR] = control
    return found | {name: result.values(method, "default", *more) for name, method in names.items()}


def format_gain(values: Values, reference: Values) -> str:
    """In points, with the p of a paired t-test over the seeds that both have."""
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return "-"
    pair = compare_paired("", "", "", [values[s] for s in seeds], [reference[s] for s in seeds])
    points = f"{100 * pair.difference.mean:+.1f}"
    if len(seeds) == 1:
        return points
    return f"{points} (p = {pair.p_t:.2g})" if pair.p_t >= 0.001 else f"{points} (p < 0.001)"


def mean_over_rules(by_rule: Sequence[Values]) -> Values:
    """By seed, the mean over rules."""
    seeds = set.intersection(*(set(one) for one in by_rule))
    return {seed: float(np.mean([one[seed] for one in by_rule])) for seed in seeds}


def render_tables(result: FolderResults) -> str:
    text = f"## {result.name}\n\n"
    rules = [rule_name(rule) for rule in result.recipe["rules"]]
    for training in dict.fromkeys(method.partition("/")[2] for method in result.methods if "/" in method):
        found = {rule: rule_columns(result, rule, training) for rule in rules}
        found = {rule: own for rule, own in found.items() if own[DEFAULT_FACTOR]}
        if not found:
            continue
        names = list(next(iter(found.values())))
        known = {m: result.values(m, "default") for m in ("zero_shot", f"last/{training}")}
        references = [f"{method.partition('/')[0]} {format_percent(own)}" for method, own in known.items() if own]
        text += f"### {training} checkpoints\n\nAccuracy; {', '.join(references)}.\n\n"
        lines = [
            [rule, *(format_percent(own[name]) if own[name] else "-" for name in names)] for rule, own in found.items()
        ]
        text += markdown_table(["rule", *names], lines) + "\n\n"
        found["**mean over rules**"] = {name: mean_over_rules([own[name] for own in found.values()]) for name in names}
        for base in (name for name in (DEFAULT_FACTOR, CHOSEN_FACTOR) if name in names):
            gained = [name for name in names if name not in (DEFAULT_FACTOR, base)]
            lines = [[rule, *(format_gain(own[name], own[base]) for name in gained)] for rule, own in found.items()]
            text += f"Points gained over the {base}:\n\n{markdown_table(['rule', *gained], lines)}\n\n"
        if CHOSEN_FACTOR in names:
            continue
        times = {rule: rule_columns(result, rule, training, "evaluating seconds") for rule in rules}
        lines = [
            [rule, *(f"{SeedMean.of(list(own[name].values())).mean:.2f}" if own[name] else "-" for name in names)]
            for rule, own in times.items()
        ]
        text += f"Seconds to evaluate:\n\n{markdown_table(['rule', *names], lines)}\n\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    text = "# MAGIC's calibrations after every rule\n\nAccuracies in %, average over tasks after the last, mean ± "
    text += "standard deviation over seeds.\n\n" + "".join(
        render_tables(FolderResults(folder)) for folder in given.folders
    )
    print(text)
    if given.out:
        given.out.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
