"""What a merge rule is: a pure function of blocks of task vectors, written for numpy and torch arrays alike."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, cast

from ..errors import MagMaxError
from .positions import TensorPosition
from .schedules import Schedule, to_config
from .statistics import Address, Array, Block, Scope, Span, Statistics, StatisticsRequest, namespace, run_locally

State = tuple[Array, ...]
"""The state of a fold over tasks: arrays of one block's shape."""


MergeFunction = Callable[[Block], Array]
"""What a rule makes of a block, whose task vectors it may overwrite."""


@dataclass(frozen=True)
class Component(ABC):
    """A rule or transform; its fields are its options.

    Attributes:
        name: the word for it in recipes and on the command line.
        paper: where it comes from.
        cpu_only: whether it takes arrays in the processor's memory only.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    cpu_only: ClassVar[bool] = False

    @property
    def cpu_only_parts(self) -> list[str]:
        """Return what of it takes arrays in the processor's memory only, by name: nothing, where it works on a GPU
        too.
        """
        inside = [name for option in _options(self) if isinstance(option, Component) for name in option.cpu_only_parts]
        return [self.name] * self.cpu_only + inside

    @property
    def varies_by_tensor(self) -> bool:
        """Return whether any of its numbers differs from tensor to tensor."""
        return any(option.varies_by_tensor for option in _options(self))

    @property
    def per_model(self) -> bool:
        """Return whether any of its numbers is given for each model."""
        return any(option.per_model for option in _options(self))

    def for_tensor(self, position: TensorPosition) -> Self:
        """The part as it is for one tensor; itself where nothing depends on the tensor."""
        return _with_options(self, lambda option: option.for_tensor(position)) if self.varies_by_tensor else self

    def for_models(self, names: Sequence[str]) -> Self:
        """Return the component with numbers by model name put in the models' order."""
        return _with_options(self, lambda option: option.for_models(names)) if self.per_model else self

    def check_schedules(self, tasks: int) -> None:
        """Raise MagMaxError if numbers given for each model do not fit so many."""
        for field in fields(self):
            for option in _nested_options(getattr(self, field.name)):
                if isinstance(option, Component):
                    option.check_schedules(tasks)
                elif problem := option.check(tasks):
                    raise MagMaxError(f"{self.name}: {field.name} {problem}")

    def describe(self) -> dict[str, Any]:
        """The part as a recipe writes it: {name: {option: value}}."""
        return {self.name: {field.name: to_config(getattr(self, field.name)) for field in fields(self)}}


@dataclass(frozen=True)
class Rule(Component):
    """A way to merge task vectors tau_t = theta_t - theta_0 into one.

    A rule is a pure function of blocks. It may first request statistics of all blocks (`statistics`); the answer goes
    into the
    merge of each.

    Attributes:
        scaling_factor: what multiplies the merged task vector where the user names nothing else.
        linear: whether the merged task vector is sum_t c_t * tau_t, with the same c for all elements of a tensor.
    """

    scaling_factor: ClassVar[float]
    linear: ClassVar[bool] = False

    @property
    def passes(self) -> int:
        """Return how many reductions it usually requests at most; each is a pass over all inputs."""
        return 0

    @property
    def memory(self) -> int:
        """Return the bytes that its statistics usually take at most, beside the blocks.

        With the span `TENSOR`, those of one tensor: each thread then collects its own.
        """
        return 0

    @property
    def passes_in_words(self) -> str:
        """`passes` in words, where they depend on options or on the number of tasks T."""
        return str(self.passes)

    @property
    def default_scaling_factor(self) -> float:
        """`scaling_factor`, or what it is for the rule at the end of a chain."""
        return self.scaling_factor

    @property
    def whole_tensor(self) -> bool:
        """Return whether it must have all of a tensor at once: `Block.shape` is then the tensor's."""
        return False

    @property
    def needs_base(self) -> bool:
        """Return whether it combines whole weights theta_0 + tau_t, so that it needs `Block.base`."""
        return False

    @property
    def needs_scaling_factor(self) -> bool:
        """Return whether what it merges depends on what that is multiplied by, so that `for_scaling_factor` must be
        called first.
        """
        return False

    @property
    def statistics_span(self) -> Span:
        """Return the range of its statistics."""
        return Span.MODEL

    def statistics(self, scope: Scope) -> StatisticsRequest:
        """Request what the merge needs; the number of yields is the number of extra passes. By default, none."""
        yield from ()

    @abstractmethod
    def merge(self, block: Block, statistics: Statistics) -> Array:
        """The merged task vector of a block; may overwrite the block's task vectors."""

    def check(self, tasks: int) -> None:
        """Raise MagMaxError if the rule cannot merge so many tasks."""
        if tasks < 1:
            raise MagMaxError(f"{self.name} needs at least one model to merge; none was given")
        self.check_schedules(tasks)
        if self.varies_by_tensor and self.passes and self.statistics_span is Span.MODEL:
            raise MagMaxError(
                f"{self.name} asks of the whole model, so its numbers must be the same for all tensors; "
                "use span: tensor"
            )

    def check_names(self, names: Collection[str]) -> None:
        """Raise MagMaxError if an option names a tensor that is none of the model's. By default, none does."""

    def for_scaling_factor(self, factor: float) -> Rule:
        """The rule, where its result is going to be multiplied by `factor`. By default, itself."""
        return self

    def summarize(self, all_statistics: Collection[Statistics]) -> str:
        """Describe the statistics to the user (one, or one for each tensor). By default, nothing."""
        return ""

    def __call__(
        self,
        task_vectors: Sequence[Array],
        key: str = "",
        offset: int = 0,
        depth: float = 0,
        *,
        base: Array | None = None,
    ) -> Array:
        """Merge bare arrays of one shape (numpy or torch; half precision is computed in float32, rounded once).

        `key` and `offset` are where random draws start; `key` and `depth` are the place of numbers that depend on it.
        Rules that combine whole weights need theta_0 as `base`, of the same shape and library; the others ignore it.
        """
        self.check(len(task_vectors))
        if self.varies_by_tensor:
            return self.for_tensor(TensorPosition(key, depth))(task_vectors, key, offset, base=base)
        if self.needs_base and base is None:
            raise MagMaxError(f"{self.name} combines whole weights, not task vectors alone; give base=theta_0")
        shapes = sorted({tuple(v.shape) for v in [*task_vectors, *([] if base is None else [base])]})
        if len(shapes) > 1:
            raise MagMaxError(f"task vectors and base must have one shape; these have {', '.join(map(str, shapes))}")
        xp = namespace(task_vectors[0])
        dtype = xp.result_type(*task_vectors)
        if not xp.isdtype(dtype, "real floating"):
            raise MagMaxError(f"task vectors must be floating, not {dtype}; convert them")
        compute = xp.float64 if dtype == xp.float64 else xp.float32
        flat = [xp.reshape(xp.asarray(v, dtype=compute, copy=True), (-1,)) for v in task_vectors]
        start = None if base is None else xp.reshape(xp.asarray(base, dtype=compute), (-1,))
        shape = tuple(task_vectors[0].shape)
        block = Block(Address(key, offset), flat, start, shape)
        elements = math.prod(shape)
        row = elements // max(1, shape[0]) if len(shape) > 1 else elements
        scope = Scope(len(task_vectors), elements, dtype == xp.float64, row, {key: shape})
        merged = self.merge(block, run_locally(self.statistics(scope), block))
        return xp.reshape(xp.astype(merged, dtype, copy=False), task_vectors[0].shape)


@dataclass(frozen=True)
class StreamingRule(Rule):
    """A rule without statistics that takes one task vector after another, in memory that does not grow with tasks.

    `step` takes a task vector in, `finish` turns what is remembered into the merged task vector. The merge of files,
    the merge of modules and the running merge all call exactly these two.

    Attributes:
        selects_entries: whether every remembered element is some task's own element, verbatim.
    """

    selects_entries: ClassVar[bool]

    @abstractmethod
    def step(self, state: State, task_vector: Array, task: int, address: Address) -> State:
        """Take in the task vector of task number `task` (from 1). `state` is () at first.

        Both `state` and `task_vector` belong to the rule from here on: it may overwrite them.
        """

    @abstractmethod
    def finish(self, state: State, tasks: int) -> Array:
        """The merged task vector of `tasks` tasks; may overwrite `state`."""

    def slots(self, tasks: int) -> int:
        """Return how many arrays the state of so many tasks holds."""
        return min(tasks, 1)

    def merge(self, block: Block, statistics: Statistics) -> Array:
        state: State = ()
        for task, vector in enumerate(block.task_vectors, start=1):
            state = self.step(state, vector, task, block.address)
        return self.finish(state, len(block.task_vectors))


_SIGNED_INT_TYPES: dict[Any, Any] = {}
"""Floating type -> the signed integer type of its width, of numpy or torch, as they are met."""


def as_signed_bits(values: Array) -> Array:
    """The same memory as signed integers of the same width."""
    kind = _SIGNED_INT_TYPES.get(values.dtype)
    if kind is None:
        xp = namespace(values)
        kind = _SIGNED_INT_TYPES[values.dtype] = xp.int64 if values.dtype == xp.float64 else xp.int32
    return values.view(kind)


def divide_in_place(values: Array, by: float) -> None:
    """Divide in place, rounded once: by a bare number torch would multiply by its reciprocal on a GPU."""
    values /= namespace(values).asarray(by, dtype=values.dtype, device=getattr(values, "device", None))


def keeps_incumbent(incumbent: Array, challenger: Array) -> Array:
    """All ones where |incumbent| > |challenger|, all zeros where the challenger wins or ties; all as integers.

    Magnitudes are compared as the integers their bits spell, an order equal to that of the numbers and in which NaN
    stands above infinity; selecting by a mask of bits is several times faster than `where`.
    """
    sign = 8 * incumbent.dtype.itemsize - 1
    magnitude = (1 << sign) - 1
    mask = challenger & magnitude
    mask -= incumbent & magnitude
    mask >>= sign
    return mask


def _options(part: Component) -> Iterator[Schedule | Component]:
    for field in fields(part):
        yield from _nested_options(getattr(part, field.name))


def _nested_options(value: Any) -> Iterator[Schedule | Component]:
    """Return what of an option depends on a place: itself, or, of a tuple, each of its items."""
    if isinstance(value, Schedule | Component):
        yield value
    elif isinstance(value, tuple):
        for item in cast("tuple[Any, ...]", value):
            yield from _nested_options(item)


def _with_options(part: Any, change: Callable[[Any], Any]) -> Any:
    """The part with everything that depends on a place changed."""
    return replace(part, **{field.name: _convert_option(getattr(part, field.name), change) for field in fields(part)})


def _convert_option(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_convert_option(item, change) for item in cast("tuple[Any, ...]", value))
    return change(value) if isinstance(value, Schedule | Component) else value


@dataclass(frozen=True)
class TaskVectorTransform(Component):
    """A transform of one task vector at a time, which may first request statistics of all blocks."""

    @property
    def passes(self) -> int:
        """Return how many reductions it usually requests at most; each is a pass over all inputs."""
        return 0

    @property
    def memory(self) -> int:
        """Return the bytes that its statistics usually take at most, beside the blocks."""
        return 0

    @property
    def statistics_span(self) -> Span | None:
        """Return the range of its statistics; None if it requests none."""
        return None if type(self).statistics is TaskVectorTransform.statistics else Span.MODEL

    def statistics(self, scope: Scope) -> StatisticsRequest:
        """Request what `apply` needs. By default, nothing."""
        yield from ()

    @abstractmethod
    def apply(self, task_vector: Array, task: int, address: Address, statistics: Statistics) -> Array:
        """The transformed task vector of task number `task` (from 1); may overwrite `task_vector`."""


@dataclass(frozen=True)
class MergedTransform(Component):
    """A transform of the merged task vector, which may first request statistics of all blocks.

    The task vectors of its blocks are those that came in, before any transform ahead of the rule.
    """

    @property
    def passes(self) -> int:
        """Return how many reductions it usually requests at most; each is a pass over all inputs."""
        return 0

    def statistics(self, scope: Scope, merge: MergeFunction) -> StatisticsRequest:
        """Request what `apply` needs. By default, nothing."""
        yield from ()

    @abstractmethod
    def apply(self, block: Block, merge: MergeFunction, statistics: Statistics, factor: float) -> Array:
        """The transformed merge of a block; it is multiplied by the scaling factor `factor` afterwards."""

    def summarize(self, all_statistics: Collection[Statistics]) -> str:
        """Describe the statistics to the user (one, or one for each tensor). By default, nothing."""
        return ""

    def check_names(self, names: Collection[str]) -> None:
        """Raise MagMaxError if an option names a tensor that is none of these. By default, none does."""
