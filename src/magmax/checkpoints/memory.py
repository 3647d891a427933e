"""State dicts and modules, in memory or mapped from a `.pt` or `.bin` file."""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import MagMaxError, list_problems, missing_extra
from .base import Checkpoint
from .dtypes import STORAGE_DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch

TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
    "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""numpy's or torch's name of a type -> safetensors' name."""


class StateDict(Checkpoint):
    """A mapping of names to numpy arrays or torch tensors; tensors that share storage are read once."""

    def __init__(self, tensors: Mapping[str, Any], label: str, path: Path | None = None) -> None:
        super().__init__(label, {})
        self.path = path
        self._tensors: dict[str, Any] = {}
        seen: dict[tuple[Any, ...], str] = {}
        problems: list[str] = []
        for key, tensor in tensors.items():
            try:
                spec = spec_of(tensor)
                if type(key) is not str:
                    raise TypeError("is not a string, as a tensor's name must be")
            except TypeError as error:
                problems.append(f"{label}: {key} {error}")
                continue
            place = _memory_key(tensor)
            if place is not None and place in seen:
                self.aliases[key] = seen[place]
                continue
            if place is not None:
                seen[place] = key
            self.specs[key], self._tensors[key] = spec, tensor
        if problems:
            raise list_problems(f"{label} is not a state dict", problems)

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        spec = self.specs[key]
        tensor = self._tensors[key]
        if isinstance(tensor, np.ndarray):
            flat = np.ascontiguousarray(cast("NDArray[Any]", tensor)).reshape(-1)
            return flat.view(spec.storage_dtype)[start:stop].copy()
        return _read_torch(tensor, spec, start, stop)

    def files(self) -> list[Path]:
        return [] if self.path is None else [self.path]

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the file is opened again."""
        if self.path is None:
            raise MagMaxError(
                f"{self.label}: is in memory, where other processes cannot read it; save it to a file, or take a "
                "ThreadPoolExecutor"
            )
        return open_state_dict_file, (self.path.absolute(), self.label)


def unwrapped(module: Any) -> Any:
    """The module inside those that torch.compile and DataParallel put around it, which change its tensors' names."""
    while True:
        kind: type[Any] = type(module)  # pyright: ignore[reportUnknownVariableType]
        if kind.__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif kind.__module__.startswith("torch.nn.parallel") and hasattr(module, "module"):
            module = module.module
        else:
            return module


def spec_of(tensor: Any) -> TensorSpec:
    """The spec of an array or tensor. Raises TypeError, saying what it is, for anything else."""
    if not hasattr(tensor, "dtype") or not hasattr(tensor, "shape"):
        raise TypeError(f"is a {type(tensor).__name__}, not a tensor")
    if getattr(tensor, "is_meta", False):
        raise TypeError("is on the meta device and has no values; load the model's weights first")
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in TORCH_DTYPES or getattr(tensor, "is_sparse", False):
        raise TypeError(f"has type {tensor.dtype}, which cannot be stored")
    return TensorSpec(TORCH_DTYPES[name], tuple(int(n) for n in tensor.shape))


def _memory_key(tensor: Any) -> tuple[Any, ...] | None:
    """Return where in memory a torch tensor lies; equal places are tied tensors."""
    if not tensor.nbytes:
        return None
    if hasattr(tensor, "__array_interface__"):
        return tensor.__array_interface__["data"][0], tuple(tensor.shape), tensor.strides, str(tensor.dtype)
    view = tensor.is_conj(), tensor.is_neg()
    return str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype), view


def _read_torch(tensor: torch.Tensor, spec: TensorSpec, start: int, stop: int) -> NDArray[Any]:
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)  # a lazy view's values are not those it stores
    if spec.dtype == "BF16":
        return flat[start:stop].cpu().view(torch.uint16).numpy().copy()
    if spec.is_mergeable:
        return flat[start:stop].cpu().numpy().copy()
    return flat.cpu().contiguous().view(torch.uint8).numpy()[start:stop].copy()


def open_state_dict_file(path: Path, label: str) -> StateDict:
    """A `.pt`, `.pth` or `.bin` state dict, mapped from disk; never runs code stored in the file."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise missing_extra(f"{label}: reading {path.suffix} files needs torch", "torch") from error
    try:
        loaded: Any = _torch_load(torch, path)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), "")
        raise MagMaxError(
            f"{label}: this pickle needs code to be run, which is refused ({reason.strip()[:200] or 'weights_only'}). "
            f"Convert it once, which runs nothing of it: magmax checkpoint convert {path} --out "
            f"{path.with_suffix('.safetensors').name}"
        ) from error
    except Exception as error:
        raise MagMaxError(
            f"{label}: cannot be read as a torch file ({_first_line(error)}); is it truncated?"
        ) from error
    nested = cast("Mapping[str, Any]", loaded).get("state_dict") if isinstance(loaded, Mapping) else None
    if isinstance(nested, Mapping):
        loaded = cast("Mapping[str, Any]", nested)
    if not isinstance(loaded, Mapping):
        raise MagMaxError(f"{label}: holds a {type(loaded).__name__}, not a state dict of named tensors")
    tensors = cast("Mapping[str, Any]", loaded)
    if not _has_all_tensors(path, tensors):
        raise MagMaxError(f"{label}: holds no tensors of the lengths that it promises; it is corrupt: copy it again")
    return StateDict(tensors, label, path)


def _has_all_tensors(path: Path, tensors: Mapping[str, Any]) -> bool:
    """Return whether every storage has the length of a record of the archive: torch does not look where it maps a
    file.
    """
    if not zipfile.is_zipfile(path):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            records = Counter(record.file_size for record in archive.infolist() if "/data/" in record.filename)
            for record in archive.infolist():
                archive.open(record).close()  # looks at the record's own header, not at its content
    except Exception:  # whatever zipfile makes of a damaged list of records, which torch did not look at
        return False
    storages = [tensor.untyped_storage() for tensor in tensors.values() if hasattr(tensor, "untyped_storage")]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    return not Counter(sizes.values()) - records


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _torch_load(torch: Any, path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def to_tensor(raw: NDArray[Any], spec: TensorSpec, like: Any) -> Any:
    """Stored units as an array or tensor of the kind, type and device of `like`."""
    if isinstance(like, np.ndarray):
        if spec.dtype == "BF16":
            raise MagMaxError("numpy has no bfloat16; give torch tensors, or choose another dtype")
        kind = cast("np.dtype[Any]", raw.dtype if spec.dtype in STORAGE_DTYPES else like.dtype)
        return raw.view(kind).reshape(spec.shape)
    import torch

    wanted = {name: key for key, name in TORCH_DTYPES.items()}[spec.dtype]
    if not spec.numel:
        return torch.empty(spec.shape, dtype=getattr(torch, wanted), device=like.device)
    flat: torch.Tensor = torch.from_numpy(raw)  # pyright: ignore[reportUnknownMemberType]
    return flat.view(getattr(torch, wanted)).reshape(spec.shape).to(like.device)
