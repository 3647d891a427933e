"""Merge rules: pure functions of arrays, found by name."""

from __future__ import annotations

import dataclasses
from importlib.metadata import entry_points
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from ..errors import MagMaxError, nearest
from .average import Average
from .compose import chain
from .consensus import Consensus
from .contract import After, Before, Rule, State, StreamingRule
from .elect import Elect, ElectSum
from .karcher import Karcher
from .kth_magnitude import KthMagnitude
from .magmax import MagMax
from .model_stock import ModelStock
from .nearswap import NearSwap
from .positions import Place, places
from .random_mix import RandomMix
from .sce import Sce
from .schedules import Filters, Layers, Number, Numbers, PerModel, read
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
    "After",
    "Array",
    "Average",
    "Before",
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
    "ModelStock",
    "NearSwap",
    "Number",
    "Numbers",
    "PerModel",
    "Place",
    "Prune",
    "RandomMix",
    "Rule",
    "Sce",
    "Slerp",
    "State",
    "StreamingRule",
    "TaskArithmetic",
    "Ties",
    "TsvM",
    "Tunable",
    "chain",
    "nearest",
    "places",
    "read",
]

RULES: tuple[type[Rule], ...] = (
    *(MagMax, Average, TaskArithmetic, Ties, Elect, ElectSum, Sce, RandomMix, KthMagnitude),
    *(Consensus, ModelStock, Karcher, Slerp, NearSwap, IsoC, IsoCTS, TsvM, Tunable),
)
TRANSFORMS: tuple[type[Before | After], ...] = (Prune, Dare, Della, Breadcrumbs, CalibrateWeights)
BUILT_IN: dict[str, type[Rule | Before | After]] = {part.name: part for part in (*RULES, *TRANSFORMS)}
ENTRY_POINTS = "magmax.rules"


def all_parts() -> dict[str, type[Rule | Before | After]]:
    """Every rule and transform by name: the built-in ones, then those of installed packages."""
    return BUILT_IN | {p.name: p.load() for p in entry_points(group=ENTRY_POINTS) if p.name not in BUILT_IN}


def find_part(name: str) -> type[Rule | Before | After]:
    """The rule or transform of that name, built in or of an installed package; an error names the nearest."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    others = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in others:
        return others[name].load()
    raise MagMaxError(f"there is no rule {name!r}; {nearest(name, sorted([*BUILT_IN, *others]))}")


def make_part(name: str, options: dict[str, Any] | None = None) -> Rule | Before | After:
    """Build a rule or transform from its name and options, each checked against its own fields."""
    kind = find_part(name)
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    ready: dict[str, Any] = {}
    for option, value in (options or {}).items():
        if option not in known:
            hint = nearest(option, known) if known else "it takes none"
            raise MagMaxError(f"the rule {name} has no option {option!r}; {hint}")
        try:
            ready[option] = _fit(value, hints[option])
        except MagMaxError as error:
            raise MagMaxError(f"the rule {name} needs {option} to be {error}") from error
    return kind(**ready)


def make_rule(name: str, options: dict[str, Any] | None = None) -> Rule:
    """Build a merge rule from its name and options."""
    return chain(make_part(name, options))


def rule_from(content: Any) -> Rule:
    """A rule as `describe` and recipes write it: a name, {name: {option: value}}, or a list of these, a chain."""
    return chain(*_parts(content))


def _parts(content: Any) -> list[Rule | Before | After]:
    if isinstance(content, str):
        return [make_part(content)]
    if isinstance(content, list):
        return [part for item in cast("list[Any]", content) for part in _parts(item)]
    if isinstance(content, dict) and len(cast("dict[Any, Any]", content)) == 1:
        ((name, options),) = cast("dict[Any, Any]", content).items()
        if name == "chain":
            return _parts(options)
        if options is None or isinstance(options, dict):
            return [make_part(str(name), cast("dict[str, Any] | None", options))]
    raise MagMaxError(f"a rule is a name or {{name: {{option: value}}}}, not {content!r}")


def as_rule(rule: Rule | str) -> Rule:
    """A rule given as an object or by name."""
    return make_rule(rule) if isinstance(rule, str) else rule


def _fit(value: Any, hint: Any) -> Any:
    """An option's value. Raises MagMaxError, in words that follow "needs it to be", for one that does not fit."""
    if hint in (Number, Numbers):
        return read(value, per_model=hint == Numbers)
    if get_origin(hint) is Literal:
        wanted = None if value in get_args(hint) else f"one of {', '.join(get_args(hint))}"
    elif not isinstance(hint, type):
        wanted = None  # of several types: the part itself checks it
    else:
        wanted = None if type(value) is hint or (hint is float and type(value) is int) else hint.__name__
    if wanted:
        raise MagMaxError(f"{wanted}, not {value!r}")
    return value
