"""A search in words: the merge, what may vary of it, and what a result is worth."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..continual import registry
from ..continual.experiment import Experiment
from ..continual.experiment_file import read_experiment
from ..errors import MagMaxError
from ..recipes.recipe import apply_overrides, build_request, with_value
from ..yaml_documents import read_document, validate
from .trials import TrialSettings


class SearchRange(BaseModel):
    """A number from low to high, both included.

    Attributes:
        step: only low, low + step, and so on.
        log: orders of magnitude are equally likely, not differences.
        whole: only whole numbers.
        each: "model" for a number of its own for each model, such as a preference.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False
    each: Literal["model"] | None = None

    @model_validator(mode="after")
    def _possible(self) -> SearchRange:
        if not self.low <= self.high or (self.log and (self.low <= 0 or self.step is not None)):
            raise ValueError("low is at most high; log needs low above 0, and no step")
        if self.whole and any(n is not None and n % 1 for n in (self.low, self.high, self.step)):
            raise ValueError("whole needs whole numbers")
        return self


class ExperimentScore(BaseModel):
    """The accuracies on each task of an experiment (a recipe of magmax bench), after all its tasks.

    Attributes:
        seed: draws the tasks and the validation examples; the experiment's first by default.
        measure_on: the validation examples; or, where that is really wanted, the test examples.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    experiment: str
    seed: int | None = None
    measure_on: Literal["validation", "test"] = "validation"


class SearchConfig(BaseModel):
    """A search in words. Paths are relative to the recipe's folder.

    Attributes:
        merge: a merge recipe, or the path of one.
        space: by its name (scaling_factor, rule, rule.k, rule.dare.density of a training, dtype), what may vary: a
        `SearchRange`,
            or a list of choices.
        score: the name of a function, called with a result's path, that returns a number or {task: number}: of an
            installed package, or my_file:my_function beside the recipe where code is allowed; or {experiment: RECIPE}.
        objectives: tasks, each to be made best by itself; none for the mean of all scores.
        trials: how many choices are tried, in all.
        sampler: tpe (Optuna's tree-structured Parzen estimator) or random.
        seed: of the sampler.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    merge: str | dict[str, Any]
    space: dict[str, SearchRange | list[Any]] = Field(min_length=1)
    score: str | ExperimentScore
    objectives: list[str] = []
    direction: Literal["maximize", "minimize"] = "maximize"
    trials: int = Field(ge=1)
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = Field(0, ge=0)


def load_search(file: str, assignments: Sequence[str], allow_code: bool = False) -> tuple[SearchConfig, TrialSettings]:
    """A search from its file, with assignments such as trials=50 put in, and all that a trial needs.

    With `allow_code`, the score may be a function in a Python file beside it; likewise the parts of an experiment.

    Raises:
        MagMaxError: a recipe that is none; a merge that is none; what the merge has not; tasks without validation
            examples.
    """
    document = read_document(file)
    for word in assignments:
        name, _, _ = word.partition("=")
        if name not in SearchConfig.model_fields:
            raise MagMaxError(f"{word}: a search has {', '.join(SearchConfig.model_fields)} to assign")
        document = document._replace(content=apply_overrides(document.content, [word]))
    recipe = validate(SearchConfig, document, "a search", _valid_keys)
    folder_of_file = str(Path(file).absolute().parent)
    content, folder = recipe.merge, folder_of_file
    if isinstance(content, str):
        path = os.path.join(folder_of_file, content)
        content, folder = dict(read_document(path).content), os.path.dirname(path)
    plan = build_request(content, document.locate("merge"), {}, folder)
    space = {name: _expand_range(span, plan.names) for name, span in recipe.space.items()}
    for name, span in recipe.space.items():
        with_value(content, name, _example_value(span, plan.names))
    score = recipe.score
    if isinstance(score, str):
        code_folder = Path(folder_of_file) if allow_code else None
        with registry.code_from(code_folder):
            registry.find("score", score)
        return recipe, TrialSettings(content, folder, space, score, code_folder)
    experiment = read_experiment(os.path.join(folder_of_file, score.experiment), allow_code=allow_code)
    return recipe, TrialSettings(content, folder, space, _experiment_score(score, experiment), experiment.code_folder)


def _expand_range(span: SearchRange | list[Any], names: Sequence[str]) -> dict[str, Any]:
    """Return what of the space a study chooses from: by "" a number or a choice, or by its name each model's number."""
    if isinstance(span, list):
        if not span:
            raise MagMaxError("a list of choices holds at least one")
        return {"": span}
    return {name: span.model_dump() for name in (names if span.each else [""])}


def _example_value(span: SearchRange | list[Any], names: Sequence[str]) -> Any:
    if isinstance(span, list):
        return span[0]
    return dict.fromkeys(names, span.high) if span.each else span.high


def _experiment_score(score: ExperimentScore, experiment: Experiment) -> tuple[str, int, str]:
    if score.measure_on == "validation" and not experiment.validation:
        raise MagMaxError(
            f"{score.experiment}: holds out no validation examples to score on; say how many of each class it does, "
            "such as validation: 10"
        )
    return experiment.model_dump_json(), experiment.seeds[0] if score.seed is None else score.seed, score.measure_on


def _valid_keys(parts: Sequence[str]) -> list[str]:
    inner: Mapping[str, type[BaseModel]] = {"space": SearchRange, "score": ExperimentScore}
    return list((SearchConfig if len(parts) == 1 else inner.get(parts[0], SearchConfig)).model_fields)
