"""Tensors in a torch file: which bytes each takes, how a range is read, and the calls of a pickle that make one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ..byte_ranges import RangeFile
from ..dtypes import BITS_PER_ELEMENT, STORAGE_DTYPES, TensorSpec
from ..memory import TORCH_DTYPES
from ..safetensors import LENGTH_LIMIT, MAX_DIMENSIONS
from .safe_unpickler import CallTable, GlobalName, OpaqueObject, describe

UNSIGNED_DTYPES = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
"""What holds an element of so many bytes, whatever it means."""

GATHER_ELEMENTS = 1 << 18
"""Elements of a strided tensor that are looked up at once."""
GATHER_GAP_BYTES = 1 << 12
"""Unneeded bytes between two needed ones that are read too, because another read takes longer."""
MAX_FLAGS = 16


class StorageRef(NamedTuple):
    """A flat run of elements, as a pickle names it; `place` says later where it lies."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, eq=False)
class UnreadableTensor:
    """A tensor of a kind whose values are not simply stored; `problem` says which, and what to save instead."""

    problem: str


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file: a view, by offset and strides in elements, of a storage that begins at byte `storage_begin`.

    `dtype` is a key of `BITS_PER_ELEMENT`; `file` and `storage_begin` are known once the whole of the torch file has
    been read.
    `is_conjugated` and `is_negated` say that the values are those of the storage changed so, as a lazy view of torch's.
    """

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_conjugated: bool = False
    is_negated: bool = False
    file: RangeFile | None = None
    storage_begin: int = 0

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def memory_key(self) -> str:
        """Return what is equal for tensors that are one and the same memory.

        Text, because its hash is random: a file could choose numbers whose hashes collide.
        """
        return repr(
            (self.storage.key, self.dtype, self.offset, self.shape, self.strides, self.is_conjugated, self.is_negated)
        )

    def read_elements(self, start: int, stop: int) -> NDArray[Any]:
        """Elements start..stop of the flattened tensor, as unsigned integers of their size."""
        if self.file is None:
            raise AssertionError("a tensor is read after its file is laid out")
        unit = UNSIGNED_DTYPES[BITS_PER_ELEMENT[self.dtype] // 8]
        if mask := self._sign_mask():
            plain = replace(self, is_conjugated=False, is_negated=False)
            return plain.read_elements(start, stop) ^ unit.type(mask)
        if self.strides == _contiguous_strides(self.shape):
            return self._read_contiguous(self.file, unit, self.offset + start, self.offset + stop)
        elements = np.empty(stop - start, unit)
        for at in range(start, stop, GATHER_ELEMENTS):
            end = min(at + GATHER_ELEMENTS, stop)
            elements[at - start : end - start] = self._gather(self.file, unit, self._storage_indices(at, end))
        return elements

    def _sign_mask(self) -> int:
        """The bits of an element that a lazy view flips: the signs of its imaginary part, or of all of it."""
        bits = BITS_PER_ELEMENT[self.dtype]
        if self.dtype != "C64":
            return (1 << (bits - 1)) * self.is_negated
        imaginary, real = 1 << 63, 1 << 31
        return (imaginary * (self.is_conjugated != self.is_negated)) | (real * self.is_negated)

    def _gather(self, file: RangeFile, unit: np.dtype[Any], where: NDArray[Any]) -> NDArray[Any]:
        """Read elements from anywhere in the storage, those that lie near one another in one go.

        Not through a memory map: a file that is truncated meanwhile would kill the process.
        """
        needed, inverse = np.unique(where, return_inverse=True)
        gaps = np.flatnonzero(np.diff(needed) * unit.itemsize > GATHER_GAP_BYTES) + 1
        values = np.empty(len(needed), unit)
        for first, last in zip([0, *gaps.tolist()], [*gaps.tolist(), len(needed)], strict=True):
            low, high = int(needed[first]), int(needed[last - 1]) + 1
            run = self._read_contiguous(file, unit, low, high)
            values[first:last] = run if high - low == last - first else run[needed[first:last] - low]
        return values[inverse.reshape(-1)]

    @property
    def storage_numel(self) -> int:
        """The length of the storage in elements of the tensor's own type."""
        return self.storage.numel * BITS_PER_ELEMENT[self.storage.dtype] // BITS_PER_ELEMENT[self.dtype]

    def read_units(self, start: int, stop: int) -> NDArray[Any]:
        """Units start..stop of the flattened tensor, as `Checkpoint.read` gives them."""
        if self.spec.is_mergeable:
            return self.read_elements(start, stop).view(self.spec.storage_dtype)
        size = BITS_PER_ELEMENT[self.dtype] // 8
        first = start // size
        return self.read_elements(first, -(-stop // size)).view(np.uint8)[start - first * size : stop - first * size]

    def find_problem(self) -> str | None:
        """Why the tensor cannot be what it claims, if it cannot."""
        numbers = (*self.shape, *self.strides, self.offset, self.storage.numel)
        if len(self.shape) != len(self.strides) or min(numbers) < 0 or max(numbers) >= LENGTH_LIMIT:
            return "has a shape, strides or an offset that cannot be"
        if self.is_negated and self.dtype not in (*STORAGE_DTYPES, "C64"):
            return "is a negated view of whole numbers; save it again after resolve_neg()"
        if self.spec.numel >= LENGTH_LIMIT:
            return "has more elements than any file can hold"
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and last >= self.storage_numel:
            return f"reaches beyond its storage of {self.storage_numel:,} elements"
        return None

    def _read_contiguous(self, file: RangeFile, unit: np.dtype[Any], start: int, stop: int) -> NDArray[Any]:
        elements = np.empty(stop - start, unit)
        file.read_into(elements.view(np.uint8).data, self.storage_begin + start * unit.itemsize)
        return elements

    def _storage_indices(self, start: int, stop: int) -> NDArray[Any]:
        """Return where elements start..stop of the flattened tensor lie in the storage."""
        places = np.unravel_index(np.arange(start, stop), self.shape)
        indices = np.full(stop - start, self.offset)
        for place, stride in zip(places, self.strides, strict=True):
            indices += place * stride
        return indices


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def _rebuild_tensor(
    storage: Any, offset: int, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None, flags: Any = None
) -> StoredTensor | UnreadableTensor:
    if isinstance(storage, OpaqueObject):
        return UnreadableTensor(f"is stored as {storage.name}, which cannot be read; save it as another type")
    if not isinstance(storage, StorageRef):
        raise TypeError("a tensor of no storage")
    set_flags = cast("dict[Any, Any]", flags or {})
    if not isinstance(flags, dict | None) or len(set_flags) > MAX_FLAGS:
        raise TypeError(f"a tensor with flags that are {describe(flags)}")
    conjugated, negated = (set_flags.get(name, False) for name in ("conj", "neg"))
    if type(conjugated) is not bool or type(negated) is not bool or set_flags.keys() - {"conj", "neg"}:
        raise TypeError("a tensor with flags that no tensor has")
    lengths, steps = _check_lengths(shape), _check_lengths(strides)
    return StoredTensor(storage, storage.dtype, int(offset), lengths, steps, conjugated, negated)


def _rebuild_typed_tensor(
    storage: Any, offset: int, shape: Any, strides: Any, _grad: Any, _hooks: Any, kind: Any, flags: Any = None
) -> StoredTensor | UnreadableTensor:
    name = _dtype_name(kind)
    tensor = _rebuild_tensor(storage, offset, shape, strides, flags=flags)
    if name not in TORCH_DTYPES:
        return UnreadableTensor(f"is of type {name or describe(kind)}, which cannot be stored; save it as another type")
    return replace(tensor, dtype=TORCH_DTYPES[name]) if isinstance(tensor, StoredTensor) else tensor


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_subclass(function: Any, kind: Any, args: tuple[Any, ...], _state: Any) -> Any:
    name = function.name if isinstance(function, GlobalName) else ""
    if name == "torch._utils._rebuild_wrapper_subclass":
        if describe(kind).endswith(".DTensor"):
            return UnreadableTensor(
                "is a DTensor, of which this file holds the part of one process; save its full_tensor(), or give the "
                "folder that torch.distributed.checkpoint wrote"
            )
        return UnreadableTensor(f"is a {describe(kind)}, whose values its class computes; save it as a plain tensor")
    if name not in PLAIN_TENSOR_CALLS:
        raise TypeError(f"a tensor made by {describe(function)}")
    return PLAIN_TENSOR_CALLS[name](*args)


def _unreadable(problem: str) -> Callable[..., UnreadableTensor]:
    return lambda *_: UnreadableTensor(problem)


def _check_lengths(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(cast("list[Any]", values)) > MAX_DIMENSIONS:
        raise TypeError(f"a shape that has more than {MAX_DIMENSIONS} dimensions, or none that can be read")
    lengths = tuple(cast("list[Any]", values))
    if any(type(n) is not int for n in lengths):
        raise TypeError("a shape that is not of whole numbers")
    return lengths


_NESTED = "is a nested tensor, which has no one shape; save the tensors in it"
PLAIN_TENSOR_CALLS: CallTable = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed_tensor,
    "torch._utils._rebuild_sparse_tensor": _unreadable("is a sparse tensor; save it again after .to_dense()"),
    "torch._utils._rebuild_qtensor": _unreadable("is a quantised tensor; save it again after .dequantize()"),
    "torch._utils._rebuild_nested_tensor": _unreadable(_NESTED),
    "torch.nested._internal.nested_tensor._rebuild_njt": _unreadable(_NESTED),
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable(
        "is on the meta device and has no values; save it again once the model's weights are loaded"
    ),
}
TENSOR_CALLS: CallTable = {
    **PLAIN_TENSOR_CALLS,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
}
"""Calls that stand for a tensor."""


def _dtype_name(kind: Any) -> str:
    return kind.name.removeprefix("torch.") if isinstance(kind, GlobalName) else ""


def dtype_of(kind: Any) -> str:
    """safetensors' name of a type that a pickle names as torch's."""
    name = _dtype_name(kind)
    if name not in TORCH_DTYPES:
        raise ValueError(f"tensors of type {name or describe(kind)}, which cannot be stored")
    return TORCH_DTYPES[name]
