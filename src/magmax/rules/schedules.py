"""Numbers that depend on the place: on the layer, on the tensor's name, on the model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from ..errors import MagMaxError, nearest
from .positions import Place

FORMS = (
    "a number, {layers: [first, ..., last]}, or a list of {filter: PART_OF_A_NAME, value: NUMBER} that ends with a "
    "value without a filter"
)


class Value(ABC):
    """A number that is not the same everywhere."""

    @property
    def varies(self) -> bool:
        """Whether it differs from tensor to tensor."""
        return True

    @property
    def per_model(self) -> bool:
        """Whether it differs from model to model."""
        return False

    @abstractmethod
    def at(self, place: Place) -> float | Value:
        """What it is for one tensor."""

    @abstractmethod
    def numbers(self) -> Iterator[float]:
        """Every number it is made of; all that it can be lie between the least and the greatest."""

    @abstractmethod
    def written(self) -> Any:
        """The value as a recipe writes it."""

    def for_models(self, names: Sequence[str]) -> Self | Value:
        """The value, once the models' names and order are known."""
        return self

    def check(self, tasks: int) -> str | None:
        """What is wrong with it for so many models, if anything."""
        return None


@dataclass(frozen=True)
class Layers(Value):
    """A gradient over the layers: its numbers at equal distances from depth 0 to depth 1, linear in between.

    Tensors in no layer (embeddings, final norms, heads) lie at the ends, or, with outside="first", as mergekit has it,
    take the first number.

    >>> Layers((0, 1, 0.5)).at(Place("layers.3.weight", 0.75))
    0.75
    """

    values: tuple[float, ...]
    outside: Literal["ends", "first"] = "ends"

    def __post_init__(self) -> None:
        if not self.values:
            raise MagMaxError("Layers needs at least one number, that of depth 0; it has none")
        if self.outside not in ("ends", "first"):
            raise MagMaxError(f"Layers needs outside to be ends or first, not {self.outside!r}")

    def at(self, place: Place) -> float:
        last = len(self.values) - 1
        depth = place.depth if place.inside or self.outside == "ends" else 0
        scaled = depth * last
        low = int(scaled)
        part = scaled - low
        return (1 - part) * self.values[low] + part * self.values[min(last, low + 1)]

    def numbers(self) -> Iterator[float]:
        yield from self.values

    def written(self) -> Any:
        return {"layers": list(self.values), **({"outside": "first"} if self.outside == "first" else {})}


@dataclass(frozen=True)
class Filters(Value):
    """A value by tensor name: that of the first entry whose filter is a part of the name; the last one has no filter.

    >>> Filters((("attn", 0.5), (None, 1.0))).at(Place("layers.3.mlp.weight", 0.75))
    1.0
    """

    entries: tuple[tuple[str | None, float | Layers], ...]

    def __post_init__(self) -> None:
        without = [place for place, (part, _) in enumerate(self.entries) if part is None]
        if without != [len(self.entries) - 1]:
            raise MagMaxError("a list of {filter, value} whose last entry, and no other, has no filter: the default")

    def at(self, place: Place) -> float:
        value = next(value for part, value in self.entries if part is None or part in place.key)
        return value.at(place) if isinstance(value, Layers) else value

    def numbers(self) -> Iterator[float]:
        for _, value in self.entries:
            yield from numbers(value)

    def written(self) -> Any:
        return [{**({"filter": part} if part is not None else {}), "value": written(v)} for part, v in self.entries]


Number = float | Layers | Filters
"""The type of an option that may depend on the tensor."""


@dataclass(frozen=True)
class PerModel(Value):
    """A value for each model, in their order.

    >>> each(PerModel((0.5, Layers((0, 1)))).at(Place("layers.3.weight", 0.75)), 2)
    [0.5, 0.75]
    """

    values: tuple[Number, ...]

    @property
    def varies(self) -> bool:
        return any(isinstance(value, Value) for value in self.values)

    @property
    def per_model(self) -> bool:
        return True

    def at(self, place: Place) -> PerModel:
        return PerModel(tuple(at(value, place) for value in self.values)) if self.varies else self

    def numbers(self) -> Iterator[float]:
        for value in self.values:
            yield from numbers(value)

    def written(self) -> Any:
        return [written(value) for value in self.values]

    def check(self, tasks: int) -> str | None:
        if len(self.values) == tasks:
            return None
        return f"has {len(self.values)} values, one for each model, but there are {tasks} models"


@dataclass(frozen=True)
class Named(Value):
    """A value for each model, by the name that a recipe gives it; `for_models` makes it a `PerModel`."""

    values: tuple[tuple[str, Number], ...]

    @property
    def per_model(self) -> bool:
        return True

    def at(self, place: Place) -> Named:
        return self

    def numbers(self) -> Iterator[float]:
        for _, value in self.values:
            yield from numbers(value)

    def written(self) -> Any:
        return {name: written(value) for name, value in self.values}

    def for_models(self, names: Sequence[str]) -> PerModel:
        given = dict(self.values)
        for name in given:
            if name not in names:
                raise MagMaxError(f"there is no model {name!r} to have a number; {nearest(name, list(names))}")
        missing = [name for name in names if name not in given]
        if missing:
            raise MagMaxError(f"no number is given for {', '.join(missing)}; every model needs one")
        return PerModel(tuple(given[name] for name in names))

    def check(self, tasks: int) -> str | None:
        return "names its models, whose names only a recipe knows; give a list, in the models' order"


Numbers = Number | PerModel | Named
"""The type of an option that may depend on the tensor and on the model."""


def at(value: Number, place: Place) -> float:
    """What a value is for one tensor."""
    return value.at(place) if isinstance(value, Value) else value


def each(value: Numbers, tasks: int) -> list[float]:
    """The number of each model, of a value that depends on the model alone."""
    return [one(value, task) for task in range(1, tasks + 1)]


def one(value: Numbers, task: int) -> float:
    """The number of model number `task` (from 1), of a value that depends on the model alone."""
    own = value.values[task - 1] if isinstance(value, PerModel) else value
    if isinstance(own, Value):
        raise MagMaxError(f"{written(value)} depends on the place; resolve the rule first, with its `at`")
    return own


def numbers(value: Any) -> Iterator[float]:
    """Every number that a value is made of. Raises MagMaxError for what is no value."""
    if isinstance(value, Value):
        yield from value.numbers()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value if isinstance(value, float) or abs(value) < 1 << 1000 else math.inf
    else:
        raise MagMaxError(f"{value!r} is not a number, Layers, Filters or PerModel; `values.read` takes lists and maps")


def written(value: Any) -> Any:
    """An option as a recipe writes it."""
    return value.written() if isinstance(value, Value) else value


def need(
    part: str, option: str, value: Any, low: float = -math.inf, high: float = math.inf, per_model: bool = True
) -> None:
    """Raise MagMaxError unless every number of an option is finite and from `low` to `high`; or where it is given for
    each model, and may not be."""
    if not per_model and isinstance(value, Value) and value.per_model:
        raise MagMaxError(f"{part} needs one {option} for all models, not one for each: {written(value)}")
    for number in numbers(value):
        if not low <= number <= high or not math.isfinite(number):
            limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            wanted = limits if math.isfinite(low) else "a finite number"
            given = f"{number}" if number is value else f"{number} in {written(value)}"
            raise MagMaxError(f"{part} needs {option} {wanted}, not {given}")


def read(content: Any, per_model: bool = True) -> Numbers:
    """An option as a recipe writes it: see FORMS; per model, a list of these or a map from the models' names.

    Raises:
        MagMaxError: in words that follow "needs OPTION to be".
    """
    forms = FORMS + "; or a list of these, one for each model, or a map from model to number" * per_model
    refusal = MagMaxError(f"{forms}, not {content!r}")
    if _number(content):
        return content
    if isinstance(content, list) and content:
        items = cast("list[Any]", content)
        if all(isinstance(item, dict) and "value" in item for item in items):
            return _filters(cast("list[dict[str, Any]]", items), refusal)
        if per_model:
            return PerModel(tuple(cast("Number", read(item, per_model=False)) for item in items))
    if isinstance(content, dict) and content:
        pairs = cast("dict[Any, Any]", content)
        if pairs.get("outside", "first") == "first" and {"layers"} <= set(pairs) <= {"layers", "outside"}:
            return _layers(pairs["layers"], "first" if "outside" in pairs else "ends", refusal)
        if per_model and "value" not in pairs and all(isinstance(name, str) for name in pairs):
            return Named(tuple((n, cast("Number", read(item, per_model=False))) for n, item in pairs.items()))
    raise refusal


def _layers(content: Any, outside: Literal["ends", "first"], refusal: MagMaxError) -> Layers:
    if not isinstance(content, list) or not content or not all(map(_number, cast("list[Any]", content))):
        raise refusal
    return Layers(tuple(cast("list[float]", content)), outside)


def _filters(entries: Sequence[Mapping[str, Any]], refusal: MagMaxError) -> Filters:
    found: list[tuple[str | None, float | Layers]] = []
    for entry in entries:
        part, value = entry.get("filter"), read(entry["value"], per_model=False)
        if not set(entry) <= {"filter", "value"} or isinstance(value, Filters) or not isinstance(part, str | None):
            raise refusal
        found.append((None if part == "*" else part, cast("float | Layers", value)))
    return Filters(tuple(found))


def _number(content: Any) -> bool:
    return type(content) in (int, float)
