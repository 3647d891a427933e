"""SCE: select what differs most, calculate a weight for each model, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from .contract import Rule, as_signed_bits, divide_in_place
from .elect import apply_weights, disjoint_mean, fold_sum, keep_agreeing
from .schedules import Number, for_all_models, validate_range
from .selection import LargestEntries, apply_mask, request_largest
from .statistics import Array, Block, Counts, Reduction, Scope, Span, Statistics, StatisticsRequest, namespace, through


class SceStatistics(NamedTuple):
    """The statistics of SCE for one tensor: its selected elements, and each model's weight."""

    cut: LargestEntries | None
    weights: Sequence[float]


@dataclass(frozen=True)
class Sce(Rule):
    """Per tensor, select the elements whose task vectors vary most; weigh each model by the squares of its selected
    entries; per element take the weighted mean of the entries that have the sign of their unweighted sum.

        m = sum_{t: sign(tau_t) = s} eta_t tau_t / sum_{t: sign(tau_t) = s} eta_t,  s = sign(sum_t tau_t),
        eta_t = sum tau_t^2 / sum_u sum tau_u^2  (over the selected elements; all others are zero)

    Selected are exactly round(density * n) of the n elements that vary at all, those of largest variance, of equal ones
    those first by flat offset; at density 1, all elements. Where the sum is zero, s is positive. The sums of squares
    are exact, so no schedule changes a bit. mergekit rounds density * n down, computes in the models' type, and weighs
    all models alike where the mean squares sum to less than 1e-6, as those of most large models do; not so here.

    >>> import numpy as np
    >>> Sce(density=0.5)([np.float32([2, 0, 1, 5]), np.float32([0, -1, 1, 5])])
    array([2., 0., 0., 0.], dtype=float32)
    """

    name: ClassVar[str] = "sce"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = "Wan et al., FuseChat, EMNLP 2025, arXiv 2408.07990"

    density: Number = 1.0

    def __post_init__(self) -> None:
        validate_range(self.name, "density", self.density, 0, 1, per_model=False)

    @property
    def passes(self) -> int:
        return 1 if self.density == 1 else 5

    @property
    def statistics_span(self) -> Span:
        return Span.TENSOR

    def statistics(self, scope: Scope) -> StatisticsRequest:
        cut = None
        (density,) = for_all_models(self.density, 1)
        if density < 1:
            varying: Counts = yield VaryingCount()
            wanted = round(density * int(varying[0]))
            (cut,) = yield from through(request_largest([wanted], Scope(1, scope.elements, float64=True)), variances)
        squares: Counts = yield SquareSums(cut, scope.tasks)
        sums = [_exact_sum(of_task) for of_task in squares]
        total = sum(sums)
        return SceStatistics(cut, [part / total if total else 1 / scope.tasks for part in sums])

    def merge(self, block: Block, statistics: Statistics) -> Array:
        selected: SceStatistics = statistics
        _zero_unselected(block, selected.cut)
        agreeing = list(keep_agreeing(block.task_vectors))
        apply_weights(agreeing, selected.weights)
        return disjoint_mean(agreeing, selected.weights, block.task_vectors[0])


def variances(block: Block) -> Block:
    """Per element the sum of squared distances from the mean of the task vectors, in float64: T times the variance."""
    xp = namespace(block.task_vectors[0])
    apart = [xp.astype(delta, xp.float64) - block.task_vectors[0] for delta in block.task_vectors]
    mean = fold_sum(apart)
    divide_in_place(mean, len(apart))
    return Block(block.address, [fold_sum([(distance - mean) ** 2 for distance in apart])])


def _zero_unselected(block: Block, cut: LargestEntries | None) -> None:
    """Zero, in place, every entry of the elements that are not selected."""
    if cut is not None:
        mask = cut.mask(variances(block).task_vectors[0], block.address)
        for delta in block.task_vectors:
            apply_mask(as_signed_bits(delta), mask)


@dataclass(frozen=True)
class VaryingCount(Reduction):
    """A count of the elements that differ between task vectors."""

    def initial(self) -> Counts:
        return np.zeros(1, np.int64)

    def update(self, block: Block, into: Counts) -> None:
        into[0] += np.count_nonzero(np.asarray(variances(block).task_vectors[0]))


@dataclass(frozen=True)
class SquareSums(Reduction):
    """Per task the exact sum of the squares of its selected entries: by exponent, the upper and the lower 26 bits of
    the mantissas, added up as integers."""

    cut: LargestEntries | None
    tasks: int

    def initial(self) -> Counts:
        return np.zeros((self.tasks, 2, 2048), np.int64)

    def update(self, block: Block, into: Counts) -> None:
        _zero_unselected(block, self.cut)
        for delta, (upper, lower) in zip(block.task_vectors, into, strict=True):
            squares = np.asarray(delta).astype(np.float64)
            squares *= squares
            codes = squares.view(np.int64)
            exponents = (codes >> 52) & 0x7FF  # without the sign, which NaN may have
            mantissas = (codes & ((1 << 52) - 1)) | ((exponents > 0).astype(np.int64) << 52)
            upper += np.bincount(exponents, mantissas >> 26, 2048).astype(np.int64)
            lower += np.bincount(exponents, mantissas & ((1 << 26) - 1), 2048).astype(np.int64)


def _exact_sum(counts: Counts) -> int:
    """A sum of squares in units of the least positive float64; those that are not finite count as nothing."""
    upper, lower = counts[:, :-1].tolist()
    return sum(((u << 26) + v) << max(0, e - 1) for e, (u, v) in enumerate(zip(upper, lower, strict=True)))
