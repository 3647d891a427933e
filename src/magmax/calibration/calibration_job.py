"""A calibrated checkpoint, written as every output is: previewed, resumed, published at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from ..checkpoints import Checkpoint
from ..checkpoints.writer import Target
from ..merging.job import Job
from ..merging.matching import compare, refuse_same_path, refuse_twins
from ..merging.merge_job import beside, kept_metadata
from ..merging.model_names import default_names
from ..merging.output_options import Options
from ..merging.provenance import read_provenance
from .rescale import Coefficients, FoldKernel, ThenFold


def calibrate_job(
    base: Checkpoint,
    merged: Checkpoint,
    models: Sequence[Checkpoint],
    out: Path,
    coefficients: Coefficients,
    told: Mapping[str, Any],
    names: Sequence[str] | None = None,
    options: Options | None = None,
) -> Job:
    """The work of folding coefficients into a merged checkpoint; what is not named in them keeps its bytes.

    Args:
        told: what provenance tells of how the coefficients came about; their digest is added.
        options: of these, mismatch.

    Raises:
        MagMaxError: checkpoints that do not fit the base, or one that is named twice.
    """
    options = options or Options()
    names = names or default_names([m.place for m in models])
    refuse_same_path([base, merged, *models])
    match = compare(base, [merged, *models], options.mismatch)
    inputs = [base, merged, *models]
    specs = {key: merged.spec(key) if merged.resolve(key) in merged.specs else spec for key, spec in base.specs.items()}
    earlier = read_provenance(merged.metadata)
    recipe = {"calibrate": {**told, "xi": digest(coefficients)}, **match.told()}
    folder = merged if merged.path is not None and merged.path.is_dir() else base
    return Job(
        target=Target(out),
        inputs=inputs,
        names=["base", "merged", *names],
        recipe=recipe | ({"merged": earlier["recipe"]} if earlier and "recipe" in earlier else {}),
        specs=specs,
        kernel=FoldKernel(tuple(inputs), coefficients, specs),
        metadata=kept_metadata(merged),
        companions=beside(folder, specs, options, match),
        check=lambda digests: refuse_twins(models, digests[2:]),
        extra_passes=2,
    )


def calibrated(job: Job, coefficients: Coefficients, told: Mapping[str, Any]) -> Job:
    """A merge's job that calibrates what it merges before it writes it."""
    recipe = {**job.recipe, "calibrate": {**told, "xi": digest(coefficients)}}
    return replace(job, recipe=recipe, kernel=ThenFold(job.kernel, coefficients, job.specs))


def digest(coefficients: Coefficients) -> str:
    """An xxh3 of all coefficients."""
    total = xxhash.xxh3_64()
    for key in sorted(coefficients):
        total.update(key.encode() + coefficients[key].tobytes())
    return total.hexdigest()
