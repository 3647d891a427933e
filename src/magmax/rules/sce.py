"""SCE: select what differs most, calculate a weight for each model, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from .contract import Rule, bits, divide
from .elect import agreeing, disjoint_mean, left_sum, weigh
from .schedules import Number, each, need
from .selection import Cut, apply_mask, largest
from .statistics import Answer, Array, Block, Counts, Fold, Plan, Scope, Span, namespace, seen


class Selected(NamedTuple):
    """What SCE must know of a tensor before it merges it: which elements it selects, and each model's weight."""

    cut: Cut | None
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
        need(self.name, "density", self.density, 0, 1, per_model=False)

    @property
    def passes(self) -> int:
        return 1 if self.density == 1 else 5

    @property
    def questions_span(self) -> Span:
        return Span.TENSOR

    def plan(self, scope: Scope) -> Plan:
        cut = None
        (density,) = each(self.density, 1)
        if density < 1:
            varying: Counts = yield Varying()
            wanted = round(density * int(varying[0]))
            (cut,) = yield from seen(largest([wanted], Scope(1, scope.elements, wide=True)), spread)
        squares: Counts = yield Squares(cut, scope.tasks)
        sums = [_whole(of_task) for of_task in squares]
        total = sum(sums)
        return Selected(cut, [part / total if total else 1 / scope.tasks for part in sums])

    def merge(self, block: Block, answer: Answer) -> Array:
        selected: Selected = answer
        _select(block, selected.cut)
        kept = list(agreeing(block.deltas))
        weigh(kept, selected.weights)
        return disjoint_mean(kept, selected.weights, block.deltas[0])


def spread(block: Block) -> Block:
    """Per element the sum of squared distances from the mean of the task vectors, in float64: T times the variance."""
    xp = namespace(block.deltas[0])
    apart = [xp.astype(delta, xp.float64) - block.deltas[0] for delta in block.deltas]
    mean = left_sum(apart)
    divide(mean, len(apart))
    return Block(block.at, [left_sum([(distance - mean) ** 2 for distance in apart])])


def _select(block: Block, cut: Cut | None) -> None:
    """Zero, in place, every entry of the elements that are not selected."""
    if cut is not None:
        mask = cut.mask(spread(block).deltas[0], block.at)
        for delta in block.deltas:
            apply_mask(bits(delta), mask)


@dataclass(frozen=True)
class Varying(Fold):
    """How many elements are not the same in all task vectors."""

    def zeros(self) -> Counts:
        return np.zeros(1, np.int64)

    def count(self, block: Block, into: Counts) -> None:
        into[0] += np.count_nonzero(np.asarray(spread(block).deltas[0]))


@dataclass(frozen=True)
class Squares(Fold):
    """Per task the exact sum of the squares of its selected entries: by exponent, the upper and the lower 26 bits of
    the mantissas, added up as integers."""

    cut: Cut | None
    tasks: int

    def zeros(self) -> Counts:
        return np.zeros((self.tasks, 2, 2048), np.int64)

    def count(self, block: Block, into: Counts) -> None:
        _select(block, self.cut)
        for delta, (upper, lower) in zip(block.deltas, into, strict=True):
            squares = np.asarray(delta).astype(np.float64)
            squares *= squares
            codes = squares.view(np.int64)
            exponents = codes >> 52
            mantissas = (codes & ((1 << 52) - 1)) | ((exponents > 0).astype(np.int64) << 52)
            upper += np.bincount(exponents, mantissas >> 26, 2048).astype(np.int64)
            lower += np.bincount(exponents, mantissas & ((1 << 26) - 1), 2048).astype(np.int64)


def _whole(counts: Counts) -> int:
    """A sum of squares in units of the least positive float64."""
    upper, lower = counts.tolist()
    return sum(((u << 26) + v) << max(0, e - 1) for e, (u, v) in enumerate(zip(upper, lower, strict=True)))
