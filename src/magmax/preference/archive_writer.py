"""Making an archive of what a preference is likely to need; `archive.py` says what is in one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.blocks import Chunk, block_digest, canonical_blocks, checkpoint_digest, tensor_digest
from ..checkpoints.dtypes import compute_dtype, narrow
from ..checkpoints.journal import lock_folder
from ..checkpoints.lora.adapted_model import portable_path
from ..checkpoints.writer import OutputDraft, OutputPath
from ..errors import MagMaxError, list_problems
from ..merging.execution.execution_options import ExecutionOptions
from ..merging.job import explain_os_error
from ..merging.matching import match_to_base, refuse_equal_models, refuse_same_path
from ..merging.pipeline import InputBlock, keep_freed_memory, run_in_threads
from ..merging.reader import BlockReader
from ..merging.statistics_pass import StatisticsRunner
from ..rules import Prune
from .archive import ARCHIVE_FILE, ARCHIVE_FORMAT, GROUP_SIZE, Archive, ArchiveInfo, Presets

QUANTISATION_LEVELS = 127
CHUNK_ELEMENTS = 256 * GROUP_SIZE
MAX_BF16 = (2 - 2**-7) * 2.0**127


class KeptEntries(NamedTuple):
    """The entries of one task vector that are archived: those of at least this magnitude, or all."""

    least: int | None
    wide: bool

    def mask(self, vector: NDArray[Any]) -> NDArray[np.bool_]:
        if self.least is None:
            return np.ones(len(vector), np.bool_)
        codes = np.abs(vector.astype(np.float64) if self.wide else vector)
        return (codes.view(np.int64 if self.wide else np.int32) >= self.least) & (vector != 0)


@dataclass(frozen=True)
class ArchiveWriter:
    """An archive being made."""

    reader: BlockReader
    keys: Sequence[str]
    kept: Sequence[KeptEntries]
    bits: int
    threads: int

    def vectors(self, chunk: Chunk) -> list[NDArray[Any]]:
        block = InputBlock(self.reader.inputs, chunk.key, [(chunk.start, chunk.stop)], digest=False)
        base = self.reader.read_numbers(block, 0)
        return [self.reader.task_vector(block, task, base) for task in range(1, len(self.reader.inputs))]

    def counts(self, chunk: Chunk) -> tuple[Chunk, list[NDArray[np.int64]]]:
        """Return how many entries of each task are kept in each block."""
        edges = np.arange(0, chunk.stop - chunk.start, GROUP_SIZE)
        masks = [entries.mask(vector) for entries, vector in zip(self.kept, self.vectors(chunk), strict=True)]
        return chunk, [np.add.reduceat(mask, edges, dtype=np.int64) for mask in masks]

    def starts(self, execution: ExecutionOptions) -> dict[tuple[int, str], NDArray[np.int64]]:
        """Return how many entries of a task's tensor are kept before each block, and in all."""
        starts: dict[tuple[int, str], NDArray[np.int64]] = {
            (task, key): np.zeros(1 + -(-self.spec(key).numel // GROUP_SIZE), np.int64)
            for task in range(len(self.kept))
            for key in self.keys
        }
        with closing(run_in_threads(self.counts, self.pieces(), self.threads)) as done:
            for chunk, counts in done:
                first = 1 + chunk.start // GROUP_SIZE
                for task, count in enumerate(counts):
                    starts[task, chunk.key][first : first + len(count)] = count
                execution.progress((chunk.stop - chunk.start) * 4 * len(self.reader.inputs))
        return {place: np.cumsum(counts) for place, counts in starts.items()}

    def specs(self, starts: Mapping[tuple[int, str], NDArray[np.int64]]) -> dict[str, TensorSpec]:
        """The archive's tensors."""
        specs: dict[str, TensorSpec] = {}
        for (task, key), counts in starts.items():
            blocks, total = len(counts) - 1, int(counts[-1])
            wide = compute_dtype(self.spec(key).dtype) == np.float64
            specs[f"{task}/values/{key}"] = TensorSpec(
                {8: "I8", 16: "BF16"}.get(self.bits, "F64" if wide else "F32"), (total,)
            )
            if self.kept[task].least is not None:
                specs[f"{task}/kept/{key}"] = TensorSpec("U8", (-(-self.spec(key).numel // 8),))
                specs[f"{task}/starts/{key}"] = TensorSpec("I64", (blocks,))
            if self.bits == 8:
                specs[f"{task}/scales/{key}"] = TensorSpec("F64" if wide else "F32", (blocks,))
        return specs

    def write(
        self, draft: OutputDraft, starts: Mapping[tuple[int, str], NDArray[np.int64]], execution: ExecutionOptions
    ) -> None:
        def work(chunk: Chunk) -> Chunk:
            for task, vector in enumerate(self.vectors(chunk)):
                self.write_part(draft, chunk, task, vector, starts[task, chunk.key])
            return chunk

        with closing(run_in_threads(work, self.pieces(), self.threads)) as done:
            for chunk in done:
                execution.progress((chunk.stop - chunk.start) * 4 * len(self.reader.inputs))

    def write_part(
        self, draft: OutputDraft, chunk: Chunk, task: int, vector: NDArray[Any], starts: NDArray[np.int64]
    ) -> None:
        """Write one task's part of a chunk."""
        mask, first = self.kept[task].mask(vector), chunk.start // GROUP_SIZE
        values, counts = vector[mask], np.diff(starts[first : first + 1 + -(-len(vector) // GROUP_SIZE)])
        if self.kept[task].least is not None:
            draft.write(f"{task}/kept/{chunk.key}", chunk.start // 8, np.packbits(mask))
            draft.write(f"{task}/starts/{chunk.key}", first, starts[first : first + len(counts)])
        most = {8: float(np.finfo(vector.dtype).max), 16: MAX_BF16}.get(self.bits, np.inf)
        if np.abs(values).max(initial=0) > most:
            raise MagMaxError(
                f"{self.reader.inputs[1 + task].label}: {chunk.key} differs from the base by more than {most:.3g}, "
                f"the most that {self.bits} bits hold; archive it with --bits 32"
            )
        if self.bits == 8:
            scales = np.zeros(len(counts), vector.dtype)
            filled = counts > 0
            if len(values):
                edges = (starts[first : first + len(counts)] - starts[first])[filled]
                scales[filled] = np.maximum.reduceat(np.abs(values), edges) / QUANTISATION_LEVELS
            draft.write(f"{task}/scales/{chunk.key}", first, scales)
            steps = np.repeat(np.where(scales > 0, scales, 1), counts)
            values = np.rint(values / steps).clip(-QUANTISATION_LEVELS, QUANTISATION_LEVELS).astype(np.int8)
        elif self.bits == 16:
            values = narrow(values, "BF16")
        draft.write(f"{task}/values/{chunk.key}", int(starts[first]), values)

    def pieces(self) -> Iterator[Chunk]:
        """Every tensor in parts of a whole number of blocks."""
        for key in self.keys:
            for start in range(0, self.spec(key).numel, CHUNK_ELEMENTS):
                yield Chunk(key, start, min(start + CHUNK_ELEMENTS, self.spec(key).numel))

    def spec(self, key: str) -> TensorSpec:
        return self.reader.inputs[0].specs[key]


def write_archive(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    names: Sequence[str],
    out: Path,
    *,
    top: float = 0.3,
    bits: int = 8,
    base_given: object = None,
    execution: ExecutionOptions | None = None,
) -> Archive:
    """Store what tuning needs of each model's task vector. An archive that was there keeps its presets.

    Args:
        top: the fraction of each task vector's entries to keep, those of largest magnitude over the whole model.
        bits: of each entry: 8 (linear, a scale for each block of 1024 elements), 16 (bfloat16) or 32 (exact).
        base_given: the path, id or BASE+ADAPTER that `base` was opened from, to be remembered in the archive.

    Raises:
        MagMaxError: no models, models that do not fit the base or are the same, NaN or infinity, differences too large
            for the bits, options out of range, a place that cannot be written or that holds presets for other models,
            no space left.
    """
    execution = execution or ExecutionOptions()
    if not 0 < top <= 1:
        raise MagMaxError(f"an archive needs top above 0 and at most 1, not {top}")
    if bits not in (8, 16, 32):
        raise MagMaxError(f"an archive needs bits to be 8, 16 or 32, not {bits}")
    if not models or len(set(names)) < len(names):
        raise MagMaxError(
            f"an archive needs models, each with a name of its own; the names are {', '.join(names) or 'none'}"
        )
    if out.suffix == ".safetensors":
        raise MagMaxError(f"{out}: an archive is a folder; name one without .safetensors")
    target, inputs = OutputPath(out), [base, *models]
    refuse_same_path(inputs)
    if problems := target.find_problems([path for c in inputs for path in [c.path, *c.files()] if path is not None]):
        raise list_problems(f"{out} cannot be written", problems)
    _read_old_presets(out, names)
    match = match_to_base(base, models, keep_copies=True)
    base, models, carried = match.base, match.models, match.unmerged
    inputs = [base, *models]
    keys = [key for key, spec in base.specs.items() if key not in carried and spec.numel]
    digests = [_digest_checkpoint(model) for model in models]
    refuse_equal_models(models, digests)
    keep_freed_memory()
    entries, reader = _find_kept_entries(BlockReader(inputs), keys, top, execution)
    writing = ArchiveWriter(reader, keys, entries, bits, execution.pool.count)
    starts = writing.starts(execution)
    about = {
        "format": ARCHIVE_FORMAT, "tasks": list(names), "top": top, "bits": bits, "models": digests,
        "base": {"path": portable_path(out, base_given, base), "digest": _digest_checkpoint(base)},
    }  # fmt: skip
    draft = OutputDraft(target, writing.specs(starts), {})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.open(fresh=True)
        writing.write(draft, starts, execution)
        with lock_folder(out):
            presets = _read_old_presets(out, names)  # again: others may have stored some meanwhile
            draft.publish({}, {ARCHIVE_FILE: json.dumps(about | {"presets": presets}, indent=2).encode() + b"\n"})
    except OSError as error:
        draft.discard()
        raise explain_os_error(error, out, "it begins anew") from error
    except BaseException:
        draft.discard()
        raise
    if presets:
        execution.note(f"{out}: replaced; presets kept: {len(presets)}")
    return Archive(out)


def _read_old_presets(out: Path, names: Sequence[str]) -> Presets:
    """The presets of the archive that is to be replaced, if there is one. Raises MagMaxError for those of others."""
    if not (out / ARCHIVE_FILE).exists():
        return {}
    try:
        old = ArchiveInfo.of(out)
    except MagMaxError as error:
        raise MagMaxError(
            f"{out / ARCHIVE_FILE}: cannot be read ({error}), and may hold presets; "
            f"name another folder, or remove {out}"
        ) from error
    if old.presets and old.tasks != list(names):
        raise MagMaxError(
            f"{out}: holds presets ({', '.join(old.presets)}) for other models ({', '.join(old.tasks)}); "
            "name another folder, or remove it"
        )
    return old.presets


def _find_kept_entries(
    reader: BlockReader, keys: Sequence[str], top: float, execution: ExecutionOptions
) -> tuple[list[KeptEntries], BlockReader]:
    """Each task's threshold, found over the whole model."""
    elements = {key: reader.inputs[0].specs[key].numel for key in keys}
    runner = StatisticsRunner(reader, elements, execution.pool, execution.progress)
    scope = runner.scope
    if top == 1:
        return [KeptEntries(None, scope.float64)] * scope.tasks, reader
    cuts = runner.collect(Prune(density=top).statistics(scope))
    return [KeptEntries(cut.code, scope.float64) for cut in cuts], runner.reader


def _digest_checkpoint(checkpoint: Checkpoint) -> str:
    """The digest that a merge notes of an input."""
    tensors: dict[str, str] = {}
    for key, spec in checkpoint.specs.items():
        if cuts := canonical_blocks(key, spec):
            tensors[key] = tensor_digest(b"".join(block_digest(checkpoint.read(key, *cut)) for cut in cuts))
    return checkpoint_digest(checkpoint.specs, tensors)
