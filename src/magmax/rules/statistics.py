"""Statistics that a rule requests before it merges: reductions over all blocks, counts or sums added up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

Array = Any
"""A numpy array or a torch tensor of float32 or float64; a rule uses what the array API standard gives both."""

Counts = NDArray[np.int64]
Sums = NDArray[np.float64]


def namespace(array: Array) -> Any:
    """The array API functions for an array: numpy is its own, torch's come through array-api-compat."""
    return array.__array_namespace__() if hasattr(array, "__array_namespace__") else array_namespace(array)


class Address(NamedTuple):
    """The address of a block: its tensor, and the offset of its first element in the flattened tensor."""

    key: str
    offset: int


@dataclass(frozen=True)
class Block:
    """The same place in all task vectors: its address and one flat array per task.

    Attributes:
        base: the same place in theta_0, never to be overwritten; None where bare task vectors are merged.
        shape: the tensor's shape where the block is all of it, or all of its rows that are merged; None where it may be
            less.
    """

    address: Address
    task_vectors: Sequence[Array]
    base: Array | None = None
    shape: tuple[int, ...] | None = None


class Span(Enum):
    """The range of a statistics request: one tensor after another, or all tensors together."""

    TENSOR = "tensor"
    MODEL = "model"


@dataclass(frozen=True)
class Scope:
    """The scope of a statistics request: number of tasks, elements, and the tensors' shapes.

    Attributes:
        tasks: the number of task vectors.
        elements: how many elements of each are merged, over the span.
        float64: whether any of them is float64, so that magnitudes must be compared in that type.
        row_elements: how many elements a row has (what has one index of the first dimension; all of a vector), of
        one tensor.
        shapes: of each tensor, the shape of what is merged of it.
    """

    tasks: int
    elements: int
    float64: bool = False
    row_elements: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


class Reduction(ABC):
    """A reduction over all blocks: integer counts, added up, so that no order or schedule can change the result.

    Sums of floating numbers do depend on the order: a reduction that takes them must be `per_block`, and the request
    adds them up in the order of their addresses.

    Attributes:
        sampled: how many elements of each block to look at; 0 means all of them.
        per_block: return the counts or sums of each block, by its address, instead of their total.
        addresses: the blocks to read; None means all of them.
    """

    sampled: int = 0
    per_block: bool = False
    addresses: Collection[Address] | None = None

    @abstractmethod
    def initial(self) -> NDArray[Any]:
        """Return zeros: `Counts`, or `Sums`."""

    @abstractmethod
    def update(self, block: Block, into: NDArray[Any]) -> None:
        """Add the block's counts to `into`; may overwrite the block's task vectors."""


Statistics = Any
StatisticsRequest = Generator[Reduction, Any, Statistics]
"""Yields reductions, is sent their sums (of one that is `per_block`, a map of addresses), returns the statistics."""


def run_request(request: StatisticsRequest, collect: Callable[[Reduction], Any]) -> Statistics:
    """Run each reduction of a request with `collect`, and return the statistics that the request computes."""
    reply: Any = None
    while True:
        try:
            reduction = request.send(reply)
        except StopIteration as end:
            return end.value
        reply = collect(reduction)


def run_locally(request: StatisticsRequest, block: Block) -> Statistics:
    """Return the statistics of a request over a single block."""

    def ask(reduction: Reduction) -> Any:
        counts = reduction.initial()
        if reduction.addresses is None or block.address in reduction.addresses:
            reduction.update(replace(block, task_vectors=[delta + 0 for delta in block.task_vectors]), counts)
        return {block.address: counts} if reduction.per_block else counts

    return run_request(request, ask)


@dataclass(frozen=True)
class TransformedReduction(Reduction):
    """A reduction of blocks that are transformed first."""

    reduction: Reduction
    transform: Callable[[Block], Block]

    @property
    def sampled(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.reduction.sampled

    @property
    def per_block(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.reduction.per_block

    @property
    def addresses(self) -> Collection[Address] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.reduction.addresses

    def initial(self) -> NDArray[Any]:
        return self.reduction.initial()

    def update(self, block: Block, into: NDArray[Any]) -> None:
        self.reduction.update(self.transform(block), into)


def through(request: StatisticsRequest, transform: Callable[[Block], Block]) -> StatisticsRequest:
    """Return the request with its reductions run on blocks that `transform` changed first."""
    reply: Any = None
    while True:
        try:
            reduction = request.send(reply)
        except StopIteration as end:
            return end.value
        reply = yield TransformedReduction(reduction, transform)
