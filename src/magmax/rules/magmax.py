"""MagMax: keep the task vector of largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .contract import State, StreamingRule, as_signed_bits, keeps_incumbent
from .statistics import Address, Array


@dataclass(frozen=True)
class MagMax(StreamingRule):
    """Element by element, the task vector of largest magnitude, with its sign; a later task wins ties.

        m <- where(|tau_t| >= |m|, tau_t, m)

    The fold is idempotent, and associative but for the order of ties. NaN, where it is allowed in at all, counts as
    larger than every number, so it is never lost. On float32, equal to the bit to the authors' code and FusionBench's.

    >>> import numpy as np
    >>> MagMax()([np.float32([1, -3, 2]), np.float32([-2, 1, -2])])
    array([-2., -3., -2.], dtype=float32)
    """

    name: ClassVar[str] = "magmax"
    scaling_factor: ClassVar[float] = 0.5
    selects_entries: ClassVar[bool] = True
    paper: ClassVar[str] = "Marczak et al., MagMax, ECCV 2024, arXiv 2407.06322"

    def step(self, state: State, task_vector: Array, task: int, address: Address) -> State:
        if not state:
            return (task_vector,)
        (winner,) = state
        held, new = as_signed_bits(winner), as_signed_bits(task_vector)
        keep = keeps_incumbent(held, new)
        held ^= new
        held &= keep
        held ^= new
        return (winner,)

    def finish(self, state: State, tasks: int) -> Array:
        return state[0]
