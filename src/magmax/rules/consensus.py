"""Consensus merging: keep of the summed task vector what several tasks select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import MagMaxError
from .contract import Rule
from .statistics import Array, Block, Statistics, namespace


@dataclass(frozen=True)
class Consensus(Rule):
    """The sum of the task vectors, zeroed where fewer than `tasks` of them find it near their own: TALL masks.

        m = s * [ #{ t : |tau_t| >= threshold * |s - tau_t| } >= tasks ],   s = tau_1 + ... + tau_T

    With tasks = 2 both what no task selects (catastrophic) and what one alone does (selfish) is removed; with 0 this
    is task arithmetic. The authors' code compares with > and chooses a threshold for each task on its validation
    data, among 0.2, 0.3, ..., 0.6; here one serves all, by default the middle of these. Sums that are not finite are
    kept.

    >>> import numpy as np
    >>> Consensus()([np.float32([1, 5, 2]), np.float32([1, 0, -1])])
    array([2., 0., 1.], dtype=float32)
    """

    name: ClassVar[str] = "consensus"
    scaling_factor: ClassVar[float] = 0.3
    paper: ClassVar[str] = "Wang et al., Localizing Task Information, ICML 2024, arXiv 2405.07813"

    threshold: float = 0.4
    tasks: int = 2

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or self.tasks < 0:
            raise MagMaxError(
                f"consensus needs threshold and tasks of at least 0, not {self.threshold} and {self.tasks}"
            )

    def check(self, tasks: int) -> None:
        super().check(tasks)
        if self.tasks > tasks:
            raise MagMaxError(f"consensus with tasks = {self.tasks} needs at least {self.tasks} models; {tasks} given")

    def merge(self, block: Block, statistics: Statistics) -> Array:
        total = block.task_vectors[0] + 0
        for delta in block.task_vectors[1:]:
            total += delta
        xp = namespace(total)
        votes = xp.zeros_like(total)
        for delta in block.task_vectors:
            votes += xp.astype(abs(delta) >= self.threshold * abs(total - delta), total.dtype)
        kept = (votes >= self.tasks) | ~xp.isfinite(total)  # no distance from infinity or NaN can be compared
        return xp.where(kept, total, xp.zeros_like(total))
