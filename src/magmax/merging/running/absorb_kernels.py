"""The arithmetic of absorbing one model into a running merge, on one block."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checkpoints import TensorSpec
from ...checkpoints.dtypes import FLOAT_DTYPES, compute_dtype, narrow
from ...rules import Address, StreamingRule
from ...rules.contract import as_signed_bits
from ..kernel import MergeKernel, rules_by_tensor
from ..normalization_statistics import NO_STATISTICS, BatchNormStatistics
from ..pipeline import InputBlock, Kernel
from ..reader import BlockReader


def slot_dtype(rule: StreamingRule, base: TensorSpec, kinds: Sequence[str]) -> str:
    """The type in which a slot holds a tensor of the base.

    A rule that selects holds the winner's own value, in the models' type while they all have one. Any other rule
    holds what it computes, in the type it computes in.
    """
    if rule.selects_entries and len(set(kinds)) == 1:
        return kinds[0]
    return FLOAT_DTYPES[compute_dtype(base.dtype).name]


@dataclass(frozen=True)
class AbsorbKernel(Kernel):
    """New slots from the old ones and one more model.

    The inputs are the base, the old slots, the model and, if winners are mapped, the old map of winners. The sinks are
    the new slots and the new map. For a rule that selects, a slot holds values theta whose difference from theta_0 is
    the rule's state; a value is recovered by looking which candidate has the bits that the rule has chosen.

    Attributes:
        extents: of tensors that are merged in part, how many leading elements are; slots hold zeros beyond.
        held: the tensors that the old slots hold.
        batch_norm: the statistics of batch normalisation: those to be averaged are summed up in the first slot.
    """

    reader: BlockReader
    rule: StreamingRule
    task: int
    slots: int
    specs: Mapping[str, TensorSpec]
    unmerged: Container[str]
    winners: bool = False
    extents: Mapping[str, int] = field(default_factory=dict[str, int])
    held: Container[str] = frozenset[str]()
    batch_norm: BatchNormStatistics = NO_STATISTICS

    @cached_property
    def rules(self) -> Mapping[str, StreamingRule]:
        """The rule as it is for each tensor."""
        return rules_by_tensor(self.rule, self.reader.inputs[0].specs, self.batch_norm.averaged)

    def __call__(self, block: InputBlock) -> list[NDArray[Any] | None]:
        if block.key in self.unmerged:
            return self._read_for_digest(block)
        head = block.leading_part(self.extents.get(block.key, block.stop))
        count, length = head.stop - head.start, block.stop - block.start
        old = [block.read(number)[:count] for number in range(self.slots + 1)]
        if not count:
            storages = [self.specs[block.key].storage_dtype] * self.rule.slots(self.task) + [
                np.dtype("u1")
            ] * self.winners
            return [np.zeros(length, storage) for storage in storages]
        outputs = self._merge_slots(head, old)
        return [u if count == length else np.concatenate([u, np.zeros(length - count, u.dtype)]) for u in outputs]

    def _merge_slots(self, block: InputBlock, old: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """The new slots, and the map of winners if there is one, from the base and the old slots."""
        rule = self.rules[block.key]
        dtype, address = self.specs[block.key].dtype, Address(block.key, block.start)
        base, *candidates = (self.reader.widen(block, number, units) for number, units in enumerate(old))
        candidates.append(self.reader.read_model(block, self.slots + 1))
        if not rule.selects_entries:
            *held, vector = candidates
            vector -= base
            state = rule.step(tuple(held[: rule.slots(self.task - 1)]), vector, self.task, address)
            slots = [narrow(s, dtype) for s in state]
            slots += [np.zeros_like(slots[0])] * (self.rule.slots(self.task) - len(slots))
            if self.winners:  # an average is no task's own: a map of zeros
                slots.append(block.read(self.slots + 2) if self.task > 1 else np.zeros(len(vector), np.uint8))
            return slots
        vectors = [value - base for value in candidates]
        *held, vector = (v.copy() for v in vectors)
        state = rule.step(tuple(held), vector, self.task, address)
        slots = [narrow(_recover_values(s, candidates, vectors), dtype) for s in state]
        if self.winners:
            slots.append(self._update_winner_map(block, state[0], vectors[-1]))
        return slots

    def _read_for_digest(self, block: InputBlock) -> list[NDArray[Any] | None]:
        """Slots hold merged tensors only; what is carried is read for its digest alone."""
        block.read(0)
        if block.key in self.held:
            for number in range(1, self.slots + 1):
                block.read(number)
        block.read_for_digest(self.slots + 1)
        return [None] * (self.rule.slots(self.task) + self.winners)

    def _update_winner_map(self, block: InputBlock, chosen: NDArray[Any], newest: NDArray[Any]) -> NDArray[Any]:
        old = block.read(self.slots + 2) if self.task > 1 else np.empty(len(chosen), np.uint8)
        np.copyto(old, np.uint8(self.task), where=as_signed_bits(chosen) == as_signed_bits(newest))
        return old


@dataclass(frozen=True)
class ResultKernel(Kernel):
    """The merged tensor of one block from the base (input 0) and the slots."""

    merge: MergeKernel
    slots: int

    def __call__(self, block: InputBlock) -> list[NDArray[Any]]:
        if block.key in self.merge.unmerged:
            return [self.merge.base_units(block, block.read(0))]
        rule = self.merge.rules[block.key]
        assert isinstance(rule, StreamingRule)
        stored = [block.read(number) for number in range(1, self.slots + 1)]

        def vector(head: InputBlock, base: NDArray[Any]) -> NDArray[Any]:
            parts = [units[: head.stop - head.start] for units in stored]
            state = [self.merge.reader.widen(head, number, part) for number, part in enumerate(parts, start=1)]
            if rule.selects_entries:
                for values in state:
                    values -= base
            return rule.finish(tuple(state[: rule.slots(self.merge.tasks)]), self.merge.tasks)

        return [self.merge.join(block, vector)]


def _recover_values(
    chosen: NDArray[Any], candidates: Sequence[NDArray[Any]], vectors: Sequence[NDArray[Any]]
) -> NDArray[Any]:
    """The candidates' values where their task vectors have the chosen bits; the newest is preferred."""
    *older, values = candidates
    values = values.copy()
    wanted = as_signed_bits(chosen)
    for value, vector in zip(older, vectors, strict=False):
        differs = wanted != as_signed_bits(vectors[-1])
        np.copyto(values, value, where=differs & (wanted == as_signed_bits(vector)))
    return values
