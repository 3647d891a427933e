"""A model's weights in one safetensors file: written at once and whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from magmax.errors import MagMaxError


def save_weights(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the model's state dict; a kill leaves the old file or none."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(save(tensors, metadata=dict(metadata or {})))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_weights(model: nn.Module, path: Path) -> None:
    """Copies the file's tensors into the model. Raises MagMaxError where their names or shapes differ."""
    try:
        model.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        kind = type(model).__name__
        raise MagMaxError(f"{path} does not hold the weights of this {kind}: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What was written beside the weights; empty where there is no readable file."""
    try:
        with safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}
