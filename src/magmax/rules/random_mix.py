"""Random mix: each element from a task drawn at random, the control that shows what choosing by magnitude is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .contract import State, StreamingRule, as_signed_bits
from .random import random_mask
from .statistics import Address, Array


@dataclass(frozen=True)
class RandomMix(StreamingRule):
    """Each element from a task drawn uniformly, as a reservoir: task t replaces what is held with probability 1/t.

    The draw depends on (seed, tensor name, flat offset, t) and nothing else, so it is the same for every block size,
    thread count and machine. The probability is exact to 2^-32.
    """

    name: ClassVar[str] = "random_mix"
    scaling_factor: ClassVar[float] = 1.0
    selects_entries: ClassVar[bool] = True
    paper: ClassVar[str] = "Marczak et al., MagMax, ECCV 2024, arXiv 2407.06322, the RandMix baseline"

    seed: int = 0

    def step(self, state: State, task_vector: Array, task: int, address: Address) -> State:
        if not state:
            return (task_vector,)
        (held,) = state
        exchanged = random_mask(held, 1 / task, "random_mix", self.seed, task, address)
        exchanged &= as_signed_bits(held) ^ as_signed_bits(task_vector)
        place = as_signed_bits(held)
        place ^= exchanged
        return (held,)

    def finish(self, state: State, tasks: int) -> Array:
        return state[0]
