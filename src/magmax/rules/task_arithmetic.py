"""Task arithmetic: the sum of the task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .average import add_weighted
from .contract import State, StreamingRule
from .schedules import Numbers, for_model, validate_range
from .statistics import Address, Array


@dataclass(frozen=True)
class TaskArithmetic(StreamingRule):
    """The sum w_1 tau_1 + ... + w_T tau_T, in task order; usually scaled by 0.3, or by 1/T in MagMax's own scripts.

    >>> import numpy as np
    >>> TaskArithmetic()([np.float32([1, 2]), np.float32([3, -2])])
    array([4., 0.], dtype=float32)
    """

    name: ClassVar[str] = "task_arithmetic"
    scaling_factor: ClassVar[float] = 0.3
    selects_entries: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    paper: ClassVar[str] = "Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089"

    weights: Numbers = 1.0

    def __post_init__(self) -> None:
        validate_range(self.name, "weights", self.weights)

    def step(self, state: State, task_vector: Array, task: int, address: Address) -> State:
        return add_weighted(state, task_vector, for_model(self.weights, task))

    def finish(self, state: State, tasks: int) -> Array:
        return state[0]
