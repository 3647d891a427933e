"""Karcher: the mean of the models on the sphere of their directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import MagMaxError
from .linear_combination import LinearCombinationRule
from .statistics import Sums


@dataclass(frozen=True)
class Karcher(LinearCombinationRule):
    """The models' mean length times the direction u whose squared angles to theirs, theta_t / |theta_t|, sum to least.

        u <- cos(|v|) u + sin(|v|) v / |v|,   v = mean{ angle(u, u_t) / sin(angle) * (u_t - <u, u_t> u) }

    from the normalised mean of the u_t, until |v| < tol or max_iter times. The merged task vector is the result less
    theta_0, which is itself no part of the mean. Every u is a combination of the u_t, so that their cosines are all
    that the iteration needs, and angles below tol (or within it of pi, where there is no shortest way) are skipped.
    As mergekit's, but that leaves out tensors of norm below tol too, goes a way that rounding chooses between opposite
    ones, and has no span model.

    >>> import numpy as np
    >>> Karcher()([np.float32([2, 0]), np.float32([0, 4])], base=np.float32([0, 0])).round(4)
    array([2.1213, 2.1213], dtype=float32)
    """

    name: ClassVar[str] = "karcher"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = "Wang et al., Functionality-Oriented LLM Merging, 2026, arXiv 2603.04972; as in mergekit"

    max_iter: int = 10
    tol: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_iter < 0 or not 0 < self.tol < 1:
            raise MagMaxError(
                f"karcher needs max_iter of at least 0 and tol between 0 and 1, not {self.max_iter} and {self.tol}"
            )

    @property
    def needs_base(self) -> bool:
        return True

    def coefficients(self, gram: Sums) -> Sequence[float]:
        dots = gram[0, 0] + gram[1:, :1] + gram[:1, 1:] + gram[1:, 1:]
        norms = np.sqrt(np.maximum(dots.diagonal(), 0))
        some = np.flatnonzero(norms)
        weights = np.zeros(len(norms))
        if len(some):
            cosines = dots[np.ix_(some, some)] / np.outer(norms[some], norms[some])
            weights[some] = norms.mean() * self._mean_direction(cosines) / norms[some]
        return [math.fsum(weights) - 1, *weights.tolist()]

    def _mean_direction(self, cosines: Sums) -> NDArray[np.float64]:
        """The mean direction, as coefficients of the unit vectors that have these cosines with one another."""
        count = len(cosines)
        mean = np.full(count, 1 / count)
        length = _combination_norm(mean, cosines)
        mean = mean / length if length >= self.tol else np.eye(count)[0]
        for _ in range(self.max_iter):
            tangent = np.zeros(count)
            for task, dot in enumerate(np.clip((cosines * mean).sum(axis=1), -1, 1).tolist()):
                angle = math.acos(dot)
                if self.tol <= angle <= math.pi - self.tol:
                    tangent += angle / math.sin(angle) / count * (np.eye(count)[task] - dot * mean)
            step = _combination_norm(tangent, cosines)
            if step < self.tol:
                break
            mean = math.cos(step) * mean + math.sin(step) / step * tangent
            mean /= _combination_norm(mean, cosines)
        return mean


def _combination_norm(coefficients: NDArray[np.float64], cosines: Sums) -> float:
    """The norm of a combination of unit vectors."""
    return math.sqrt(max(0.0, float((np.outer(coefficients, coefficients) * cosines).sum())))
