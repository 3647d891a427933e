"""Merges into files: inputs matched, kernel built, job made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..checkpoints import Checkpoint, Spec
from ..checkpoints.dtypes import LONG_NAMES
from ..checkpoints.writer import Target
from ..checkpoints.zero_base import Zeros
from ..rules import Rule
from ..rules.schedules import written
from ..rules.statistics import Span
from .job import Job, provenance_file
from .kernel import MergeKernel
from .matching import Match, compare, refuse_same_path, refuse_twins
from .model_files import companions
from .model_names import default_names
from .output_options import Options
from .provenance import METADATA_KEY, Provenance, model_card
from .reader import Reader


def merge_job(
    rule: Rule,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    out: str | PathLike[str],
    options: Options,
    names: Sequence[str] | None = None,
) -> Job:
    """The work of merging into a file or folder. Raises MagMaxError for models that do not fit the base."""
    names = names or default_names([m.place for m in models])
    rule = rule.for_models(names)
    match = match_models(rule, base, models, options)
    kernel = merge_kernel(rule, base, models, options, match)
    apart = rule.questions_span is Span.TENSOR

    return Job(
        target=Target.of(out),
        inputs=[base, *models],
        names=["zeros" if isinstance(base, Zeros) else "base", *names],
        recipe={**recipe_of(rule, options), **match.told()},
        specs=kernel.out,
        kernel=kernel,
        carried=match.carried,
        partly={key: part.why for key, part in match.partly.items()},
        metadata=kept_metadata(base),
        companions=beside(base, kernel.out, options, match),
        check=lambda digests: refuse_twins(models, digests[1:]),
        extra_passes=rule.passes,
        memory=0 if apart else rule.memory,
        memory_a_thread=rule.memory if apart else 0,
        shard_bytes=options.shard_bytes,
    )


def beside(
    base: Checkpoint, out: Mapping[str, Spec], options: Options, match: Match
) -> Callable[[Provenance, Mapping[str, str]], dict[str, bytes | Path]]:
    """The files that go beside a folder output: the base's config and tokenizer, a model card, the provenance."""
    wanted = LONG_NAMES[options.dtype] if options.dtype else None

    def files(provenance: Provenance, digests: Mapping[str, str]) -> dict[str, bytes | Path]:
        dtypes = sorted({s.dtype for s in out.values() if s.floating})
        partly = {key: f"{part.rows} of {part.of} rows" for key, part in match.partly.items()}
        card = model_card(provenance, dtypes, match.carried, partly).encode()
        folder = base.folder()
        copied = companions(folder, wanted) if folder else {}
        return {**copied, "README.md": card, **provenance_file(provenance, digests)}

    return files


def recipe_of(rule: Rule, options: Options) -> dict[str, Any]:
    """What provenance tells of a merge."""
    told = {
        "rule": rule.describe(),
        "scaling_factor": written(options.factor(rule)),
        "dtype": options.dtype or "as the base",
    }
    if options.mismatch != "strict":
        told["mismatch"] = options.mismatch
    if options.allow_nonfinite:
        told["allow_nonfinite"] = True
    return told


def kept_metadata(base: Checkpoint) -> dict[str, str]:
    """The base's own metadata, and which names share a tensor, as safetensors' save_model notes it."""
    kept = {k: v for k, v in base.metadata.items() if k != METADATA_KEY}
    return kept | base.aliases


def match_models(rule: Rule, base: Checkpoint, models: Sequence[Checkpoint], options: Options) -> Match:
    """Match the models to the base; refuse a rule that cannot merge so many and one file named twice."""
    rule.check(len(models))
    refuse_same_path([base, *models])
    return compare(base, models, options.mismatch)


def merge_kernel(
    rule: Rule, base: Checkpoint, models: Sequence[Checkpoint], options: Options, match: Match
) -> MergeKernel:
    """Build the kernel that merges blocks of these inputs."""
    reader = Reader([base, *models], options.allow_nonfinite)
    kernel = MergeKernel(
        rule=rule,
        tasks=len(models),
        reader=reader,
        scaling_factor=options.factor(rule),
        out=options.out_specs(base),
        carried=match.carried,
        extents=match.extents,
    )
    kernel.check_placed()
    return kernel
