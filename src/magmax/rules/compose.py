"""Composition: chains of transforms and a rule, and a cache of merged blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from ..errors import MagMaxError
from .contract import After, Before, Rule, State, StreamingRule
from .statistics import Address, Answer, Array, Block, Plan, Scope, Span, namespace, seen


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


@dataclass(frozen=True)
class Held(Wrapping):
    """A rule that merges each block once and from then on gives copies, of the same models and with the same answer."""

    known: dict[tuple[Address, int], Array] = field(
        default_factory=dict[tuple[Address, int], Array], repr=False, compare=False
    )

    def merge(self, block: Block, answer: Answer) -> Array:
        length = len(block.deltas[0])
        if (merged := self.recalled(block.at, length)) is None:
            self.known[block.at, length] = merged = self.rule.merge(block, answer)
            return namespace(merged).asarray(merged, copy=True)
        return merged

    def recalled(self, at: Address, length: int) -> Array | None:
        """A copy of what was merged of so many elements there, if it was."""
        merged = self.known.get((at, length))
        return None if merged is None else namespace(merged).asarray(merged, copy=True)


def holding(rule: Rule) -> Rule:
    """The rule, with that part of it held which is the same for every scaling factor."""
    if isinstance(rule, Followed):
        return replace(rule, rule=holding(rule.rule))
    return rule if rule.needs_factor else Held(rule)
