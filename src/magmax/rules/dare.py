"""DARE: drop entries at random and rescale the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import MagMaxError
from .before import Before
from .chance import masked_at_random
from .plan import Address, Answer, Array


@dataclass(frozen=True)
class Dare(Before):
    """Each entry is zeroed with probability `drop`; the others are divided by 1 - drop, so that the mean stays.

    The draws depend on (seed, tensor name, flat offset, task) alone. FusionBench's and mergekit's draws depend on the
    order of work; the MagMax authors' code has p and 1 - p exchanged.
    """

    name: ClassVar[str] = "dare"
    paper: ClassVar[str] = "Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099"

    drop: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1 or not math.isfinite(self.drop):
            raise MagMaxError(f"dare needs drop of at least 0 and below 1, not {self.drop}")

    def apply(self, delta: Array, task: int, at: Address, answer: Answer) -> Array:
        kept = masked_at_random(delta, 1 - self.drop, "dare", self.seed, task, at)
        kept /= 1 - self.drop
        return kept
