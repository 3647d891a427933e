"""Model Stock: how far to go from the base towards the mean, from the angle between the task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from ..errors import MagMaxError
from .linear_combination import LinearCombinationRule
from .statistics import Sums

MIN_DENOMINATOR = 1e-6


@dataclass(frozen=True)
class ModelStock(LinearCombinationRule):
    """The mean task vector times a ratio that grows with the mean cosine of the angles between task vectors.

        m = r * mean(tau),   r = T c / (1 + (T - 1) c),   c = mean{ cos(tau_s, tau_t) : s < t }

    The ratio is the paper's (its t), tensor by tensor: 1 for equal task vectors, 0 for orthogonal ones, negative, as
    in mergekit, for opposing ones. As mergekit's, it is 0 where the denominator is below 1e-6; the cosine with a zero
    vector counts as 0. Unlike mergekit, cosines are not damped where the norms' product is below 1e-6, and there is no
    filter-wise variant.

    >>> import numpy as np
    >>> ModelStock()([np.float32([2, 0]), np.float32([1, np.sqrt(3)])]).round(4)
    array([1.    , 0.5774], dtype=float32)
    """

    name: ClassVar[str] = "model_stock"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = "Jang et al., Model Stock, ECCV 2024, arXiv 2403.19522"

    def check(self, tasks: int) -> None:
        if tasks < 2:
            raise MagMaxError(f"model_stock needs at least 2 models, for their angle; {tasks or 'none'} given")

    def coefficients(self, gram: Sums) -> Sequence[float]:
        norms = [math.sqrt(square) for square in gram.diagonal()]
        pairs = list(combinations(range(1, len(norms)), 2))
        cosines = [gram[s, t] / (norms[s] * norms[t]) if norms[s] and norms[t] else 0.0 for s, t in pairs]
        mean = math.fsum(min(1.0, max(-1.0, cosine)) for cosine in cosines) / len(pairs)
        tasks = len(norms) - 1
        denominator = 1 + (tasks - 1) * mean
        ratio = 0.0 if abs(denominator) < MIN_DENOMINATOR else tasks * mean / denominator
        return [0.0, *[ratio / tasks] * tasks]
