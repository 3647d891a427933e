"""A benchmark's results as files, and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...checkpoints.journal import hold_folder
from ..experiment import Experiment
from ..training.weight_files import write_bytes
from .tables import TABLE_HEADER, against_best, as_csv, comparisons, markdown, summary, table, tidy


def write_results(experiment: Experiment, records: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """Write results.csv (tidy rows), results.json (statistics, recipe, records) and results.md into the folder."""
    rows = tidy(records)
    pairs = [pair for variant in ("default", "chosen") if (pair := against_best(rows, variant)) is not None]
    content = {
        "recipe": experiment.model_dump(),
        "summary": [
            {"method": method, "variant": variant, **{name: asdict(mean) for name, mean in means.items()}}
            for (method, variant), means in summary(rows).items()
        ],
        "paired": [asdict(pair) for pair in pairs],
        "records": list(records),
    }
    files = {
        "results.csv": as_csv(rows),
        "results.json": json.dumps(_replace_nan(content), indent=1) + "\n",
        "results.md": markdown(rows, describe_experiment(experiment, records), not_run(experiment, records)),
    }
    with hold_folder(out):
        for name, text in files.items():
            write_bytes(text.encode(), out / name)
    return [out / name for name in files]


def print_results(experiment: Experiment, records: Sequence[Mapping[str, Any]]) -> None:
    """The table on the terminal, as wide as it needs to be; without records, only what is not run."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 200)
    if not records:
        console.print(*not_run(experiment, records), highlight=False)
        return
    rows = tidy(records)
    drawn = Table(*TABLE_HEADER[:1], title="Accuracies in %, mean ± standard deviation over seeds")
    for name in TABLE_HEADER[1:]:
        drawn.add_column(name, justify="right")
    for line in table(rows):
        drawn.add_row(*line)
    console.print(drawn)
    for line in (*describe_experiment(experiment, records), *comparisons(rows), *not_run(experiment, records)):
        console.print(line, highlight=False)


def not_run(experiment: Experiment, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """In words, the cells of the recipe that have no record; nothing where all have one."""
    there = {(record["method"], record["seed"]) for record in records}
    missing: dict[str, list[int]] = {}
    for cell in experiment.cells():
        if (cell.method, cell.seed) not in there:
            missing.setdefault(cell.method, []).append(cell.seed)
    words = [f"{method} (seeds {', '.join(map(str, seeds))})" for method, seeds in missing.items()]
    return [f"Not run: {'; '.join(words)}."] if words else []


def describe_experiment(experiment: Experiment, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was measured, in words that stand above or below the table."""
    fit, seeds = experiment.fit, sorted({record["seed"] for record in records})
    warm = f"{fit.warmup:.0%} of the steps" if fit.warmup < 1 else f"{fit.warmup:g} steps"
    among = "the classes of the tasks learned so far" if experiment.among == "seen" else "the classes of all tasks"
    where = "test examples" if experiment.measure_on == "test" else "VALIDATION examples"
    return [
        f"data {json.dumps(experiment.data)}, model {json.dumps(experiment.model)}, "
        f"scenario {json.dumps(experiment.scenario)}; {fit.steps} steps a task, batch {fit.batch}, learning rate "
        f"{fit.learning_rate:g}, warm-up {warm}; seeds {', '.join(map(str, seeds))}; {where} told apart among "
        f"{among}; factors chosen on {experiment.validation} training examples a class that were held out. "
        "joint and replay are references: they use data that the others may not keep."
    ]


def _replace_nan(content: Any) -> Any:
    """Without NaN, which JSON does not have: null instead."""
    if isinstance(content, dict):
        return {key: _replace_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_replace_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content
