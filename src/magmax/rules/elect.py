"""Elect a sign per element, then merge what agrees with it: what TIES does after trimming."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .contract import Rule, as_signed_bits
from .schedules import Numbers, for_all_models, validate_range
from .statistics import Array, Block, Statistics, namespace


@dataclass(frozen=True)
class Elect(Rule):
    """Per element elect the sign of the weighted sum; take the weighted mean of the entries that have it.

        m = sum_{t: sign(w_t tau_t) = s} w_t tau_t / sum_{t: sign(w_t tau_t) = s} w_t,  s = sign(sum_t w_t tau_t)

    Where the sum is zero, s is positive, as in mergekit; so nothing need be asked of the whole model, as `ties` must.
    Zeros agree with no sign. Where the weights that agree sum to zero, nothing is divided by.

    >>> import numpy as np
    >>> from magmax.rules import PerModel
    >>> Elect(weights=PerModel((1, 1, 2)))([np.float32([4, 1]), np.float32([0, -3]), np.float32([1, 4])])
    array([2., 3.], dtype=float32)
    """

    name: ClassVar[str] = "elect"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = "Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708, without the trimming"

    weights: Numbers = 1.0

    def __post_init__(self) -> None:
        validate_range(self.name, "weights", self.weights)

    def merge(self, block: Block, statistics: Statistics) -> Array:
        weights = for_all_models(self.weights, len(block.task_vectors))
        apply_weights(block.task_vectors, weights)
        return disjoint_mean(keep_agreeing(block.task_vectors), weights, block.task_vectors[0])


@dataclass(frozen=True)
class ElectSum(Rule):
    """Per element elect the sign of the weighted sum, as `elect` does; sum the weighted entries that have it.

        m = sum_{t: sign(w_t tau_t) = s} w_t tau_t,  s = sign(sum_t w_t tau_t)

    mergekit's `normalize: false`, the default of its dare_ties and breadcrumbs_ties.

    >>> import numpy as np
    >>> from magmax.rules import PerModel
    >>> ElectSum(weights=PerModel((1, 1, 2)))([np.float32([4, 1]), np.float32([0, -3]), np.float32([1, 4])])
    array([6., 9.], dtype=float32)
    """

    name: ClassVar[str] = "elect_sum"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = Elect.paper

    weights: Numbers = 1.0

    def __post_init__(self) -> None:
        validate_range(self.name, "weights", self.weights)

    def merge(self, block: Block, statistics: Statistics) -> Array:
        apply_weights(block.task_vectors, for_all_models(self.weights, len(block.task_vectors)))
        return fold_sum(list(keep_agreeing(block.task_vectors)))


def apply_weights(task_vectors: Sequence[Array], weights: Sequence[float]) -> None:
    """Multiply each task vector by its weight, in place."""
    for delta, weight in zip(task_vectors, weights, strict=True):
        if weight != 1:
            delta *= weight


def fold_sum(task_vectors: Sequence[Array]) -> Array:
    """A new array, the left fold of a sum; adding zero first makes the sum of negative zeros positive."""
    total = task_vectors[0] + 0
    for delta in task_vectors[1:]:
        total += delta
    return total


def keep_agreeing(task_vectors: Sequence[Array], zero_is_negative: bool = False) -> Iterator[Array]:
    """Of each task vector the entries that have the sign of their sum, zeros elsewhere; NaN where that sum is NaN."""
    total = fold_sum(task_vectors)
    xp = namespace(total)
    # A sum is never -0, so that 1 less turns zero, and nothing else, from positive to negative.
    opposite = ~(as_signed_bits(total) - int(zero_is_negative))
    for number, delta in enumerate(task_vectors):
        masked = as_signed_bits(delta) ^ opposite
        masked >>= 8 * delta.dtype.itemsize - 1
        masked &= as_signed_bits(delta)
        agreeing = masked.view(delta.dtype)
        # NaN has a sign, which depends on the processor where it is of inf - inf; one NaN makes the result NaN.
        yield agreeing if number else xp.where(xp.isnan(total), total, agreeing)


def disjoint_mean(agreeing: Iterable[Array], weights: Sequence[float], like: Array) -> Array:
    """The sum of the weighted task vectors' entries that agree, over the sum of their weights; an array as `like`."""
    xp = namespace(like)
    merged = xp.zeros_like(like)
    share = xp.zeros_like(like, dtype=xp.int16 if all(weight == 1 for weight in weights) else like.dtype)
    for vector, weight in zip(agreeing, weights, strict=True):
        merged += vector
        present = xp.astype(vector != 0, share.dtype)
        apply_weights([present], [weight])
        share += present
    share += xp.astype(share == 0, share.dtype)
    merged /= xp.astype(share, merged.dtype, copy=False)
    return merged
