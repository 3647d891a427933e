"""Files of tensors: open any kind, read any range, write atomically. Knows nothing of merging."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import urlsplit

from ..errors import MagMaxError
from .base import HUB_PREFIX, Checkpoint, WeightLayout
from .dtypes import TensorSpec
from .folder import (
    DEFAULT_ADAPTER,
    INDEX_NAME,
    PICKLE_SUFFIXES,
    find_adapter,
    find_shard,
    is_weight_file,
    list_files,
    open_folder,
    open_index,
    open_remote,
    shorten,
)
from .foreign_formats import recognize_file, recognize_folder
from .lora.adapted_model import LoraModel, split_base_and_adapter
from .lora.peft import ADAPTER_CONFIG, WEIGHT_FILES, PeftAdapter, refuse_lora_file
from .memory import StateDict, module_state, unwrapped
from .quantized import refuse_quantized
from .remote.hub import locate_model, looks_like_hub_id
from .remote.urls import display_url, is_url
from .safetensors import SafetensorsFile
from .torch.dcp import DistributedCheckpoint, find_dcp
from .torch.pickled_models import TorchStateDict, convert_command
from .torch.torch_file import is_torch_file

__all__ = ["Checkpoint", "TensorSpec", "open_adapter", "open_checkpoint"]


def open_checkpoint(
    source: Any, label: str | None = None, base: Checkpoint | None = None, *, mergeable: bool = True
) -> Checkpoint:
    """Open a path, a state dict or a module as a `Checkpoint`; only headers are read.

    Args:
        source: a `.safetensors` file; a folder with (sharded) safetensors or `.bin` files; a `.pt`, `.pth` or `.bin`
            state dict; a folder of torch.distributed.checkpoint, or a part of one, FOLDER/PART; the folder of a PEFT
            LoRA adapter, or BASE+ADAPTER; in a string, the id of a model on the Hugging Face hub in place of each, or
            the URL (s3://, gs://, https://, ...) of a `.safetensors` file or of a folder with an index; a
            mapping of names to tensors or arrays; an object with `state_dict()`; a `Checkpoint`.
        label: what messages call it; a path's own text by default.
        base: what an adapter is applied to where the source does not say it.
        mergeable: refuse what cannot be merged: quantised checkpoints, and one shard of several.

    Raises:
        MagMaxError: nothing there, a file that is corrupt, a pickle that needs code, another kind of object, a
            quantised checkpoint, a part of a model.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, str | PathLike):
        text = source if isinstance(source, str) else os.path.join(os.curdir, fspath(cast("PathLike[str]", source)))
        try:
            opened = _open_source(text, label or fspath(source), base, mergeable)
            opened.fingerprints()  # from now on, a change is noticed
            return opened
        except OSError as error:
            raise MagMaxError(f"{label or fspath(source)}: cannot be read: {error.strerror}") from error
    if isinstance(source, Mapping):
        opened = StateDict(cast("Mapping[str, Any]", source), label or "the state dict")
    elif hasattr(source, "state_dict"):
        opened = StateDict(
            module_state(unwrapped(source), label or type(source).__name__), label or type(source).__name__
        )
    else:
        kind = type(source).__name__
        raise MagMaxError(f"cannot read a checkpoint from {kind}; give a path, a state dict or a module")
    refuse_quantized(opened)
    return opened


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
        found = _find_adapter_folder(path, label)
        if found is None:
            raise MagMaxError(f"{label}: is not the folder of a LoRA adapter (it has no {ADAPTER_CONFIG})")
        adapter = PeftAdapter(found[0], label)
        adapter.notes += found[1]
        adapter.fingerprints()
        return adapter
    except OSError as error:
        raise MagMaxError(f"{label}: cannot be read: {error.strerror}") from error


def _open_source(text: str, label: str, base: Checkpoint | None, mergeable: bool = True) -> Checkpoint:
    if halves := split_base_and_adapter(text):
        _reject_remote_adapter(halves[1])
        start, adapter = _open_source(halves[0], halves[0], None), locate_model(halves[1])
        if adapter.path.is_file():
            refuse_lora_file(_open_path(adapter.path, adapter.label, None))
            raise MagMaxError(f"{adapter.label}: is not the folder of a LoRA adapter; give the folder that PEFT saved")
        opened = _open_adapted(adapter.path, start, label) or LoraModel(adapter.path, start, label)
        origins = start.origin or Path(halves[0]).name, adapter.origin or adapter.path.name
        opened.origin = "+".join(origins) if start.origin or adapter.origin else ""
        return opened
    if is_url(text):
        opened = open_remote(text, display_url(text) if label == text else label)
        name = PurePosixPath(urlsplit(text).path).name
    else:
        located = locate_model(text)
        opened = _open_path(located.path, located.label if label == text else label, base)
        opened.origin, name = located.origin, located.path.name
    if mergeable:
        refuse_lora_file(opened)
        refuse_quantized(opened)
        if (shard := find_shard(name)) and is_weight_file(name):
            raise MagMaxError(
                f"{opened.label}: is shard {shard[0]} of {shard[1]} of a model; name the folder with all of them and "
                "their index"
            )
    return opened


def _open_adapted(path: Path, base: Checkpoint | None, label: str) -> LoraModel | None:
    """Open the folder of an adapter, applied to the base; None for another kind of folder."""
    found = _find_adapter_folder(path, label)
    if found is None:
        return None
    if base is None:
        raise MagMaxError(f"{label}: is an adapter, which is a model only with its base: write BASE+{label}")
    opened = LoraModel(found[0], base, label)
    opened.notes += found[1]
    return opened


def _find_adapter_folder(path: Path, label: str) -> tuple[Path, list[str]] | None:
    """Return where in a folder PEFT's LoRA adapter is, in it or in `default`, and what to say; None if it has none."""
    for folder in (path, path / DEFAULT_ADAPTER):
        if (folder / ADAPTER_CONFIG).is_file():
            names = [name for name in list_files(folder) if not _is_value_head(folder / name)]
            weights = [name for name in list_files(folder) if is_weight_file(name)]
            found = find_adapter(names, f"{label}: the folder")
            if weights and not found:
                return None
            others = [name for name in weights if name not in WEIGHT_FILES]
            notes = [f"{label}: left out, since it is no part of the adapter: {shorten(others)}"] if others else []
            return folder, notes
        if path.is_dir() and any(map(is_weight_file, list_files(path))):
            return None
    return None


def _is_value_head(file: Path) -> bool:
    """Return whether a file is what TRL saves of a value head under the name of a whole model."""
    if file.name != "pytorch_model.bin":
        return False
    try:
        return all(key.startswith("v_head.") for key in TorchStateDict(file, file.name).specs)
    except MagMaxError:
        return False


def _reject_remote_adapter(text: str) -> None:
    if is_url(text):
        raise MagMaxError(f"{display_url(text)}: adapters are not read from another machine; download the folder first")


def _open_path(path: Path, label: str, base: Checkpoint | None) -> Checkpoint:
    if path.is_dir() and (adapted := _open_adapted(path, base, label)):
        return adapted
    if dcp := find_dcp(path):
        return DistributedCheckpoint(dcp[0], label, dcp[1])
    if path.is_dir():
        try:
            return open_folder(path, label)
        except MagMaxError as error:
            if words := recognize_folder(path):
                raise MagMaxError(f"{label}: {words}") from error
            raise
    if not path.exists():
        hint = f"; for the model of the hub: {HUB_PREFIX}{label}" if looks_like_hub_id(label) else ""
        raise MagMaxError(f"{label}: there is no such file or folder{hint}")
    if INDEX_NAME.fullmatch(path.name):
        return open_index(path, label)
    if path.suffix == ".safetensors":
        opened: Checkpoint = SafetensorsFile(path, label)
    elif path.suffix in PICKLE_SUFFIXES:
        opened = TorchStateDict(path, label)
    elif words := recognize_file(path):
        raise MagMaxError(f"{label}: {_explain_torch_file(path) or words}")
    else:
        kind = path.suffix or repr(path.name)
        raise MagMaxError(f"{label}: expected a folder, or a .safetensors, .pt, .pth or .bin file, not {kind}")
    opened.layout = WeightLayout.of_file(path.name)
    return opened


def _explain_torch_file(path: Path) -> str | None:
    """Return how to read what torch.save wrote under another name, as .ckpt, .pth.tar or .pkl."""
    if not is_torch_file(path):
        return None
    command = convert_command(path)
    return f"was written by torch.save under a name that is not read as it is; convert it once: {command}"
