"""What torch.save writes, read without torch and without running anything: names of tensors, and ranges of each.

A torch file is a zip archive whose entries are not compressed: `data.pkl`, a pickle, and a `data/KEY` for each storage;
or, before torch 1.6, a few pickles one after the other and then each storage, its length before it.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import MagMaxError
from ..byte_ranges import RangeFile
from ..dtypes import BITS_PER_ELEMENT, TensorSpec
from ..memory import TORCH_DTYPES
from .safe_unpickler import CallTable, GlobalName, SafeUnpickler, describe

TORCH_STORAGE_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "ComplexFloatStorage": "C64", "UntypedStorage": "U8", "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip
"""torch's name of a storage's type -> safetensors' name of its elements' type."""

UNSIGNED_DTYPES = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
"""What holds an element of so many bytes, whatever it means."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_PICKLE_BYTES = 1 << 30
GATHER_ELEMENTS = 1 << 16
"""Elements of a strided tensor that are looked up at once."""


class StorageRef(NamedTuple):
    """A flat run of elements, as a pickle names it; `place` says later where it lies."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file: a view, by offset and strides in elements, of a storage that begins at byte `storage_begin`.

    `dtype` is a key of `BITS_PER_ELEMENT`; `file` and `storage_begin` are known once the whole of the torch file has
    been read.
    `is_lazy_view` says that the values are those of the storage conjugated or negated, which torch does when it loads
    them.
    """

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_lazy_view: bool = False
    file: RangeFile | None = None
    storage_begin: int = 0

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def memory_key(self) -> tuple[Any, ...]:
        """Return what is equal for tensors that are one and the same memory."""
        return self.storage.key, self.dtype, self.offset, self.shape, self.strides, self.is_lazy_view

    def read_elements(self, start: int, stop: int) -> NDArray[Any]:
        """Elements start..stop of the flattened tensor, as unsigned integers of their size."""
        if self.file is None:
            raise AssertionError("a tensor is read after its file is laid out")
        unit = UNSIGNED_DTYPES[BITS_PER_ELEMENT[self.dtype] // 8]
        if self.strides == _contiguous_strides(self.shape):
            return self._read_contiguous(self.file, unit, self.offset + start, self.offset + stop)
        elements = np.empty(stop - start, unit)
        for at in range(start, stop, GATHER_ELEMENTS):
            end = min(at + GATHER_ELEMENTS, stop)
            where = self._storage_indices(at, end)
            low, high = int(where.min()), int(where.max()) + 1
            if high - low <= 4 * GATHER_ELEMENTS:
                elements[at - start : end - start] = self._read_contiguous(self.file, unit, low, high)[where - low]
            else:
                whole = np.memmap(self.file.path, unit, "r", self.storage_begin, (self.storage_numel,))
                elements[at - start : end - start] = whole[where]
        return elements

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
        if len(self.shape) != len(self.strides) or min((*self.shape, *self.strides, self.offset), default=0) < 0:
            return "has a shape, strides or an offset that cannot be"
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
) -> StoredTensor:
    if not isinstance(storage, StorageRef):
        raise TypeError("a tensor of no storage")
    if not isinstance(flags, dict | None):
        raise TypeError(f"a tensor with flags that are {describe(flags)}")
    set_flags = cast("dict[Any, Any]", flags or {})
    lazy = any(value is not False for value in set_flags.values())
    return StoredTensor(storage, storage.dtype, int(offset), _check_lengths(shape), _check_lengths(strides), lazy)


def _rebuild_typed_tensor(
    storage: Any, offset: int, shape: Any, strides: Any, _grad: Any, _hooks: Any, kind: Any, flags: Any = None
) -> StoredTensor:
    return replace(_rebuild_tensor(storage, offset, shape, strides, flags=flags), dtype=dtype_of(kind))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_subclass(function: Any, _kind: Any, args: tuple[Any, ...], _state: Any) -> Any:
    if not isinstance(function, GlobalName) or function.name not in TENSOR_CALLS:
        raise TypeError(f"a tensor made by {describe(function)}")
    return TENSOR_CALLS[function.name](*args)


def _check_lengths(values: Any) -> tuple[int, ...]:
    if any(type(n) is not int for n in values):
        raise TypeError("a shape that is not of whole numbers")
    return tuple(values)


TENSOR_CALLS: CallTable = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
}
"""Calls that stand for a tensor."""


def dtype_of(kind: Any) -> str:
    """safetensors' name of a type that a pickle names as torch's."""
    name = kind.name.removeprefix("torch.") if isinstance(kind, GlobalName) else ""
    if name not in TORCH_DTYPES:
        raise ValueError(f"tensors of type {name or describe(kind)}, which cannot be stored")
    return TORCH_DTYPES[name]


class TorchFile:
    """The object in a torch file, with `StoredTensor` where it has tensors.

    Args:
        file, begin, length: the bytes it takes, which may be a part of a file.
        inert: calls to be kept as records of themselves instead of refused.

    Raises:
        MagMaxError: a pickle that calls what is not allowed, a file that is cut or of another format.
    """

    def __init__(self, file: RangeFile, begin: int, length: int, label: str, inert: Iterable[str] = ()) -> None:
        self._file, self._label, self._inert = file, label, inert
        self.storage_ranges: dict[str, tuple[int, int]] = {}
        """Storage key -> the byte where it begins and its length in bytes."""
        stream = FileSection(file, begin, length)
        if file.read_bytes(begin, min(2, length)) == b"PK":
            self.root = self._read_zip(stream, begin)
        else:
            self.root = self._read_legacy(stream, begin)

    def locate_tensor(self, tensor: StoredTensor) -> StoredTensor:
        """The tensor with its place in the file. Raises MagMaxError where the file has no such place."""
        if tensor.is_lazy_view:
            raise MagMaxError(
                f"{self._label}: a tensor {tensor.spec} is a conjugated or negated view, whose values are not those "
                "stored; save it again after resolve_conj().resolve_neg()"
            )
        begin, length = self.storage_ranges.get(tensor.storage.key, (0, -1))
        problem = tensor.find_problem()
        if length < 0:
            problem = f"lies in storage {tensor.storage.key}, which is missing"
        elif length < tensor.storage.numel * BITS_PER_ELEMENT[tensor.storage.dtype] // 8:
            problem = f"lies in storage {tensor.storage.key}, which has {length:,} bytes, too few"
        if problem:
            raise MagMaxError(f"{self._label}: a tensor {tensor.spec} {problem}; copy or download it again")
        return replace(tensor, file=self._file, storage_begin=begin)

    def _read_zip(self, stream: FileSection, begin: int) -> Any:
        try:
            with zipfile.ZipFile(cast("Any", stream)) as archive:
                entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                if "data.pkl" not in entries:
                    raise self._error("is a zip archive, but not of torch (it has no data.pkl)")
                if "byteorder" in entries and self._read_entry(archive, entries["byteorder"], 6) != b"little":
                    raise self._error("was written on a big-endian machine, which is not supported")
                pickled = self._read_entry(archive, entries["data.pkl"], MAX_PICKLE_BYTES)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            if isinstance(error, MagMaxError):
                raise
            raise self._error(f"cannot be read as a torch file ({error}); is it truncated?") from error
        for name, info in entries.items():
            if name.startswith("data/"):
                self.storage_ranges[name.removeprefix("data/")] = self._entry_range(info, begin)
        return self._unpickler(io.BytesIO(pickled)).load()

    def _read_entry(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int) -> bytes:
        """The content of an entry, which cannot take more memory than it has bytes in the file."""
        self._check_uncompressed(info)
        if info.file_size > max_bytes:
            raise self._error(
                f"has a record {info.filename} of {info.file_size:,} bytes, where {max_bytes:,} are the most"
            )
        return archive.read(info)

    def _check_uncompressed(self, info: zipfile.ZipInfo) -> None:
        if info.compress_type != zipfile.ZIP_STORED:
            raise self._error(f"holds {info.filename} compressed, as torch never does")

    def _entry_range(self, info: zipfile.ZipInfo, begin: int) -> tuple[int, int]:
        """Return where an entry's bytes lie: after its local header, whose length only the header itself tells."""
        self._check_uncompressed(info)
        header = self._file.read_bytes(begin + info.header_offset, 30)
        at = begin + info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        return at + int.from_bytes(header[28:30], "little"), info.file_size

    def _read_legacy(self, stream: FileSection, begin: int) -> Any:
        reader = io.BufferedReader(stream)
        first = SafeUnpickler(reader, self._label, {}).load()
        if first != LEGACY_MAGIC:
            raise self._error("is a pickle, but not of torch")
        _version, system = (SafeUnpickler(reader, self._label, {}).load() for _ in range(2))
        if not isinstance(system, dict) or cast("dict[str, Any]", system).get("little_endian") is not True:
            raise self._error("was written on a big-endian machine, which is not supported")
        sizes: dict[str, int] = {}
        root = self._unpickler(reader, sizes).load()
        keys = SafeUnpickler(reader, self._label, {}).load()
        for key in cast("list[Any]", keys) if isinstance(keys, list) else [keys]:
            if type(key) is not str or key not in sizes:
                raise self._error(f"holds a storage {key if type(key) is str else describe(key)} that nothing names")
            count = int.from_bytes(reader.read(8), "little")
            self.storage_ranges[key] = begin + reader.tell(), count * sizes[key]
            if sum(self.storage_ranges[key]) > self._file.size:
                raise self._error("ends before its last tensor; copy or download it again")
            reader.seek(count * sizes[key], io.SEEK_CUR)
        return root

    def _unpickler(self, stream: Any, sizes: dict[str, int] | None = None) -> SafeUnpickler:
        def persistent(identity: Any) -> Any:
            """ "storage", type, key, device, elements; the legacy format also has "module", class, file, source."""
            if identity[0] == "module":
                return identity[1]
            _, kind, key, _, elements, *view = identity
            name = kind.name.rpartition(".")[2] if isinstance(kind, GlobalName) else ""
            if name not in TORCH_STORAGE_DTYPES or any(part is not None for part in view):
                raise self._error(f"holds a storage of kind {describe(kind)}, which cannot be read")
            if type(key) not in (str, int) or type(elements) is not int:
                raise self._error(f"holds a storage with the key {describe(key)} and a length of {describe(elements)}")
            storage = StorageRef(str(key), TORCH_STORAGE_DTYPES[name], int(elements))
            if sizes is not None:
                sizes[storage.key] = BITS_PER_ELEMENT[storage.dtype] // 8
            return storage

        return SafeUnpickler(stream, self._label, TENSOR_CALLS, self._inert, persistent)

    def _error(self, problem: str) -> MagMaxError:
        return MagMaxError(f"{self._label}: the file {problem}")


class FileSection(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: RangeFile, begin: int, length: int) -> None:
        super().__init__()
        self._file, self._begin, self._length, self._position = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._position, self._length)[whence]
        if at < 0:
            raise OSError("a place before the beginning")
        self._position = at
        return at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._file.read_into(view, self._begin + self._position)
        self._position += len(view)
        return len(view)
