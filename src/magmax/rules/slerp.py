"""SLERP: from the base to one model along the arc between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .linear_combination import LinearCombinationRule, check_single_model
from .schedules import Number, for_model, validate_range
from .statistics import Sums

COLLINEAR_COSINE = 0.9995
MIN_NORM = 1e-8


@dataclass(frozen=True)
class Slerp(LinearCombinationRule):
    """Spherical interpolation of the flattened tensors, from theta_0 at t = 0 to the one model theta_1 at t = 1.

        theta = sin((1 - t) w) / sin(w) * theta_0 + sin(t w) / sin(w) * theta_1,   cos(w) = <theta_0, theta_1> / norms

    Linear where |cos(w)| > 0.9995, as after most fine-tunings. The angle to a tensor of norm below 1e-8 is a right one,
    as in mergekit, which has no span model. The merged task vector is theta - theta_0.

    >>> import numpy as np
    >>> Slerp(t=0.5)([np.float32([-1, 1])], base=np.float32([1, 0])).round(4)
    array([-0.2929,  0.7071], dtype=float32)
    """

    name: ClassVar[str] = "slerp"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; as in mergekit"

    t: Number = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_range(self.name, "t", self.t, 0, 1, per_model=False)

    @property
    def needs_base(self) -> bool:
        return True

    def check(self, tasks: int) -> None:
        check_single_model(self, tasks)
        super().check(tasks)

    def coefficients(self, gram: Sums) -> Sequence[float]:
        t = for_model(self.t, 1)
        norms = [math.sqrt(gram[0, 0]), math.sqrt(max(0.0, gram.sum()))]
        cosine = gram[0].sum() / math.prod(norms) if min(norms) > MIN_NORM else 0.0
        if abs(cosine) > COLLINEAR_COSINE:
            return [0.0, t]
        angle = math.acos(cosine)
        first, second = (math.sin(part * angle) / math.sin(angle) for part in (1 - t, t))
        return [first + second - 1, second]
