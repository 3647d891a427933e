"""Safetensors files, read by range: the header is checked in full before any tensor is. And the index of shards."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import MagMaxError, list_problems
from .base import Checkpoint, read_small
from .byte_ranges import RangeFile
from .dtypes import BITS_PER_ELEMENT, TensorSpec
from .foreign_formats import HEAD_BYTES, recognize_bytes
from .remote.remote_file import RemoteFile

HEADER_LIMIT = 100_000_000
LENGTH_LIMIT = 2**63
MAX_DIMENSIONS = 64
RESERVED_NAME = "__metadata__"
"""The entry of a header that is no tensor."""


class SafetensorsFile(Checkpoint):
    """One `.safetensors` file. Raises MagMaxError for a header that is malformed or lies about the file."""

    def __init__(self, source: Path | RemoteFile, label: str | None = None) -> None:
        super().__init__(label or str(source), {})
        if isinstance(source, RemoteFile):
            self.url, self._file = source.url, source
        else:
            self.path, self._file = source, RangeFile(source, self.label)
            self._stamps[str(source)] = self._file.stamp  # taken before the header is read
        self._size = self._file.size
        header = self._read_header()
        self._header_digest = xxhash.xxh3_128_hexdigest(header)
        self._data_start = 8 + len(header)
        self._offsets: dict[str, int] = {}
        self._read_entries(self._parse_header(header))

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        storage = self.specs[key].storage_dtype
        out = np.empty(stop - start, storage)
        self._file.read_into(out.view(np.uint8).data, self._offsets[key] + start * storage.itemsize, key)
        return out

    def prefetch(self, key: str, start: int, stop: int) -> int:
        return self._file.prefetch(*self._byte_range(key, start, stop)) if isinstance(self._file, RemoteFile) else 0

    def release_prefetched(self, key: str, start: int, stop: int) -> int:
        return (
            self._file.release_prefetched(*self._byte_range(key, start, stop))
            if isinstance(self._file, RemoteFile)
            else 0
        )

    def _byte_range(self, key: str, start: int, stop: int) -> tuple[int, int]:
        """The bytes of the file that hold these units, as far as the tensor has them."""
        spec = self.specs[key]
        size, stop = spec.storage_dtype.itemsize, min(stop, spec.num_units)
        return self._offsets[key] + min(start, stop) * size, self._offsets[key] + stop * size

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        if isinstance(self._file, RemoteFile):
            return {self.url: [*(self._file.read_stamp() if refresh else self._file.stamp), self._header_digest]}
        return super().fingerprints(refresh)

    def files(self) -> list[Path]:
        return [] if self.path is None else [self.path]

    def header_digests(self) -> list[str]:
        return [self._header_digest]

    def _read_header(self) -> bytes:
        if self._size < 8:
            raise self._error(f"has {self._size} bytes, too few for a safetensors file")
        prefix = bytearray(8)
        self._file.read_into(memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if 8 + length > self._size:
            head = bytearray(min(HEAD_BYTES, self._size))
            self._file.read_into(memoryview(head), 0)
            if words := recognize_bytes(bytes(head)):
                raise MagMaxError(f"{self.label}: {words}")
            raise self._error(
                f"promises a header of {length:,} bytes, but the file has {self._size:,}; "
                "it is truncated or not a safetensors file"
            )
        if length > HEADER_LIMIT:
            raise self._error(
                f"has a header of {length:,} bytes, and safetensors allows {HEADER_LIMIT:,}; "
                "save it as several files, or with less metadata"
            )
        header = bytearray(length)
        self._file.read_into(memoryview(header), 8)
        return bytes(header)

    def _parse_header(self, header: bytes) -> dict[str, Any]:
        try:
            parsed: Any = json.loads(header.decode(), object_pairs_hook=self._check_unique)
        except MagMaxError:
            raise
        except (ValueError, RecursionError) as error:
            raise self._error(f"has a header that is not JSON ({error}); it is corrupt") from error
        if not isinstance(parsed, dict):
            raise self._error("has a header that is not a JSON object")
        return cast("dict[str, Any]", parsed)

    def _check_unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise self._error(f"names {twice} twice in its header; save it again, with each name once")
        "".join([*entries, *(v for v in entries.values() if isinstance(v, str))]).encode()  # fails on lone surrogates
        return entries

    def _read_entries(self, header: dict[str, Any]) -> None:
        """Fill specs and offsets, refusing any entry that does not describe its own bytes exactly."""
        metadata: Any = header.pop(RESERVED_NAME, None)
        metadata = {} if metadata is None else metadata
        if not is_string_map(metadata):
            raise self._error("has __metadata__ that is not a map of strings")
        self.metadata = metadata
        room = self._size - self._data_start
        ends: list[tuple[int, int, str]] = []
        for key, entry in header.items():
            spec, begin, end = self._parse_entry(key, entry)
            if not 0 <= begin <= end <= room:
                raise self._error(
                    f"places {key} at bytes {begin:,} to {end:,}, but holds {room:,} bytes of data; "
                    "it is truncated or corrupt: copy or download it again"
                )
            if end - begin != spec.nbytes:
                raise self._error(f"gives {key} {end - begin:,} bytes, but {spec} takes {spec.nbytes:,}")
            self.specs[key], self._offsets[key] = spec, self._data_start + begin
            ends.append((begin, end, key))
        self._check_contiguous(sorted(ends), room)
        self.aliases = {k: v for k, v in metadata.items() if v in self.specs and k not in self.specs}

    def _parse_entry(self, key: str, entry: Any) -> tuple[TensorSpec, int, int]:
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise self._error(f"describes {key} without a dtype, a shape and two data_offsets") from error
        lengths = cast("list[int]", shape) if isinstance(shape, list) else [-1]
        whole = len(lengths) <= MAX_DIMENSIONS and all(
            type(n) is int and 0 <= n < LENGTH_LIMIT for n in (*lengths, begin, end)
        )
        if not whole or not isinstance(dtype, str):
            shown = reprlib.repr(cast("object", entry))
            raise self._error(f"describes {key} by a dtype, a shape or offsets that cannot be: {shown}")
        if dtype not in BITS_PER_ELEMENT:
            raise self._error(f"stores {key} as {dtype}, a type this version does not know")
        spec = TensorSpec(dtype, tuple(lengths))
        if spec.numel >= LENGTH_LIMIT:
            raise self._error(f"describes {key} with more elements than any file can hold")
        if spec.numel * BITS_PER_ELEMENT[dtype] % 8:
            raise self._error(f"describes {key} as {spec}, which does not end at a whole byte")
        return spec, begin, end

    def _check_contiguous(self, ends: list[tuple[int, int, str]], data_bytes: int) -> None:
        at = 0
        for begin, end, key in ends:
            if begin != at:
                word = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
                raise self._error(f"places {key} at byte {begin:,}, which {word}")
            at = end
        if at != data_bytes:
            raise self._error(f"holds {data_bytes - at:,} bytes after its last tensor; it is corrupt")

    def _error(self, problem: str) -> MagMaxError:
        return MagMaxError(f"{self.label}: the file {problem}")


def is_string_map(value: Any) -> TypeGuard[dict[str, str]]:
    """Return whether parsed JSON is an object whose values are all strings."""
    return isinstance(value, dict) and all(type(v) is str for v in cast("dict[str, Any]", value).values())


def parse_weight_map(text: str, index: str) -> dict[str, str]:
    """Tensor name -> file name, from the text of an index. Raises MagMaxError where it is none."""
    try:
        where: Any = json.loads(text)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MagMaxError(f"{index}: is not an index with a weight_map ({error})") from error
    if not is_string_map(where) or not where:
        raise MagMaxError(f"{index}: its weight_map is not a map of tensor names to file names")
    return where


def check_index_names(index: str, names: Sequence[str]) -> None:
    """Raise MagMaxError where an index names files that are not beside it."""
    problems = [f"{index}: names the file {n!r}, which is outside the folder" for n in names if Path(n).name != n]
    if problems:
        raise list_problems(f"{index} cannot be followed", problems)


def refuse_wrong_index(index: str, weight_map: Mapping[str, str], files: Mapping[str, Checkpoint]) -> None:
    """Raise MagMaxError where the files of an index do not hold what it says."""
    problems = [
        f"{index}: places {key} in {name}, which does not hold it"
        for key, name in weight_map.items()
        if key not in files[name].specs and key not in files[name].aliases
    ]
    if problems:
        raise list_problems(f"{index} does not match its files", problems)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says. Raises MagMaxError where it is none."""
    try:
        return parse_weight_map(read_small(index).decode(), str(index))
    except (OSError, ValueError) as error:
        if isinstance(error, MagMaxError):
            raise
        raise MagMaxError(f"{index}: is not an index with a weight_map ({error})") from error
