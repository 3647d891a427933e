"""A model's weights in one safetensors file: written at once and whole, or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...checkpoints.output_paths import delete_output, kind_of, replace_file
from ...errors import MagMaxError

MADE_FROM = "made_from"
"""The metadata key under which a file says what it was made from."""
TRAINING_FILES = re.compile(r"(theta|step|penalty)_\d+\.safetensors|(costs|memory)\.json")
"""The names of what a training writes."""


def save_weights(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the model's state dict; a kill leaves the old file or none."""
    write_tensors(model.state_dict(), path, metadata)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors to a safetensors file; a kill, or a disk that is full, leaves the old file or none."""
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_bytes(save(ready, metadata=dict(metadata or {})), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Writes a file at once and whole. Raises MagMaxError where it cannot be written; the old file is then there."""
    replace_file(path, content, "the same command goes on from here")


def delete_training(folder: Path) -> None:
    """Deletes the checkpoints of a training, and its folder if nothing else is in it.

    Raises MagMaxError, and deletes nothing, where a file's name is taken by something else, such as a link.
    """
    ours = [path for path in folder.iterdir() if TRAINING_FILES.fullmatch(path.name)] if folder.is_dir() else []
    if strange := [path for path in ours if kind_of(path) != "file"]:
        raise MagMaxError(f"{strange[0]}: is a {kind_of(strange[0])}, which magmax did not make; move it")
    for path in ours:
        delete_output(path)
    with suppress(OSError):  # what others put there stays
        folder.rmdir()


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
