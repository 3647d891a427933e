"""Numbers that depend on the place: on the layer, on the tensor's name, on the model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from ..errors import MagMaxError, nearest_hint
from .positions import TensorPosition

ACCEPTED_FORMS = (
    "a number, {layers: [first, ..., last]}, or a list of {filter: PART_OF_A_NAME, value: NUMBER} that ends with a "
    "value without a filter"
)


class Schedule(ABC):
    """A number that is not the same everywhere."""

    @property
    def varies_by_tensor(self) -> bool:
        """Return whether it differs from tensor to tensor."""
        return True

    @property
    def per_model(self) -> bool:
        """Return whether it differs from model to model."""
        return False

    @abstractmethod
    def for_tensor(self, position: TensorPosition) -> float | Schedule:
        """Return what it is for one tensor."""

    @abstractmethod
    def numbers(self) -> Iterator[float]:
        """Every number it is made of; all that it can be lie between the least and the greatest."""

    @abstractmethod
    def to_config(self) -> Any:
        """The value as a recipe writes it."""

    def for_models(self, names: Sequence[str]) -> Self | Schedule:
        """Return the schedule with the models' names put in their order."""
        return self

    def check(self, tasks: int) -> str | None:
        """Return what is wrong with it for so many models, if anything."""
        return None


@dataclass(frozen=True)
class Layers(Schedule):
    """A gradient over the layers: its numbers at equal distances from depth 0 to depth 1, linear in between.

    Tensors in no layer (embeddings, final norms, heads) lie at the ends, or, with outside="first", as mergekit has it,
    take the first number.

    >>> Layers((0, 1, 0.5)).for_tensor(TensorPosition("layers.3.weight", 0.75))
    0.75
    """

    values: tuple[float, ...]
    outside: Literal["ends", "first"] = "ends"

    def __post_init__(self) -> None:
        if not self.values:
            raise MagMaxError("Layers needs at least one number, that of depth 0; it has none")
        if self.outside not in ("ends", "first"):
            raise MagMaxError(f"Layers needs outside to be ends or first, not {self.outside!r}")

    def for_tensor(self, position: TensorPosition) -> float:
        last = len(self.values) - 1
        depth = position.depth if position.in_layer or self.outside == "ends" else 0
        scaled = depth * last
        low = int(scaled)
        part = scaled - low
        return (1 - part) * self.values[low] + part * self.values[min(last, low + 1)]

    def numbers(self) -> Iterator[float]:
        yield from self.values

    def to_config(self) -> Any:
        return {"layers": list(self.values), **({"outside": "first"} if self.outside == "first" else {})}


@dataclass(frozen=True)
class Filters(Schedule):
    """A value by tensor name: that of the first entry whose filter is a part of the name; the last one has no filter.

    >>> Filters((("attn", 0.5), (None, 1.0))).for_tensor(TensorPosition("layers.3.mlp.weight", 0.75))
    1.0
    """

    entries: tuple[tuple[str | None, float | Layers], ...]

    def __post_init__(self) -> None:
        without = [place for place, (part, _) in enumerate(self.entries) if part is None]
        if without != [len(self.entries) - 1]:
            raise MagMaxError("a list of {filter, value} whose last entry, and no other, has no filter: the default")

    def for_tensor(self, position: TensorPosition) -> float:
        value = next(value for part, value in self.entries if part is None or part in position.key)
        return value.for_tensor(position) if isinstance(value, Layers) else value

    def numbers(self) -> Iterator[float]:
        for _, value in self.entries:
            yield from all_numbers(value)

    def to_config(self) -> Any:
        return [{**({"filter": part} if part is not None else {}), "value": to_config(v)} for part, v in self.entries]


Number = float | Layers | Filters
"""The type of an option that may depend on the tensor."""


@dataclass(frozen=True)
class PerModel(Schedule):
    """A value for each model, in their order.

    >>> for_all_models(PerModel((0.5, Layers((0, 1)))).for_tensor(TensorPosition("layers.3.weight", 0.75)), 2)
    [0.5, 0.75]
    """

    values: tuple[Number, ...]

    @property
    def varies_by_tensor(self) -> bool:
        return any(isinstance(value, Schedule) for value in self.values)

    @property
    def per_model(self) -> bool:
        return True

    def for_tensor(self, position: TensorPosition) -> PerModel:
        return PerModel(tuple(resolve(value, position) for value in self.values)) if self.varies_by_tensor else self

    def numbers(self) -> Iterator[float]:
        for value in self.values:
            yield from all_numbers(value)

    def to_config(self) -> Any:
        return [to_config(value) for value in self.values]

    def check(self, tasks: int) -> str | None:
        if len(self.values) == tasks:
            return None
        return f"has {len(self.values)} values, one for each model, but there are {tasks} models"


@dataclass(frozen=True)
class PerModelName(Schedule):
    """A value for each model, by the name that a recipe gives it; `for_models` makes it a `PerModel`."""

    values: tuple[tuple[str, Number], ...]

    @property
    def per_model(self) -> bool:
        return True

    def for_tensor(self, position: TensorPosition) -> PerModelName:
        return self

    def numbers(self) -> Iterator[float]:
        for _, value in self.values:
            yield from all_numbers(value)

    def to_config(self) -> Any:
        return {name: to_config(value) for name, value in self.values}

    def for_models(self, names: Sequence[str]) -> PerModel:
        by_name = dict(self.values)
        for name in by_name:
            if name not in names:
                raise MagMaxError(f"there is no model {name!r} to have a number; {nearest_hint(name, list(names))}")
        missing = [name for name in names if name not in by_name]
        if missing:
            raise MagMaxError(f"no number is given for {', '.join(missing)}; every model needs one")
        return PerModel(tuple(by_name[name] for name in names))

    def check(self, tasks: int) -> str | None:
        return "names its models, whose names only a recipe knows; give a list, in the models' order"


Numbers = Number | PerModel | PerModelName
"""The type of an option that may depend on the tensor and on the model."""


def resolve(value: Number, position: TensorPosition) -> float:
    """Return what a value is for one tensor."""
    return value.for_tensor(position) if isinstance(value, Schedule) else value


def for_all_models(value: Numbers, tasks: int) -> list[float]:
    """The number of each model, of a value that depends on the model alone."""
    return [for_model(value, task) for task in range(1, tasks + 1)]


def for_model(value: Numbers, task: int) -> float:
    """The number of model number `task` (from 1), of a value that depends on the model alone."""
    number = value.values[task - 1] if isinstance(value, PerModel) else value
    if isinstance(number, Schedule):
        raise MagMaxError(f"{to_config(value)} depends on the place; resolve the rule first, with its `at`")
    return number


def all_numbers(value: Any) -> Iterator[float]:
    """Every number that a value is made of. Raises MagMaxError for what is no value."""
    if isinstance(value, Schedule):
        yield from value.numbers()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value if isinstance(value, float) or abs(value) < 1 << 1000 else math.inf
    else:
        raise MagMaxError(f"{value!r} is not a number, Layers, Filters or PerModel; `values.read` takes lists and maps")


def to_config(value: Any) -> Any:
    """An option as a recipe writes it."""
    return value.to_config() if isinstance(value, Schedule) else value


def validate_range(
    part: str, option: str, value: Any, low: float = -math.inf, high: float = math.inf, per_model: bool = True
) -> None:
    """Raise MagMaxError unless every number of an option is finite and from `low` to `high`; or where it is given for
    each model, and may not be."""
    if not per_model and isinstance(value, Schedule) and value.per_model:
        raise MagMaxError(f"{part} needs one {option} for all models, not one for each: {to_config(value)}")
    for number in all_numbers(value):
        if not low <= number <= high or not math.isfinite(number):
            limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            wanted = limits if math.isfinite(low) else "a finite number"
            shown = f"{number}" if number is value else f"{number} in {to_config(value)}"
            raise MagMaxError(f"{part} needs {option} {wanted}, not {shown}")


def parse(content: Any, per_model: bool = True) -> Numbers:
    """An option as a recipe writes it: see FORMS; per model, a list of these or a map from the models' names.

    Raises:
        MagMaxError: in words that follow "needs OPTION to be".
    """
    forms = ACCEPTED_FORMS + "; or a list of these, one for each model, or a map from model to number" * per_model
    refusal = MagMaxError(f"{forms}, not {content!r}")
    if _is_number(content):
        return content
    if isinstance(content, list) and content:
        items = cast("list[Any]", content)
        if all(isinstance(item, dict) and "value" in item for item in items):
            return _parse_filters(cast("list[dict[str, Any]]", items), refusal)
        if per_model:
            return PerModel(tuple(cast("Number", parse(item, per_model=False)) for item in items))
    if isinstance(content, dict) and content:
        pairs = cast("dict[Any, Any]", content)
        if pairs.get("outside", "first") == "first" and {"layers"} <= set(pairs) <= {"layers", "outside"}:
            return _parse_layers(pairs["layers"], "first" if "outside" in pairs else "ends", refusal)
        if per_model and "value" not in pairs and all(isinstance(name, str) for name in pairs):
            return PerModelName(tuple((n, cast("Number", parse(item, per_model=False))) for n, item in pairs.items()))
    raise refusal


def _parse_layers(content: Any, outside: Literal["ends", "first"], refusal: MagMaxError) -> Layers:
    if not isinstance(content, list) or not content or not all(map(_is_number, cast("list[Any]", content))):
        raise refusal
    return Layers(tuple(cast("list[float]", content)), outside)


def _parse_filters(entries: Sequence[Mapping[str, Any]], refusal: MagMaxError) -> Filters:
    entries_out: list[tuple[str | None, float | Layers]] = []
    for entry in entries:
        part, value = entry.get("filter"), parse(entry["value"], per_model=False)
        if not set(entry) <= {"filter", "value"} or isinstance(value, Filters) or not isinstance(part, str | None):
            raise refusal
        entries_out.append((None if part == "*" else part, cast("float | Layers", value)))
    return Filters(tuple(entries_out))


def _is_number(content: Any) -> bool:
    return type(content) in (int, float)
