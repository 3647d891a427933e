"""A recipe's parameters: which setting holds for which model and tensor, and what is said where none fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from ...errors import MagMaxError
from ...rules import Filters, Layers, Number, Numbers, PerModel
from ...yaml_documents import YamlDocument
from .schema import Settings

Turn = Callable[[float], float]
Entry = tuple[str | None, float | Layers]
NUMBER, TRUTH = TypeAdapter(float), TypeAdapter(bool)
"""What mergekit reads parameters with: "0.5" is a number, "false", "no" and 0 are false."""
Kind = TypeVar("Kind", bool, int, float)


class ParameterLevel(NamedTuple):
    """Settings of one level, and the place of their keys in the document."""

    place: tuple[str | int, ...]
    settings: Settings


class ParameterLookup:
    """The parameters of a mergekit recipe, from the most specific level (a model) to the most general.

    A value that names no filter holds for all tensors; of a list of filters the first that is a part of the tensor's
    name holds; where none is, the next level is asked, and at last the method's default.
    """

    def __init__(
        self, document: YamlDocument, shared: Sequence[ParameterLevel], model_levels: Sequence[Sequence[ParameterLevel]]
    ) -> None:
        self._document, self._shared, self._own = document, shared, model_levels

    def per_model(self, name: str, default: float | None, turn: Turn = float) -> Numbers:
        """A number for each model, put through `turn`. Raises MagMaxError if a model has none, and no default."""
        values = [self._number(name, default, [*levels, *self._shared], turn) for levels in self._own]
        alike = len(set(values)) == 1 and not isinstance(values[0], Layers | Filters)
        return values[0] if alike else PerModel(tuple(values))

    def number(self, name: str, default: float | None = None, turn: Turn = float) -> Number:
        """A number that all models share, put through `turn`."""
        return self._number(name, default, self._shared, turn)

    def constant(self, name: str, default: Kind) -> Kind:
        """A number or truth value that must be the same for all tensors."""
        for level in self._shared:
            if name in level.settings:
                return _parse_constant(level.settings[name], default, self._at(level, name), name)
        return default

    def unsupported(self, name: str, what: str) -> MagMaxError:
        """The error for a value of a shared parameter that has no equal here."""
        level = next(level for level in self._shared if name in level.settings)
        return MagMaxError(f"{self._at(level, name)}: not supported here: {what}")

    def _number(self, name: str, default: float | None, levels: Sequence[ParameterLevel], turn: Turn) -> Number:
        entries: list[Entry] = []
        for level in levels:
            if name in level.settings:
                entries += _parse_filtered_values(level.settings[name], self._at(level, name), name, turn)
                if any(part is None for part, _ in entries):
                    break
        else:
            if default is None:
                raise self._missing(name, entries, levels)
            entries.append((None, turn(default)))
        cut = next(n for n, (part, _) in enumerate(entries, start=1) if part is None)
        return entries[0][1] if cut == 1 else Filters(tuple(entries[:cut]))

    def _missing(self, name: str, entries: Sequence[Entry], levels: Sequence[ParameterLevel]) -> MagMaxError:
        where = self._document.locate(*(levels[0].place if levels else ("merge_method",)))
        if not entries:
            return MagMaxError(f"{where}: {name} is missing; the merge method has no default for it")
        return MagMaxError(
            f"{where}: {name} is missing for tensors that no filter fits; add a last {{value: ...}} without a filter"
        )

    def _at(self, level: ParameterLevel, name: str) -> str:
        return self._document.locate(*level.place, name)


def _parse_filtered_values(setting: Any, where: str, name: str, turn: Turn) -> list[Entry]:
    """A setting as filters and numbers; None filters nothing."""
    conditions = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(condition, dict) for condition in conditions):
        return [(None, _parse_value(setting, where, name, turn))]
    entries: list[Entry] = []
    for condition in conditions:
        if not isinstance(condition, dict) or not {"value"} <= set(condition) <= {"value", "filter"}:
            raise MagMaxError(f"{where}: {name} is a number, a list of numbers or a list of {{filter, value}}")
        part = condition.get("filter")
        if not isinstance(part, str | None):
            raise MagMaxError(f"{where}: a filter of {name} is a part of tensor names, not {part!r}")
        entries.append((None if part in ("*", "") else part, _parse_value(condition["value"], where, name, turn)))
    return entries


def _parse_value(value: Any, where: str, name: str, turn: Turn) -> float | Layers:
    if not isinstance(value, list):
        return turn(_parse_number(value, where, name))
    if not value:
        raise MagMaxError(f"{where}: {name} is an empty list; give it a number")
    numbers = tuple(_parse_number(item, where, name) for item in value)
    turned = tuple(map(turn, numbers))
    if len(numbers) > 1 and turned != numbers:  # mergekit goes from one to the next first, and turns what it gets there
        raise MagMaxError(f"{where}: not supported here: {name} over the layers that goes beyond 1; end it at 1")
    return turned[0] if len(numbers) == 1 else Layers(numbers, outside="first")


def _parse_number(value: Any, where: str, name: str) -> float:
    """A number as mergekit takes it: text that spells one is one too, and true is 1."""
    try:
        return value if type(value) is int else NUMBER.validate_python(value)
    except ValidationError as error:
        raise MagMaxError(f"{where}: {name} needs a number, not {value!r}") from error


def _parse_constant(value: Any, default: Kind, where: str, name: str) -> Kind:
    if isinstance(value, list | dict):
        raise MagMaxError(f"{where}: not supported here: {name} by layer or tensor; give one value for all")
    if isinstance(default, bool):
        try:
            return TRUTH.validate_python(value)  # pyright: ignore[reportReturnType]
        except ValidationError as error:
            raise MagMaxError(f"{where}: {name} is true or false, not {value!r}") from error
    number = _parse_number(value, where, name)
    if isinstance(default, int):
        if number != int(number):
            raise MagMaxError(f"{where}: {name} needs a whole number, not {value!r}")
        return int(number)  # pyright: ignore[reportReturnType]
    return number  # pyright: ignore[reportReturnType]
