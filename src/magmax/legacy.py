"""Stored rules, recipes and records of earlier versions, translated to today's names when they are read.

What changed: DARE's `drop` is `density` = 1 - drop; prune's `keep` is `density`; a benchmark's `chains` are `training`,
a cell's `chain` is its `training`, and the training `given` is `external`. Nothing is ever written in the old names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

OLD_OPTIONS: Mapping[tuple[str, str], str] = {
    ("dare", "drop"): "it is now density, the fraction kept",
    ("prune", "keep"): "it is now density",
}
"""(rule, former option) -> what it is now, for errors."""

OLD_KEYS: Mapping[str, str] = {"chains": "training"}
"""Former keys of experiments."""

OLD_RESULT_KEYS: Mapping[str, str] = {"carried": "unmerged", "partly": "partly_merged"}
"""Former keys of the result of a merge whose upload was interrupted."""

OLD_FOLDER = "chains"
"""Former name of the folder of a benchmark's checkpoints."""


def complement(value: Any) -> Any:
    """Return 1 - value for every number of a schedule, rounded to 12 digits so that 0.9 gives 0.1.

    >>> complement({"layers": [0.9, 0.5], "outside": "first"})
    {'layers': [0.1, 0.5], 'outside': 'first'}
    """
    if isinstance(value, dict):
        return {key: complement(inner) for key, inner in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list):
        return [complement(inner) for inner in cast("list[Any]", value)]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return round(1 - value, 12)


def modern_rule(content: Any) -> Any:
    """Return a rule, as `describe` and recipes write it, with today's option names."""
    if isinstance(content, list):
        return [modern_rule(part) for part in cast("list[Any]", content)]
    if not isinstance(content, dict):
        return content
    modern: dict[str, Any] = {}
    for name, options in cast("dict[str, Any]", content).items():
        if name == "chain":
            modern[name] = modern_rule(options)
        elif isinstance(options, dict):
            modern[name] = dict(_modern_option(name, *item) for item in cast("dict[str, Any]", options).items())
        else:
            modern[name] = options
    return modern


def modern_merge_result(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored result of a merge with today's keys."""
    return {OLD_RESULT_KEYS.get(key, key): value for key, value in content.items()}


def modern_experiment(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment, or what a training or a cell says of its own, with today's keys."""
    modern: dict[str, Any] = {}
    for key, value in content.items():
        if key in ("chain", "chains"):
            modern["training"] = _modern_training(value)
        elif key in ("rule", "rules"):
            modern[key] = modern_rule(value)
        else:
            modern[key] = value
    return modern


def modern_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a cell with today's names; its digest is that of the old recipe still."""
    modern: dict[str, Any] = {}
    for key, value in record.items():
        if key == "chain":
            modern["training"] = _modern_training(value)
        elif key == "recipe" and isinstance(value, dict):
            modern[key] = modern_experiment(cast("dict[str, Any]", value))
        elif key in ("method", "rule") and isinstance(value, str):
            modern[key] = _modern_name(value)
        else:
            modern[key] = value
    return modern


def old_training_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a training's checkpoints as earlier versions wrote it: their folders bear its digest."""
    ((training, options),) = recipe["training"].items()
    old = {key: value for key, value in recipe.items() if key != "training"}
    return {**old, "chain": {old_training_name(training): options}}


def old_training_name(training: str) -> str:
    """Return what earlier versions called a training."""
    return "given" if training == "external" else training


def _modern_option(rule: str, option: str, value: Any) -> tuple[str, Any]:
    if (rule, option) == ("dare", "drop"):
        return "density", complement(value)
    return ("density" if (rule, option) == ("prune", "keep") else option), value


def _modern_training(value: Any) -> Any:
    """The names of trainings, alone, as keys, or in a list."""
    if isinstance(value, list):
        return [_modern_training(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {_modern_training(key): options for key, options in cast("dict[str, Any]", value).items()}
    return "external" if value == "given" else value


def _modern_name(name: str) -> str:
    """The name of a method or a rule, such as dare(drop=0.9)+magmax/given."""
    name = re.sub(r"(prune\([^()]*)\bkeep=", r"\1density=", name)
    name = re.sub(r"(dare\([^()]*)\bdrop=([0-9.]+)", lambda m: f"{m[1]}density={complement(float(m[2])):g}", name)
    return re.sub(r"/given$", "/external", name)
