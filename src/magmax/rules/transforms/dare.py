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
    """Keep each entry with probability `density` and divide it by `density`, so that the mean stays; zero the others.

    The draws depend on (seed, tensor name, flat offset, task) alone. FusionBench's and mergekit's draws depend on the
    order of work; the MagMax authors' code has p and 1 - p exchanged.
    """

    name: ClassVar[str] = "dare"
    paper: ClassVar[str] = "Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099"

    density: Numbers = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        validate_range(self.name, "density", self.density, 0, 1)
        if 0 in all_numbers(self.density):
            raise MagMaxError("dare needs density above 0; at 0 nothing would be left to rescale")

    def apply(self, task_vector: Array, task: int, address: Address, statistics: Statistics) -> Array:
        # The complement twice, as where the option was the fraction dropped: merges made then keep their bytes.
        density = 1 - (1 - for_model(self.density, task))
        sparse = keep_at_random(task_vector, density, "dare", self.seed, task, address)
        divide_in_place(sparse, density)
        return sparse
