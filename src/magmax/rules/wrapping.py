"""A rule around another one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from .contract import Rule
from .statistics import Answer, Array, Block, Plan, Scope, Span


@dataclass(frozen=True)
class Wrapping(Rule):
    """A rule that does more than another one, and asks, costs and merges as that one where it does not say."""

    name: ClassVar[str] = "chain"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = ""

    rule: Rule

    @property
    def passes(self) -> int:
        return self.rule.passes

    @property
    def memory(self) -> int:
        return self.rule.memory

    @property
    def default_factor(self) -> float:
        return self.rule.default_factor

    @property
    def questions_span(self) -> Span:
        return self.rule.questions_span

    @property
    def whole(self) -> bool:
        return self.rule.whole

    @property
    def needs_base(self) -> bool:
        return self.rule.needs_base

    def check(self, tasks: int) -> None:
        self.rule.check(tasks)
        super().check(tasks)

    def check_names(self, names: Collection[str]) -> None:
        self.rule.check_names(names)

    def describe(self) -> dict[str, Any]:
        return self.rule.describe()

    def explain(self, answers: Collection[Answer]) -> str:
        return self.rule.explain(answers)

    def plan(self, scope: Scope) -> Plan:
        return self.rule.plan(scope)

    def merge(self, block: Block, answer: Answer) -> Array:
        return self.rule.merge(block, answer)
