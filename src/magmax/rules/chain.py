"""Chains: transforms of the task vectors, then a rule; a chain is itself a rule."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ..errors import MagMaxError
from .base import Rule, State, StreamingRule
from .before import Before
from .plan import Address, Answer, Array, Block, Counts, Fold, Plan, Scope, Span


def chain(*parts: Before | Rule) -> Rule:
    """Transforms, in order, and one merge rule after them.

    >>> import numpy as np
    >>> from magmax.rules import MagMax, Prune
    >>> chain(Prune(keep=0.5), MagMax())([np.float32([3, 1]), np.float32([-1, 2])])
    array([3., 2.], dtype=float32)
    """
    *before, rule = parts or (None,)
    befores = [b for b in before if isinstance(b, Before)]
    if not isinstance(rule, Rule) or len(befores) < len(before):
        names = ", ".join(getattr(p, "name", repr(p)) for p in parts) or "nothing"
        raise MagMaxError(f"a chain is transforms and then one merge rule; this one is {names}")
    if len(set(befores)) < len(befores):
        raise MagMaxError("a chain has the same transform twice; give each a seed, or another option, of its own")
    if not befores:
        return rule
    if isinstance(rule, StreamingRule) and all(b.questions_span is None for b in befores):
        return StreamingChain(tuple(befores), rule)
    return Chain(tuple(befores), rule)


@dataclass(frozen=True)
class Chain(Rule):
    """A chain that asks questions, all of them over one span."""

    name: ClassVar[str] = "chain"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = ""

    before: tuple[Before, ...]
    rule: Rule

    def __post_init__(self) -> None:
        spans = {s.value for s in self._spans()}
        if len(spans) > 1:
            raise MagMaxError("a chain asks over one span; give all its parts span: model, or all of them span: tensor")

    @property
    def passes(self) -> int:
        return self.rule.passes + sum(b.passes for b in self.before)

    @property
    def memory(self) -> int:
        return self.rule.memory

    @property
    def default_factor(self) -> float:
        return self.rule.default_factor

    @property
    def questions_span(self) -> Span:
        return next(iter(self._spans()), Span.MODEL)

    def _spans(self) -> Sequence[Span]:
        spans = [b.questions_span for b in self.before if b.questions_span]
        return [*spans, self.rule.questions_span] if self.rule.passes else spans

    def check(self, tasks: int) -> None:
        self.rule.check(tasks)

    def describe(self) -> dict[str, Any]:
        return {"chain": [part.describe() for part in (*self.before, self.rule)]}

    def named(self, names: Sequence[str]) -> Self:
        return replace(self, rule=self.rule.named(names))

    def explain(self, answers: Collection[Answer]) -> str:
        return self.rule.explain([rules for _, rules in answers])

    def plan(self, scope: Scope) -> Plan:
        answers: list[Answer] = []
        for place, before in enumerate(self.before):
            answers.append((yield from self._through(before.plan(scope), place, answers)))
        rules = yield from self._through(self.rule.plan(scope), len(self.before), answers)
        return answers, rules

    def merge(self, block: Block, answer: Answer) -> Array:
        answers, rules = answer
        return self.rule.merge(transformed(block, self.before, answers), rules)

    def _through(self, plan: Plan, place: int, answers: Sequence[Answer]) -> Plan:
        """The plan, its questions put to blocks as the first `place` transforms leave them."""
        reply: Any = None
        while True:
            try:
                fold = plan.send(reply)
            except StopIteration as end:
                return end.value
            reply = yield Through(fold, self.before[:place], tuple(answers))


@dataclass(frozen=True)
class StreamingChain(StreamingRule):
    """A chain that asks nothing, so that it too runs in constant memory over tasks."""

    name: ClassVar[str] = "chain"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = ""
    selects: ClassVar[bool] = False

    before: tuple[Before, ...]
    rule: StreamingRule

    @property
    def default_factor(self) -> float:
        return self.rule.default_factor

    def check(self, tasks: int) -> None:
        self.rule.check(tasks)

    def slots(self, tasks: int) -> int:
        return self.rule.slots(tasks)

    def describe(self) -> dict[str, Any]:
        return {"chain": [part.describe() for part in (*self.before, self.rule)]}

    def step(self, state: State, task_vector: Array, task: int, at: Address) -> State:
        for before in self.before:
            task_vector = before.apply(task_vector, task, at, None)
        return self.rule.step(state, task_vector, task, at)

    def finish(self, state: State, tasks: int) -> Array:
        return self.rule.finish(state, tasks)


@dataclass(frozen=True)
class Through(Fold):
    """A question put to blocks as some transforms leave them."""

    fold: Fold
    before: Sequence[Before]
    answers: Sequence[Answer]

    @property
    def sample(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.fold.sample

    @property
    def apart(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.fold.apart

    @property
    def only(self) -> Collection[Address] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.fold.only

    def zeros(self) -> Counts:
        return self.fold.zeros()

    def count(self, block: Block, into: Counts) -> None:
        self.fold.count(transformed(block, self.before, self.answers), into)


def transformed(block: Block, before: Sequence[Before], answers: Sequence[Answer]) -> Block:
    """The block as the transforms leave it; may overwrite the block's arrays."""
    deltas = list(block.deltas)
    for transform, answer in zip(before, answers, strict=False):
        deltas = [transform.apply(delta, task, block.at, answer) for task, delta in enumerate(deltas, start=1)]
    return Block(block.at, deltas)
