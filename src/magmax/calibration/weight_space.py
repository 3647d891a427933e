"""Calibration in weight space of a model that is merged already: no data, one pass over all weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint
from ..merging.execution.execution_options import ExecutionOptions
from ..merging.matching import Mismatch, match_to_base
from ..merging.pipeline import BlockPipeline, InputBlock, Kernel
from ..merging.reader import BlockReader
from ..rules import CalibrateWeights
from ..rules.norms import dot_products_and_norms
from ..rules.transforms.calibrate_weights import is_calibrated
from .calibration_report import LayerReport
from .gram import TaskVectorGram
from .rescale import Coefficients

Parts = dict[str, dict[int, NDArray[np.float64]]]


@dataclass(frozen=True)
class _NormKernel(Kernel):
    """The `measures` of task vectors and merged vector, by tensor and the block's first part: a row, or all of it."""

    reader: BlockReader
    sizes: Mapping[str, int]
    found: Parts = field(default_factory=dict)

    @property
    def holds_all_inputs(self) -> bool:
        return True

    def __call__(self, block: InputBlock) -> list[NDArray[Any] | None]:
        if block.key in self.sizes:
            base = self.reader.read_numbers(block, 0)
            vectors = [self.reader.task_vector(block, n, base) for n in [*range(2, len(self.reader.inputs)), 1]]
            size, length = self.sizes[block.key], block.stop - block.start
            whole = block.start % size == 0 and length % size == 0
            measures = dot_products_and_norms(vectors, size if whole else length, angles=True)
            self.found.setdefault(block.key, {})[block.start] = measures
        return []


def measure_gram(
    base: Checkpoint,
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    names: Sequence[str],
    execution: ExecutionOptions | None = None,
    mismatch: Mismatch = "strict",
) -> TaskVectorGram:
    """Lengths and angles of whole tensors; every input is read once, block by block.

    Raises:
        MagMaxError: models that do not fit the base, NaN or infinity.
    """
    execution = execution or ExecutionOptions()
    apart = _excluded_tensors(base, [merged, *models], mismatch)
    sizes = {key: spec.numel for key, spec in base.specs.items() if key not in apart and spec.numel}
    measures = _measure_parts(base, merged, models, sizes, execution)
    return TaskVectorGram({key: measures[key].sum(axis=0)[:, :-1] for key in sizes}, apart, list(names))


def calibrate_weights(
    base: Checkpoint,
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    transform: CalibrateWeights,
    gram: TaskVectorGram,
    execution: ExecutionOptions | None = None,
    mismatch: Mismatch = "strict",
) -> tuple[Coefficients, list[LayerReport]]:
    """xi of every matrix and convolution of a merged model, as `transform` has it at the end of a chain.

    It is the same function of the same vectors, m being the merged model less the base: what was scaled, and rounded
    to the type it was stored in. With it, what to report of each tensor; xi there is the mean over rows.
    """
    transform.check_names(list(base.specs))
    apart = _excluded_tensors(base, [merged, *models], mismatch)
    rows = transform.per == "row" or (transform.per is None and transform.form == "ellipsoid")
    sizes = {
        key: math.prod(spec.shape[1:] if rows else spec.shape)
        for key, spec in base.specs.items()
        if key not in apart and is_calibrated(key, spec.shape)
    }
    coefficients: Coefficients = {}
    layers: list[LayerReport] = []
    for key, measures in _measure_parts(base, merged, models, sizes, execution or ExecutionOptions()).items():
        raw, why = transform.coefficients(measures), ""
        xi = raw
        if transform.is_guarded(measures.sum(axis=0)[:-1, [*range(len(models)), -1]]):
            xi, why = np.ones_like(raw), f"the task vectors are too much alike for the guard of {transform.guard:g}"
        elif transform.sensitive:
            sensitive = key in transform.sensitive
            xi = np.minimum(raw, 1) if sensitive else np.maximum(raw, 1)
            why = f"{'' if sensitive else 'not '}sensitive: {(xi != raw).mean():.0%} clipped" * bool((xi != raw).any())
        coefficients[key] = xi if rows else xi[0]
        norms, after = gram.norms([key]), float(np.sqrt((xi**2 * measures[:, -1, -2]).sum()))
        details = {"weights": norms, "weight_after": after, "cosine": gram.cosine([key])}
        layers.append(LayerReport(key, "weights", [key], float(xi.mean()), float(raw.mean()), why, **details))
    return coefficients, layers


def _excluded_tensors(base: Checkpoint, others: Sequence[Checkpoint], mismatch: Mismatch) -> dict[str, str]:
    match = match_to_base(base, others, mismatch)
    return {**match.unmerged, **{key: part.reason for key, part in match.partly_merged.items()}}


def _measure_parts(
    base: Checkpoint,
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    sizes: Mapping[str, int],
    execution: ExecutionOptions,
) -> dict[str, NDArray[np.float64]]:
    """By tensor the measures of each of its parts, of so many elements each: shape (parts, T + 1, T + 2)."""
    inputs = [base, merged, *models]
    kernel = _NormKernel(BlockReader(inputs), sizes)
    BlockPipeline(inputs, [], kernel, execution.pool, digest=False).run(execution.progress)
    measures: dict[str, NDArray[np.float64]] = {}
    for key, size in sizes.items():
        width = len(models) + 1
        total = np.zeros((base.specs[key].numel // size, width, width + 1))
        for start, part_measures in sorted(kernel.found.get(key, {}).items()):
            first = start // size
            total[first : first + len(part_measures)] += part_measures
        measures[key] = total
    return measures
