"""A calibrated checkpoint, written as every output is: previewed, resumed, published at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from ..checkpoints import Checkpoint
from ..checkpoints.output_paths import OutputPath
from ..merging.job import Job
from ..merging.matching import match_to_base, refuse_equal_models, refuse_same_path
from ..merging.merge_job import base_metadata, small_files
from ..merging.model_names import default_names
from ..merging.output_options import OutputOptions
from ..merging.provenance import read_provenance
from .rescale import Coefficients, FoldAfterMerge, FoldKernel


def calibrate_job(
    base: Checkpoint,
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    out: Path,
    coefficients: Coefficients,
    provenance: Mapping[str, Any],
    names: Sequence[str] | None = None,
    options: OutputOptions | None = None,
) -> Job:
    """The work of folding coefficients into a merged checkpoint; what is not named in them keeps its bytes.

    Args:
        provenance: how the coefficients were computed; their digest is added.
        options: of these, mismatch.

    Raises:
        MagMaxError: checkpoints that do not fit the base, or one that is named twice.
    """
    options = options or OutputOptions()
    names = names or default_names([m.source for m in models])
    refuse_same_path([base, merged, *models])
    match = match_to_base(base, [merged, *models], options.mismatch)
    base, (merged, *models) = match.base, match.models
    inputs = [base, merged, *models]
    specs = {key: merged.output_specs.get(merged.resolve_alias(key), spec) for key, spec in base.output_specs.items()}
    earlier = read_provenance(merged.metadata)
    recipe = {"calibrate": {**provenance, "xi": coefficients_digest(coefficients)}, **match.describe()}
    folder = merged if merged.small_files_folder() is not None else base
    target = OutputPath(out)
    return Job(
        target=target,
        inputs=inputs,
        names=["base", "merged", *names],
        recipe=recipe | ({"merged": earlier["recipe"]} if earlier and "recipe" in earlier else {}),
        specs=specs,
        kernel=FoldKernel(tuple(inputs), coefficients, specs),
        metadata=base_metadata(merged),
        small_files=small_files(folder, target, specs, options, match),
        stem=base.layout.stem,
        modules=base.layout.modules,
        companions=folder,
        check=lambda digests: refuse_equal_models(models, digests[2:]),
        extra_passes=2,
    )


def calibrate_merge(job: Job, coefficients: Coefficients, provenance: Mapping[str, Any]) -> Job:
    """A merge's job that calibrates what it merges before it writes it."""
    recipe = {**job.recipe, "calibrate": {**provenance, "xi": coefficients_digest(coefficients)}}
    return replace(job, recipe=recipe, kernel=FoldAfterMerge(job.kernel, coefficients, job.specs))


def coefficients_digest(coefficients: Coefficients) -> str:
    """An xxh3 of all coefficients."""
    total = xxhash.xxh3_64()
    for key in sorted(coefficients):
        total.update(key.encode() + coefficients[key].tobytes())
    return total.hexdigest()
