"""Merge rules: pure functions of arrays, found by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from ..errors import MagMaxError, nearest_hint
from ..legacy import OLD_OPTIONS, complement
from .average import Average, AverageOrSum
from .compose import chain
from .consensus import Consensus
from .contract import MergedTransform, Rule, State, StreamingRule, TaskVectorTransform
from .elect import Elect, ElectSum
from .karcher import Karcher
from .kth_magnitude import KthMagnitude
from .magmax import MagMax
from .model_stock import ModelStock
from .nearswap import NearSwap
from .positions import TensorPosition, tensor_positions
from .random_mix import RandomMix
from .sce import Sce
from .schedules import Filters, Layers, Number, Numbers, PerModel, parse
from .slerp import Slerp
from .spectral.iso_c import IsoC
from .spectral.iso_cts import IsoCTS
from .spectral.tsv_m import TsvM
from .statistics import Address, Array, Block
from .task_arithmetic import TaskArithmetic
from .ties import Ties
from .transforms.breadcrumbs import Breadcrumbs
from .transforms.calibrate_weights import CalibrateWeights
from .transforms.dare import Dare
from .transforms.della import Della
from .transforms.prune import Prune
from .tunable.tunable_rule import Tunable

__all__ = [
    "Address",
    "Array",
    "Average",
    "AverageOrSum",
    "Block",
    "Breadcrumbs",
    "CalibrateWeights",
    "Consensus",
    "Dare",
    "Della",
    "Elect",
    "ElectSum",
    "Filters",
    "IsoC",
    "IsoCTS",
    "Karcher",
    "KthMagnitude",
    "Layers",
    "MagMax",
    "MergedTransform",
    "ModelStock",
    "NearSwap",
    "Number",
    "Numbers",
    "PerModel",
    "Prune",
    "RandomMix",
    "Rule",
    "Sce",
    "Slerp",
    "State",
    "StreamingRule",
    "TaskArithmetic",
    "TaskVectorTransform",
    "TensorPosition",
    "Ties",
    "TsvM",
    "Tunable",
    "chain",
    "nearest_hint",
    "parse",
    "tensor_positions",
]

RULES: tuple[type[Rule], ...] = (
    *(MagMax, Average, TaskArithmetic, Ties, Elect, ElectSum, Sce, RandomMix, KthMagnitude),
    *(Consensus, ModelStock, Karcher, Slerp, NearSwap, IsoC, IsoCTS, TsvM, Tunable),
)
TRANSFORMS: tuple[type[TaskVectorTransform | MergedTransform], ...] = (
    Prune,
    Dare,
    Della,
    Breadcrumbs,
    CalibrateWeights,
)
BUILT_IN: dict[str, type[Rule | TaskVectorTransform | MergedTransform]] = {
    part.name: part for part in (*RULES, *TRANSFORMS)
}
MERGEKIT_RULES: dict[str, type[Rule]] = {AverageOrSum.name: AverageOrSum}
"""What recipes of mergekit become, and no command offers by itself."""
ENTRY_POINT_GROUP = "magmax.rules"


def all_components() -> dict[str, type[Rule | TaskVectorTransform | MergedTransform]]:
    """Every rule and transform by name: the built-in ones, then those of installed packages."""
    return BUILT_IN | {p.name: p.load() for p in entry_points(group=ENTRY_POINT_GROUP) if p.name not in BUILT_IN}


def find_component(name: str) -> type[Rule | TaskVectorTransform | MergedTransform]:
    """The rule or transform of that name, built in or of an installed package; an error names the nearest."""
    if name in BUILT_IN or name in MERGEKIT_RULES:
        return {**BUILT_IN, **MERGEKIT_RULES}[name]
    others = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in others:
        return others[name].load()
    hint = nearest_hint(name, sorted([*BUILT_IN, *others]))
    if hint.startswith("choose"):
        transforms = [kind.name for kind in TRANSFORMS]
        hint = f"choose from: {', '.join(sorted({*BUILT_IN, *others} - {*transforms}))}; before or after one of these: "
        hint += ", ".join(transforms)
    raise MagMaxError(f"there is no rule {name!r}; {hint}")


def make_component(name: str, options: dict[str, Any] | None = None) -> Rule | TaskVectorTransform | MergedTransform:
    """Build a rule or transform from its name and options, each checked against its own fields."""
    kind = find_component(name)
    hints = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    ready: dict[str, Any] = {}
    for option, value in (options or {}).items():
        if option not in fields:
            hint = _option_hint(name, option, value, fields)
            raise MagMaxError(f"the rule {name} has no option {option!r}; {hint}")
        try:
            ready[option] = _check_option(value, hints[option])
        except MagMaxError as error:
            raise MagMaxError(f"the rule {name} needs {option} to be {error}") from error
    return kind(**ready)


def _option_hint(rule: str, option: str, value: Any, known: list[str]) -> str:
    """Say what to write instead of an option that a rule does not have."""
    if (rule, option) in OLD_OPTIONS:
        now = f": density: {complement(value):g}" if option == "drop" and type(value) in (int, float) else ""
        return OLD_OPTIONS[rule, option] + now
    return nearest_hint(option, known) if known else "it takes none"


def make_rule(name: str, options: dict[str, Any] | None = None) -> Rule:
    """Build a merge rule from its name and options."""
    return chain(make_component(name, options))


def rule_from(content: Any) -> Rule:
    """A rule as `describe` and recipes write it: a name, {name: {option: value}}, or a list of these, a chain.

    Rules and transforms themselves may be among them.
    """
    return chain(*_parse_components(content))


def _parse_components(content: Any) -> list[Rule | TaskVectorTransform | MergedTransform]:
    if isinstance(content, Rule | TaskVectorTransform | MergedTransform):
        return [content]
    if isinstance(content, str):
        return [make_component(content)]
    if isinstance(content, list | tuple):
        return [part for item in cast("Sequence[Any]", content) for part in _parse_components(item)]
    if isinstance(content, Mapping) and len(cast("Mapping[Any, Any]", content)) == 1:
        ((name, options),) = cast("Mapping[Any, Any]", content).items()
        if name == "chain":
            return _parse_components(options)
        if options is None or isinstance(options, dict):
            return [make_component(str(name), cast("dict[str, Any] | None", options))]
    raise MagMaxError(f"a rule is a name or {{name: {{option: value}}}}, not {content!r}")


RuleLike = Rule | str | Mapping[str, Any] | Sequence[Any]
"""A rule, its name, {name: {option: value}} as recipes write it, or a list of these and of transforms, a chain."""


def as_rule(rule: RuleLike) -> Rule:
    """Return a rule from an object, a name, or what a recipe writes."""
    return rule if isinstance(rule, Rule) else rule_from(rule)


def _check_option(value: Any, hint: Any) -> Any:
    """An option's value. Raises MagMaxError, in words that follow "needs it to be", for one that does not fit."""
    if hint in (Number, Numbers):
        return parse(value, per_model=hint == Numbers)
    if get_origin(hint) is Literal:
        wanted = None if value in get_args(hint) else f"one of {', '.join(get_args(hint))}"
    elif not isinstance(hint, type):
        wanted = None  # of several types: the part itself checks it
    else:
        wanted = None if type(value) is hint or (hint is float and type(value) is int) else hint.__name__
    if wanted:
        raise MagMaxError(f"{wanted}, not {value!r}")
    return value
