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
from ..dtypes import BITS, Spec
from ..memory import TORCH_NAMES
from .safe_unpickler import Calls, Global, Machine, told

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "ComplexFloatStorage": "C64", "UntypedStorage": "U8", "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip
"""torch's name of a storage's type -> safetensors' name of its elements' type."""

UNITS = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
"""What holds an element of so many bytes, whatever it means."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LARGEST_PICKLE = 1 << 30
GATHERED = 1 << 16
"""Elements of a strided tensor that are looked up at once."""


class Storage(NamedTuple):
    """A flat run of elements, as a pickle names it; `place` says later where it lies."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file: a view, by offset and strides in elements, of a storage that begins at byte `begin`.

    `dtype` is a key of `BITS`; `file` and `begin` are known once the whole of the torch file has been read.
    `lazy` says that the values are those of the storage conjugated or negated, which torch does when it loads them.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    lazy: bool = False
    file: RangeFile | None = None
    begin: int = 0

    @property
    def spec(self) -> Spec:
        return Spec(self.dtype, self.shape)

    @property
    def place(self) -> tuple[Any, ...]:
        """What is equal for tensors that are one and the same memory."""
        return self.storage.key, self.dtype, self.offset, self.shape, self.strides, self.lazy

    def elements(self, start: int, stop: int) -> NDArray[Any]:
        """Elements start..stop of the flattened tensor, as unsigned integers of their size."""
        if self.file is None:
            raise AssertionError("a tensor is read after its file is laid out")
        unit = UNITS[BITS[self.dtype] // 8]
        if self.strides == _dense(self.shape):
            return self._run(self.file, unit, self.offset + start, self.offset + stop)
        found = np.empty(stop - start, unit)
        for at in range(start, stop, GATHERED):
            end = min(at + GATHERED, stop)
            where = self._indices(at, end)
            low, high = int(where.min()), int(where.max()) + 1
            if high - low <= 4 * GATHERED:
                found[at - start : end - start] = self._run(self.file, unit, low, high)[where - low]
            else:
                whole = np.memmap(self.file.path, unit, "r", self.begin, (self.storage_elements,))
                found[at - start : end - start] = whole[where]
        return found

    @property
    def storage_elements(self) -> int:
        """The length of the storage in elements of the tensor's own type."""
        return self.storage.elements * BITS[self.storage.dtype] // BITS[self.dtype]

    def units(self, start: int, stop: int) -> NDArray[Any]:
        """Units start..stop of the flattened tensor, as `Checkpoint.read` gives them."""
        if self.spec.floating:
            return self.elements(start, stop).view(self.spec.storage)
        size = BITS[self.dtype] // 8
        first = start // size
        return self.elements(first, -(-stop // size)).view(np.uint8)[start - first * size : stop - first * size]

    def problem(self) -> str | None:
        """Why the tensor cannot be what it claims, if it cannot."""
        if len(self.shape) != len(self.strides) or min((*self.shape, *self.strides, self.offset), default=0) < 0:
            return "has a shape, strides or an offset that cannot be"
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and last >= self.storage_elements:
            return f"reaches beyond its storage of {self.storage_elements:,} elements"
        return None

    def _run(self, file: RangeFile, unit: np.dtype[Any], start: int, stop: int) -> NDArray[Any]:
        found = np.empty(stop - start, unit)
        file.fill(found.view(np.uint8).data, self.begin + start * unit.itemsize)
        return found

    def _indices(self, start: int, stop: int) -> NDArray[Any]:
        """Where elements start..stop of the flattened tensor lie in the storage."""
        places = np.unravel_index(np.arange(start, stop), self.shape)
        found = np.full(stop - start, self.offset)
        for place, stride in zip(places, self.strides, strict=True):
            found += place * stride
        return found


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def _tensor(
    storage: Any, offset: int, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None, flags: Any = None
) -> Stored:
    if not isinstance(storage, Storage):
        raise TypeError("a tensor of no storage")
    if not isinstance(flags, dict | None):
        raise TypeError(f"a tensor with flags that are {told(flags)}")
    set_flags = cast("dict[Any, Any]", flags or {})
    lazy = any(value is not False for value in set_flags.values())
    return Stored(storage, storage.dtype, int(offset), _lengths(shape), _lengths(strides), lazy)


def _typed_tensor(
    storage: Any, offset: int, shape: Any, strides: Any, _grad: Any, _hooks: Any, kind: Any, flags: Any = None
) -> Stored:
    return replace(_tensor(storage, offset, shape, strides, flags=flags), dtype=dtype_of(kind))


def _same(tensor: Any, *_: Any) -> Any:
    return tensor


def _subclassed(function: Any, _kind: Any, args: tuple[Any, ...], _state: Any) -> Any:
    if not isinstance(function, Global) or function.name not in TENSORS:
        raise TypeError(f"a tensor made by {told(function)}")
    return TENSORS[function.name](*args)


def _lengths(given: Any) -> tuple[int, ...]:
    if any(type(n) is not int for n in given):
        raise TypeError("a shape that is not of whole numbers")
    return tuple(given)


TENSORS: Calls = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _subclassed,
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
}
"""Calls that stand for a tensor."""


def dtype_of(kind: Any) -> str:
    """safetensors' name of a type that a pickle names as torch's."""
    name = kind.name.removeprefix("torch.") if isinstance(kind, Global) else ""
    if name not in TORCH_NAMES:
        raise ValueError(f"tensors of type {name or told(kind)}, which cannot be stored")
    return TORCH_NAMES[name]


class TorchFile:
    """The object in a torch file, with `Stored` where it has tensors.

    Args:
        file, begin, length: the bytes it takes, which may be a part of a file.
        inert: calls to be kept as records of themselves instead of refused.

    Raises:
        MagMaxError: a pickle that calls what is not allowed, a file that is cut or of another format.
    """

    def __init__(self, file: RangeFile, begin: int, length: int, label: str, inert: Iterable[str] = ()) -> None:
        self._file, self._label, self._inert = file, label, inert
        self.places: dict[str, tuple[int, int]] = {}
        """Storage key -> the byte where it begins and its length in bytes."""
        stream = Section(file, begin, length)
        if file.bytes(begin, min(2, length)) == b"PK":
            self.root = self._zipped(stream, begin)
        else:
            self.root = self._legacy(stream, begin)

    def laid_out(self, tensor: Stored) -> Stored:
        """The tensor with its place in the file. Raises MagMaxError where the file has no such place."""
        if tensor.lazy:
            raise MagMaxError(
                f"{self._label}: a tensor {tensor.spec} is a conjugated or negated view, whose values are not those "
                "stored; save it again after resolve_conj().resolve_neg()"
            )
        begin, length = self.places.get(tensor.storage.key, (0, -1))
        problem = tensor.problem()
        if length < 0:
            problem = f"lies in storage {tensor.storage.key}, which is missing"
        elif length < tensor.storage.elements * BITS[tensor.storage.dtype] // 8:
            problem = f"lies in storage {tensor.storage.key}, which has {length:,} bytes, too few"
        if problem:
            raise MagMaxError(f"{self._label}: a tensor {tensor.spec} {problem}; copy or download it again")
        return replace(tensor, file=self._file, begin=begin)

    def _zipped(self, stream: Section, begin: int) -> Any:
        try:
            with zipfile.ZipFile(cast("Any", stream)) as archive:
                entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                if "data.pkl" not in entries:
                    raise self._bad("is a zip archive, but not of torch (it has no data.pkl)")
                if "byteorder" in entries and self._record(archive, entries["byteorder"], 6) != b"little":
                    raise self._bad("was written on a big-endian machine, which is not supported")
                pickled = self._record(archive, entries["data.pkl"], LARGEST_PICKLE)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            if isinstance(error, MagMaxError):
                raise
            raise self._bad(f"cannot be read as a torch file ({error}); is it truncated?") from error
        for name, info in entries.items():
            if name.startswith("data/"):
                self.places[name.removeprefix("data/")] = self._entry(info, begin)
        return self._machine(io.BytesIO(pickled)).run()

    def _record(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
        """The content of an entry, which cannot take more memory than it has bytes in the file."""
        self._refuse_compressed(info)
        if info.file_size > most:
            raise self._bad(f"has a record {info.filename} of {info.file_size:,} bytes, where {most:,} are the most")
        return archive.read(info)

    def _refuse_compressed(self, info: zipfile.ZipInfo) -> None:
        if info.compress_type != zipfile.ZIP_STORED:
            raise self._bad(f"holds {info.filename} compressed, as torch never does")

    def _entry(self, info: zipfile.ZipInfo, begin: int) -> tuple[int, int]:
        """Where an entry's bytes lie: after its local header, whose length only the header itself tells."""
        self._refuse_compressed(info)
        header = self._file.bytes(begin + info.header_offset, 30)
        at = begin + info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        return at + int.from_bytes(header[28:30], "little"), info.file_size

    def _legacy(self, stream: Section, begin: int) -> Any:
        reader = io.BufferedReader(stream)
        first = Machine(reader, self._label, {}).run()
        if first != LEGACY_MAGIC:
            raise self._bad("is a pickle, but not of torch")
        _version, system = (Machine(reader, self._label, {}).run() for _ in range(2))
        if not isinstance(system, dict) or cast("dict[str, Any]", system).get("little_endian") is not True:
            raise self._bad("was written on a big-endian machine, which is not supported")
        sizes: dict[str, int] = {}
        root = self._machine(reader, sizes).run()
        keys = Machine(reader, self._label, {}).run()
        for key in cast("list[Any]", keys) if isinstance(keys, list) else [keys]:
            if type(key) is not str or key not in sizes:
                raise self._bad(f"holds a storage {key if type(key) is str else told(key)} that nothing names")
            count = int.from_bytes(reader.read(8), "little")
            self.places[key] = begin + reader.tell(), count * sizes[key]
            if sum(self.places[key]) > self._file.size:
                raise self._bad("ends before its last tensor; copy or download it again")
            reader.seek(count * sizes[key], io.SEEK_CUR)
        return root

    def _machine(self, stream: Any, sizes: dict[str, int] | None = None) -> Machine:
        def persistent(identity: Any) -> Any:
            """ "storage", type, key, device, elements; the legacy format also has "module", class, file, source."""
            if identity[0] == "module":
                return identity[1]
            _, kind, key, _, elements, *view = identity
            name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
            if name not in STORAGES or any(part is not None for part in view):
                raise self._bad(f"holds a storage of kind {told(kind)}, which cannot be read")
            if type(key) not in (str, int) or type(elements) is not int:
                raise self._bad(f"holds a storage with the key {told(key)} and a length of {told(elements)}")
            storage = Storage(str(key), STORAGES[name], int(elements))
            if sizes is not None:
                sizes[storage.key] = BITS[storage.dtype] // 8
            return storage

        return Machine(stream, self._label, TENSORS, self._inert, persistent)

    def _bad(self, what: str) -> MagMaxError:
        return MagMaxError(f"{self._label}: the file {what}")


class Section(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: RangeFile, begin: int, length: int) -> None:
        super().__init__()
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise OSError("a place before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.fill(view, self._begin + self._at)
        self._at += len(view)
        return len(view)
