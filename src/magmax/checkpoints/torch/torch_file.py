"""What torch.save writes, read without torch and without running anything: names of tensors, and ranges of each.

A torch file is a zip archive whose entries are not compressed: `data.pkl`, a pickle, and a `data/KEY` for each storage;
or, before torch 1.6, a few pickles one after the other and then each storage, its length before it.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ...errors import MagMaxError
from ..byte_ranges import RangeFile
from ..dtypes import BITS_PER_ELEMENT
from ..foreign_formats import HEAD_BYTES, recognize_bytes
from .safe_unpickler import MAX_PICKLE_BYTES, GlobalName, OpaqueObject, SafeUnpickler, WorkBudget, describe
from .stored_tensors import MAX_FLAGS, TENSOR_CALLS, StorageRef, StoredTensor

TORCH_STORAGE_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "ComplexFloatStorage": "C64", "UntypedStorage": "U8", "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip
"""torch's name of a storage's type -> safetensors' name of its elements' type."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_ARCHIVE_BYTES = 1 << 28
"""Bytes of an archive's list of records that are read at once."""


def is_torch_file(path: Path) -> bool:
    """Return whether a file begins as those that torch.save writes: a zip archive, or a pickle of protocol 2 to 5."""
    with path.open("rb") as file:
        start = file.read(2)
    return start == b"PK" or (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"))


class TorchFile:
    """The object in a torch file, with `StoredTensor` where it has tensors.

    Args:
        file, begin, length: the bytes it takes, which may be a part of a file.
        inert: calls to be kept as records of themselves instead of refused.

    Attributes:
        root: the object.
        is_torchscript: whether torch.jit.save wrote it.
        budget: what is left of the work that reading the file may take.

    Raises:
        MagMaxError: a pickle that calls what is not allowed, a file that is cut or of another format.
    """

    def __init__(self, file: RangeFile, begin: int, length: int, label: str, inert: Iterable[str] = ()) -> None:
        self._file, self._label, self._inert = file, label, inert
        self.budget, self.is_torchscript = WorkBudget(label), False
        self.storage_ranges: dict[str, tuple[int, int]] = {}
        """Storage key -> the byte where it begins and its length in bytes."""
        if begin == 0 and not is_torch_file(file.path):
            words = recognize_bytes(file.read_bytes(0, min(HEAD_BYTES, file.size)))
            if words:
                raise MagMaxError(f"{label}: {words}")
        stream = FileSection(file, begin, length)
        if file.read_bytes(begin, min(2, length)) == b"PK":
            self.root = self._read_zip(stream, begin)
        else:
            self.root = self._read_legacy(stream, begin)

    def locate_tensor(self, tensor: StoredTensor) -> StoredTensor:
        """The tensor with its place in the file. Raises MagMaxError where the file has no such place."""
        if problem := self.find_problem(tensor):
            raise MagMaxError(f"{self._label}: a tensor {tensor.spec} {problem}")
        return replace(tensor, file=self._file, storage_begin=self.storage_ranges[tensor.storage.key][0])

    def find_problem(self, tensor: StoredTensor) -> str | None:
        """Why a tensor cannot be read from the file, if it cannot."""
        begin, length = self.storage_ranges.get(tensor.storage.key, (0, -1))
        problem = tensor.find_problem()
        if length < 0:
            problem = f"lies in storage {tensor.storage.key}, which is missing"
        elif problem is None and length < tensor.storage.numel * BITS_PER_ELEMENT[tensor.storage.dtype] // 8:
            problem = f"lies in storage {tensor.storage.key}, which has {length:,} bytes, too few"
        elif begin + length > self._file.size:
            problem = f"lies in storage {tensor.storage.key}, which goes beyond the end of the file"
        return problem and f"{problem}; copy or download it again"

    def _read_zip(self, stream: FileSection, begin: int) -> Any:
        try:
            with zipfile.ZipFile(cast("Any", stream)) as archive:
                self.budget.spend(len(archive.infolist()))
                entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                if "data.pkl" not in entries:
                    raise self._error("is a zip archive, but not of torch (it has no data.pkl)")
                if len(entries) < len(archive.infolist()):
                    raise self._error("has two records of one name")
                self.is_torchscript = "constants.pkl" in entries
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
        if not header.startswith(b"PK\x03\x04"):
            raise self._error(f"has no record {info.filename} where it says; copy or download it again")
        at = begin + info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        return at + int.from_bytes(header[28:30], "little"), info.file_size

    def _read_legacy(self, stream: FileSection, begin: int) -> Any:
        reader = io.BufferedReader(stream)
        first = SafeUnpickler(reader, self._label, {}, budget=self.budget).load()
        if first != LEGACY_MAGIC:
            raise self._error("is a pickle, but not of torch")
        _version, system = (SafeUnpickler(reader, self._label, {}, budget=self.budget).load() for _ in range(2))
        if not isinstance(system, dict) or cast("dict[str, Any]", system).get("little_endian") is not True:
            raise self._error("was written on a big-endian machine, which is not supported")
        sizes: dict[str, int] = {}
        root = self._unpickler(reader, sizes).load()
        keys = SafeUnpickler(reader, self._label, {}, budget=self.budget).load()
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
            parts = list(cast("tuple[Any, ...]", identity)) if isinstance(identity, tuple) else []
            if not 2 <= len(parts) <= MAX_FLAGS:
                raise self._error(f"names a storage by {describe(identity)}")
            if parts[0] == "module":
                return parts[1]
            _, kind, key, _, elements, *view = parts
            name = kind.name.rpartition(".")[2] if isinstance(kind, GlobalName) else ""
            if name.endswith("Storage") and name not in TORCH_STORAGE_DTYPES:
                return OpaqueObject(f"torch.{name}")  # the tensors in it are reported by their names
            if name not in TORCH_STORAGE_DTYPES or any(part is not None for part in view):
                raise self._error(f"holds a storage of kind {describe(kind)}, which cannot be read")
            if type(key) not in (str, int) or type(elements) is not int:
                raise self._error(f"holds a storage with the key {describe(key)} and a length of {describe(elements)}")
            storage = StorageRef(str(key), TORCH_STORAGE_DTYPES[name], elements)
            if sizes is not None:
                sizes[storage.key] = BITS_PER_ELEMENT[storage.dtype] // 8
            return storage

        return SafeUnpickler(stream, self._label, TENSOR_CALLS, self._inert, persistent, self.budget)

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
        if len(buffer) > MAX_ARCHIVE_BYTES:
            raise OSError(f"a part of {len(buffer):,} bytes, more than any checkpoint has")
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._file.read_into(view, self._begin + self._position)
        self._position += len(view)
        return len(view)
