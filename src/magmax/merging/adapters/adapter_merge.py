"""LoRA adapters merged into one LoRA adapter, without their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checkpoints import TensorSpec, open_adapter
from ...checkpoints.blocks import block_digests, canonical_blocks, tensor_digest
from ...checkpoints.journal import Journal
from ...checkpoints.lora.peft import ADAPTER_CONFIG, PeftAdapter
from ...checkpoints.lora.target_modules import AdaptedLayer, common_layers, merged_config
from ...checkpoints.output_paths import OutputPath
from ...errors import MagMaxError
from ...rules import Number, Rule, TensorPosition, as_rule
from ...rules.schedules import resolve, to_config
from ..digests import DigestCollector
from ..execution.execution_options import ExecutionOptions
from ..execution.pool import WorkerPool
from ..job import Job, provenance_file
from ..kernel import MergeKernel
from ..matching import refuse_same_path
from ..model_names import default_names
from ..pipeline import Progress, TensorSink
from ..provenance import Provenance, adapter_card
from ..reader import is_finite
from .adapter_kernel import AdapterMerge, AdapterOptions, LayerFit

SINGLE_SHARD_BYTES = 1 << 62
"""Bytes a shard: PEFT reads an adapter from one file."""


@dataclass(frozen=True)
class AdapterRunner:
    """The work of a merge of adapters, layer after layer; finished ones are noted in the journal."""

    merge: AdapterMerge
    kernel: MergeKernel
    sinks: Sequence[TensorSink]
    threads: int
    journal: Journal
    parts: Sequence[Any]

    @property
    def reused(self) -> int:
        done = {module for module, *_ in self.parts}
        return sum(self.merge.read_bytes(layer) for layer in self.merge.layers if layer.module in done)

    def run(self, progress: Progress) -> DigestCollector:
        collector = DigestCollector({}, 0)
        made: dict[str, str] = {}
        collector.tensors = [*(_digest_tensors(folder) for folder in self.merge.folders), made]
        made |= self._copy_frozen_weights(collector.tensors)
        for module, fit, digests in self.parts:
            self.merge.fits[module] = LayerFit(*fit)
            made |= digests
        todo = [layer for layer in self.merge.layers if layer.module not in self.merge.fits]
        progress(self.reused)
        kernel = self.kernel
        if todo and not self.merge.rule.linear:
            kernel = kernel.prepare(WorkerPool(self.threads), progress)
        for layer in todo:
            digests, fit = self._layer(layer, kernel)
            made |= digests
            for sink in self.sinks:
                sink.sync()
            self.journal.append([[layer.module, [fit.rank, fit.norm, fit.error], digests]])
            progress(self.merge.read_bytes(layer))
        return collector

    def _copy_frozen_weights(self, digests: Sequence[Mapping[str, str]]) -> dict[str, str]:
        """Carry over the base's own weights; refuses those that are not the same in all adapters that have them."""
        carried: dict[str, str] = {}
        for name, first in self.merge.frozen().items():
            having = [
                (f, tensor_digests[name])
                for f, tensor_digests in zip(self.merge.folders, digests, strict=False)
                if name in tensor_digests
            ]
            carried[name] = having[0][1]
            for folder, digest in having:
                if (folder.specs[name], digest) != (first.specs[name], carried[name]):
                    raise MagMaxError(f"{folder.label}: {name} is not what it is in {first.label}; their bases differ")
            for sink in self.sinks:
                sink.write(name, 0, first.read(name, 0, first.specs[name].num_units))
        return carried

    def _layer(self, layer: AdaptedLayer, kernel: MergeKernel) -> tuple[dict[str, str], LayerFit]:
        pair, fit = self.merge.fit_layer(layer, kernel, self.threads)
        self.merge.fits[layer.module] = fit
        by_a, by_b = pair if layer.is_embedding else reversed(pair)
        digests: dict[str, str] = {}
        for name, stored in zip(layer.factor_names(), (by_a, by_b.T), strict=True):
            flat = np.ascontiguousarray(stored).reshape(-1)
            for sink in self.sinks:
                sink.write(name, 0, flat)
                digests[name] = _digest_tensor(flat, name, sink.specs[name])
        return digests, fit


def merge_adapters(
    rule: Rule | str,
    adapters: Sequence[str | PathLike[str]],
    rank: int,
    out: str | PathLike[str],
    scaling_factor: Number | None = None,
    *,
    dtype: str | None = None,
    execution: ExecutionOptions | None = None,
) -> dict[str, LayerFit]:
    """Merge LoRA adapters into one LoRA adapter, without their base.

        B A  ~  scaling_factor * rule(s_1 * B_1 A_1, ..., s_T * B_T A_T),  the nearest product of at most that rank

    An adapter that does not target a module has zero for its update. The result's own s is 1. PEFT's
    add_weighted_adapter merges the factors B_t and A_t apart, by default, which is another thing.

    Args:
        rule: a rule or its name.
        adapters: folders of PEFT LoRA adapters, whose ranks, scales and targets may differ.
        rank: the most that a layer of the result may have.
        out: the folder of the result.
        scaling_factor: by default the rule's own.
        dtype: the factors' type ("float32", "bfloat16", ...); by default the adapters', float32 where these differ.

    Returns:
        How well each module fits: its rank, the norm of its merged update, and the Frobenius norm of what the rank and
        the rounding lose.

    Raises:
        MagMaxError: an adapter that is none, that saves modules in full, or that does not match the others; a result
            that cannot be written.
    """
    if isinstance(adapters, str | PathLike):
        raise MagMaxError("adapters must be a list of paths")
    folders = [open_adapter(adapter) for adapter in adapters]
    merge, job = adapter_job(as_rule(rule), folders, Path(fspath(out)), AdapterOptions(rank, scaling_factor, dtype))
    job.run(execution)
    return merge.fits


def adapter_job(
    rule: Rule,
    folders: Sequence[PeftAdapter],
    out: Path,
    options: AdapterOptions,
    names: Sequence[str] | None = None,
) -> tuple[AdapterMerge, Job]:
    """The work of merging adapters into the folder of one. Raises MagMaxError for adapters that do not match."""
    rule.check(len(folders))
    if out.suffix == ".safetensors":
        raise MagMaxError(f"{out}: an adapter is a folder; give one a name without .safetensors")
    refuse_same_path(folders)
    if rule.needs_base:
        raise MagMaxError(f"{rule.name} combines whole weights, and adapters hold changes alone; choose another rule")
    layers, updates = common_layers(folders)
    for layer in layers:
        first, last = (TensorPosition(layer.key, depth) for depth in (0, 1))
        factor = options.scaling_factor
        if rule.for_tensor(first) != rule.for_tensor(last) or (
            factor is not None and resolve(factor, first) != resolve(factor, last)
        ):
            raise MagMaxError(
                "adapters do not tell how many layers their base has, which a gradient over layers needs; "
                "merge into the base (--base), or give numbers by filter"
            )
    merge = AdapterMerge(rule, folders, options, layers, updates)
    merge.kernel().check_rules()
    recipe = {
        "rule": rule.describe(),
        "scaling_factor": to_config(merge.scaling_factor),
        "dtype": options.dtype or "as the adapters",
        "adapter_rank": options.rank,
    }

    def worker(
        job: Job, sinks: Sequence[TensorSink], journal: Journal, execution: ExecutionOptions, parts: Sequence[Any]
    ) -> AdapterRunner:
        if execution.executor is not None:
            raise MagMaxError("adapters are merged into an adapter by threads of this process; give no executor")
        return AdapterRunner(merge, merge.kernel(), sinks, execution.threads, journal, parts)

    def companions(provenance: Provenance, digests: Mapping[str, str]) -> dict[str, bytes | Path]:
        fits = {module: fit.to_json() for module, fit in sorted(merge.fits.items())}
        content = {"adapter": {**merge.overall_fit().to_json(), "layers": fits}}
        card = adapter_card(provenance, merge.dtype, merge.report()).encode()
        config = merged_config(folders, merge.ranks())
        return {ADAPTER_CONFIG: config, "README.md": card, **provenance_file(provenance, digests, content)}

    def refuse_twins(digests: Sequence[str]) -> None:
        seen: dict[object, str] = {}
        for folder, layer_updates, digest in zip(folders, updates, digests, strict=True):
            same = digest, *(u.scale for u in layer_updates.values())
            if same in seen:
                raise MagMaxError(f"{folder.label}: holds the same tensors as {seen[same]}; name each adapter once")
            seen[same] = folder.label

    job = Job(
        target=OutputPath(out),
        inputs=folders,
        names=names or default_names([str(folder.path) for folder in folders]),
        recipe=recipe,
        specs=merge.specs(),
        kernel=merge.kernel(),
        small_files=companions,
        check=refuse_twins,
        extra_passes=rule.passes,
        shard_bytes=SINGLE_SHARD_BYTES,
        stem="adapter_model",
        worker=worker,
        memory=merge.memory,
        report=merge.report,
    )
    return merge, job


def _digest_tensors(folder: PeftAdapter) -> dict[str, str]:
    """The digest of each of an adapter's tensors; refuses NaN and infinity, of which no rank is the nearest."""
    digests: dict[str, str] = {}
    for key, spec in folder.specs.items():
        stored = folder.read(key, 0, spec.num_units)
        if spec.is_mergeable and spec.numel and not is_finite(stored, spec.dtype):
            raise MagMaxError(f"{folder.weights.label}: {key} holds NaN or infinity; mend the adapter")
        digests[key] = _digest_tensor(stored, key, spec)
    return digests


def _digest_tensor(stored: NDArray[Any], key: str, spec: TensorSpec) -> str:
    cuts = canonical_blocks(key, spec)
    return tensor_digest(block_digests(stored, cuts) if cuts else b"")
