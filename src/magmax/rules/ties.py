"""TIES: trim, elect a sign, merge what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from ..errors import MagMaxError
from .base import Rule, bits
from .magnitude import Cut, apply_mask, largest
from .plan import Answer, Array, Block, Counts, Fold, Plan, Scope, Span, namespace


class Trimmed(NamedTuple):
    """What TIES must know before it merges: each task's cut, and whether most elected signs are negative."""

    cuts: Sequence[Cut]
    mostly_negative: bool


@dataclass(frozen=True)
class Ties(Rule):
    """Per task keep exactly round(density * n) entries of largest magnitude; per element elect the sign of their sum;
    take the mean of the kept entries that have it.

        m = mean{ trim(tau_t) : sign(trim(tau_t)) = s },  s = sign(sum_t trim(tau_t))

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

    density: float = 0.2
    span: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        if self.span not in ("model", "tensor"):
            raise MagMaxError(f"ties needs span to be model or tensor, not {self.span!r}")
        if not 0 <= self.density <= 1:
            raise MagMaxError(f"ties needs a density from 0 to 1, not {self.density}")

    @property
    def passes(self) -> int:
        return 4

    @property
    def questions_span(self) -> Span:
        return Span(self.span)

    def plan(self, scope: Scope) -> Plan:
        cuts = yield from largest(round(self.density * scope.elements), scope)
        votes: Counts = yield Votes(cuts)
        return Trimmed(cuts, int(votes[0]) < 0)

    def merge(self, block: Block, answer: Answer) -> Array:
        trimmed: Trimmed = answer
        _trim(block, trimmed.cuts)
        elected = _sum(block.deltas)
        xp = namespace(elected)
        if trimmed.mostly_negative:
            elected = xp.where(elected == 0, xp.asarray(-1, dtype=elected.dtype), elected)
        count = xp.zeros_like(bits(elected))
        for delta in block.deltas:
            disagrees = (bits(delta) ^ bits(elected)) >> (8 * delta.dtype.itemsize - 1)
            kept = bits(delta)
            kept &= ~disagrees
            count += xp.astype(delta != 0, count.dtype)
        merged = _sum(block.deltas)
        merged /= xp.astype(xp.maximum(count, xp.ones_like(count)), merged.dtype)
        return merged


@dataclass(frozen=True)
class Votes(Fold):
    """How many more elements elect a positive sign than a negative one."""

    cuts: Sequence[Cut]

    def zeros(self) -> Counts:
        return np.zeros(1, np.int64)

    def count(self, block: Block, into: Counts) -> None:
        _trim(block, self.cuts)
        total = np.asarray(_sum(block.deltas))
        into[0] += np.count_nonzero(total > 0) - np.count_nonzero(total < 0)


def _trim(block: Block, cuts: Sequence[Cut]) -> None:
    """Zero, in place, every entry that is not among its task's largest."""
    for delta, cut in zip(block.deltas, cuts, strict=True):
        apply_mask(bits(delta), cut.mask(delta, block.at))


def _sum(deltas: Sequence[Array]) -> Array:
    """A new array, the left fold of a sum; adding zero first makes the sum of negative zeros positive."""
    total = deltas[0] + 0
    for delta in deltas[1:]:
        total += delta
    return total
