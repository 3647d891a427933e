"""A model's weights in one safetensors file: written at once and whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...errors import MagMaxError

MADE_FROM = "made_from"
"""The metadata key under which a file says what it was made from."""


def save_weights(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the model's state dict; a kill leaves the old file or none."""
    write_tensors(model.state_dict(), path, metadata)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors to a safetensors file; a kill, or a disk that is full, leaves the old file or none."""
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_bytes(save(ready, metadata=dict(metadata or {})), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Writes a file at once and whole. Raises MagMaxError where it cannot be written; the old file is then there."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        reason = f"{error.strerror} ({len(content):,} bytes)"
        raise MagMaxError(f"{path}: cannot be written: {reason}; the same command goes on from here") from error
    finally:
        partial.unlink(missing_ok=True)


def load_weights(model: nn.Module, path: Path) -> None:
    """Copies the file's tensors into the model. Raises MagMaxError where their names or shapes differ."""
    try:
        model.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError, OSError) as error:
        kind = type(model).__name__
        raise MagMaxError(f"{path} does not hold the weights of this {kind}: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return what was written beside the weights; empty where there is no readable file."""
    try:
        with safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}
