"""DARE: drop entries at random and rescale the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import MagMaxError
from ..contract import TaskVectorTransform, divide_in_place
from ..random import keep_at_random
from ..schedules import Numbers, all_numbers, for_model, validate_range
from ..statistics import Address, Array, Statistics


@dataclass(frozen=True)
class Dare(TaskVectorTransform):
    """Each entry is zeroed with probability `drop`; the others are divided by 1 - drop, so that the mean stays.

    The draws depend on (seed, tensor name, flat offset, task) alone. FusionBench's and mergekit's draws depend on the
    order of work; the MagMax authors' code has p and 1 - p exchanged.
    """

    name: ClassVar[str] = "dare"
    paper: ClassVar[str] = "Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099"

    drop: Numbers = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        validate_range(self.name, "drop", self.drop, 0, 1)
        if 1 in all_numbers(self.drop):
            raise MagMaxError("dare needs drop below 1; at 1 nothing would be left to rescale")

    def apply(self, task_vector: Array, task: int, address: Address, statistics: Statistics) -> Array:
        keep = 1 - for_model(self.drop, task)
        kept = keep_at_random(task_vector, keep, "dare", self.seed, task, address)
        divide_in_place(kept, keep)
        return kept
