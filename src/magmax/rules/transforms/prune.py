"""Prune: keep a part of every task vector, zero the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...errors import MagMaxError
from ..contract import Before, bits
from ..random import masked_at_random
from ..schedules import Numbers, each, need, one
from ..selection import apply_mask, largest
from ..statistics import Address, Answer, Array, Plan, Scope, Span


@dataclass(frozen=True)
class Prune(Before):
    """Keep the fraction `keep` of each task vector's entries: the largest, the smallest, or some at random.

    Exactly round(keep * n) entries of largest (or smallest) magnitude are kept of the n in the span; of equal
    magnitudes those first by tensor name, then flat offset, count as larger. At random, each entry is kept with
    probability `keep`, by a draw that depends on (seed, tensor name, flat offset, task) alone.
    """

    name: ClassVar[str] = "prune"
    paper: ClassVar[str] = "Marczak et al., MagMax, ECCV 2024, arXiv 2407.06322, the retention analysis"

    keep: Numbers = 0.2
    which: Literal["top", "bottom", "random"] = "top"
    span: Literal["model", "tensor"] = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.which not in ("top", "bottom", "random"):
            raise MagMaxError(f"prune needs which to be top, bottom or random, not {self.which!r}")
        if self.span not in ("model", "tensor"):
            raise MagMaxError(f"prune needs span to be model or tensor, not {self.span!r}")
        need(self.name, "keep", self.keep, 0, 1)

    @property
    def passes(self) -> int:
        return 0 if self.which == "random" else 3

    @property
    def questions_span(self) -> Span | None:
        return None if self.which == "random" else Span(self.span)

    def plan(self, scope: Scope) -> Plan:
        if self.which == "random":
            return None
        keeps = [round(keep * scope.elements) for keep in each(self.keep, scope.tasks)]
        return (yield from largest(keeps if self.which == "top" else [scope.elements - k for k in keeps], scope))

    def apply(self, delta: Array, task: int, at: Address, answer: Answer) -> Array:
        if self.which == "random":
            return masked_at_random(delta, one(self.keep, task), "prune", self.seed, task, at)
        apply_mask(bits(delta), answer[task - 1].mask(delta, at), invert=self.which == "bottom")
        return delta
