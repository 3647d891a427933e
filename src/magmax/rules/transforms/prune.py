"""Prune: keep a part of every task vector, zero the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...errors import MagMaxError
from ..contract import TaskVectorTransform, as_signed_bits
from ..random import keep_at_random
from ..schedules import Numbers, for_all_models, for_model, validate_range
from ..selection import apply_mask, request_largest
from ..statistics import Address, Array, Scope, Span, Statistics, StatisticsRequest


@dataclass(frozen=True)
class Prune(TaskVectorTransform):
    """Keep the fraction `density` of each task vector's entries: the largest, the smallest, or some at random.

    Exactly round(density * n) entries of largest (or smallest) magnitude are kept of the n in the span; of equal
    magnitudes those first by tensor name, then flat offset, count as larger. At random, each entry is kept with
    probability `density`, by a draw that depends on (seed, tensor name, flat offset, task) alone.
    """

    name: ClassVar[str] = "prune"
    paper: ClassVar[str] = "Marczak et al., MagMax, ECCV 2024, arXiv 2407.06322, the retention analysis"

    density: Numbers = 0.2
    which: Literal["top", "bottom", "random"] = "top"
    span: Literal["model", "tensor"] = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.which not in ("top", "bottom", "random"):
            raise MagMaxError(f"prune needs which to be top, bottom or random, not {self.which!r}")
        if self.span not in ("model", "tensor"):
            raise MagMaxError(f"prune needs span to be model or tensor, not {self.span!r}")
        validate_range(self.name, "density", self.density, 0, 1)

    @property
    def passes(self) -> int:
        return 0 if self.which == "random" else 3

    @property
    def statistics_span(self) -> Span | None:
        return None if self.which == "random" else Span(self.span)

    def statistics(self, scope: Scope) -> StatisticsRequest:
        if self.which == "random":
            return None
        keeps = [round(keep * scope.elements) for keep in for_all_models(self.density, scope.tasks)]
        return (
            yield from request_largest(keeps if self.which == "top" else [scope.elements - k for k in keeps], scope)
        )

    def apply(self, task_vector: Array, task: int, address: Address, statistics: Statistics) -> Array:
        if self.which == "random":
            return keep_at_random(task_vector, for_model(self.density, task), "prune", self.seed, task, address)
        apply_mask(
            as_signed_bits(task_vector), statistics[task - 1].mask(task_vector, address), invert=self.which == "bottom"
        )
        return task_vector
