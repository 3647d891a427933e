"""Safetensors outputs that appear all at once: written beside their final name, then renamed."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import MagMaxError, UnfinishedError
from .dtypes import BITS_PER_ELEMENT, TensorSpec
from .journal import fdatasync
from .output_paths import (
    OutputPath,
    delete_output,
    describe_foreign,
    find_foreign,
    find_place_problems,
    has_one_name,
    kind_of,
    open_own,
    sync_folder,
    write_contents,
    write_new_file,
)
from .safetensors import HEADER_LIMIT, RESERVED_NAME

DEFAULT_SHARD_BYTES = 5_000_000_000
PROVENANCE_FILE = "provenance.json"
READ_BYTES = 1 << 20
INDEX_SUFFIX = ".safetensors.index.json"


class ShardFile:
    """One file being filled: its header first, then any range of any tensor, in any order, from any thread."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: dict[str, str], prefix: str = "") -> None:
        """Describe a file; the names of its tensors are those in `specs` without the prefix."""
        self.path, self.specs, self.prefix = path, dict(specs), prefix
        if RESERVED_NAME in self.specs:
            raise MagMaxError(
                f"{path.name}: a tensor cannot be called {RESERVED_NAME} in a safetensors file; give it another name"
            )
        self._header_bytes = _build_header(self.specs, metadata, prefix)
        if len(self._header_bytes) - 8 > HEADER_LIMIT:
            raise MagMaxError(
                f"{path.name}: its header would take {len(self._header_bytes) - 8:,} bytes, and safetensors allows "
                f"{HEADER_LIMIT:,}; give the base less metadata, or write a folder with more shards"
            )
        self._offsets: dict[str, int] = {}
        at = len(self._header_bytes)
        for key, spec in self.specs.items():
            self._offsets[key], at = at, at + spec.nbytes
        self.size = at
        self._fd = -1

    def is_intact(self) -> bool:
        """Return whether the file on disk is this shard, begun earlier, and no other name leads to it."""
        try:
            with open(self.path, "rb") as file:
                same = file.read(len(self._header_bytes)) == self._header_bytes
                return same and os.fstat(file.fileno()).st_size == self.size and has_one_name(self.path)
        except OSError:
            return False

    def open(self, fresh: bool) -> None:
        self._fd = open_own(self.path, os.O_CREAT | os.O_EXCL if fresh else 0)
        if fresh:
            self._write_at(memoryview(self._header_bytes), 0)
            os.ftruncate(self._fd, self.size)

    def write(self, key: str, start: int, raw: NDArray[Any]) -> None:
        flat = np.ascontiguousarray(raw).view(np.uint8).data
        self._write_at(flat, self._offsets[key] + start * raw.dtype.itemsize)

    def sync(self) -> None:
        fdatasync(self._fd)

    def finalize(self, metadata: dict[str, str]) -> None:
        """Put the final metadata into the place its draft reserved, and wait for the disk."""
        header = _build_header(self.specs, metadata, self.prefix)
        if len(header) != len(self._header_bytes):
            raise AssertionError("the final metadata must fill exactly the place reserved for it")
        self._write_at(memoryview(header), 0)
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "path": self.path.absolute(), "_fd": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process the file on disk is opened, to be filled by both, until nobody needs this any more."""
        self.__dict__.update(state)
        self.open(fresh=False)
        weakref.finalize(self, os.close, self._fd)

    def _write_at(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count


class OutputDraft:
    """An output not yet visible under its name; `publish` makes it so in one step."""

    def __init__(
        self,
        output: OutputPath,
        specs: Mapping[str, TensorSpec],
        metadata: dict[str, str],
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        stem: str = "model",
        modules: Sequence[str] = (),
    ) -> None:
        self.output, self._stem = output, stem
        self.specs = dict(sorted(specs.items(), key=lambda item: (-BITS_PER_ELEMENT[item[1].dtype], item[0])))
        self._shards: list[ShardFile] = []
        self._sharded: list[str] = []
        """The folders whose weights are in several files, so that they need an index."""
        for prefix, keys in _split_modules(self.specs, modules if output.is_folder else ()).items():
            specs = {key: self.specs[key] for key in keys}
            groups = _group_into_shards(specs, shard_bytes) if output.is_folder else [keys]
            self._sharded += [prefix] * (len(groups) > 1)
            self._shards += [
                ShardFile(self._shard_path(prefix, n, len(groups)), {k: specs[k] for k in group}, metadata, prefix)
                for n, group in enumerate(groups, start=1)
            ]
        self._shard_of = {key: shard for shard in self._shards for key in shard.specs}

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self._shards)

    def is_intact(self) -> bool:
        return all(shard.is_intact() for shard in self._shards)

    def open(self, fresh: bool) -> None:
        """Create the files, or with fresh=False take up those of an interrupted run."""
        if fresh:
            delete_output(self.output.partial_path)
            if self.output.is_folder:
                self.output.partial_path.mkdir()
                write_contents(self.output.partial_path, self._shard_names())
                for shard in self._shards:
                    shard.path.parent.mkdir(exist_ok=True)
        for shard in self._shards:
            shard.open(fresh)

    def write(self, key: str, start: int, raw: NDArray[Any]) -> None:
        self._shard_of[key].write(key, start, raw)

    def sync(self) -> None:
        for shard in self._shards:
            shard.sync()

    def file_digests(self) -> dict[str, str]:
        """Return the xxh3-128 of each file of weights, by its name."""
        return {shard.path.name: file_digest(shard.path) for shard in self._shards}

    def publish(self, metadata: dict[str, str], extra_files: Mapping[str, bytes | Path]) -> None:
        """Seal every shard, add the files that belong beside them, and rename the whole into place."""
        partial, path = self.output.partial_path, self.output.path
        _refuse(find_place_problems(path, "folder" if self.output.is_folder else "file"))
        if self.output.is_folder:
            _refuse(describe_foreign(path, find_foreign(path)))
        for shard in self._shards:
            shard.finalize(metadata)
            shard.close()
        if not self.output.is_folder:
            os.replace(partial, path)
            sync_folder(path.parent)
            return
        indexes = {
            f"{prefix}{self._stem_in(prefix)}{INDEX_SUFFIX}": self._index_json(prefix) for prefix in self._sharded
        }
        extra_files = {**extra_files, **indexes}
        write_contents(partial, [*extra_files, *self._shard_names()])
        for name, content in extra_files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            delete_output(partial / name)  # an earlier try to publish may have ended here
            write_new_file(partial / name, content)
        for folder in {partial / name for name in extra_files}:
            sync_folder(folder.parent)
        sync_folder(partial)
        self._replace_folder(partial, path)

    def _replace_folder(self, partial: Path, path: Path) -> None:
        """Put the finished folder in the place of the old one, unless something was added to that."""
        if kind_of(path):
            os.rename(path, self.output.replaced)
            # Only now does nobody find the old folder by its name any more, so that nothing can be added unseen.
            if foreign := find_foreign(self.output.replaced):
                os.rename(self.output.replaced, path)
                _refuse(describe_foreign(path, foreign))
        os.rename(partial, path)
        sync_folder(path.parent)
        sync_folder(self.output.working_folder)
        delete_output(self.output.replaced)

    def close(self) -> None:
        for shard in self._shards:
            shard.close()

    def discard(self) -> None:
        self.close()
        delete_output(self.output.partial_path)

    def _shard_names(self) -> list[str]:
        return [str(shard.path.relative_to(self.output.partial_path)) for shard in self._shards]

    def _stem_in(self, prefix: str) -> str:
        return "model" if prefix else self._stem

    def _shard_path(self, prefix: str, number: int, count: int) -> Path:
        if not self.output.is_folder:
            return self.output.partial_path
        part = "" if count == 1 else f"-{number:05}-of-{count:05}"
        return self.output.partial_path / f"{prefix}{self._stem_in(prefix)}{part}.safetensors"

    def _index_json(self, prefix: str) -> bytes:
        placed = {k: s for k, s in sorted(self._shard_of.items()) if s.prefix == prefix}
        where = {key.removeprefix(prefix): shard.path.name for key, shard in placed.items()}
        total = sum(self.specs[key].nbytes for key in placed)
        return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2).encode() + b"\n"


def _split_modules(keys: Iterable[str], modules: Sequence[str]) -> dict[str, list[str]]:
    """The tensor names by the module that they begin with, in whose folder they are written; "" for the others."""
    parts: dict[str, list[str]] = {}
    for key in keys:
        parts.setdefault(next((module for module in modules if key.startswith(module)), ""), []).append(key)
    return parts or {"": []}


def file_digest(path: Path) -> str:
    """Return the xxh3-128 of a file."""
    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            total.update(piece)
    return total.hexdigest()


def _refuse(problems: list[str]) -> None:
    """Raise UnfinishedError for what came into the output's place while it was made: what is done can be kept."""
    if problems:
        raise UnfinishedError(f"{problems[0]}; then run the same command again")


def _build_header(specs: Mapping[str, TensorSpec], metadata: dict[str, str], prefix: str = "") -> bytes:
    """A safetensors header for tensors laid out in the order of `specs`, padded to a multiple of 8 bytes."""
    if prefix:  # of the names in the metadata, which tell of tied tensors, too
        metadata = {k.removeprefix(prefix): v.removeprefix(prefix) for k, v in metadata.items()}
    entries: dict[str, object] = {RESERVED_NAME: metadata} if metadata else {}
    at = 0
    for key, spec in specs.items():
        entries[key.removeprefix(prefix)] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _group_into_shards(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    """Tensor names grouped so that each group takes at most `limit` bytes, or is a single tensor."""
    groups: list[list[str]] = [[]]
    room = limit
    for key, spec in specs.items():
        if groups[-1] and spec.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(key)
        room -= spec.nbytes
    return groups
