"""TIES: trim, elect a sign, merge what agrees with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from ..errors import MagMaxError
from .contract import Rule, as_signed_bits
from .elect import apply_weights, disjoint_mean, fold_sum, keep_agreeing
from .schedules import Numbers, for_all_models, validate_range
from .selection import EqualCounts, LargestEntries, apply_mask, largest_entries, request_kth_magnitudes
from .statistics import Address, Array, Block, Counts, Reduction, Scope, Span, Statistics, StatisticsRequest


class TiesStatistics(NamedTuple):
    """The statistics of TIES: each task's largest entries, and whether most elected signs are negative."""

    cuts: Sequence[LargestEntries]
    mostly_negative: bool


@dataclass(frozen=True)
class Ties(Rule):
    """Per task keep exactly round(density * n) entries of largest magnitude; per element elect the sign of their sum;
    take the mean of the kept entries that have it.

        m = mean{ trim(tau_t) : sign(trim(tau_t)) = s },  s = sign(sum_t trim(tau_t))

    With weights, w_t trim(tau_t) stands for trim(tau_t), and the mean divides by the weights of those that agree.
    Equal magnitudes at the cut go by tensor name, then flat offset. Where the sum is zero, s is the sign that most
    elements of the span elected (positive, if neither prevails). The authors' code keeps one entry too many and all
    that equal it, and fails at density 1; mergekit trims tensor by tensor (span: tensor).

    >>> import numpy as np
    >>> Ties(density=0.5)([np.float32([5, -1, 3, 0]), np.float32([4, 1, -7, 2])])
    array([ 4.5,  0. , -7. ,  0. ], dtype=float32)
    """

    name: ClassVar[str] = "ties"
    scaling_factor: ClassVar[float] = 0.3
    paper: ClassVar[str] = "Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708"

    density: Numbers = 0.2
    weights: Numbers = 1.0
    span: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        if self.span not in ("model", "tensor"):
            raise MagMaxError(f"ties needs span to be model or tensor, not {self.span!r}")
        validate_range(self.name, "density", self.density, 0, 1)
        validate_range(self.name, "weights", self.weights)

    @property
    def passes(self) -> int:
        return 3

    @property
    def statistics_span(self) -> Span:
        return Span(self.span)

    def statistics(self, scope: Scope) -> StatisticsRequest:
        weights = for_all_models(self.weights, scope.tasks)
        keeps = [round(density * scope.elements) for density in for_all_models(self.density, scope.tasks)]
        ranks = yield from request_kth_magnitudes(keeps, scope)
        everything = [LargestEntries(rank.code, float64=scope.float64) for rank in ranks]
        tallies: Mapping[Address, Counts] = yield EqualCountsAndVotes(
            [rank.code for rank in ranks], scope.float64, everything, weights
        )
        exact = largest_entries(ranks, tallies, scope.float64)
        recount = {
            at
            for at, (*equals, _) in tallies.items()
            if any(cut.drops_any_equal(at, int(equal)) for cut, equal in zip(exact, equals, strict=True))
        }
        votes = sum(int(tally[-1]) for at, tally in tallies.items() if at not in recount)
        if recount:
            votes += int((yield SignVotes(exact, weights, recount))[0])
        return TiesStatistics(exact, votes < 0)

    def merge(self, block: Block, statistics: Statistics) -> Array:
        trimmed: TiesStatistics = statistics
        weights = for_all_models(self.weights, len(block.task_vectors))
        _trim_in_place(block, trimmed.cuts, weights)
        return disjoint_mean(keep_agreeing(block.task_vectors, trimmed.mostly_negative), weights, block.task_vectors[0])


@dataclass(frozen=True)
class SignVotes(Reduction):
    """The number of elements that elect a positive sign, less those that elect a negative one."""

    cuts: Sequence[LargestEntries]
    weights: Sequence[float]
    addresses: Collection[Address] | None = None

    def initial(self) -> Counts:
        return np.zeros(1, np.int64)

    def update(self, block: Block, into: Counts) -> None:
        _trim_in_place(block, self.cuts, self.weights)
        total = np.asarray(fold_sum(block.task_vectors))
        into[0] += np.count_nonzero(total > 0) - np.count_nonzero(total < 0)


@dataclass(frozen=True)
class EqualCountsAndVotes(Reduction):
    """Per task, the number of magnitudes equal to its code; and the votes if all of these are kept."""

    codes: Sequence[int]
    float64: bool
    cuts: Sequence[LargestEntries]
    weights: Sequence[float]
    per_block: bool = True

    def initial(self) -> Counts:
        return np.zeros(len(self.codes) + 1, np.int64)

    def update(self, block: Block, into: Counts) -> None:
        EqualCounts(self.codes, self.float64).update(block, into[:-1])
        SignVotes(self.cuts, self.weights).update(block, into[-1:])


def _trim_in_place(block: Block, cuts: Sequence[LargestEntries], weights: Sequence[float]) -> None:
    """Zero, in place, every entry that is not among its task's largest; multiply the others by the task's weight."""
    for delta, cut in zip(block.task_vectors, cuts, strict=True):
        apply_mask(as_signed_bits(delta), cut.mask(delta, block.address))
    apply_weights(block.task_vectors, weights)
