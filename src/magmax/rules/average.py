"""Averaging: the model soup, as task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import MagMaxError
from .contract import State, StreamingRule, divide_in_place
from .schedules import Numbers, for_all_models, for_model, validate_range
from .statistics import Address, Array

MIN_WEIGHT_SUM = 1e-8


@dataclass(frozen=True)
class Average(StreamingRule):
    """The mean of the task vectors, (tau_1 + ... + tau_T) / T, summed in task order; or their weighted mean.

        m = sum_t w_t tau_t / sum_t w_t

    The MagMax authors' own `Average` divides by a constant; this one divides by T. Weighted, it is mergekit's `linear`
    of the models without their base.

    >>> import numpy as np
    >>> Average()([np.float32([1, 2]), np.float32([3, -2])])
    array([2., 0.], dtype=float32)
    """

    name: ClassVar[str] = "average"
    scaling_factor: ClassVar[float] = 1.0
    selects_entries: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    paper: ClassVar[str] = "Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482"

    weights: Numbers = 1.0

    def __post_init__(self) -> None:
        validate_range(self.name, "weights", self.weights)

    def check(self, tasks: int) -> None:
        super().check(tasks)
        if not self.varies_by_tensor and sum(for_all_models(self.weights, tasks)) == 0:
            raise MagMaxError("the weights of average sum to zero, so it has no mean; task_arithmetic needs none")

    def step(self, state: State, task_vector: Array, task: int, address: Address) -> State:
        return add_weighted(state, task_vector, for_model(self.weights, task))

    def finish(self, state: State, tasks: int) -> Array:
        (total,) = state
        divide_in_place(total, sum(for_all_models(self.weights, tasks)))
        return total


@dataclass(frozen=True)
class AverageOrSum(Average):
    """The weighted mean of the task vectors; their weighted sum in tensors whose weights sum to less than 1e-8.

    mergekit's `normalize: true` where no sign is elected. With weights of (1, -1) the mean does not exist:

    >>> import numpy as np
    >>> from magmax.rules import PerModel
    >>> AverageOrSum(weights=PerModel((1, -1)))([np.float32([1, 2]), np.float32([3, -2])])
    array([-2.,  4.], dtype=float32)
    """

    name: ClassVar[str] = "average_or_sum"

    def check(self, tasks: int) -> None:
        StreamingRule.check(self, tasks)

    def finish(self, state: State, tasks: int) -> Array:
        (total,) = state
        weight = sum(for_all_models(self.weights, tasks))
        if abs(weight) >= MIN_WEIGHT_SUM:
            divide_in_place(total, weight)
        return total


def add_weighted(state: State, task_vector: Array, weight: float) -> State:
    """One more summand, times its weight, to a running sum."""
    if weight != 1:
        task_vector *= weight
    if not state:
        return (task_vector,)
    (total,) = state
    total += task_vector
    return (total,)
