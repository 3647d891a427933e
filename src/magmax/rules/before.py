"""What can be done to task vectors before they are merged."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from .component import Part
from .statistics import Address, Answer, Array, Plan, Scope, Span


@dataclass(frozen=True)
class Before(Part):
    """A transform of one task vector at a time, which may first ask questions of all blocks."""

    @property
    def passes(self) -> int:
        """How many questions it asks, at the usual most; each is a pass over all inputs."""
        return 0

    @property
    def memory(self) -> int:
        """Bytes that its questions take beside the blocks, at the usual most, where these are many."""
        return 0

    @property
    def questions_span(self) -> Span | None:
        """Over what the plan's questions range; None if it asks none."""
        return None if type(self).plan is Before.plan else Span.MODEL

    def plan(self, scope: Scope) -> Plan:
        """Ask what `apply` must know. By default, nothing."""
        yield from ()

    @abstractmethod
    def apply(self, delta: Array, task: int, at: Address, answer: Answer) -> Array:
        """The transformed task vector of task number `task` (from 1); may overwrite `delta`."""
