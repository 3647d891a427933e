"""The journal beside an unfinished output: what it is to be, and which parts of it are safe on disk."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import MagMaxError


def fdatasync(fd: int) -> None:
    """Wait until what was written is on disk; where the system has no fdatasync, its fsync does that and more."""
    getattr(os, "fdatasync", os.fsync)(fd)


class Journal:
    """Lines of JSON: first the identity of the work, then one line per finished part.

    The open journal is locked, so that one process alone writes an output. A torn last line, which a crash can leave,
    is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open_locked(path)
        while not _is_open_as(path, self._fd):  # its last holder deleted it just before we had the lock
            os.close(self._fd)
            self._fd = _open_locked(path)

    def load(self) -> tuple[Any, list[Any]]:
        """(identity, parts) of the interrupted work; (None, []) where there is none. Cuts off a torn end."""
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
        parsed: list[Any] = []
        for line in lines:
            try:
                parsed.append(json.loads(line if line.endswith(b"\n") else b"torn"))
            except ValueError:
                break
        os.ftruncate(self._fd, sum(map(len, lines[: len(parsed)])))
        return (parsed[0], parsed[1:]) if parsed else (None, [])

    def start(self, identity: Any) -> None:
        """Forget everything and begin the journal of this work."""
        os.ftruncate(self._fd, 0)
        self.append([identity])

    def append(self, entries: Iterable[Any]) -> None:
        """Add finished parts; they are on disk when this returns. A failure adds none."""
        lines = "".join(json.dumps(part, separators=(",", ":")) + "\n" for part in entries).encode()
        end = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            while lines:
                lines = lines[os.write(self._fd, lines) :]
            fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, end)
            raise

    def remove(self) -> None:
        """Delete the journal: the work is published or given up."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open_locked(path: Path) -> int:
    """The file opened, or created, and locked by this process alone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise MagMaxError(f"{path.parent}: cannot be written to: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise MagMaxError(f"{path}: another magmax is writing this output; wait for it to end") from error
    return fd


@contextmanager
def lock_folder(folder: Path) -> Generator[None]:
    """Keep every other process of ours from changing what is in a folder, if it is there."""
    if not folder.is_dir():
        yield
        return
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise MagMaxError(f"{folder}: another magmax is changing it; wait for that to end") from error
    finally:
        os.close(fd)


def _is_open_as(path: Path, fd: int) -> bool:
    """Return whether `path` still is the file that is open as `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
