"""The k-th largest magnitude: what MagMax would be if it chose less well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import MagMaxError
from .contract import State, StreamingRule, as_signed_bits, keeps_incumbent
from .statistics import Address, Array


@dataclass(frozen=True)
class KthMagnitude(StreamingRule):
    """Element by element, the task vector that is k-th in the order of (|tau_t|, t), largest and latest first.

    k = 1 is MagMax. The fold remembers the k largest so far, each newcomer sinking past those that it does not beat.

    >>> import numpy as np
    >>> KthMagnitude(k=2)([np.float32([1, -3]), np.float32([-2, 1]), np.float32([0, 2])])
    array([1., 2.], dtype=float32)
    """

    name: ClassVar[str] = "kth_magnitude"
    scaling_factor: ClassVar[float] = 0.5
    selects_entries: ClassVar[bool] = True
    paper: ClassVar[str] = "Marczak et al., MagMax, ECCV 2024, arXiv 2407.06322, the ablation of the selection"

    k: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise MagMaxError(f"kth_magnitude needs k of at least 1, not {self.k}")

    def slots(self, tasks: int) -> int:
        return min(tasks, self.k)

    def check(self, tasks: int) -> None:
        super().check(tasks)
        if self.k > tasks:
            raise MagMaxError(f"kth_magnitude with k = {self.k} needs at least {self.k} models; {tasks} given")

    def step(self, state: State, task_vector: Array, task: int, address: Address) -> State:
        sinking = as_signed_bits(task_vector)
        for ranked in state:
            place = as_signed_bits(ranked)
            exchanged = ~keeps_incumbent(place, sinking)
            exchanged &= place ^ sinking
            place ^= exchanged
            sinking ^= exchanged
        return (*state, task_vector) if len(state) < self.k else state

    def finish(self, state: State, tasks: int) -> Array:
        return state[self.k - 1]
