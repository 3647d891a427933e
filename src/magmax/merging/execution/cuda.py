"""Merging on an accelerator: blocks go there as they are stored, are merged by the same rules, and come back as stored.

Every thread has a stream of its own and copies through pinned memory, so that while one thread's block is merged,
others are on the way. What a rule asks before it merges, the processor counts.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...checkpoints.dtypes import FLOAT_DTYPES, STORAGE_DTYPES, compute_dtype
from ...errors import MagMaxError
from ..kernel import MergeKernel
from ..pipeline import InputBlock
from ..reader import BlockReader, is_finite

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
COMPUTE_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}

CPU = torch.device("cpu")

_thread_local = threading.local()


def device_named(name: str) -> torch.device:
    """The device. Raises MagMaxError where there is none of that name."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MagMaxError(f"there is no device {name!r}; give cuda, or cuda:1 for the second, or cpu") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise MagMaxError(f"merging on {name!r} is not supported; give cuda, or cuda:1 for the second, or cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        there = f"{count} such devices" if count else "no such device"
        raise MagMaxError(f"{name}: torch {torch.__version__} finds {there} here; leave it out to use the processors")
    return device


@contextmanager
def device_stream(device: torch.device) -> Generator[None]:
    """This thread's own stream of the device; of the processor, nothing."""
    if device.type == "cpu":
        yield
        return
    streams: dict[torch.device, Any] = _thread_local.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(streams[device]):
        yield


def to_device(stored: NDArray[Any], dtype: str, device: torch.device) -> torch.Tensor:
    """Stored units as a tensor of that type on the device; on the processor they share memory."""
    units = torch.as_tensor(stored.view(np.int16) if dtype == "BF16" else stored).view(TORCH_DTYPES[dtype])
    return units if device.type == "cpu" else units.pin_memory().to(device, non_blocking=True)


def from_device(values: torch.Tensor, dtype: str) -> NDArray[Any]:
    """A tensor of that type as stored units."""
    if values.device.type != "cpu":
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        torch.cuda.current_stream(values.device).synchronize()
        values = host
    return (values.view(torch.int16) if dtype == "BF16" else values).numpy().view(STORAGE_DTYPES[dtype])


@dataclass(frozen=True)
class DeviceReader(BlockReader):
    """Blocks as tensors on a device."""

    device: torch.device = CPU

    def widen(self, block: InputBlock, number: int, stored: NDArray[Any]) -> Any:
        """Units of input `number` as numbers, on the device."""
        values = to_device(stored, block.spec(number).dtype, self.device)
        if block.fixed is not None or not (self._is_unchecked(number) or bool(torch.isfinite(values).all())):
            numbers = super().widen(block, number, stored)
            return to_device(numbers, FLOAT_DTYPES[numbers.dtype.name], self.device)
        return values.to(COMPUTE_DTYPES[compute_dtype(block.spec(0).dtype)])


@dataclass(frozen=True)
class DeviceKernel(MergeKernel):
    """A merge's kernel whose rule works on a device, with its statistics collected already."""

    device: torch.device = CPU

    @classmethod
    def of(cls, kernel: MergeKernel, device: torch.device) -> DeviceKernel:
        values = {field.name: getattr(kernel, field.name) for field in fields(kernel)}
        reader = kernel.reader
        values["reader"] = DeviceReader(reader.inputs, reader.allow_nonfinite, reader.finiteness_checked, device)
        return cls(**values, device=device)

    def __call__(self, block: InputBlock) -> list[NDArray[Any]]:
        with device_stream(self.device):
            return super().__call__(block)

    def scale(self, block: InputBlock, base: Any, merged: Any) -> NDArray[Any]:
        """base + scaling_factor * merged, rounded as on the processor, in stored units."""
        merged *= torch.tensor(self.factors[block.key], dtype=merged.dtype, device=merged.device)
        merged += base
        merged = self.clip_variance(block, merged)
        dtype = self.out[block.key].dtype
        wide = {torch.float32: "F32", torch.float64: "F64"}[merged.dtype]
        if wide == "F64" or self.reader.allow_nonfinite:  # rounded once, and NaN as numpy writes it
            return self._narrow(block, from_device(merged, wide))
        stored = from_device(merged.to(TORCH_DTYPES[dtype]), dtype)
        return stored if is_finite(stored, dtype) else self._narrow(block, from_device(merged, wide))


def on_device(kernel: Any, name: str) -> tuple[Any, str]:
    """The kernel at work on a device, and what a user should hear of it; what can only be done here is left here."""
    device = device_named(name)
    if not isinstance(kernel, MergeKernel):
        return kernel, f"this work is done by the processors alone, not on {name}"
    if hindrances := kernel.rule.cpu_only_parts:
        return kernel, f"{' and '.join(hindrances)}: merged by the processors alone, not on {name}"
    return DeviceKernel.of(kernel, device), ""
