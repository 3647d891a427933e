"""Merges in memory: of state dicts and modules, at several scaling factors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.memory import to_tensor, unwrapped
from ..errors import MagMaxError
from ..rules import Number, Rule
from ..rules.compose import with_cache
from .execution.execution_options import ExecutionOptions
from .job import prepare_kernel
from .kernel import MergeKernel
from .merge_job import match_models, merge_kernel
from .output_options import OutputOptions
from .pipeline import BlockPipeline


def merge_in_memory(
    rule: Rule, base: Checkpoint, models: Sequence[Checkpoint], options: OutputOptions, execution: ExecutionOptions
) -> dict[str, NDArray[Any]]:
    """Merge in memory; return flat arrays of stored units by the base's keys."""
    return InMemoryMerges(rule, base, models, options, execution).merge_at(options.resolve_scaling_factor(rule))


class InMemoryMerges:
    """Merges of the same models at one scaling factor after another.

    The rule asks the models once. With `hold`, what it merged before scaling stays in memory and serves all factors.
    """

    def __init__(
        self,
        rule: Rule,
        base: Checkpoint,
        models: Sequence[Checkpoint],
        options: OutputOptions,
        execution: ExecutionOptions,
        *,
        hold: bool = False,
    ) -> None:
        rule = with_cache(rule) if hold and execution.executor is None else rule
        kernel = merge_kernel(rule, options, match_models(rule, base, models, options))
        self.kernel = cast("MergeKernel", prepare_kernel(kernel, execution))
        self.inputs, self.settings = kernel.reader.inputs, execution

    def merge_at(self, factor: Number) -> dict[str, NDArray[Any]]:
        """Return the merge at a scaling factor: flat arrays of stored units by the base's keys."""
        memory = MemorySink(self.kernel.out)
        scaled = replace(self.kernel, scaling_factor=factor)
        BlockPipeline(self.inputs, [memory], scaled, self.settings.pool, digest=False).run(self.settings.progress)
        return memory.tensors


class MemorySink:
    """Flat arrays to be filled by a pass."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs
        self.tensors = {key: np.empty(spec.num_units, spec.storage_dtype) for key, spec in specs.items()}

    def write(self, key: str, start: int, raw: NDArray[Any]) -> None:
        self.tensors[key][start : start + len(raw)] = raw

    def sync(self) -> None:
        """Nothing to wait for."""


def restore_kind(base: Any, opened: Checkpoint, tensors: Mapping[str, NDArray[Any]], options: OutputOptions) -> Any:
    """Return the merged tensors as the same kind of object as the base: a state dict or a module."""
    original = cast("Mapping[str, Any]", base if isinstance(base, Mapping) else unwrapped(base).state_dict())
    specs = options.out_specs(opened)
    grown = [key for key, spec in specs.items() if key not in original or spec.shape != tuple(original[key].shape)]
    if grown and not isinstance(base, Mapping):
        raise MagMaxError(f"a module cannot grow ({grown[0]} has other rows); give state dicts, or files and out")
    like = next(iter(original.values()), None)
    restored = {key: to_tensor(tensors[key], spec, original.get(key, like)) for key, spec in specs.items()}
    merged = {key: restored[opened.resolve_alias(key)] for key in [*original, *(k for k in grown if k not in original)]}
    if isinstance(base, Mapping):
        return merged
    result = copy.deepcopy(base)
    if options.dtype is not None:
        import torch

        result = result.to(getattr(torch, options.dtype))
    unwrapped(result).load_state_dict(merged)
    return result
