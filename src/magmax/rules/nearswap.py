"""NearSwap: take a model's value where it is near the base's, and step towards it elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .contract import Rule
from .linear_combination import check_single_model
from .schedules import Number, for_model, validate_range
from .statistics import Array, Block, Statistics, namespace

MIN_DISTANCE = 1e-6


@dataclass(frozen=True)
class NearSwap(Rule):
    """The one task vector, every element clipped to -t ... t: no element of the base moves by more than t.

        m = min(max(tau, -t), t)

    The released code interpolates with the weight min(1, t / |tau|), which is this clip but for rounding. mergekit's
    divides by 1e-6 where |tau| is less; so with a t below 1e-6 tau is multiplied by t / 1e-6 first, here too. Theirs
    has no default t; 0.0001 is that of the model it was published with.

    >>> import numpy as np
    >>> NearSwap(t=0.5)([np.float32([0.25, -3, 0.5])])
    array([ 0.25, -0.5 ,  0.5 ], dtype=float32)
    """

    name: ClassVar[str] = "nearswap"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = "alchemonaut, QuartetAnemoi-70B-t0.0001, huggingface.co, 2024; as in mergekit"

    t: Number = 0.0001

    def __post_init__(self) -> None:
        validate_range(self.name, "t", self.t, 0, per_model=False)

    def check(self, tasks: int) -> None:
        check_single_model(self, tasks)
        super().check(tasks)

    def merge(self, block: Block, statistics: Statistics) -> Array:
        (delta,) = block.task_vectors
        t = for_model(self.t, 1)
        if t < MIN_DISTANCE:
            delta *= t / MIN_DISTANCE
        return namespace(delta).clip(delta, -t, t)
