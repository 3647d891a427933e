"""Merge models into a base: files to a file or folder, state dicts to a state dict, modules to a module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint, Spec, open_checkpoint
from ..checkpoints.base import PREFIX
from ..checkpoints.dtypes import LONG_NAMES
from ..checkpoints.memory import as_tensor
from ..checkpoints.remote.urls import is_url
from ..checkpoints.writer import SHARD_BYTES, Target
from ..checkpoints.zero_base import Zeros
from ..errors import MagMaxError
from ..rules import Filters, Layers, Number, Rule, as_rule, nearest
from ..rules.held import holding
from ..rules.schedules import Value, need, written
from ..rules.statistics import Span
from .execution.execution_options import Settings
from .job import Job, prepared, provenance_file
from .kernel import MergeKernel
from .matching import Match, Mismatch, compare
from .model_files import companions
from .pipeline import Pass
from .provenance import METADATA_KEY, Provenance, model_card
from .reader import Reader

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
COMMON_NAMES = {"model", "pytorch_model", "adapter_model", "diffusion_pytorch_model"}
"""File names that say nothing of the model."""


@dataclass(frozen=True)
class Options:
    """What a merge computes, beyond its rule.

    Attributes:
        scaling_factor: multiplies the merged task vector, and may depend on the tensor; None means the rule's default.
        dtype: the output's floating type ("float32", "bfloat16", ...); None keeps each tensor's type in the base.
        mismatch: "strict" refuses models whose tensors differ from the base's; "base" keeps the base's there;
            "intersect" merges the leading rows that all have, where tensors differ in the number of rows alone, and
            keeps the base's rows and tensors elsewhere.
        allow_nonfinite: let NaN and infinity through instead of refusing them.
        shard_bytes: the most a shard of a folder output may hold.
    """

    scaling_factor: Number | None = None
    dtype: str | None = None
    mismatch: Mismatch = "strict"
    allow_nonfinite: bool = False
    shard_bytes: int = SHARD_BYTES

    def out_specs(self, base: Checkpoint) -> dict[str, Spec]:
        """The output's tensors. Raises MagMaxError for a dtype that is none."""
        if self.dtype is None:
            return dict(base.specs)
        if self.dtype not in LONG_NAMES:
            raise MagMaxError(f"there is no dtype {self.dtype!r}; {nearest(self.dtype, list(LONG_NAMES))}")
        wanted = LONG_NAMES[self.dtype]
        return {key: Spec(wanted, s.shape) if s.floating else s for key, s in base.specs.items()}

    def factor(self, rule: Rule) -> Number:
        if isinstance(self.scaling_factor, Layers | Filters):
            need("a merge", "scaling_factor", self.scaling_factor)
            return self.scaling_factor
        if isinstance(self.scaling_factor, Value):
            raise MagMaxError("scaling_factor is one for all models; give the rule weights")
        try:
            factor = rule.default_factor if self.scaling_factor is None else float(self.scaling_factor)
        except OverflowError:
            factor = math.inf
        if not math.isfinite(factor):
            raise MagMaxError(f"scaling_factor must be a finite number, not {factor}")
        return factor


def merge(
    rule: Rule | str,
    base: Any,
    models: Sequence[Any],
    scaling_factor: Number | None = None,
    out: str | PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    mismatch: Mismatch = "strict",
    allow_nonfinite: bool = False,
    settings: Settings | None = None,
    executor: Executor | None = None,
) -> Any:
    """base + scaling_factor * rule(task vectors of `models`).

    Args:
        rule: a rule or its name.
        base: a path, a state dict or a module.
        models: the same, in any mixture; a model may be a LoRA adapter of the base.
        scaling_factor: by default the rule's own; `Layers` or `Filters` where it depends on the tensor.
        out: where to write, a `.safetensors` file or a folder, or the URL of one; needed where `base` is a path.
        dtype: of the output; the base's, if None.
        mismatch: what to do where models do not fit the base; see `Options`.
        allow_nonfinite: merge NaN and infinity too.
        settings: threads, progress, restart; see `Settings`.
        executor: any `concurrent.futures.Executor`, whose workers do the work instead of threads of this process; its
            processes need the inputs, and the folder of `out`, at the same paths. See `Settings`.

    Returns:
        With `out`, its path or URL. Without, the merged model of the same kind as `base`: a new state dict, or a deep
        copy of the module. Tensors that share storage in `base` share it in the result.

    Raises:
        MagMaxError: models that do not fit the base, NaN or infinity, files that cannot be read or written.
    """
    if isinstance(models, str | PathLike | Mapping) or hasattr(models, "state_dict"):
        raise MagMaxError("models must be a list of paths, state dicts or modules")
    rule = as_rule(rule)
    settings = settings or Settings()
    settings = replace(settings, executor=executor or settings.executor)
    options = Options(scaling_factor, dtype, mismatch, allow_nonfinite)
    opened = open_checkpoint(base, None if isinstance(base, str | PathLike) else "base")
    labels = [None if isinstance(m, str | PathLike) else f"model {n}" for n, m in enumerate(models, start=1)]
    others = [open_checkpoint(m, label, opened) for m, label in zip(models, labels, strict=True)]
    if out is not None:
        merge_job(rule, opened, others, out, options).run(settings)
        return fspath(out) if is_url(fspath(out)) else Path(fspath(out))
    if opened.stored:
        raise MagMaxError("merging files needs `out`, the path of the result")
    tensors = merge_in_memory(rule.for_models([m.label for m in others]), opened, others, options, settings)
    return like(base, opened, tensors, options)


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
    match = _match(rule, base, models, options)
    kernel = _kernel(rule, base, models, options, match)
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


def merge_in_memory(
    rule: Rule, base: Checkpoint, models: Sequence[Checkpoint], options: Options, settings: Settings
) -> dict[str, NDArray[Any]]:
    """The merged tensors as stored units, flat, by the base's own keys."""
    return MergesInMemory(rule, base, models, options, settings).at(options.factor(rule))


class MergesInMemory:
    """Merges of the same models at one scaling factor after another.

    The rule asks the models once. With `hold`, what it merged before scaling stays in memory and serves all factors.
    """

    def __init__(
        self,
        rule: Rule,
        base: Checkpoint,
        models: Sequence[Checkpoint],
        options: Options,
        settings: Settings,
        *,
        hold: bool = False,
    ) -> None:
        rule = holding(rule) if hold and settings.executor is None else rule
        kernel = _kernel(rule, base, models, options, _match(rule, base, models, options))
        self.kernel = cast("MergeKernel", prepared(kernel, settings))
        self.inputs, self.settings = [base, *models], settings

    def at(self, factor: Number) -> dict[str, NDArray[Any]]:
        """The merged tensors as stored units, flat, by the base's own keys."""
        memory = MemorySink(self.kernel.out)
        scaled = replace(self.kernel, scaling_factor=factor)
        Pass(self.inputs, [memory], scaled, self.settings.crew, digest=False).run(self.settings.progress)
        return memory.tensors


class MemorySink:
    """Flat arrays to be filled by a pass."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self.specs = specs
        self.tensors = {key: np.empty(spec.units, spec.storage) for key, spec in specs.items()}

    def write(self, key: str, start: int, stored: NDArray[Any]) -> None:
        self.tensors[key][start : start + len(stored)] = stored

    def sync(self) -> None:
        """Nothing to wait for."""


def default_names(paths: Sequence[str]) -> list[str]:
    """For each path the first part that tells it from the others, without its suffix; for a model of the hub its id."""
    local = [path for path in paths if not path.startswith(PREFIX)]
    if len(local) < len(paths):
        told = iter(default_names(local)) if local else iter(())
        return [path.removeprefix(PREFIX) if path.startswith(PREFIX) else next(told) for path in paths]
    parts = [Path(path).parts or ("",) for path in paths]
    if len(paths) == 1:
        names = [_plain(part) for part in reversed(parts[0])]
        return [next((name for name in names if name not in COMMON_NAMES), names[0])]
    for column in range(max(map(len, parts), default=0)):
        words = [p[min(column, len(p) - 1)] for p in parts]
        if len(set(words)) == len(words):
            return [_plain(word) for word in words]
    longest = max(map(len, parts), default=0)
    first = next((c for c in range(longest) if len({p[min(c, len(p) - 1)] for p in parts}) > 1), 0)
    return [_plain("/".join(p[first:] or p[-1:])) for p in parts]


def _plain(name: str) -> str:
    """A file's name without the suffix that says it holds weights."""
    return next((name.removesuffix(s) for s in WEIGHT_SUFFIXES if name.endswith(s)), name)


def _match(rule: Rule, base: Checkpoint, models: Sequence[Checkpoint], options: Options) -> Match:
    rule.check(len(models))
    refuse_same_path([base, *models])
    return compare(base, models, options.mismatch)


def _kernel(rule: Rule, base: Checkpoint, models: Sequence[Checkpoint], options: Options, match: Match) -> MergeKernel:
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


def refuse_same_path(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise MagMaxError if two checkpoints are one file or folder; zeros take no numbers from theirs."""
    seen: dict[Path | str, str] = {}
    for checkpoint in checkpoints:
        if not checkpoint.stored or isinstance(checkpoint, Zeros):
            continue
        real = checkpoint.path.resolve() if checkpoint.path is not None else checkpoint.url
        if real in seen:
            raise MagMaxError(f"{checkpoint.label}: is the same file as {seen[real]}; name each model once")
        seen[real] = checkpoint.label


def refuse_twins(models: Sequence[Checkpoint], digests: Sequence[str]) -> None:
    """Raise MagMaxError if two models hold the same tensors, wherever they are."""
    seen: dict[str, str] = {}
    for model, digest in zip(models, digests, strict=True):
        if digest in seen:
            raise MagMaxError(f"{model.label}: holds the same tensors as {seen[digest]}; name each model once")
        seen[digest] = model.label


def like(base: Any, opened: Checkpoint, tensors: Mapping[str, NDArray[Any]], options: Options) -> Any:
    """The merged tensors in the shape of the thing that was given as the base."""
    original = cast("Mapping[str, Any]", base if isinstance(base, Mapping) else base.state_dict())
    specs = options.out_specs(opened)
    made = {key: as_tensor(tensors[key], spec, original[key]) for key, spec in specs.items()}
    merged = {key: made[opened.resolve(key)] for key in original}
    if isinstance(base, Mapping):
        return merged
    result = copy.deepcopy(base)
    if options.dtype is not None:
        import torch

        result = result.to(getattr(torch, options.dtype))
    result.load_state_dict(merged)
    return result
