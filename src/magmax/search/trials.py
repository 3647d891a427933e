"""One trial of a search: merge with some settings, and score the result. Done by a worker, perhaps elsewhere."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..checkpoints.output_paths import delete_output
from ..continual import registry
from ..continual.experiment import Experiment
from ..errors import MagMaxError
from ..merging.execution.execution_options import ExecutionOptions
from ..recipes.recipe import build_request, with_value
from ..recipes.request import MergeRequest

DEFAULT_SCORE_NAME = "score"
"""What the one number of a score function is called."""
MAX_REASON = 500
"""Characters of the reason why a trial has no score."""


class TrialResult(NamedTuple):
    """The result of a trial: scores by task, or in one line why it has none.

    That is so where its settings do not go together, and where the score raised an exception or is no finite number.
    """

    scores: dict[str, float]
    refused: str = ""


def to_optuna(choice: Any) -> str | int | float | bool | None:
    """A choice as Optuna can keep it: itself, or as text where it is a map or a list."""
    return choice if choice is None or isinstance(choice, str | int | float) else json.dumps(choice)


@dataclass(frozen=True)
class TrialSettings:
    """The merge, space and score that every trial of a search needs.

    Attributes:
        merge: the content of the merge recipe; its paths are seen from `folder`.
        space: what may vary, by name; within it "" stands for all models, or each model for itself.
        score: a function's name, or an experiment as JSON, its seed, and what to measure on.
        code_folder: where the user allowed names to mean functions in Python files.
    """

    merge: Mapping[str, Any]
    folder: str
    space: Mapping[str, Mapping[str, Any]]
    score: str | tuple[str, int, str]
    code_folder: Path | None = None

    def recipe(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The merge recipe with what was chosen put in: by NAME, or NAME[MODEL]."""
        content = dict(self.merge)
        for name, parts in self.space.items():
            if "" not in parts:
                value = {part: chosen[f"{name}[{part}]"] for part in parts}
            elif isinstance(parts[""], list):
                value = next(choice for choice in parts[""] if to_optuna(choice) == chosen[name])
            else:
                value = chosen[name]
            content = with_value(content, name, value)
        return content

    def merge_request(self, chosen: Mapping[str, Any]) -> MergeRequest:
        """The merge with these settings. Raises MagMaxError where they do not go together."""
        plan = build_request(self.recipe(chosen), "the recipe of the trial", {}, self.folder)
        plan.rule.check(len(plan.models))
        return plan

    def run_trial(self, chosen: Mapping[str, Any], out: Path, threads: int = 1) -> TrialResult:
        """Merge with these settings into `out`, score that and delete it.

        Raises:
            MagMaxError: inputs that cannot be used; a score that cannot be imported; tasks without examples.
        """
        try:
            plan = self.merge_request(chosen)
        except MagMaxError as error:
            return TrialResult({}, _one_line(str(error)))
        try:
            plan.job(str(out)).run(ExecutionOptions(threads))
            with registry.code_from(self.code_folder):
                return self._run_score(self.score, out) if isinstance(self.score, str) else self._measure(out)
        finally:
            delete_output(out)

    def _run_score(self, name: str, path: Path) -> TrialResult:
        """Call the score's function. What it raises is the trial's failure, for another trial may well succeed."""
        score = registry.find("score", name)
        try:
            found: Any = score(path)
        except (Exception, SystemExit) as error:
            _, *inside = traceback.extract_tb(error.__traceback__)
            where = f" ({Path(inside[0].filename).name}, line {inside[0].lineno})" if inside else ""
            return TrialResult({}, _one_line(f"{name} raised {type(error).__name__}{where}: {error}"))
        scores = cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {DEFAULT_SCORE_NAME: found}
        try:
            numbers = {str(task): float(score) for task, score in scores.items()}
        except (TypeError, ValueError):
            return TrialResult({}, _one_line(f"{name} returned {found!r}, not a number or a map of numbers"))
        if not numbers or not all(map(math.isfinite, numbers.values())):
            return TrialResult({}, _one_line(f"{name} returned {found!r}; every score must be a finite number"))
        return TrialResult(numbers)

    def _measure(self, path: Path) -> TrialResult:
        assert not isinstance(self.score, str)
        recipe, seed, on = self.score
        experiment = Experiment.model_validate_json(recipe)
        if self.code_folder:
            experiment = experiment.allow_code(self.code_folder)
        return TrialResult(accuracies(experiment, seed, on, path))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON else line[:MAX_REASON] + " ..."


def accuracies(experiment: Experiment, seed: int, on: str, model: Path) -> dict[str, float]:
    """The accuracy of a model on each task after all of them, on the validation or the test examples.

    Raises:
        MagMaxError: a task without examples.
    """
    from ..continual.context import build_context, context_lock  # need torch, which other scores may not
    from ..continual.training.weight_files import load_weights

    with context_lock:
        context = build_context(experiment, seed)
        load_weights(context.encoder.model, model)
        row = context.row(len(context.tasks), context.test if on == "test" else context.validation)
    accuracies_by_task = {task.name: share for task, share in zip(context.tasks, row.tasks, strict=True)}
    if lacking := [name for name, share in accuracies_by_task.items() if math.isnan(share)]:
        raise MagMaxError(f"no {on} example of {', '.join(lacking)}; hold out more of each class")
    return accuracies_by_task
