"""TIES: trim, elect a sign, merge what agrees with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from ..errors import MagMaxError
from .contract import Rule, bits
from .elect import agreeing, disjoint_mean, left_sum, weigh
from .schedules import Numbers, each, need
from .selection import Cut, Equals, apply_mask, exact_cuts, ranked
from .statistics import Address, Answer, Array, Block, Counts, Fold, Plan, Scope, Span


class Trimmed(NamedTuple):
    """What TIES must know before it merges: each task's cut, and whether most elected signs are negative."""

    cuts: Sequence[Cut]
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
        need(self.name, "density", self.density, 0, 1)
        need(self.name, "weights", self.weights)

    @property
    def passes(self) -> int:
        return 3

    @property
    def questions_span(self) -> Span:
        return Span(self.span)

    def plan(self, scope: Scope) -> Plan:
        weights = each(self.weights, scope.tasks)
        keeps = [round(density * scope.elements) for density in each(self.density, scope.tasks)]
        ranks = yield from ranked(keeps, scope)
        everything = [Cut(rank.code, wide=scope.wide) for rank in ranks]
        tallies: Mapping[Address, Counts] = yield Tally([rank.code for rank in ranks], scope.wide, everything, weights)
        exact = exact_cuts(ranks, tallies, scope.wide)
        recount = {
            at
            for at, (*equals, _) in tallies.items()
            if any(cut.drops(at, int(equal)) for cut, equal in zip(exact, equals, strict=True))
        }
        votes = sum(int(tally[-1]) for at, tally in tallies.items() if at not in recount)
        if recount:
            votes += int((yield Votes(exact, weights, recount))[0])
        return Trimmed(exact, votes < 0)

    def merge(self, block: Block, answer: Answer) -> Array:
        trimmed: Trimmed = answer
        weights = each(self.weights, len(block.deltas))
        _trim(block, trimmed.cuts, weights)
        return disjoint_mean(agreeing(block.deltas, trimmed.mostly_negative), weights, block.deltas[0])


@dataclass(frozen=True)
class Votes(Fold):
    """How many more elements elect a positive sign than a negative one."""

    cuts: Sequence[Cut]
    weights: Sequence[float]
    only: Collection[Address] | None = None

    def zeros(self) -> Counts:
        return np.zeros(1, np.int64)

    def count(self, block: Block, into: Counts) -> None:
        _trim(block, self.cuts, self.weights)
        total = np.asarray(left_sum(block.deltas))
        into[0] += np.count_nonzero(total > 0) - np.count_nonzero(total < 0)


@dataclass(frozen=True)
class Tally(Fold):
    """Per task, how many magnitudes are exactly its code; and the votes, if all of these are kept."""

    codes: Sequence[int]
    wide: bool
    cuts: Sequence[Cut]
    weights: Sequence[float]
    apart: bool = True

    def zeros(self) -> Counts:
        return np.zeros(len(self.codes) + 1, np.int64)

    def count(self, block: Block, into: Counts) -> None:
        Equals(self.codes, self.wide).count(block, into[:-1])
        Votes(self.cuts, self.weights).count(block, into[-1:])


def _trim(block: Block, cuts: Sequence[Cut], weights: Sequence[float]) -> None:
    """Zero, in place, every entry that is not among its task's largest; multiply the others by the task's weight."""
    for delta, cut in zip(block.deltas, cuts, strict=True):
        apply_mask(bits(delta), cut.mask(delta, block.at))
    weigh(block.deltas, weights)
