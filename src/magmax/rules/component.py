"""What rules and transforms have in common: a name, options that are numbers at a place, and a description."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, cast

from ..errors import MagMaxError
from .positions import Place
from .schedules import Value, written


@dataclass(frozen=True)
class Part(ABC):
    """A rule or transform; its fields are its options.

    Attributes:
        name: the word for it in recipes and on the command line.
        paper: where it comes from.
        numpy_alone: whether it takes arrays in the processor's memory only.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    numpy_alone: ClassVar[bool] = False

    @property
    def hindrances(self) -> list[str]:
        """What of it takes arrays in the processor's memory only, by name: nothing, where it works on a GPU too."""
        inside = [name for option in _options(self) if isinstance(option, Part) for name in option.hindrances]
        return [self.name] * self.numpy_alone + inside

    @property
    def varies(self) -> bool:
        """Whether any of its numbers differs from tensor to tensor."""
        return any(option.varies for option in _options(self))

    @property
    def per_model(self) -> bool:
        """Whether any of its numbers is given for each model."""
        return any(option.per_model for option in _options(self))

    def at(self, place: Place) -> Self:
        """The part as it is for one tensor; itself where nothing depends on the tensor."""
        return _changed(self, lambda option: option.at(place)) if self.varies else self

    def for_models(self, names: Sequence[str]) -> Self:
        """The part, numbers given by the models' names put in the models' order."""
        return _changed(self, lambda option: option.for_models(names)) if self.per_model else self

    def check_numbers(self, tasks: int) -> None:
        """Raise MagMaxError if numbers given for each model do not fit so many."""
        for field in fields(self):
            for option in _inside(getattr(self, field.name)):
                if isinstance(option, Part):
                    option.check_numbers(tasks)
                elif problem := option.check(tasks):
                    raise MagMaxError(f"{self.name}: {field.name} {problem}")

    def describe(self) -> dict[str, Any]:
        """The part as a recipe writes it: {name: {option: value}}."""
        return {self.name: {field.name: written(getattr(self, field.name)) for field in fields(self)}}


def _options(part: Part) -> Iterator[Value | Part]:
    for field in fields(part):
        yield from _inside(getattr(part, field.name))


def _inside(value: Any) -> Iterator[Value | Part]:
    """What of an option depends on a place: itself, or, of a tuple, each of its items."""
    if isinstance(value, Value | Part):
        yield value
    elif isinstance(value, tuple):
        for item in cast("tuple[Any, ...]", value):
            yield from _inside(item)


def _changed(part: Any, change: Callable[[Any], Any]) -> Any:
    """The part with everything that depends on a place changed."""
    return replace(part, **{field.name: _change(getattr(part, field.name), change) for field in fields(part)})


def _change(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_change(item, change) for item in cast("tuple[Any, ...]", value))
    return change(value) if isinstance(value, Value | Part) else value
