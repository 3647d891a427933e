"""Safetensors outputs that appear all at once: written beside their final name, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MagMaxError
from .dtypes import BITS_PER_ELEMENT, TensorSpec
from .journal import fdatasync
from .remote.upload import staging_path
from .remote.urls import is_url
from .safetensors import HEADER_LIMIT, RESERVED_NAME

DEFAULT_SHARD_BYTES = 5_000_000_000
PROVENANCE_FILE = "provenance.json"
CONTENTS_FILE = ".magmax-contents"
"""The names of all files of a folder output, by which files added since are told apart."""
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class OutputPath:
    """The path of an output: a `.safetensors` file, or, with any other name, a folder of shards.

    Attributes:
        path: where it is made.
        url: where it is then uploaded to, if it belongs on another machine.
    """

    path: Path
    url: str = ""

    @classmethod
    def parse(cls, out: str | PathLike[str]) -> OutputPath:
        """The target that a path or a URL names."""
        text = fspath(out)
        return cls(staging_path(text), text) if is_url(text) else cls(Path(text))

    @property
    def is_folder(self) -> bool:
        return self.path.suffix != ".safetensors"

    @property
    def partial_path(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    @property
    def journal_path(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    @property
    def replaced(self) -> Path:
        return self.path.with_name(self.path.name + ".magmax-old")

    def find_problems(self, inputs: list[Path]) -> list[str]:
        """Return what forbids writing here, seen without writing: all of it."""
        path = self.path
        if path.name in ("", ".."):
            return [f"{path}: names no new file or folder; give the output a name of its own"]
        problems: list[str] = []
        if not self.url and is_url(str(path).replace(":/", "://", 1)):
            problems.append(f"{path}: is on another machine, and this is written here; name a path")
        if path.suffix in (".pt", ".pth", ".bin"):
            problems.append(f"{path}: only safetensors are written; name a .safetensors file or a folder")
        real, taken = path.resolve(), {p.resolve() for p in inputs}
        if real in taken or (self.is_folder and any(real in p.parents for p in taken)):
            problems.append(f"{path}: is one of the inputs, or holds one; choose another place for the output")
        elif inside := next((p for p in taken if p in real.parents), None):
            problems.append(
                f"{path}: is inside {inside}, which is one of the inputs; choose another place for the output"
            )
        if self.is_folder and path.is_dir() and (strangers := _foreign_files(path)):
            listed = ", ".join(strangers[:5]) + (", ..." if len(strangers) > 5 else "")
            problems.append(
                f"{path}: holds files that magmax did not write ({listed}); move them or choose another folder"
            )
        if self.is_folder != path.is_dir() and path.exists():
            problems.append(f"{path}: is a {'file' if self.is_folder else 'folder'}; choose another name")
        above = nearest_existing_folder(path)
        if not os.access(above, os.W_OK | os.X_OK):
            problems.append(f"{above}: cannot be written to; choose another place for the output")
        return problems


def _foreign_files(folder: Path) -> list[str]:
    """The files in a folder that are not part of an output put there before."""
    listing = folder / CONTENTS_FILE
    ours = {CONTENTS_FILE, *(listing.read_text().splitlines() if listing.is_file() else ())}
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and str(p.relative_to(folder)) not in ours
    )


def nearest_existing_folder(path: Path) -> Path:
    """The deepest folder above `path` that exists."""
    return next(p for p in path.absolute().parents if p.is_dir())


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
        """Return whether the file on disk is this shard, begun earlier."""
        try:
            with open(self.path, "rb") as file:
                same = file.read(len(self._header_bytes)) == self._header_bytes
                return same and os.fstat(file.fileno()).st_size == self.size
        except OSError:
            return False

    def open(self, fresh: bool) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if fresh else 0)
        self._fd = os.open(self.path, flags, 0o666)
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
            remove(self.output.partial_path)
            if self.output.is_folder:
                self.output.partial_path.mkdir()
                for shard in self._shards:
                    shard.path.parent.mkdir(exist_ok=True)
        for shard in self._shards:
            shard.open(fresh)

    def write(self, key: str, start: int, raw: NDArray[Any]) -> None:
        self._shard_of[key].write(key, start, raw)

    def sync(self) -> None:
        for shard in self._shards:
            shard.sync()

    def publish(self, metadata: dict[str, str], extra_files: Mapping[str, bytes | Path]) -> None:
        """Seal every shard, add the files that belong beside them, and rename the whole into place."""
        for shard in self._shards:
            shard.finalize(metadata)
            shard.close()
        partial, path = self.output.partial_path, self.output.path
        if not self.output.is_folder:
            os.replace(partial, path)
            sync_folder(path.parent)
            return
        indexes = {
            f"{prefix}{self._stem_in(prefix)}{INDEX_SUFFIX}": self._index_json(prefix) for prefix in self._sharded
        }
        extra_files = {**extra_files, **indexes}
        names = sorted([*extra_files, *(str(shard.path.relative_to(partial)) for shard in self._shards)])
        extra_files = {**extra_files, CONTENTS_FILE: "".join(f"{name}\n" for name in names).encode()}
        for name, content in extra_files.items():
            _write_file(partial / name, content)
        sync_folder(partial)
        if path.exists():
            remove(self.output.replaced)
            os.rename(path, self.output.replaced)
        os.rename(partial, path)
        sync_folder(path.parent)
        remove(self.output.replaced)

    def close(self) -> None:
        for shard in self._shards:
            shard.close()

    def discard(self) -> None:
        self.close()
        remove(self.output.partial_path)

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


def _write_file(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        if isinstance(content, Path):
            with open(content, "rb") as source:
                shutil.copyfileobj(source, file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    draft = path.with_name(path.name + ".partial")
    try:
        _write_file(draft, content)
        os.replace(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise MagMaxError(
            f"{path}: cannot be written: {error.strerror}; mend that and run the command again"
        ) from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
