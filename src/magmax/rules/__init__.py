"""Merge rules: pure functions of arrays, found by name."""

from __future__ import annotations

import dataclasses
import difflib
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from ..errors import MagMaxError
from .average import Average
from .base import Address, Array, Rule, State
from .kth_magnitude import KthMagnitude
from .magmax import MagMax
from .random_mix import RandomMix
from .task_arithmetic import TaskArithmetic

__all__ = ["Address", "Array", "Average", "KthMagnitude", "MagMax", "RandomMix", "Rule", "State", "TaskArithmetic"]

BUILT_IN: dict[str, type[Rule]] = {r.name: r for r in (MagMax, Average, TaskArithmetic, RandomMix, KthMagnitude)}
ENTRY_POINTS = "magmax.rules"


def nearest(word: str, words: list[str]) -> str:
    """A hint for a word that is none of those known."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(words)}"


def find_rule(name: str) -> type[Rule]:
    """The rule of that name, built in or of an installed package. Raises MagMaxError with the nearest name."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    others = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in others:
        return others[name].load()
    raise MagMaxError(f"there is no rule {name!r}; {nearest(name, sorted([*BUILT_IN, *others]))}")


def make_rule(name: str, options: dict[str, Any] | None = None) -> Rule:
    """Build a rule from its name and options, each checked against the rule's own fields."""
    kind = find_rule(name)
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for option, value in (options or {}).items():
        if option not in known:
            hint = nearest(option, known) if known else "it takes none"
            raise MagMaxError(f"the rule {name} has no option {option!r}; {hint}")
        if type(value) is not hints[option] and not (hints[option] is float and type(value) is int):
            raise MagMaxError(f"the rule {name} needs {option} to be {hints[option].__name__}, not {value!r}")
    return kind(**(options or {}))


def as_rule(rule: Rule | str) -> Rule:
    """A rule given as an object or by name."""
    return make_rule(rule) if isinstance(rule, str) else rule
