"""The arithmetic of a merge on one block: base + scaling_factor * rule(task vectors)."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import TensorSpec
from ..checkpoints.dtypes import compute_dtype, narrow, widen
from ..errors import MagMaxError
from ..rules import Address, Average, Block, Number, Rule, StreamingRule, tensor_positions
from ..rules.compose import CachedRule
from ..rules.schedules import resolve
from ..rules.statistics import Statistics
from .execution.pool import WorkerPool
from .normalization_statistics import NO_STATISTICS, BatchNormStatistics
from .pipeline import InputBlock, Kernel, Progress
from .reader import BlockReader, is_finite
from .statistics_pass import collect_statistics

AnyRule = TypeVar("AnyRule", bound=Rule)


@dataclass(frozen=True)
class MergeKernel(Kernel):
    """The merged tensor of one block; input 0 is the base, inputs 1 to T are the models.

    Attributes:
        out: the specs of what is written.
        unmerged: tensors copied from the base as they are, and why.
        extents: of tensors that are merged in part, how many leading elements are; the rest is the base's as it is.
        statistics: what the rule asked, by tensor; under None what it asked of the whole model.
        batch_norm: the statistics of batch normalisation, and what is made of them.
    """

    reader: BlockReader
    rule: Rule
    tasks: int
    scaling_factor: Number
    out: Mapping[str, TensorSpec]
    unmerged: Mapping[str, str]
    extents: Mapping[str, int] = field(default_factory=dict[str, int])
    statistics: Mapping[str | None, Statistics] = field(default_factory=dict[str | None, Any])
    batch_norm: BatchNormStatistics = NO_STATISTICS

    @cached_property
    def rules(self) -> Mapping[str, Rule]:
        """The rule as it is for each tensor."""
        rules = rules_by_tensor(self.rule, self.reader.inputs[0].specs, self.batch_norm.averaged)
        if not self.rule.needs_scaling_factor:
            return rules
        return {key: rule.for_scaling_factor(self.factors[key]) for key, rule in rules.items()}

    @cached_property
    def factors(self) -> Mapping[str, float]:
        """The scaling factor of each tensor."""
        return {
            key: 1.0 if key in self.batch_norm.averaged else resolve(self.scaling_factor, place)
            for key, place in tensor_positions(self.reader.inputs[0].specs).items()
        }

    def check_rules(self) -> None:
        """Raise MagMaxError if the rule names a tensor that is not there, or cannot merge with its numbers for one."""
        self.rule.check_names(self.rules)
        for key, rule in self.rules.items() if self.rule.varies_by_tensor else ():
            try:
                rule.check(self.tasks)
            except MagMaxError as error:
                raise MagMaxError(f"{key}: {error}") from error

    @property
    def whole_tensor(self) -> bool:
        return self.rule.whole_tensor

    @property
    def holds_all_inputs(self) -> bool:
        return not isinstance(self.rule, StreamingRule)

    def prepare(self, pool: WorkerPool, progress: Progress) -> Self:
        """Ask what the rule must know, over every model."""
        if isinstance(self.rule, StreamingRule):
            return self
        collected = collect_statistics(self.rule, self.rules, self.reader, self._merged_elements(), pool, progress)
        return replace(self, statistics=collected.by_tensor, reader=collected.reader)

    def note(self) -> str:
        return self.rule.summarize(list(self.statistics.values()))

    def __call__(self, block: InputBlock) -> list[NDArray[Any]]:
        if block.key in self.unmerged:
            return [self.copy_unmerged(block)]
        return [self.join(block, self.task_vector)]

    def join(self, block: InputBlock, vector: Callable[[InputBlock, NDArray[Any]], NDArray[Any]]) -> NDArray[Any]:
        """Scale the merged part of a block, add it to the base, and append what is not merged."""
        head, stored, tail = self.split(block)
        if head.start == head.stop:
            return self.base_units(block, tail)
        base = self.reader.widen(head, 0, stored)
        with np.errstate(invalid="ignore"):  # where NaN and infinity are allowed in, nobody needs a warning
            merged = self.scale(head, base, vector(head, base))
        if head.fixed is not None:
            head.fixed.restore(merged, self.out[block.key].dtype)
        return np.concatenate([merged, self.base_units(block, tail)]) if len(tail) else merged

    def split(self, block: InputBlock) -> tuple[InputBlock, NDArray[Any], NDArray[Any]]:
        """Return what is merged of the block, the base's units there, and those beyond."""
        head, stored = block.leading_part(self.extents.get(block.key, block.stop)), block.read(0)
        count = head.stop - head.start
        return head, stored[:count], stored[count:]

    def task_vector(self, input_block: InputBlock, base: NDArray[Any]) -> NDArray[Any]:
        """The rule's merge of the models' task vectors, unscaled."""
        where = Address(input_block.key, input_block.start)
        rule, numbers = self.rules[input_block.key], range(1, self.tasks + 1)
        if (
            isinstance(rule, CachedRule)
            and (cached := rule.cached_block(where, input_block.stop - input_block.start)) is not None
        ):
            return cached
        if isinstance(rule, StreamingRule):
            state = ()
            for task in numbers:
                state = rule.step(state, self.reader.task_vector(input_block, task, base), task, where)
            return rule.finish(state, self.tasks)
        vectors = [self.reader.task_vector(input_block, task, base) for task in numbers]
        block = Block(where, vectors, base, input_block.shape if rule.whole_tensor else None)
        return rule.merge(block, self.statistics.get(input_block.key, self.statistics.get(None)))

    def scale(self, block: InputBlock, base: NDArray[Any], merged: NDArray[Any]) -> NDArray[Any]:
        """base + scaling_factor * merged, the product and the sum rounded separately, stored in the output's type."""
        with np.errstate(over="ignore", invalid="ignore"):
            merged *= merged.dtype.type(self.factors[block.key])
            merged += base
        return self._narrow(block, self.clip_variance(block, merged))

    def clip_variance(self, block: InputBlock, merged: Any) -> Any:
        """Merged numbers, of at least zero where they are variances."""
        return merged.clip(0) if block.key in self.batch_norm.variances else merged

    def copy_unmerged(self, block: InputBlock) -> NDArray[Any]:
        """Copy a block of the base; read the models' blocks where they exist, for their digests."""
        base = block.read(0)
        for task in range(1, self.tasks + 1):
            block.read_for_digest(task)
        return self.base_units(block, base)

    def _merged_elements(self) -> dict[str, int]:
        """Return how many elements of each tensor the rule merges."""
        apart, specs = {*self.unmerged, *self.batch_norm.averaged}, self.reader.inputs[0].specs
        return {key: self.extents.get(key, s.numel) for key, s in specs.items() if key not in apart}

    def base_units(self, block: InputBlock, base: NDArray[Any]) -> NDArray[Any]:
        """Return the base's units in the output's type."""
        spec = block.spec(0)
        if not spec.is_mergeable or self.out[block.key].dtype == spec.dtype:
            return base
        if not self.reader.allow_nonfinite and not is_finite(base, spec.dtype):
            raise MagMaxError(
                f"{block.key}: what is kept of the base as it is holds NaN or infinity, and is to be stored as "
                f"{self.out[block.key].dtype}; mend the base, or let them through with --allow-nonfinite"
            )
        return self._narrow(block, widen(base, spec.dtype, compute_dtype(spec.dtype)))

    def _narrow(self, block: InputBlock, values: NDArray[Any]) -> NDArray[Any]:
        """Numbers in the output's type; refuses what is no longer finite, unless that is allowed."""
        dtype = self.out[block.key].dtype
        if self.reader.allow_nonfinite:  # the sign of a NaN that arithmetic makes depends on the processor
            values[np.isnan(values)] = np.nan
        stored = narrow(values, dtype)
        if not self.reader.allow_nonfinite and not is_finite(stored, dtype):
            if np.isfinite(values).all():
                raise MagMaxError(f"{block.key}: the merged values overflow {dtype}; choose a wider dtype")
            raise MagMaxError(
                f"{block.key}: the merged values overflow {values.dtype}, the type merged in; convert the base"
            )
        return stored


def rules_by_tensor(rule: AnyRule, names: Iterable[str], averaged: Container[str] = ()) -> dict[str, AnyRule | Average]:
    """The rule as it is for each of a model's tensors, its numbers resolved; `Average` of those in `averaged`."""
    rules: dict[str, AnyRule | Average] = {}
    for name, place in tensor_positions(names).items():
        try:
            rules[name] = Average() if name in averaged else rule.for_tensor(place)
        except MagMaxError as error:
            raise MagMaxError(f"{name}: {error}") from error
    return rules
