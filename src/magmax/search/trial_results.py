"""Which trials of a search were best, as a table and as a recipe to merge with."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints.journal import hold_folder
from ..checkpoints.lora.adapted_model import relative_path, resolve_path
from ..checkpoints.output_paths import replace_file
from ..errors import MagMaxError
from .config import SearchConfig
from .runner import TrialRecord
from .trials import TrialSettings

BEST_FILE, TABLE_FILE = "best.yaml", "trials.csv"


def tasks_of(recipe: SearchConfig, tried: Sequence[TrialRecord]) -> list[str]:
    """Return what the trials are compared on: the objectives, or every task that is scored."""
    return recipe.objectives or list(dict.fromkeys(task for trial in tried for task in trial.scores))


def pareto_front(tried: Sequence[TrialRecord], tasks: Sequence[str], direction: str = "maximize") -> list[TrialRecord]:
    """The trials that no other trial equals on every task and beats on one: the Pareto front; of equal ones the first.

    >>> rows = [{"a": 1, "b": 0}, {"a": 0, "b": 1}, {"a": 0, "b": 0.5}, {"a": 1, "b": 0}]
    >>> [t.number for t in pareto_front([TrialRecord(n, {}, row) for n, row in enumerate(rows)], ["a", "b"])]
    [0, 1]
    """
    sign = 1 if direction == "maximize" else -1
    points = [(t, [sign * t.scores[task] for task in tasks]) for t in tried if not t.refused]

    def beaten(number: int, point: Sequence[float]) -> bool:
        return any(
            all(theirs >= ours for theirs, ours in zip(other, point, strict=True))
            and (list(other) != list(point) or rival.number < number)
            for rival, other in points
            if rival.number != number
        )

    return [trial for trial, point in points if not beaten(trial.number, point)]


def best_of(recipe: SearchConfig, tried: Sequence[TrialRecord]) -> TrialRecord:
    """The trial whose mean over the objectives, or over all tasks, is best; of equal ones the first.

    Raises MagMaxError where no trial has a score.
    """
    tasks = tasks_of(recipe, tried)
    scored = [trial for trial in tried if not trial.refused]
    if not scored:
        raise MagMaxError(f"no trial could be merged and scored; the first: {tried[0].refused}")
    sign = 1 if recipe.direction == "maximize" else -1
    return max(scored, key=lambda trial: sign * sum(trial.scores[task] for task in tasks))


def write_search(
    recipe: SearchConfig, trials: TrialSettings, tried: Sequence[TrialRecord], out: Path
) -> tuple[Path, Path]:
    """Write the best trial as a recipe for magmax merge, and the table of all trials; their paths."""
    best = best_of(recipe, tried)
    content = rebase_paths(trials.recipe(best.settings), trials.folder, str(out.absolute()))
    words = ", ".join(f"{task} {best.scores[task]:.6g}" for task in tasks_of(recipe, tried))
    text = f"# Trial {best.number} of {len(tried)} of a search: {words}.\n" + yaml.safe_dump(content, sort_keys=False)
    with hold_folder(out):
        replace_file(out / BEST_FILE, text.encode())
        replace_file(out / TABLE_FILE, table(recipe, tried).encode())
    return out / BEST_FILE, out / TABLE_FILE


def table(recipe: SearchConfig, tried: Sequence[TrialRecord]) -> str:
    """All trials as CSV: number, what was chosen, scores, and whether it is on the Pareto front."""
    tasks = tasks_of(recipe, tried)
    on_front = {trial.number for trial in pareto_front(tried, tasks, recipe.direction)}
    options = list(dict.fromkeys(name for trial in tried for name in trial.settings))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", *options, *tasks, "front", "refused"])
    for trial in tried:
        scores = [trial.scores.get(task, "") for task in tasks]
        chosen = [trial.settings[name] for name in options]
        writer.writerow([trial.number, *chosen, *scores, int(trial.number in on_front), trial.refused])
    return file.getvalue()


def rebase_paths(content: Mapping[str, Any], folder: str, to: str) -> dict[str, Any]:
    """A merge recipe whose paths are seen from another folder; it has an `out`."""

    def path(text: str) -> str:
        return os.path.relpath(os.path.join(folder, text), to)

    def source(text: str) -> str:
        return relative_path(to, resolve_path(folder, text))

    result = dict(content)
    result["base"] = source(content["base"])
    result["models"] = [
        {**model, "path": source(model["path"])} if isinstance(model, Mapping) else source(model)
        for model in content["models"]
    ]
    rule = content.get("rule")
    if isinstance(rule, str) and rule.endswith((".yaml", ".yml")):
        result["rule"] = path(rule)
    if target := content.get("target"):
        places = ("data", "samples", "encoder")
        result["target"] = {key: path(v) if key in places else v for key, v in target.items()}
    result["out"] = path(content["out"]) if content.get("out") else "best.safetensors"
    return result
