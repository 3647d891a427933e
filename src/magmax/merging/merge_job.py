"""Merges into files: inputs matched, kernel built, job made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.dtypes import FLOAT_DTYPES
from ..checkpoints.output_paths import OutputPath
from ..checkpoints.zero_base import ZeroBase
from ..rules import Rule
from ..rules.schedules import to_config
from ..rules.statistics import Span
from .config_differences import note_differences
from .job import Job, provenance_file
from .kernel import MergeKernel
from .matching import Match, match_to_base, refuse_equal_models, refuse_same_path
from .model_files import copy_notes, find_library, model_files
from .model_names import default_names
from .normalization_statistics import BatchNormStatistics
from .output_options import OutputOptions
from .provenance import METADATA_KEY, Provenance, model_card
from .reader import BlockReader

HASH_NAME = re.compile(r"hash|digest|checksum|sha_?\d|md5|crc_?32|xxh\d", re.IGNORECASE)
"""Metadata that hold a hash: modelspec.hash_sha256, sshs_model_hash, ss_sd_model_hash, ..."""


def merge_job(
    rule: Rule,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    out: str | PathLike[str],
    options: OutputOptions,
    names: Sequence[str] | None = None,
) -> Job:
    """The work of merging into a file or folder. Raises MagMaxError for models that do not fit the base."""
    names = names or default_names([m.source for m in models])
    rule = rule.for_models(names)
    match = match_models(rule, base, models, options)
    kernel = merge_kernel(rule, options, match)
    base, models = match.base, match.models
    apart = rule.statistics_span is Span.TENSOR
    target = OutputPath.parse(out)
    statistics = kernel.batch_norm

    return Job(
        target=target,
        inputs=[base, *models],
        names=["zeros" if isinstance(base, ZeroBase) else "base", *names],
        recipe={**provenance_recipe(rule, options), **match.describe(), **statistics.describe()},
        specs=kernel.out,
        kernel=kernel,
        unmerged=match.unmerged,
        partly_merged={key: part.reason for key, part in match.partly_merged.items()},
        metadata=base_metadata(base),
        small_files=small_files(base, target, kernel.out, options, match),
        stem=base.layout.stem,
        modules=base.layout.modules,
        companions=base,
        check=lambda digests: refuse_equal_models(models, digests[1:]),
        extra_passes=rule.passes,
        memory=0 if apart else rule.memory,
        memory_per_thread=rule.memory if apart else 0,
        shard_bytes=options.shard_bytes,
        notes=[*options.dtype_notes(base), *statistics.notes()],
    )


def small_files(
    base: Checkpoint, target: OutputPath, out: Mapping[str, TensorSpec], options: OutputOptions, match: Match
) -> Callable[[Provenance, Mapping[str, str]], dict[str, bytes | Path]]:
    """The files that go beside a folder output: the base's config and tokenizer, a model card, the provenance.

    What the user should know of them is added to the base's notes.
    """
    wanted = FLOAT_DTYPES[options.dtype] if options.dtype else None
    base.notes += [note for note in copy_notes(base, target) if note not in base.notes]

    def files(provenance: Provenance, digests: Mapping[str, str]) -> dict[str, bytes | Path]:
        dtypes = sorted({s.dtype for s in out.values() if s.is_mergeable})
        partly = {key: f"{part.rows} of {part.of} rows" for key, part in match.partly_merged.items()}
        card = model_card(provenance, dtypes, match.unmerged, partly, find_library(base)).encode()
        folder = base.small_files_folder()
        copied = model_files(folder, wanted, base.layout.modules) if folder else {}
        return {**copied, "README.md": card, **provenance_file(provenance, digests)}

    return files


def provenance_recipe(rule: Rule, options: OutputOptions) -> dict[str, Any]:
    """Return what provenance tells of a merge."""
    recipe = {
        "rule": rule.describe(),
        "scaling_factor": to_config(options.resolve_scaling_factor(rule)),
        "dtype": options.dtype or "as the base",
    }
    if options.keep_dtype:
        recipe["keep_dtype"] = options.keep_dtype
    if options.mismatch != "strict":
        recipe["mismatch"] = options.mismatch
    if options.allow_nonfinite:
        recipe["allow_nonfinite"] = True
    return recipe


def base_metadata(base: Checkpoint) -> dict[str, str]:
    """Return the base's metadata, and the names that share a tensor, as safetensors' save_model writes them.

    Hashes of the base's weights would not be those of the output.
    """
    metadata = {
        k: v for k, v in base.metadata.items() if k != METADATA_KEY and (k in base.aliases or not HASH_NAME.search(k))
    }
    return metadata | base.aliases


def match_models(rule: Rule, base: Checkpoint, models: Sequence[Checkpoint], options: OutputOptions) -> Match:
    """Match the models to the base; refuse a rule that cannot merge so many and one file named twice."""
    rule.check(len(models))
    refuse_same_path([base, *models])
    note_differences(base, models)
    match = match_to_base(base, models, options.mismatch)
    return BatchNormStatistics.find(match.base.specs, options.batch_norm).narrow(match)


def merge_kernel(rule: Rule, options: OutputOptions, match: Match) -> MergeKernel:
    """Build the kernel that merges blocks of matched inputs."""
    reader = BlockReader([match.base, *match.models], options.allow_nonfinite)
    kernel = MergeKernel(
        rule=rule,
        tasks=len(match.models),
        reader=reader,
        scaling_factor=options.resolve_scaling_factor(rule),
        out=options.out_specs(match.base),
        unmerged=match.unmerged,
        extents=match.extents,
        batch_norm=BatchNormStatistics.find(match.base.specs, options.batch_norm),
    )
    kernel.check_rules()
    return kernel
