"""Composition: chains of transforms and a rule, and a cache of merged blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from ..errors import MagMaxError
from .contract import MergedTransform, Rule, State, StreamingRule, TaskVectorTransform
from .statistics import Address, Array, Block, Scope, Span, Statistics, StatisticsRequest, namespace, through


@dataclass(frozen=True)
class RuleWrapper(Rule):
    """A wrapper around a rule, which behaves as that rule where it overrides nothing."""

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
    def default_scaling_factor(self) -> float:
        return self.rule.default_scaling_factor

    @property
    def statistics_span(self) -> Span:
        return self.rule.statistics_span

    @property
    def whole_tensor(self) -> bool:
        return self.rule.whole_tensor

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

    def summarize(self, all_statistics: Collection[Statistics]) -> str:
        return self.rule.summarize(all_statistics)

    def statistics(self, scope: Scope) -> StatisticsRequest:
        return self.rule.statistics(scope)

    def merge(self, block: Block, statistics: Statistics) -> Array:
        return self.rule.merge(block, statistics)


@dataclass(frozen=True)
class TransformedRule(RuleWrapper):
    """A rule, and a transform of what it merges."""

    transform: MergedTransform
    merge_factor: float = 1.0

    @property
    def passes(self) -> int:
        return self.rule.passes + self.transform.passes

    @property
    def statistics_span(self) -> Span:
        return self.rule.statistics_span if self.rule.passes else Span.TENSOR

    @property
    def needs_scaling_factor(self) -> bool:
        return True

    def for_scaling_factor(self, factor: float) -> TransformedRule:
        return replace(self, merge_factor=factor)

    def check_names(self, names: Collection[str]) -> None:
        super().check_names(names)
        self.transform.check_names(names)

    def describe(self) -> dict[str, Any]:
        description = self.rule.describe()
        return {"chain": [*description.get("chain", [description]), self.transform.describe()]}

    def summarize(self, all_statistics: Collection[Statistics]) -> str:
        summaries = [
            self.rule.summarize([rules for rules, _ in all_statistics]),
            self.transform.summarize([transform_statistics for _, transform_statistics in all_statistics]),
        ]
        return "; ".join(filter(None, summaries))

    def statistics(self, scope: Scope) -> StatisticsRequest:
        rules = yield from self.rule.statistics(scope)
        return rules, (yield from self.transform.statistics(scope, partial(self.rule.merge, statistics=rules)))

    def merge(self, block: Block, statistics: Statistics) -> Array:
        rules, transform_statistics = statistics
        return self.transform.apply(
            block, partial(self.rule.merge, statistics=rules), transform_statistics, self.merge_factor
        )


def chain(*parts: TaskVectorTransform | Rule | MergedTransform) -> Rule:
    """Transforms of the task vectors, in order, one merge rule, and transforms of what it merges.

    >>> import numpy as np
    >>> from magmax.rules import MagMax, Prune
    >>> chain(Prune(density=0.5), MagMax())([np.float32([3, 1]), np.float32([-1, 2])])
    array([3., 2.], dtype=float32)
    """
    flat = [part for part_given in parts for part in _flatten(part_given)]
    befores = [part for part in flat if isinstance(part, TaskVectorTransform)]
    rules = [part for part in flat if isinstance(part, Rule)]
    afters = [part for part in flat if isinstance(part, MergedTransform)]
    if len(rules) != 1 or flat != [*befores, *rules, *afters]:
        names = ", ".join(getattr(p, "name", repr(p)) for p in flat) or "nothing"
        raise MagMaxError(
            "a chain is transforms and then one merge rule, then what calibrates its result (calibrate_weights); this "
            f"one is {names}"
        )
    if len({*befores, *afters}) < len(befores) + len(afters):
        raise MagMaxError("a chain has the same transform twice; give each a seed, or another option, of its own")
    merging = _compose(befores, rules[0])
    for after in afters:
        merging = TransformedRule(merging, after)
    return merging


def _flatten(
    part: TaskVectorTransform | Rule | MergedTransform,
) -> Sequence[TaskVectorTransform | Rule | MergedTransform]:
    """A rule that is followed by something, and that."""
    return [*_flatten(part.rule), part.transform] if isinstance(part, TransformedRule) else [part]


def _compose(befores: Sequence[TaskVectorTransform], rule: Rule) -> Rule:
    if not befores:
        return rule
    if isinstance(rule, StreamingRule) and all(b.statistics_span is None for b in befores):
        return StreamingChain(tuple(befores), rule)
    return Chain(rule, tuple(befores))


@dataclass(frozen=True)
class Chain(RuleWrapper):
    """A chain that requests statistics, all of them over one span."""

    transforms: tuple[TaskVectorTransform, ...]

    def __post_init__(self) -> None:
        spans = {s.value for s in self._spans()}
        if len(spans) > 1:
            raise MagMaxError("a chain asks over one span; give all its parts span: model, or all of them span: tensor")

    @property
    def passes(self) -> int:
        return self.rule.passes + sum(b.passes for b in self.transforms)

    @property
    def memory(self) -> int:
        return self.rule.memory + sum(b.memory for b in self.transforms)

    @property
    def statistics_span(self) -> Span:
        return next(iter(self._spans()), Span.MODEL)

    def _spans(self) -> Sequence[Span]:
        spans = [b.statistics_span for b in self.transforms if b.statistics_span]
        return [*spans, self.rule.statistics_span] if self.rule.passes else spans

    def describe(self) -> dict[str, Any]:
        return {"chain": [part.describe() for part in (*self.transforms, self.rule)]}

    def summarize(self, all_statistics: Collection[Statistics]) -> str:
        return self.rule.summarize([rules for _, rules in all_statistics])

    def statistics(self, scope: Scope) -> StatisticsRequest:
        collected: list[Statistics] = []
        for place, before in enumerate(self.transforms):
            left = partial(apply_transforms, before=self.transforms[:place], all_statistics=tuple(collected))
            collected.append((yield from through(before.statistics(scope), left)))
        rules = yield from through(
            self.rule.statistics(scope), partial(apply_transforms, before=self.transforms, all_statistics=collected)
        )
        return collected, rules

    def merge(self, block: Block, statistics: Statistics) -> Array:
        of_transforms, rules = statistics
        return self.rule.merge(apply_transforms(block, self.transforms, of_transforms), rules)


@dataclass(frozen=True)
class StreamingChain(StreamingRule):
    """A chain that asks nothing, so that it too runs in constant memory over tasks."""

    name: ClassVar[str] = "chain"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = ""
    selects_entries: ClassVar[bool] = False

    transforms: tuple[TaskVectorTransform, ...]
    rule: StreamingRule

    @property
    def default_scaling_factor(self) -> float:
        return self.rule.default_scaling_factor

    def check(self, tasks: int) -> None:
        self.rule.check(tasks)
        super().check(tasks)

    def slots(self, tasks: int) -> int:
        return self.rule.slots(tasks)

    def describe(self) -> dict[str, Any]:
        return {"chain": [part.describe() for part in (*self.transforms, self.rule)]}

    def step(self, state: State, task_vector: Array, task: int, address: Address) -> State:
        for before in self.transforms:
            task_vector = before.apply(task_vector, task, address, None)
        return self.rule.step(state, task_vector, task, address)

    def finish(self, state: State, tasks: int) -> Array:
        return self.rule.finish(state, tasks)


def apply_transforms(
    block: Block, before: Sequence[TaskVectorTransform], all_statistics: Sequence[Statistics]
) -> Block:
    """The block as the transforms leave it; may overwrite the block's arrays."""
    deltas = list(block.task_vectors)
    for transform, statistics in zip(before, all_statistics, strict=False):
        deltas = [transform.apply(delta, task, block.address, statistics) for task, delta in enumerate(deltas, start=1)]
    return replace(block, task_vectors=deltas)


@dataclass(frozen=True)
class CachedRule(RuleWrapper):
    """A cache of a rule's merged blocks in memory, so that several scaling factors share one pass."""

    cache: dict[tuple[Address, int], Array] = field(
        default_factory=dict[tuple[Address, int], Array], repr=False, compare=False
    )

    def merge(self, block: Block, statistics: Statistics) -> Array:
        length = len(block.task_vectors[0])
        if (merged := self.cached_block(block.address, length)) is None:
            self.cache[block.address, length] = merged = self.rule.merge(block, statistics)
            return namespace(merged).asarray(merged, copy=True)
        return merged

    def cached_block(self, address: Address, length: int) -> Array | None:
        """A copy of what was merged of so many elements there, if it was."""
        merged = self.cache.get((address, length))
        return None if merged is None else namespace(merged).asarray(merged, copy=True)


def with_cache(rule: Rule) -> Rule:
    """Wrap the part of a rule that does not depend on the scaling factor in a cache."""
    if isinstance(rule, TransformedRule):
        return replace(rule, rule=with_cache(rule.rule))
    return rule if rule.needs_scaling_factor else CachedRule(rule)
