"""The finished cells of a benchmark: one JSON Lines file, to which several processes append."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from .. import legacy
from ..checkpoints.output_paths import kind_of
from ..errors import MagMaxError
from .experiment import digest_of

Record = dict[str, Any]
CELLS_FILE = "cells.jsonl"
OLD_FOLDER = "cells"
"""The folder in which earlier versions kept a file for each cell."""


class CellStore:
    """The records in OUT/cells.jsonl, one JSON object a line.

    A record is known by its `digest`, or where it has none by its `recipe`; a later one takes the place of an earlier
    one. Processes, also of several machines that share the folder, append one after the other under a lock on the
    file. A last line that is no whole record is of a writer that was killed: readers ignore it, the next writer cuts
    it off.

    An OUT of an earlier version has a file for each cell, in OUT/cells: these are read too, beneath those of the JSON
    Lines file, and nothing is written there. What is damaged among them is ignored, and so is measured again.
    """

    def __init__(self, out: Path) -> None:
        self.file = out / CELLS_FILE
        self.folder = out / OLD_FOLDER

    def exists(self) -> bool:
        """Return whether a benchmark has written here, be it no record yet."""
        return self.file.is_file() or self.folder.is_dir()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record at the end of the file, whole and durable. Raises MagMaxError where that cannot be done."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if kind_of(self.file) not in (None, "file"):
                raise MagMaxError(f"{self.file}: is a {kind_of(self.file)}, which is not written to; move it")
            with self.file.open("ab+", buffering=0) as file, _lock_file(file):
                file.seek(0)
                file.truncate(_complete_length(file.readall()))
                rest = memoryview(line)
                while rest:  # a disk that is nearly full takes only a part
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
        except OSError as error:
            reason = f"cannot be written: {error.strerror} ({len(line):,} bytes)"
            raise MagMaxError(f"{self.file}: {reason}; the same command goes on from here") from error

    def records(self) -> list[Record]:
        """Read all records, in the order of their first lines.

        Raises MagMaxError for a line before the last that is not a record, and a file that cannot be read.
        """
        return list(self.by_digest().values())

    def by_digest(self) -> dict[str, Record]:
        """Read all records once, for many to be looked up. Raises as `records` does."""
        return {_digest(record): record for record in (*self._read_old_records(), *self._lines())}

    def find(self, digest: str) -> Record | None:
        """Look one record up. Raises as `records` does."""
        return self.by_digest().get(digest)

    def _lines(self) -> Iterator[Record]:
        *lines, torn = self._content().split(b"\n")
        for number, line in enumerate(lines, start=1):
            record = _parse_record(line)
            if record is not None:
                yield record
            elif number < len(lines) or torn:
                reason = "is not a JSON object, as every line is; without this line its cell is measured again"
                raise MagMaxError(f"{self.file}, line {number}: {reason}")

    def _content(self) -> bytes:
        try:
            with self.file.open("rb", buffering=0) as file, _lock_file(file, fcntl.LOCK_SH):
                return file.readall()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise MagMaxError(f"{self.file}: cannot be read: {error.strerror}") from error

    def _read_old_records(self) -> Iterator[Record]:
        for path in sorted(self.folder.glob("*.json")):
            with suppress(OSError):
                if (record := _parse_record(path.read_bytes())) is not None:
                    yield record


def checkpoint_folder(out: Path, training: str, seed: int, recipe: Mapping[str, Any]) -> Path:
    """Return where the checkpoints of a training are, or go; `recipe` is all that decides them.

    Those of an earlier version are in OUT/chains, by the digest of the recipe as that version wrote it.
    """
    old_digest = digest_of(legacy.old_training_recipe(recipe))
    old = out / legacy.OLD_FOLDER / f"{legacy.old_training_name(training)}-seed{seed}-{old_digest[:8]}"
    new = out / "training" / f"{training}-seed{seed}-{digest_of(recipe)[:8]}"
    return old if old.is_dir() and not new.is_dir() else new


@contextmanager
def _lock_file(file: FileIO, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the lock of an open file: readers too, who would else see half of a writer's repair.

    Where there are no locks, as on some read-only file systems, readers go without and writers raise OSError.
    """
    try:
        fcntl.flock(file, how)
    except OSError:
        if how == fcntl.LOCK_EX:
            raise
    try:
        yield
    finally:
        with suppress(OSError):  # closing the file lets go of it too
            fcntl.flock(file, fcntl.LOCK_UN)


def _complete_length(content: bytes) -> int:
    """Return how many bytes come before what a killed writer left: a line without end, or one that is no record."""
    end = content.rfind(b"\n") + 1
    last = content.rfind(b"\n", 0, max(0, end - 1)) + 1
    return end if end < len(content) or _parse_record(content[last:end]) is not None else last


def _parse_record(line: bytes) -> Record | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return _modernize(content) if isinstance(content, dict) else None


def _modernize(record: Record) -> Record:
    """The record with today's names; the digest of its recipe follows where it was that of the recipe before."""
    modern = legacy.modern_record(record)
    if "digest" in record and record["digest"] == digest_of(record.get("recipe", {})):
        modern["digest"] = digest_of(modern["recipe"])
    return modern


def _digest(record: Mapping[str, Any]) -> str:
    return str(record["digest"]) if "digest" in record else digest_of(record.get("recipe", record))
