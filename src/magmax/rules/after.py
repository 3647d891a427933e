"""What can be done to a merged task vector, given the task vectors that it was made from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .component import Part
from .statistics import Answer, Array, Block, Plan, Scope, Span
from .wrapping import Wrapping

Merge = Callable[[Block], Array]
"""What a rule makes of a block, whose task vectors it may overwrite."""


@dataclass(frozen=True)
class After(Part):
    """A transform of the merged task vector, which may first ask questions of all blocks.

    The task vectors of its blocks are those that came in, before any transform ahead of the rule.
    """

    @property
    def passes(self) -> int:
        """How many questions it asks, at the usual most; each is a pass over all inputs."""
        return 0

    def plan(self, scope: Scope, merge: Merge) -> Plan:
        """Ask what `apply` must know. By default, nothing."""
        yield from ()

    @abstractmethod
    def apply(self, block: Block, merge: Merge, answer: Answer, factor: float) -> Array:
        """The transformed merge of a block; it is multiplied by the scaling factor `factor` afterwards."""

    def explain(self, answers: Collection[Answer]) -> str:
        """What a user should hear of the answers to its plan (one, or one for each tensor). By default, nothing."""
        return ""

    def check_names(self, names: Collection[str]) -> None:
        """Raise MagMaxError if an option names a tensor that is none of these. By default, none does."""


@dataclass(frozen=True)
class Followed(Wrapping):
    """A rule, and a transform of what it merges."""

    after: After
    factor: float = 1.0

    @property
    def passes(self) -> int:
        return self.rule.passes + self.after.passes

    @property
    def questions_span(self) -> Span:
        return self.rule.questions_span if self.rule.passes else Span.TENSOR

    @property
    def needs_factor(self) -> bool:
        return True

    def scaled_by(self, factor: float) -> Followed:
        return replace(self, factor=factor)

    def check_names(self, names: Collection[str]) -> None:
        super().check_names(names)
        self.after.check_names(names)

    def describe(self) -> dict[str, Any]:
        told = self.rule.describe()
        return {"chain": [*told.get("chain", [told]), self.after.describe()]}

    def explain(self, answers: Collection[Answer]) -> str:
        told = [self.rule.explain([rules for rules, _ in answers]), self.after.explain([own for _, own in answers])]
        return "; ".join(filter(None, told))

    def plan(self, scope: Scope) -> Plan:
        rules = yield from self.rule.plan(scope)
        return rules, (yield from self.after.plan(scope, partial(self.rule.merge, answer=rules)))

    def merge(self, block: Block, answer: Answer) -> Array:
        rules, own = answer
        return self.after.apply(block, partial(self.rule.merge, answer=rules), own, self.factor)
