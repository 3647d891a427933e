"""The benchmark of preferences as tables and words: where a preference helps, and where it does not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...continual.evaluation.tables import Mean, Paired, as_csv
from ...continual.experiment import Experiment
from ...continual.training.weight_files import write_bytes
from ..mixtures import MIXTURES
from .environment_runs import FOLDER, Record
from .environments_config import BASELINES, Study, shares_of
from .tidy_rows import Row, Table, tidy

VARIANTS = {"0.5": "scaling factor 0.5", "chosen": "factors chosen on held-out training examples"}
OURS = "tunable/optimal/"
ORACLE = f"{OURS}oracle"


def write_report(study: Study, experiment: Experiment, records: Sequence[Record], out: Path) -> list[Path]:
    """Write results.csv (tidy rows), results.json (recipes, factors, tests) and results.md into OUT/environments.

    Of a study that was stopped, the records of some parts do, if the baselines of a chain are among them.
    """
    rows = tidy(records)
    chains = list(dict.fromkeys(record["chain"] for record in records))
    first = [record for record in records if record["part"] == BASELINES]
    content = {
        "study": study.model_dump(),
        "experiment": experiment.model_dump(),
        "baselines": [{key: record[key] for key in ("seed", "chain", "search", "chosen", "own")} for record in first],
        "paired": [
            {"chain": chain, **asdict(pair)} for chain in chains for pair in comparisons(Table(of(rows, chain)), study)
        ],
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "merges": sum(record["merges"] for record in records),
    }
    tasks = len(first[0]["own"])
    text = [about(study, experiment, records, len(study.seeds) * len(study.chains) * len(study.parts(tasks)))]
    for chain in chains:
        chosen = {name: [r["chosen"][name] for r in first if r["chain"] == chain] for name in first[0]["chosen"]}
        told = ", ".join(f"{name} {' '.join(f'{f:g}' for f in found)}" for name, found in chosen.items())
        text += [f"## Chain: {chain}", f"Chosen factors, seed by seed: {told}.", *sections(study, of(rows, chain))]
    files = {
        "results.csv": as_csv(rows),
        "results.json": json.dumps(content, indent=1) + "\n",
        "results.md": "\n\n".join(text) + "\n",
    }
    folder = out / FOLDER
    for name, written in files.items():
        write_bytes(written.encode(), folder / name)
    return [folder / name for name in files]


def of(rows: Sequence[Row], chain: str) -> list[Row]:
    """The rows of one chain."""
    return [row for row in rows if row["chain"] == chain]


def about(study: Study, experiment: Experiment, records: Sequence[Record], parts: int) -> str:
    """What was measured, in words, of so many parts."""
    stopped = f"NOT ALL IS MEASURED: {len(records)} of {parts} parts. " if len(records) < parts else ""
    environments = (
        f" {study.draws} environments of each kind, {study.target:.0%} of each the target sample and the rest scored, "
        "among all classes; means over environments. oracle: the true mixture; manual: its tasks in equal parts; auto: "
        "each half of the target sample tries what is made of the other. The sources label, ot, cos, mmd and auto see "
        "the target sample alone."
    )
    spent = f"{sum(r['merges'] for r in records)} merges, {sum(r['seconds'] for r in records):.0f} s."
    return (
        f"{stopped}Experiment {study.experiment} (data {json.dumps(experiment.data)}, scenario "
        f"{json.dumps(experiment.scenario)}), seeds {', '.join(map(str, study.seeds))}."
        f"{environments * bool(study.mixtures)} Accuracies in %, mean ± standard deviation over seeds. {spent}"
    )


def sections(study: Study, rows: Sequence[Row]) -> list[str]:
    """All tables and remarks on one chain."""
    table, kinds = Table(rows), [name for name in study.mixtures if len(MIXTURES[name]) <= widest(rows)]
    told = [methods_table(table, kinds), selections_table(table, kinds, study), crowd_table(table)]
    text = told if table.values else []
    text += ["\n".join(f"* {line}" for line in remarks(table, study, Table(rows, "distance")))]
    for part, measured in (("curves", curves_table), ("samples", samples_table), ("archive", archive_table)):
        if own := [row for row in rows if row["part"] == part]:
            text.append(measured(own))
    return [part for part in text if part]


def widest(rows: Sequence[Row]) -> int:
    """The most tasks that some environment has."""
    return max((len(shares_of(row["mixture"])) for row in rows if row["mixture"]), default=0)


def ordered(table: Table, kinds: Sequence[str], draws: int | None = None) -> list[tuple[str, str, list[float]]]:
    """Methods and variants that were measured in all these kinds, best first, with their means seed by seed."""
    found = [(*key, table.by_seed(*key, kinds, draws)) for key in table.values]
    return sorted((each for each in found if each[2]), key=lambda each: -float(np.mean(each[2])))


def methods_table(table: Table, kinds: Sequence[str]) -> str:
    """Everything but the other selections, by kind of environment."""
    lines = [
        [method, variant or "-", *(percent(table.by_seed(method, variant, [kind])) for kind in kinds), percent(values)]
        for method, variant, values in ordered(table, kinds)
        if not method.startswith("tunable/") or method.startswith(OURS)
    ]
    return drawn(["method", "factor", *kinds, "mean"], lines)


def selections_table(table: Table, kinds: Sequence[str], study: Study) -> str:
    """The selections against each other, on the environments that all were tried in."""
    draws = min(study.selections.values(), default=0)
    by_source: dict[tuple[str, str], dict[str, list[float]]] = {}
    for method, variant, values in ordered(table, kinds, draws):
        if method.startswith("tunable/"):
            _, selection, source = method.split("/")
            by_source.setdefault((source, variant), {})[selection] = values
    names = ["optimal", *study.selections]
    lines = [[*key, *(percent(own.get(name, [])) for name in names)] for key, own in by_source.items()]
    title = f"Selections, on {draws} environments of each kind:\n\n"
    return title + drawn(["preference", "factor", *names], lines) if draws else ""


def crowd_table(table: Table) -> str:
    """Accuracy against the number of tasks in the target, in equal parts."""
    even = {len(shares_of(kind)): kind for kind in table.mixtures if len(set(shares_of(kind))) == 1}
    kinds = [even[m] for m in sorted(even)]
    lines = [
        [method, variant or "-", *(percent(table.by_seed(method, variant, [kind])) for kind in kinds)]
        for method, variant, _ in ordered(table, kinds)
        if not method.startswith("tunable/") or method.startswith(OURS)
    ]
    title = "Accuracy against M, the number of tasks in the target, in equal parts:\n\n"
    return title + drawn(["method", "factor", *(f"M = {m}" for m in sorted(even))], lines)


def comparisons(table: Table, study: Study) -> list[Paired]:
    """Every source against MagMax and against the oracle, and the oracle against the control, over all mixtures."""
    kinds, found = [kind for kind in study.mixtures if kind in table.mixtures], []
    draws = min(study.selections.values(), default=0)
    for variant in VARIANTS:
        pairs = [(f"{OURS}{source}", "magmax", None) for source in (*study.sources, "manual", "oracle")]
        pairs += [(f"{OURS}{source}", ORACLE, None) for source in (*study.sources, "manual")]
        pairs += [(ORACLE, f"tunable/{name}/oracle", draws) for name in study.selections if draws]
        pairs += [(ORACLE, "weighted_average/oracle", None)]
        found += [table.against(ours, other, variant, kinds, several) for ours, other, several in pairs]
    return [pair for pair in found if pair is not None]


def remarks(table: Table, study: Study, distance: Table) -> list[str]:
    """The tests in words, the best source by name, and the kinds of environments where a source does not help."""
    pairs = comparisons(table, study)
    lines: list[str] = []
    for variant, words in VARIANTS.items():
        own = [pair for pair in pairs if pair.variant == variant]
        automatic = [p for p in own if p.other == "magmax" and p.ours.removeprefix(OURS) in study.sources]
        if automatic:
            best = max(automatic, key=lambda pair: pair.difference.mean)
            lines.append(f"With {words}, the best source that sees a sample alone is {best.ours}.")
        lines += [told(pair) for pair in own]
    for source in study.sources:
        worse = [
            kind
            for kind in table.mixtures
            if (pair := table.against(f"{OURS}{source}", "magmax", "chosen", [kind], None))
            and pair.difference.mean <= 0
        ]
        away = distance.by_seed(f"{OURS}{source}", "chosen", distance.mixtures)
        if away:
            lines.append(
                f"{source}: {100 * np.mean(away):.0f} % of its weight lies elsewhere than the true mixture's; with "
                f"chosen factors it does not help against MagMax in: {', '.join(worse) or 'none'}."
            )
    return lines


def told(pair: Paired) -> str:
    """One paired test over seeds in words."""
    d = pair.difference
    words = f"{pair.ours} minus {pair.other} ({pair.variant}): {100 * d.mean:+.1f} points"
    if d.n < 2:
        return f"{words} on one seed, which proves nothing."
    low, high = 100 * (d.mean - d.half), 100 * (d.mean + d.half)
    return f"{words} (95 % interval {low:+.1f} .. {high:+.1f}, paired t-test over {d.n} seeds p = {pair.p_t:.3g})."


def curves_table(rows: Sequence[Row]) -> str:
    """First and last task under schedules; each task under its own weight; factor chosen."""
    lines: list[list[str]] = []
    tasks = max(int(row["measure"].rsplit(" ", 1)[1]) for row in rows)
    for method, x in dict.fromkeys((row["method"], row["x"]) for row in rows):
        shown = [1, tasks] if method == "schedule" else [int(method.rsplit(" ", 1)[1])]
        for task in shown:
            values = picked(rows, method=method, x=x, variant="chosen", measure=f"accuracy on task {task}")
            lines.append([method if method != "schedule" else "a", f"{x:g}", f"task {task}", percent(values)])
    return "Control curves, chosen factor:\n\n" + drawn(["control", "value", "accuracy on", "%"], lines)


def samples_table(rows: Sequence[Row]) -> str:
    """Accuracy and distance from the oracle against the number of target samples a task."""
    counts = sorted({row["x"] for row in rows})
    lines = [
        [method, measure, *(percent(means(rows, method, measure, count)) for count in counts)]
        for method in dict.fromkeys(row["method"] for row in rows)
        for measure in ("accuracy", "distance")
    ]
    title = "Target samples a task (held-out training examples), chosen factor, in %:\n\n"
    return title + drawn(["method", "measure", *map(str, counts)], lines)


def means(rows: Sequence[Row], method: str, measure: str, x: int) -> list[float]:
    """For each seed the mean over environments."""
    own = [r for r in rows if (r["method"], r["measure"], r["x"], r["variant"]) == (method, measure, x, "chosen")]
    seeds = sorted({row["seed"] for row in own})
    return [float(np.mean([row["value"] for row in own if row["seed"] == seed])) for seed in seeds]


def archive_table(rows: Sequence[Row]) -> str:
    """What an archive takes and what it loses."""
    lines: list[list[str]] = []
    for method, x in dict.fromkeys((row["method"], row["x"]) for row in rows):
        found: Mapping[str, list[float]] = {
            name: picked(rows, method=method, x=x, measure=name) for name in {row["measure"] for row in rows}
        }
        size, model = np.mean(found["bytes"]), np.mean(found["model_bytes"])
        lost = np.subtract(found["accuracy"], found["exact"])
        took = [f"{np.mean(found[name]):.1f} s" for name in ("making", "seconds")]
        lines.append([f"top {x:g}, {method}", f"{size / 1e6:,.0f} MB", f"{size / model:.2f}", *took])
        lines[-1] += [percent(found["accuracy"]), percent(found["exact"]), f"{100 * np.mean(lost):+.2f}"]
        lines[-1].append(f"{100 * np.max(np.abs(lost)):.2f}")
    head = [
        "archive / preference",
        "bytes",
        "models",
        "making",
        "merging",
        "accuracy",
        "exact",
        "difference",
        "worst seed",
    ]
    return "Archives against the models themselves, all test examples, chosen factor:\n\n" + drawn(head, lines)


def picked(rows: Sequence[Row], **wanted: Any) -> list[float]:
    """The values of the rows that have all this, seed by seed."""
    return [row["value"] for row in rows if all(row[key] == value for key, value in wanted.items())]


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in %."""
    if not values:
        return "-"
    mean = Mean.of(values)
    return f"{100 * mean.mean:.1f}" + ("" if mean.n == 1 else f" ± {100 * mean.std:.1f}")


def drawn(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = "|" + "---|" * len(head)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])
