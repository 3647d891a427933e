"""Chains: transforms of the task vectors, then a rule; a chain is itself a rule."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from ..errors import MagMaxError
from .after import After, Followed
from .before import Before
from .contract import Rule, State, StreamingRule
from .statistics import Address, Answer, Array, Block, Plan, Scope, Span, seen
from .wrapping import Wrapping


def chain(*parts: Before | Rule | After) -> Rule:
    """Transforms of the task vectors, in order, one merge rule, and transforms of what it merges.

    >>> import numpy as np
    >>> from magmax.rules import MagMax, Prune
    >>> chain(Prune(keep=0.5), MagMax())([np.float32([3, 1]), np.float32([-1, 2])])
    array([3., 2.], dtype=float32)
    """
    flat = [part for given in parts for part in _unfolded(given)]
    befores = [part for part in flat if isinstance(part, Before)]
    rules = [part for part in flat if isinstance(part, Rule)]
    afters = [part for part in flat if isinstance(part, After)]
    if len(rules) != 1 or flat != [*befores, *rules, *afters]:
        names = ", ".join(getattr(p, "name", repr(p)) for p in flat) or "nothing"
        raise MagMaxError(
            "a chain is transforms and then one merge rule, then what calibrates its result (calibrate_weights); this "
            f"one is {names}"
        )
    if len({*befores, *afters}) < len(befores) + len(afters):
        raise MagMaxError("a chain has the same transform twice; give each a seed, or another option, of its own")
    merging = _merging(befores, rules[0])
    for after in afters:
        merging = Followed(merging, after)
    return merging


def _unfolded(part: Before | Rule | After) -> Sequence[Before | Rule | After]:
    """A rule that is followed by something, and that."""
    return [*_unfolded(part.rule), part.after] if isinstance(part, Followed) else [part]


def _merging(befores: Sequence[Before], rule: Rule) -> Rule:
    if not befores:
        return rule
    if isinstance(rule, StreamingRule) and all(b.questions_span is None for b in befores):
        return StreamingChain(tuple(befores), rule)
    return Chain(rule, tuple(befores))


@dataclass(frozen=True)
class Chain(Wrapping):
    """A chain that asks questions, all of them over one span."""

    before: tuple[Before, ...]

    def __post_init__(self) -> None:
        spans = {s.value for s in self._spans()}
        if len(spans) > 1:
            raise MagMaxError("a chain asks over one span; give all its parts span: model, or all of them span: tensor")

    @property
    def passes(self) -> int:
        return self.rule.passes + sum(b.passes for b in self.before)

    @property
    def memory(self) -> int:
        return self.rule.memory + sum(b.memory for b in self.before)

    @property
    def questions_span(self) -> Span:
        return next(iter(self._spans()), Span.MODEL)

    def _spans(self) -> Sequence[Span]:
        spans = [b.questions_span for b in self.before if b.questions_span]
        return [*spans, self.rule.questions_span] if self.rule.passes else spans

    def describe(self) -> dict[str, Any]:
        return {"chain": [part.describe() for part in (*self.before, self.rule)]}

    def explain(self, answers: Collection[Answer]) -> str:
        return self.rule.explain([rules for _, rules in answers])

    def plan(self, scope: Scope) -> Plan:
        answers: list[Answer] = []
        for place, before in enumerate(self.before):
            left = partial(transformed, before=self.before[:place], answers=tuple(answers))
            answers.append((yield from seen(before.plan(scope), left)))
        rules = yield from seen(self.rule.plan(scope), partial(transformed, before=self.before, answers=answers))
        return answers, rules

    def merge(self, block: Block, answer: Answer) -> Array:
        answers, rules = answer
        return self.rule.merge(transformed(block, self.before, answers), rules)


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
        super().check(tasks)

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


def transformed(block: Block, before: Sequence[Before], answers: Sequence[Answer]) -> Block:
    """The block as the transforms leave it; may overwrite the block's arrays."""
    deltas = list(block.deltas)
    for transform, answer in zip(before, answers, strict=False):
        deltas = [transform.apply(delta, task, block.at, answer) for task, delta in enumerate(deltas, start=1)]
    return replace(block, deltas=deltas)
