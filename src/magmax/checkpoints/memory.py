"""State dicts and modules in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import MagMaxError, list_problems
from .base import Checkpoint, find_name_problem
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

    def __init__(self, tensors: Mapping[str, Any], label: str) -> None:
        super().__init__(label, {})
        self._tensors: dict[str, Any] = {}
        seen: dict[tuple[Any, ...], str] = {}
        problems: list[str] = []
        for key, tensor in tensors.items():
            try:
                spec = spec_of(tensor)
                if type(key) is not str:
                    raise TypeError("is not a string, as a tensor's name must be")
                if problem := find_name_problem(key):
                    raise TypeError(problem)
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
        return []

    def __reduce__(self) -> tuple[Any, ...]:
        raise MagMaxError(
            f"{self.label}: is in memory, where other processes cannot read it; save it to a file, or take a "
            "ThreadPoolExecutor"
        )


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


def module_state(module: Any, label: str) -> Mapping[str, Any]:
    """The state dict of a module; of a PeftModel, that of a copy with the adapter merged into the weights."""
    if not hasattr(module, "peft_config") or not hasattr(module, "get_base_model"):
        state: Mapping[str, Any] = module.state_dict()
        if any(".lora_A." in key for key in state) and any(".base_layer." in key for key in state):
            raise MagMaxError(
                f"{label}: holds LoRA layers that PEFT has put into it; take them out with its unload(), or "
                "load the model again"
            )
        return state
    try:
        return copy.deepcopy(module).merge_and_unload().state_dict()
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise MagMaxError(f"{label}: PEFT cannot merge this adapter into its model: {error}") from error
