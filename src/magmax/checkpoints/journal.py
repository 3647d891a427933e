"""What an output is written under: its lock, held by one process, and its journal, by which it is resumed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import MagMaxError
from .output_paths import (
    LOCK_FILE,
    LOCK_TEXT,
    WORK_SUFFIX,
    delete_output,
    describe_foreign,
    find_foreign_work,
    has_one_name,
    kind_of,
    sync_folder,
    working_folder,
)


def fdatasync(fd: int) -> None:
    """Wait until what was written is on disk; where the system has no fdatasync, its fsync does that and more."""
    getattr(os, "fdatasync", os.fsync)(fd)


class Journal:
    """Lines of JSON: first the identity of the work, then one line per finished part.

    It lies in the output's working folder, whose lock keeps other processes away. A torn last line, which a crash can
    leave, is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

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


class FolderLock:
    """The lock on a folder, held by this process until `release`: a file in it, which a kill leaves, but unlocked.

    Raises MagMaxError where another process holds it, naming the output that it is for.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        self._path = folder / LOCK_FILE
        self._fd = self._open(output)
        while not _is_open_as(self._path, self._fd):  # its last holder deleted it just before we had the lock
            os.close(self._fd)
            self._fd = self._open(output)
        try:
            if os.fstat(self._fd).st_size < len(LOCK_TEXT):
                os.write(self._fd, LOCK_TEXT)
                os.fsync(self._fd)
        except OSError:
            self.release()
            raise

    def release(self, delete: bool = True) -> None:
        """Let another process have the lock; its file is deleted first, if it still is in its place."""
        if self._fd < 0:
            return
        with suppress(OSError):
            if delete and _is_open_as(self._path, self._fd):
                self._path.unlink()
        os.close(self._fd)
        self._fd = -1

    def _open(self, output: Path) -> int:
        if kind_of(self._path) is not None and not has_one_name(self._path):
            raise MagMaxError(f"{self._path}: is not a lock of magmax; move it")
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise MagMaxError(f"{output}: another magmax is writing this output; wait for it to end") from error
        if not LOCK_TEXT.startswith(os.pread(fd, len(LOCK_TEXT) + 1, 0)):
            os.close(fd)
            raise MagMaxError(f"{self._path}: is not a lock of magmax; move it")
        return fd


@contextmanager
def lock_folder(folder: Path) -> Generator[None]:
    """Keep every other process of ours from changing what is in a folder, if it is there."""
    if not folder.is_dir():
        yield
        return
    try:
        lock = FolderLock(folder, folder)
    except OSError as error:
        raise MagMaxError(f"{folder}: cannot be written to: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def hold_folder(folder: Path) -> Generator[None]:
    """Make a folder that grows, such as a training's, and lock it; a new one that stays empty is deleted again."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MagMaxError(f"{folder.parent}: cannot be written to: {error.strerror}") from error
    try:
        with lock_folder(folder):
            yield
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


class WorkingFolder:
    """The working folder of an output, made and locked; on leaving the block it stays if something unfinished is in it.

    Only the process that has it may write the output. An old output that a kill left in it, between two renames, is put
    back in its place first.

    Raises MagMaxError where another process has it, and where something is in it that is not ours.
    """

    def __init__(self, output: Path) -> None:
        self.path, self._output = working_folder(output), output

    def __enter__(self) -> WorkingFolder:
        if kind_of(self.path) not in (None, "folder"):
            self._refuse_foreign()
        try:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._make()
        except OSError as error:
            with suppress(OSError):
                self.path.rmdir()
            raise MagMaxError(f"{self._output.parent}: cannot be written to: {error.strerror}") from error
        try:
            self._refuse_foreign()
            old = self.path / "old"
            if kind_of(old) and not kind_of(self._output):
                os.rename(old, self._output)
                sync_folder(self._output.parent)
            delete_output(old)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def clear(self) -> None:
        """Delete what is in it, but the lock and outputs that a worker of an earlier run is still writing."""
        names = {path.name for path in self.path.iterdir()}
        for name in sorted(names - {LOCK_FILE}):
            inner = name.removesuffix(WORK_SUFFIX)
            if inner != name:
                with suppress(MagMaxError), WorkingFolder(self.path / inner) as work:
                    work.clear()
                    delete_output(self.path / inner)
            elif name + WORK_SUFFIX not in names:
                delete_output(self.path / name)

    def _make(self) -> FolderLock:
        while True:
            with suppress(FileExistsError):
                self.path.mkdir()
            try:
                if kind_of(self.path / LOCK_FILE) is None and any(self.path.iterdir()):
                    self._refuse_foreign()
                return FolderLock(self.path, self._output)
            except FileNotFoundError:  # its last holder deleted the folder just before we had the lock
                continue

    def _refuse_foreign(self) -> None:
        if foreign := find_foreign_work(self.path):
            raise MagMaxError(describe_foreign(self.path, foreign)[0])

    def _close(self) -> None:
        """The lock goes last: a folder without it would be taken for someone else's."""
        done = [path.name for path in self.path.iterdir()] == [LOCK_FILE]
        self._lock.release(delete=done)
        if done:
            with suppress(OSError):  # another process has come after us
                self.path.rmdir()


def _is_open_as(path: Path, fd: int) -> bool:
    """Return whether `path` still is the file that is open as `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
