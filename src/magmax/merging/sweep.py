"""Many scaling factors from one merge: the merged task vector is computed once and then only scaled."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..checkpoints import Checkpoint, TensorSpec, open_checkpoint
from ..checkpoints.dtypes import FLOAT_DTYPES, compute_dtype
from ..checkpoints.journal import WorkingFolder
from ..checkpoints.output_paths import OutputPath, delete_output
from ..errors import MagMaxError, list_problems
from ..rules import Rule
from .execution.execution_options import ExecutionOptions
from .job import Job
from .kernel import MergeKernel
from .merge_job import merge_job
from .output_options import OutputOptions
from .pipeline import InputBlock, Kernel, WrappedKernel
from .provenance import Provenance
from .result import MergeResult

MAX_FACTORS = 10_000


@dataclass(frozen=True)
class TaskVectorKernel(WrappedKernel[MergeKernel]):
    """The merged task vector itself, unscaled, in the type it is computed in."""

    def __call__(self, block: InputBlock) -> list[NDArray[Any] | None]:
        if block.key in self.merge.unmerged:
            self.merge.copy_unmerged(block)
            return [None]
        head, stored, _ = self.merge.split(block)
        if head.start == head.stop:
            return [None]
        return [self.merge.task_vector(head, self.merge.reader.widen(head, 0, stored))]


@dataclass(frozen=True)
class ScaleKernel(Kernel):
    """base (input 0) + scaling_factor * merged task vector (input 1)."""

    merge: MergeKernel

    def __call__(self, block: InputBlock) -> list[NDArray[Any]]:
        if block.key in self.merge.unmerged:
            return [self.merge.copy_unmerged(block)]
        return [self.merge.join(block, lambda head, _: self.merge.reader.read_numbers(head, 1))]


@dataclass(frozen=True)
class FactorSweep:
    """A merge to be written at several scaling factors; each file equals, byte for byte, a merge at that factor."""

    rule: Rule
    base: Checkpoint
    models: Sequence[Checkpoint]
    names: Sequence[str]
    out: Path
    options: OutputOptions
    factors: Sequence[float]
    execution: ExecutionOptions

    def path(self, factor: float) -> Path:
        """Return where the result at a factor goes: OUT with the factor put before its suffix."""
        suffix = ".safetensors" if not OutputPath(self.out).is_folder else ""
        return self.out.with_name(f"{self.out.name.removesuffix(suffix)}-{factor:g}{suffix}")

    @contextmanager
    def merged(self) -> Generator[SweepWriter]:
        """Merge once; the merged task vector lies in the working folder of OUT until the block is left.

        A rule whose result depends on the factor merges at each.
        """
        whole = self.job(self.out, self.options)
        jobs = (self.job(self.path(factor), self.options) for factor in self.factors)
        problems = [problem for job in jobs for problem in job.problems()]
        if problems:
            raise list_problems("the results cannot be written", problems)
        with WorkingFolder(self.out) as work:
            if self.rule.needs_scaling_factor:  # there is no one merged task vector to be scaled
                yield SweepWriter(self)
                return
            vector = work.path / "task-vector.safetensors"
            result = self._vector_job(whole, vector).run(self.execution)
            try:
                yield SweepWriter(self, (result, open_checkpoint(vector)))
            finally:
                delete_output(vector)

    def _vector_job(self, whole: Job, vector: Path) -> Job:
        """The work of writing the merged task vector to a file."""
        specs = {
            key: TensorSpec(FLOAT_DTYPES[compute_dtype(spec.dtype).name], spec.shape)
            for key, spec in self.base.specs.items()
            if key not in whole.unmerged
        }
        kernel = TaskVectorKernel(_require_merge_kernel(whole))
        return replace(whole, target=OutputPath(vector), specs=specs, kernel=kernel, small_files=_no_small_files)

    def job(self, out: Path, options: OutputOptions) -> Job:
        """The whole merge, as if it were the only one."""
        return merge_job(self.rule, self.base, self.models, out, options, self.names)


@dataclass(frozen=True)
class SweepWriter:
    """Writes the result at one factor after another."""

    sweep: FactorSweep
    once: tuple[MergeResult, Checkpoint] | None = None
    """What came of merging once, and the merged task vector."""

    def write(self, factor: float) -> Path:
        """Write base + factor * merged task vector to the sweep's path for it, and return that path."""
        sweep = self.sweep
        options = replace(sweep.options, scaling_factor=factor)
        whole = sweep.job(sweep.path(factor), options)
        if self.once is None:
            return Path(whole.run(sweep.execution).path)
        result, vector = self.once
        inputs, kernel = [sweep.base, vector], _require_merge_kernel(whole)
        kernel = replace(kernel, tasks=0, reader=replace(kernel.reader, inputs=inputs))
        origin = Provenance(whole.recipe, whole.names, result.input_digests, [c.origin for c in whole.inputs])
        job = replace(
            whole, inputs=inputs, names=["base", "task vector"], kernel=ScaleKernel(kernel), origin=origin,
            check=_no_check, extra_passes=0,
        )  # fmt: skip
        return Path(job.run(sweep.execution).path)


def _require_merge_kernel(job: Job) -> MergeKernel:
    assert isinstance(job.kernel, MergeKernel)
    return job.kernel


def _no_small_files(provenance: Provenance, digests: object) -> dict[str, bytes | Path]:
    return {}


def _no_check(digests: Sequence[str]) -> None:
    """The inputs were checked when they were merged."""


def parse_factors(text: str) -> list[float]:
    """The numbers of "first:last:step" (both ends included) or of "a,b,c"."""
    try:
        if ":" not in text:
            factors = [float(Decimal(part)) for part in text.split(",")]
        else:
            first, last, step = (Decimal(part) for part in text.split(":"))
            count = int((last - first) / step) + 1
            if count > MAX_FACTORS:
                raise ValueError(f"{count} factors")
            factors = [float(first + step * n) for n in range(count)]
    except (InvalidOperation, ValueError, OverflowError, ArithmeticError) as error:
        raise MagMaxError(
            f"cannot read {text!r} as numbers; write first:last:step, such as 0.1:1.0:0.1, or a,b,c"
        ) from error
    if not factors:
        raise MagMaxError(f"{text!r} holds no number; write first:last:step, such as 0.1:1.0:0.1")
    if len({f"{factor:g}" for factor in factors}) < len(factors):
        raise MagMaxError(f"{text!r} holds factors that are equal to six digits, which would have one name")
    return factors
