"""Files of tensors: open any kind, read any range, write atomically. Knows nothing of merging."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

from ..errors import MagMaxError
from .base import HUB_PREFIX, Checkpoint
from .dtypes import TensorSpec
from .folder import PICKLE_SUFFIXES, open_folder, open_remote
from .lora.adapted_model import LoraModel, is_adapter_folder, split_base_and_adapter
from .lora.peft import ADAPTER_CONFIG, PeftAdapter
from .memory import StateDict, module_state, open_state_dict_file
from .remote.hub import locate_model, looks_like_hub_id
from .remote.urls import display_url, is_url
from .safetensors import SafetensorsFile
from .torch.dcp import DistributedCheckpoint, find_dcp

__all__ = ["Checkpoint", "TensorSpec", "open_adapter", "open_checkpoint"]


def open_checkpoint(source: Any, label: str | None = None, base: Checkpoint | None = None) -> Checkpoint:
    """Open a path, a state dict or a module as a `Checkpoint`; only headers are read.

    Args:
        source: a `.safetensors` file; a folder with (sharded) safetensors or `.bin` files; a `.pt`, `.pth` or `.bin`
            state dict; a folder of torch.distributed.checkpoint, or a part of one, FOLDER/PART; the folder of a PEFT
            LoRA adapter, or BASE+ADAPTER; in a string, the id of a model on the Hugging Face hub in place of each, or
            the URL (s3://, gs://, https://, ...) of a `.safetensors` file or of a folder with an index; a
            mapping of names to tensors or arrays; an object with `state_dict()`; a `Checkpoint`.
        label: what messages call it; a path's own text by default.
        base: what an adapter is applied to where the source does not say it.

    Raises:
        MagMaxError: nothing there, a file that is corrupt, a pickle that needs code, another kind of object.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, str | PathLike):
        text = source if isinstance(source, str) else os.path.join(os.curdir, fspath(cast("PathLike[str]", source)))
        try:
            return _open_source(text, label or fspath(source), base)
        except OSError as error:
            raise MagMaxError(f"{label or fspath(source)}: cannot be read: {error.strerror}") from error
    if isinstance(source, Mapping):
        return StateDict(cast("Mapping[str, Any]", source), label or "the state dict")
    if hasattr(source, "state_dict"):
        return StateDict(module_state(source, label or type(source).__name__), label or type(source).__name__)
    raise MagMaxError(f"cannot read a checkpoint from {type(source).__name__}; give a path, a state dict or a module")


def open_adapter(source: str | PathLike[str], label: str | None = None) -> PeftAdapter:
    """Open the folder of a PEFT LoRA adapter, or its id on the hub, without its base; only headers are read.

    Raises:
        MagMaxError: no folder of an adapter, or an adapter of another kind.
    """
    text = fspath(source)
    label = label or text
    if halves := split_base_and_adapter(text):
        raise MagMaxError(f"{label}: the base has no part in this; give the adapter alone: {halves[1]}")
    _reject_remote_adapter(text)
    path = locate_model(text).path
    try:
        if not path.exists():
            raise MagMaxError(f"{label}: there is no such folder")
        if not (path / ADAPTER_CONFIG).is_file():
            raise MagMaxError(f"{label}: is not the folder of a LoRA adapter (it has no {ADAPTER_CONFIG})")
        return PeftAdapter(path, label)
    except OSError as error:
        raise MagMaxError(f"{label}: cannot be read: {error.strerror}") from error


def _open_source(text: str, label: str, base: Checkpoint | None) -> Checkpoint:
    if halves := split_base_and_adapter(text):
        _reject_remote_adapter(halves[1])
        start, adapter = _open_source(halves[0], halves[0], None), locate_model(halves[1])
        opened = LoraModel(adapter.path, start, label)
        origins = start.origin or Path(halves[0]).name, adapter.origin or adapter.path.name
        opened.origin = "+".join(origins) if start.origin or adapter.origin else ""
        return opened
    if is_url(text):
        return open_remote(text, display_url(text) if label == text else label)
    located = locate_model(text)
    opened = _open_path(located.path, located.label if label == text else label, base)
    opened.origin = located.origin
    return opened


def _reject_remote_adapter(text: str) -> None:
    if is_url(text):
        raise MagMaxError(f"{display_url(text)}: adapters are not read from another machine; download the folder first")


def _open_path(path: Path, label: str, base: Checkpoint | None) -> Checkpoint:
    if path.is_dir() and is_adapter_folder(path):
        if base is None:
            raise MagMaxError(f"{label}: is an adapter, which is a model only with its base: write BASE+{label}")
        return LoraModel(path, base, label)
    if dcp := find_dcp(path):
        return DistributedCheckpoint(dcp[0], label, dcp[1])
    if path.is_dir():
        return open_folder(path, label)
    if not path.exists():
        hint = f"; for the model of the hub: {HUB_PREFIX}{label}" if looks_like_hub_id(label) else ""
        raise MagMaxError(f"{label}: there is no such file or folder{hint}")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path, label)
    if path.suffix in PICKLE_SUFFIXES:
        return open_state_dict_file(path, label)
    raise MagMaxError(
        f"{label}: expected a folder, or a .safetensors, .pt, .pth or .bin file, not {path.suffix or path.name!r}"
    )
