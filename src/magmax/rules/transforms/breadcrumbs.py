"""Breadcrumbs: drop the outliers and the small change of every task vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...errors import MagMaxError
from ..contract import TaskVectorTransform, as_signed_bits
from ..schedules import Numbers, for_all_models, validate_range
from ..selection import apply_mask, request_largest
from ..statistics import Address, Array, Block, Scope, Span, Statistics, StatisticsRequest, through


@dataclass(frozen=True)
class Breadcrumbs(TaskVectorTransform):
    """Drop the `gamma` n entries of largest magnitude, then keep the `density` n that are largest of the rest.

    Of the n entries in the span, exactly round(density * n) are kept, below round(gamma * n) that are dropped; where
    there are not so many, fewer of the largest are dropped. Of equal magnitudes those first by tensor name, then flat
    offset, count as larger. mergekit does so too, but rounds down; the authors' code counts within each row of the last
    dimension and leaves scalars as they are.

    >>> import numpy as np
    >>> from magmax.rules import TaskArithmetic, chain
    >>> chain(Breadcrumbs(density=0.5, gamma=0.25), TaskArithmetic())([np.float32([9, -1, 2, 3])])
    array([0., 0., 2., 3.], dtype=float32)
    """

    name: ClassVar[str] = "breadcrumbs"
    paper: ClassVar[str] = "Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795"

    density: Numbers = 0.9
    gamma: Numbers = 0.01
    span: Literal["model", "tensor"] = "tensor"

    def __post_init__(self) -> None:
        if self.span not in ("model", "tensor"):
            raise MagMaxError(f"breadcrumbs needs span to be model or tensor, not {self.span!r}")
        validate_range(self.name, "density", self.density, 0, 1)
        validate_range(self.name, "gamma", self.gamma, 0, 1)

    @property
    def passes(self) -> int:
        return 3

    @property
    def statistics_span(self) -> Span:
        return Span(self.span)

    def statistics(self, scope: Scope) -> StatisticsRequest:
        numbers = zip(for_all_models(self.density, scope.tasks), for_all_models(self.gamma, scope.tasks), strict=True)
        counts = [(round(density * scope.elements), round(gamma * scope.elements)) for density, gamma in numbers]
        dropped = [min(outliers, scope.elements - keep) for keep, outliers in counts]
        reached = [outliers + keep for outliers, (keep, _) in zip(dropped, counts, strict=True)]
        twice = Scope(2 * scope.tasks, scope.elements, scope.float64)
        cuts = yield from through(request_largest([*dropped, *reached], twice), _repeat_task_vectors)
        return list(zip(cuts[: scope.tasks], cuts[scope.tasks :], strict=True))

    def apply(self, task_vector: Array, task: int, address: Address, statistics: Statistics) -> Array:
        outliers, reached = statistics[task - 1]
        mask = ~outliers.mask(task_vector, address)
        mask &= reached.mask(task_vector, address)
        apply_mask(as_signed_bits(task_vector), mask)
        return task_vector


def _repeat_task_vectors(block: Block) -> Block:
    """The block with every task vector twice, so that two cuts of each are found at once; counting changes none."""
    return Block(block.address, [*block.task_vectors, *block.task_vectors])
