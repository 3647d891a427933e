"""Linear combinations of the base and the task vectors, with coefficients that depend on their dot products alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import MagMaxError
from .contract import Rule
from .statistics import Address, Array, Block, Reduction, Scope, Span, Statistics, StatisticsRequest, Sums, namespace

SLICE_LENGTH = 1 << 14
"""Elements multiplied at once: few enough to stay in the processor's cache."""


@dataclass(frozen=True)
class GramReduction(Reduction):
    """The dot products of theta_0, tau_1, ..., tau_T with one another, in float64; zeros for theta_0 without `base`.

    Products of float32 numbers are exact in float64, and numpy's own pairwise sums, unlike BLAS, are the same on every
    processor and for any number of its cores.
    """

    tasks: int
    base: bool
    per_block: bool = True

    def initial(self) -> Sums:
        return np.zeros((1 + self.tasks, 1 + self.tasks))

    def update(self, block: Block, into: Sums) -> None:
        first = 0 if self.base else 1
        arrays: list[Array] = [*([block.base] if self.base else []), *block.task_vectors]
        xp = namespace(arrays[0])
        for start in range(0, arrays[0].shape[0], SLICE_LENGTH):
            parts = [xp.astype(array[start : start + SLICE_LENGTH], xp.float64) for array in arrays]
            for row, left in enumerate(parts, start=first):
                for column, right in enumerate(parts[: row - first + 1], start=first):
                    into[row, column] += float(xp.sum(left * right))
        into[:] = np.tril(into) + np.tril(into, -1).T


@dataclass(frozen=True)
class LinearCombinationRule(Rule):
    """A rule whose result is c_0 * theta_0 + c_1 * tau_1 + ... + c_T * tau_T, over each tensor or the whole model.

    The coefficients are found in one extra pass and in float64; the combination is a left fold in the type that is
    merged in. Between machines, and between numpy and torch, the results agree to the rounding of that type.
    """

    span: Literal["model", "tensor"] = "tensor"

    def __post_init__(self) -> None:
        if self.span not in ("model", "tensor"):
            raise MagMaxError(f"{self.name} needs span to be model or tensor, not {self.span!r}")

    @property
    def passes(self) -> int:
        return 1

    @property
    def statistics_span(self) -> Span:
        return Span(self.span)

    @abstractmethod
    def coefficients(self, gram: Sums) -> Sequence[float]:
        """c_0, c_1, ..., c_T, of the dot products of theta_0, tau_1, ..., tau_T."""

    def statistics(self, scope: Scope) -> StatisticsRequest:
        reduction = GramReduction(scope.tasks, self.needs_base)
        parts: Mapping[Address, Sums] = yield reduction
        total = reduction.initial()
        for at in sorted(parts):
            if not np.isfinite(parts[at]).all():
                raise MagMaxError(f"{at.key}: {self.name} measures angles, and those of NaN or infinity are undefined")
            total += parts[at]
        return self.coefficients(total)

    def merge(self, block: Block, statistics: Statistics) -> Array:
        start, *others = statistics
        merged, *deltas = block.task_vectors
        merged *= others[0]
        for delta, coefficient in zip(deltas, others[1:], strict=True):
            delta *= coefficient
            merged += delta
        if self.needs_base:
            merged += start * block.base
        return merged


def check_single_model(rule: Rule, tasks: int) -> None:
    """Raise MagMaxError unless exactly one model is merged."""
    if tasks != 1:
        raise MagMaxError(f"{rule.name} merges exactly one model with the base; {tasks or 'none'} given")
