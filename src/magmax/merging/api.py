"""Merge models into a base: files to a file or folder, state dicts to a state dict, modules to a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

from ..checkpoints import open_checkpoint
from ..checkpoints.remote.urls import is_url
from ..checkpoints.renamed import Renaming
from ..errors import MagMaxError
from ..rules import Number, RuleLike, as_rule
from .execution.execution_options import ExecutionOptions
from .in_memory import InMemoryMerges, restore_kind
from .matching import Mismatch
from .merge_job import merge_job
from .normalization_statistics import BatchNorm
from .output_options import OutputOptions


def merge(
    rule: RuleLike,
    base: Any,
    models: Iterable[Any],
    scaling_factor: Number | None = None,
    out: str | PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    mismatch: Mismatch = "strict",
    rename: Mapping[str, str] | None = None,
    strip: str = "",
    allow_nonfinite: bool = False,
    batch_norm: BatchNorm = "average",
    execution: ExecutionOptions | None = None,
    executor: Executor | None = None,
) -> Any:
    """base + scaling_factor * rule(task vectors of `models`).

    Args:
        rule: a rule, its name, {name: {option: value}}, or a list of these, a chain.
        base: a path, a state dict or a module.
        models: the same, in any mixture; a model may be a LoRA adapter of the base, or a PeftModel, which is merged as
            its `merge_and_unload` would.
        scaling_factor: by default the rule's own; `Layers` or `Filters` where it depends on the tensor.
        out: where to write, a `.safetensors` file or a folder, or the URL of one; needed where `base` is a path.
        dtype: of the output; the base's, if None.
        mismatch: what to do where models do not fit the base; see `OutputOptions`.
        rename: regular expression -> replacement, for the tensor names of those models that have them.
        strip: a prefix; of the models whose tensor names begin with it, only these tensors are used, without it.
        allow_nonfinite: merge NaN and infinity too; see `OutputOptions`.
        batch_norm: what is made of running means and variances: their average over the models ("average"), the base's
            ("base"), or the rule's result with variances of at least zero ("clip").
        execution: threads, progress, restart; see `ExecutionOptions`.
        executor: any `concurrent.futures.Executor`, whose workers do the work instead of threads of this process; its
            processes need the inputs, and the folder of `out`, at the same paths. See `ExecutionOptions`.

    Returns:
        With `out`, its path or URL. Without, the merged model of the same kind as `base`: a new state dict, or a deep
        copy of the module. Tensors that share storage in `base` share it in the result.

    Raises:
        MagMaxError: models that do not fit the base, NaN or infinity, files that cannot be read or written.
    """
    if isinstance(models, str | PathLike | Mapping) or hasattr(models, "state_dict"):
        raise MagMaxError("models must be a list of paths, state dicts or modules")
    if not isinstance(cast("object", models), Iterable):
        raise MagMaxError(f"models must be a list of paths, state dicts or modules, not {type(models).__name__}")
    if hasattr(base, "peft_config") and hasattr(base, "get_base_model"):
        raise MagMaxError("base is a PeftModel; give the model that its adapter was trained on, loaded anew")
    rule, models = as_rule(rule), list(models)
    execution = execution or ExecutionOptions()
    execution = replace(execution, executor=executor or execution.executor)
    options = OutputOptions(scaling_factor, dtype, mismatch, allow_nonfinite, batch_norm=batch_norm)
    opened = open_checkpoint(base, None if isinstance(base, str | PathLike) else "base")
    labels = [None if isinstance(m, str | PathLike) else f"model {n}" for n, m in enumerate(models, start=1)]
    others = Renaming(strip, rename or {}).apply_to_some(
        [open_checkpoint(m, label, opened) for m, label in zip(models, labels, strict=True)]
    )
    if out is not None:
        merge_job(rule, opened, others, out, options).run(execution)
        return fspath(out) if is_url(fspath(out)) else Path(fspath(out))
    if opened.is_on_disk:
        raise MagMaxError("merging files needs `out`, the path of the result")
    merges = InMemoryMerges(rule.for_models([m.label for m in others]), opened, others, options, execution)
    return restore_kind(base, merges.inputs[0], merges.merge_at(options.resolve_scaling_factor(rule)), options)
