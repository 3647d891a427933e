"""The benchmark of preferences as tables and words: where a preference helps, and where it does not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints.journal import lock_folder
from ...continual.evaluation.tables import PairedComparison, SeedMean, as_csv
from ...continual.experiment import Experiment
from ...continual.training.weight_files import write_bytes
from ..mixtures import MIXTURES
from .environment_runs import FOLDER_NAME, Record
from .environments_config import BASELINES, EnvironmentsConfig, mixture_shares
from .tidy_rows import ScoreTable, TidyRow, tidy_rows

VARIANTS = {"0.5": "scaling factor 0.5", "chosen": "factors chosen on held-out training examples"}
TUNABLE_PREFIX = "tunable/optimal/"
ORACLE_METHOD = f"{TUNABLE_PREFIX}oracle"


def write_report(
    config: EnvironmentsConfig, experiment: Experiment, records: Sequence[Record], out: Path
) -> list[Path]:
    """Write results.csv (tidy rows), results.json (recipes, factors, tests) and results.md into OUT/environments.

    Of a study that was stopped, the records of some parts do, if the baselines of a training are among them.
    """
    rows = tidy_rows(records)
    trainings = list(dict.fromkeys(record["training"] for record in records))
    first = [record for record in records if record["part"] == BASELINES]
    content = {
        "study": config.model_dump(),
        "experiment": experiment.model_dump(),
        "baselines": [
            {key: record[key] for key in ("seed", "training", "search", "chosen", "own")} for record in first
        ],
        "paired": [
            {"training": training, **asdict(pair)}
            for training in trainings
            for pair in paired_comparisons(ScoreTable(select_training(rows, training)), config)
        ],
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "merges": sum(record["merges"] for record in records),
    }
    tasks = len(first[0]["own"])
    text = [
        describe_experiment(
            config, experiment, records, len(config.seeds) * len(config.training) * len(config.cell_names(tasks))
        )
    ]
    for training in trainings:
        chosen = {name: [r["chosen"][name] for r in first if r["training"] == training] for name in first[0]["chosen"]}
        factors_text = ", ".join(f"{name} {' '.join(f'{f:g}' for f in factors)}" for name, factors in chosen.items())
        text += [
            f"## Training: {training}",
            f"Chosen factors, seed by seed: {factors_text}.",
            *render_sections(config, select_training(rows, training)),
        ]
    files = {
        "results.csv": as_csv(rows),
        "results.json": json.dumps(content, indent=1) + "\n",
        "results.md": "\n\n".join(text) + "\n",
    }
    folder = out / FOLDER_NAME
    with lock_folder(out):
        for name, written in files.items():
            write_bytes(written.encode(), folder / name)
    return [folder / name for name in files]


def select_training(rows: Sequence[TidyRow], training: str) -> list[TidyRow]:
    """The rows of one training."""
    return [row for row in rows if row["training"] == training]


def describe_experiment(
    config: EnvironmentsConfig, experiment: Experiment, records: Sequence[Record], num_cells: int
) -> str:
    """Return what was measured, in words, of so many parts."""
    stopped = f"NOT ALL IS MEASURED: {len(records)} of {num_cells} parts. " if len(records) < num_cells else ""
    environments = (
        f" {config.draws} environments of each kind, {config.target:.0%} of each the target sample and the rest "
        f"scored, "
        "among all classes; means over environments. oracle: the true mixture; manual: its tasks in equal parts; auto: "
        "each half of the target sample tries what is made of the other. The sources label, ot, cos, mmd and auto see "
        "the target sample alone."
    )
    spent = f"{sum(r['merges'] for r in records)} merges, {sum(r['seconds'] for r in records):.0f} s."
    return (
        f"{stopped}Experiment {config.experiment} (data {json.dumps(experiment.data)}, scenario "
        f"{json.dumps(experiment.scenario)}), seeds {', '.join(map(str, config.seeds))}."
        f"{environments * bool(config.mixtures)} Accuracies in %, mean ± standard deviation over seeds. {spent}"
    )


def render_sections(config: EnvironmentsConfig, rows: Sequence[TidyRow]) -> list[str]:
    """All tables and remarks on one training."""
    table, kinds = ScoreTable(rows), [name for name in config.mixtures if len(MIXTURES[name]) <= max_tasks(rows)]
    sections = [methods_table(table, kinds), selections_table(table, kinds, config), task_count_table(table)]
    text = sections if table.values else []
    text += ["\n".join(f"* {line}" for line in remarks(table, config, ScoreTable(rows, "distance")))]
    for part, measured in (("curves", curves_table), ("samples", samples_table), ("archive", archive_table)):
        if part_rows := [row for row in rows if row["part"] == part]:
            text.append(measured(part_rows))
    return [part for part in text if part]


def max_tasks(rows: Sequence[TidyRow]) -> int:
    """The most tasks that some environment has."""
    return max((len(mixture_shares(row["mixture"])) for row in rows if row["mixture"]), default=0)


def rank_methods(
    table: ScoreTable, mixtures: Sequence[str], draws: int | None = None
) -> list[tuple[str, str, list[float]]]:
    """Methods and variants that were measured in all these kinds, best first, with their means seed by seed."""
    ranked = [(*key, table.seed_means(*key, mixtures, draws)) for key in table.values]
    return sorted((each for each in ranked if each[2]), key=lambda each: -float(np.mean(each[2])))


def methods_table(table: ScoreTable, mixtures: Sequence[str]) -> str:
    """Everything but the other selections, by kind of environment."""
    lines = [
        [
            method,
            variant or "-",
            *(format_percent(table.seed_means(method, variant, [kind])) for kind in mixtures),
            format_percent(values),
        ]
        for method, variant, values in rank_methods(table, mixtures)
        if not method.startswith("tunable/") or method.startswith(TUNABLE_PREFIX)
    ]
    return markdown_table(["method", "factor", *mixtures, "mean"], lines)


def selections_table(table: ScoreTable, mixtures: Sequence[str], config: EnvironmentsConfig) -> str:
    """The selections against each other, on the environments that all were tried in."""
    draws = min(config.selections.values(), default=0)
    by_source: dict[tuple[str, str], dict[str, list[float]]] = {}
    for method, variant, values in rank_methods(table, mixtures, draws):
        if method.startswith("tunable/"):
            _, selection, source = method.split("/")
            by_source.setdefault((source, variant), {})[selection] = values
    names = ["optimal", *config.selections]
    lines = [[*key, *(format_percent(means.get(name, [])) for name in names)] for key, means in by_source.items()]
    title = f"Selections, on {draws} environments of each kind:\n\n"
    return title + markdown_table(["preference", "factor", *names], lines) if draws else ""


def task_count_table(table: ScoreTable) -> str:
    """Accuracy against the number of tasks in the target, in equal parts."""
    even = {len(mixture_shares(kind)): kind for kind in table.mixtures if len(set(mixture_shares(kind))) == 1}
    kinds = [even[m] for m in sorted(even)]
    lines = [
        [method, variant or "-", *(format_percent(table.seed_means(method, variant, [kind])) for kind in kinds)]
        for method, variant, _ in rank_methods(table, kinds)
        if not method.startswith("tunable/") or method.startswith(TUNABLE_PREFIX)
    ]
    title = "Accuracy against M, the number of tasks in the target, in equal parts:\n\n"
    return title + markdown_table(["method", "factor", *(f"M = {m}" for m in sorted(even))], lines)


def paired_comparisons(table: ScoreTable, config: EnvironmentsConfig) -> list[PairedComparison]:
    """Every source against MagMax and against the oracle, and the oracle against the control, over all mixtures."""
    kinds, found = [kind for kind in config.mixtures if kind in table.mixtures], []
    draws = min(config.selections.values(), default=0)
    for variant in VARIANTS:
        pairs = [(f"{TUNABLE_PREFIX}{source}", "magmax", None) for source in (*config.sources, "manual", "oracle")]
        pairs += [(f"{TUNABLE_PREFIX}{source}", ORACLE_METHOD, None) for source in (*config.sources, "manual")]
        pairs += [(ORACLE_METHOD, f"tunable/{name}/oracle", draws) for name in config.selections if draws]
        pairs += [(ORACLE_METHOD, "weighted_average/oracle", None)]
        found += [table.compare(ours, other, variant, kinds, several) for ours, other, several in pairs]
    return [pair for pair in found if pair is not None]


def remarks(table: ScoreTable, config: EnvironmentsConfig, distance_table: ScoreTable) -> list[str]:
    """The tests in words, the best source by name, and the kinds of environments where a source does not help."""
    pairs = paired_comparisons(table, config)
    lines: list[str] = []
    for variant, words in VARIANTS.items():
        variant_pairs = [pair for pair in pairs if pair.variant == variant]
        automatic = [
            p for p in variant_pairs if p.other == "magmax" and p.ours.removeprefix(TUNABLE_PREFIX) in config.sources
        ]
        if automatic:
            best = max(automatic, key=lambda pair: pair.difference.mean)
            lines.append(f"With {words}, the best source that sees a sample alone is {best.ours}.")
        lines += [describe_pair(pair) for pair in variant_pairs]
    for source in config.sources:
        worse = [
            kind
            for kind in table.mixtures
            if (pair := table.compare(f"{TUNABLE_PREFIX}{source}", "magmax", "chosen", [kind], None))
            and pair.difference.mean <= 0
        ]
        away = distance_table.seed_means(f"{TUNABLE_PREFIX}{source}", "chosen", distance_table.mixtures)
        if away:
            lines.append(
                f"{source}: {100 * np.mean(away):.0f} % of its weight lies elsewhere than the true mixture's; with "
                f"chosen factors it does not help against MagMax in: {', '.join(worse) or 'none'}."
            )
    return lines


def describe_pair(pair: PairedComparison) -> str:
    """One paired test over seeds in words."""
    d = pair.difference
    words = f"{pair.ours} minus {pair.other} ({pair.variant}): {100 * d.mean:+.1f} points"
    if d.n < 2:
        return f"{words} on one seed, which proves nothing."
    low, high = 100 * (d.mean - d.half), 100 * (d.mean + d.half)
    return f"{words} (95 % interval {low:+.1f} .. {high:+.1f}, paired t-test over {d.n} seeds p = {pair.p_t:.3g})."


def curves_table(rows: Sequence[TidyRow]) -> str:
    """First and last task under schedules; each task under its own weight; factor chosen."""
    lines: list[list[str]] = []
    tasks = max(int(row["measure"].rsplit(" ", 1)[1]) for row in rows)
    for method, x in dict.fromkeys((row["method"], row["x"]) for row in rows):
        shown = [1, tasks] if method == "schedule" else [int(method.rsplit(" ", 1)[1])]
        for task in shown:
            values = select_values(rows, method=method, x=x, variant="chosen", measure=f"accuracy on task {task}")
            lines.append([method if method != "schedule" else "a", f"{x:g}", f"task {task}", format_percent(values)])
    return "Control curves, chosen factor:\n\n" + markdown_table(["control", "value", "accuracy on", "%"], lines)


def samples_table(rows: Sequence[TidyRow]) -> str:
    """Accuracy and distance from the oracle against the number of target samples a task."""
    counts = sorted({row["x"] for row in rows})
    lines = [
        [method, measure, *(format_percent(seed_means(rows, method, measure, count)) for count in counts)]
        for method in dict.fromkeys(row["method"] for row in rows)
        for measure in ("accuracy", "distance")
    ]
    title = "Target samples a task (held-out training examples), chosen factor, in %:\n\n"
    return title + markdown_table(["method", "measure", *map(str, counts)], lines)


def seed_means(rows: Sequence[TidyRow], method: str, measure: str, x: int) -> list[float]:
    """For each seed the mean over environments."""
    selected = [r for r in rows if (r["method"], r["measure"], r["x"], r["variant"]) == (method, measure, x, "chosen")]
    seeds = sorted({row["seed"] for row in selected})
    return [float(np.mean([row["value"] for row in selected if row["seed"] == seed])) for seed in seeds]


def archive_table(rows: Sequence[TidyRow]) -> str:
    """Return what an archive takes and what it loses."""
    lines: list[list[str]] = []
    for method, x in dict.fromkeys((row["method"], row["x"]) for row in rows):
        values: Mapping[str, list[float]] = {
            name: select_values(rows, method=method, x=x, measure=name) for name in {row["measure"] for row in rows}
        }
        size, model = np.mean(values["bytes"]), np.mean(values["model_bytes"])
        lost = np.subtract(values["accuracy"], values["exact"])
        took = [f"{np.mean(values[name]):.1f} s" for name in ("making", "seconds")]
        lines.append([f"top {x:g}, {method}", f"{size / 1e6:,.0f} MB", f"{size / model:.2f}", *took])
        lines[-1] += [
            format_percent(values["accuracy"]),
            format_percent(values["exact"]),
            f"{100 * np.mean(lost):+.2f}",
        ]
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
    return "Archives against the models themselves, all test examples, chosen factor:\n\n" + markdown_table(head, lines)


def select_values(rows: Sequence[TidyRow], **wanted: Any) -> list[float]:
    """The values of the rows that have all this, seed by seed."""
    return [row["value"] for row in rows if all(row[key] == value for key, value in wanted.items())]


def format_percent(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in %."""
    if not values:
        return "-"
    mean = SeedMean.of(values)
    return f"{100 * mean.mean:.1f}" + ("" if mean.n == 1 else f" ± {100 * mean.std:.1f}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = "|" + "---|" * len(header)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in rows)])
