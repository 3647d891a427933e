"""Checkpoints that others trained, used as a training: one for each task, merged and evaluated as our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoints import Checkpoint, open_checkpoint
from ...checkpoints.memory import to_tensor
from ...errors import MagMaxError, list_problems
from .weight_files import MADE_FROM, read_metadata, write_tensors


def import_checkpoints(
    models: Sequence[str], tasks: Sequence[str], base: Mapping[str, Tensor], folder: Path
) -> list[Path]:
    """Write theta_1 .. theta_T from the models, in the order of the tasks; returns their paths.

    A model is a file or folder of weights, or a model of the hub. Its tensors stand under the names of `base`; what it
    lacks (a projection that was not trained) is the base's, what the base lacks (another head) is left out.

    Raises MagMaxError where there is not one model for each task, or where shapes differ or no name is the same.
    """
    if len(models) != len(tasks):
        raise MagMaxError(f"training: external names {len(models)} models for {len(tasks)} tasks ({', '.join(tasks)})")
    paths = [folder / f"theta_{t}.safetensors" for t in range(1, len(models) + 1)]
    for model, path in zip(models, paths, strict=True):
        place = locate_external(model)
        stamp = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in open_checkpoint(place).files()]
        metadata = {MADE_FROM: str(stamp)}
        if read_metadata(path) != metadata:
            write_tensors({**base, **_read_matching_tensors(place, base)}, path, metadata)
    return paths


def locate_external(model: str) -> Path:
    """The file or folder of a model, fetched from the hub if it is none here."""
    if Path(model).exists():
        return Path(model)
    from transformers.utils.hub import cached_file

    try:
        cached = cached_file(model, "model.safetensors")
    except (OSError, ValueError) as error:
        raise MagMaxError(f"{model}: is no file or folder here, and cannot be had from the hub: {error}") from error
    if cached is None:
        raise MagMaxError(f"{model}: has no model.safetensors")
    return Path(cached)


def _read_matching_tensors(place: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    opened = open_checkpoint(place)
    there = {key: opened.resolve_alias(_stored_name(key, opened, base)) for key in base}
    shared = [key for key, name in there.items() if name in opened.specs]
    if not shared:
        ours, theirs = next(iter(base), "nothing"), next(iter(opened.specs), "nothing")
        raise MagMaxError(f"{place}: has no tensor of the model's names ({theirs} there, {ours} here)")
    apart = [
        f"{place}: {key} is {opened.spec(there[key]).shape} there and {tuple(base[key].shape)} in the model"
        for key in shared
        if tuple(opened.spec(there[key]).shape) != tuple(base[key].shape)
    ]
    if apart:
        raise list_problems(f"{place}: is of another model", apart)
    tensors: dict[str, Tensor] = {}
    for key in shared:
        spec = opened.spec(there[key])
        stored = opened.read(there[key], 0, spec.num_units)
        tensors[key] = to_tensor(stored, spec, torch.empty(0)).to(base[key].dtype)
    return tensors


def _stored_name(key: str, opened: Checkpoint, base: Mapping[str, Tensor]) -> str:
    """The name under which a file that stores tied weights once, and does not say so, has the tensor."""
    if opened.resolve_alias(key) in opened.specs:
        return key
    twins = (other for other, tensor in base.items() if other in opened.specs and torch.equal(tensor, base[key]))
    return next(twins, key)
