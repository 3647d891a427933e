"""Averaging: the model soup, as task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import State, StreamingRule
from .plan import Address, Array


@dataclass(frozen=True)
class Average(StreamingRule):
    """The mean of the task vectors, (tau_1 + ... + tau_T) / T, summed in task order.

    The MagMax authors' own `Average` divides by a constant; this one divides by T.

    >>> import numpy as np
    >>> Average()([np.float32([1, 2]), np.float32([3, -2])])
    array([2., 0.], dtype=float32)
    """

    name: ClassVar[str] = "average"
    scaling_factor: ClassVar[float] = 1.0
    selects: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    paper: ClassVar[str] = "Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482"

    def step(self, state: State, task_vector: Array, task: int, at: Address) -> State:
        return add(state, task_vector)

    def finish(self, state: State, tasks: int) -> Array:
        (total,) = state
        total /= tasks
        return total


def add(state: State, task_vector: Array) -> State:
    """One more summand to a running sum."""
    if not state:
        return (task_vector,)
    (total,) = state
    total += task_vector
    return (total,)
