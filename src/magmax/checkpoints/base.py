"""What every kind of checkpoint can do: name its tensors and read any range of one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import MagMaxError
from .dtypes import TensorSpec

HUB_PREFIX = "hf://"


class Checkpoint(ABC):
    """Named tensors, read in flat ranges; nothing is held in memory beyond their names and shapes.

    Attributes:
        label: what messages call it (its path as given, or a word such as "model 2").
        path: the file or folder on this machine, or None.
        url: where it is on another machine, without anything secret, or "".
        specs: key -> (dtype, shape), in the order of the file.
        aliases: key -> the key in `specs` whose storage it shares (tied weights).
        metadata: the header's own strings.
        notes: what a user should know of how it was read.
        origin: its id on the hub with the commit, as hf://..., or those of base+adapter; "" for what never was there.
        is_task_vector: whether the floating tensors are task vectors, to be added to a base.
    """

    label: str
    path: Path | None = None
    url: str = ""
    specs: dict[str, TensorSpec]
    aliases: dict[str, str]
    metadata: dict[str, str]
    notes: list[str]
    origin: str = ""
    is_task_vector: bool = False

    def __init__(self, label: str, specs: dict[str, TensorSpec]) -> None:
        self.label, self.specs, self.aliases, self.metadata, self.notes = label, specs, {}, {}, []
        self._stamps: dict[str, list[object]] = {}

    @abstractmethod
    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        """Units start..stop of the flattened tensor, in `specs[key].storage`; the caller may overwrite them."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Every file on this machine that the tensors and their names come from."""

    @property
    def source(self) -> str:
        """Return what a name for it is made from: where it was downloaded from, its path, or its label."""
        last = self.origin.rpartition("+")[2]
        return last if last.startswith(HUB_PREFIX) else str(self.path or self.url or self.label)

    @property
    def is_on_disk(self) -> bool:
        """Return whether it is in files, here or elsewhere, and not in memory."""
        return self.path is not None or bool(self.url)

    @property
    def remote_bytes(self) -> int:
        """Return how many of its bytes come from another machine, as far as tensors go."""
        return self.nbytes if self.url else 0

    def small_files_folder(self) -> Path | None:
        """The folder on this machine with the small files that belong to the model, if it has any."""
        return self.path if self.path is not None and self.path.is_dir() else None

    def header_digests(self) -> list[str]:
        """One digest per file of `files()` of what can be known without reading tensors."""
        return ["" for _ in self.files()]

    def fingerprints(self, refresh: bool = False) -> dict[str, list[object]]:
        """File -> its stamp (or size and ETag), and the digest of its header: these tell that it is unchanged.

        Args:
            refresh: ask the disk or another machine again, instead of taking the answer of when the file was opened.
        """
        fingerprints: dict[str, list[object]] = {}
        for path, header in zip(self.files(), self.header_digests(), strict=True):
            now = file_stamp(path) if refresh or str(path) not in self._stamps else []
            fingerprints[str(path)] = [*(now if refresh else self._stamps.setdefault(str(path), now)), header]
        return fingerprints

    def check_unchanged(self) -> None:
        """Raise MagMaxError if a file is no longer what it was when it was opened."""
        before, now = self.fingerprints(), self.fingerprints(refresh=True)
        for name in before:
            if before[name] != now[name]:
                raise changed_file_error(name)

    def prefetch(self, key: str, start: int, stop: int) -> int:
        """Begin to fetch units start..stop, which are to be read soon, and keep them until `release`.

        Returns the bytes of memory that are taken for it: none where files are on this machine, the default.
        """
        return 0

    def release_prefetched(self, key: str, start: int, stop: int) -> int:
        """Give up what `prefetch` kept, once for each call of it; returns the bytes of memory that this frees."""
        return 0

    def spec(self, key: str) -> TensorSpec:
        return self.specs[self.resolve_alias(key)]

    def resolve_alias(self, key: str) -> str:
        """The key under which a possibly tied tensor is stored."""
        return self.aliases.get(key, key)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label!r}, {len(self.specs)} tensors, {self.nbytes:,} bytes)"


def file_stamp(path: Path) -> list[object]:
    """What the system says of a file, by which a change is noticed: size, time of modification, inode, time of change.

    The last two tell of another file under the same name, and of a time of modification that was set back.
    """
    try:
        status = path.stat()
    except OSError as error:
        return [error.strerror]
    return stamp_of(status)


def stamp_of(status: os.stat_result) -> list[object]:
    """The stamp of a file, from what `os.stat` returned."""
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def changed_file_error(label: str) -> MagMaxError:
    """The error for a file that is no longer what it was when it was opened."""
    return MagMaxError(f"{label}: changed while it was read; wait until nothing writes it, and start again")
