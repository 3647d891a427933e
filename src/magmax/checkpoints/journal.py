"""What an output is written under: its lock, held by one process, and its journal, by which it is resumed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import MagMaxError
from .output_paths import (
    LOCK_FILE,
    LOCK_TEXT,
    STAGED_FOLDERS,
    WORK_SUFFIX,
    delete_output,
    describe_foreign,
    find_foreign_work,
    is_lock,
    kind_of,
    open_own,
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
        self._fd = open_own(path, os.O_CREAT)

    def load(self) -> tuple[Any, list[Any]]:
        """(identity, parts) of the interrupted work; (None, []) where there is none. Cuts off a torn end."""
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
        parsed: list[Any] = []
        for line in lines:
            try:
                parsed.append(json.loads(line if line.endswith(b"\n") else b"torn"))
            except (ValueError, RecursionError):
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

    def __init__(self, folder: Path, output: Path, create: bool = True) -> None:
        self._path = folder / LOCK_FILE
        self._fd = self._open(output, create)
        while not _is_open_as(self._path, self._fd):  # its last holder deleted it just before we had the lock
            os.close(self._fd)
            self._fd = self._open(output, create)
        try:
            if os.fstat(self._fd).st_size < len(LOCK_TEXT):
                os.write(self._fd, LOCK_TEXT)
                os.fsync(self._fd)
        except OSError:
            self.release()
            raise

    def move(self, folder: Path) -> None:
        """Note that the folder has another name now."""
        self._path = folder / LOCK_FILE

    def release(self, delete: bool = True) -> None:
        """Let another process have the lock; its file is deleted first, if it still is in its place."""
        if self._fd < 0:
            return
        with suppress(OSError):
            if delete and _is_open_as(self._path, self._fd):
                self._path.unlink()
        os.close(self._fd)
        self._fd = -1

    def _open(self, output: Path, create: bool) -> int:
        if kind_of(self._path) not in (None, "file"):
            raise MagMaxError(f"{self._path}: is a {kind_of(self._path)}, not a lock of magmax; move it")
        fd = open_own(self._path, os.O_CREAT if create else 0)
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
    if folder.exists() and not folder.is_dir():
        raise MagMaxError(f"{folder}: is not a folder; choose another name")
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

    It gets its name, and loses it, with the lock in it: a folder of that name without a lock is someone else's. Only
    the process that has it may write the output. An old output that a kill left in it, between two renames, is put back
    in its place first.

    Raises MagMaxError where another process has it, and where something is in it that is not ours.
    """

    def __init__(self, output: Path) -> None:
        self.path, self._output = working_folder(output), output

    def __enter__(self) -> WorkingFolder:
        try:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._make()
        except OSError as error:
            raise MagMaxError(f"{self._output.parent}: cannot be written to: {error.strerror}") from error
        try:
            self._refuse_foreign()
            delete_staged(self.path)
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
            try:
                if kind_of(self.path) is None:
                    return self._make_new()
                if not is_lock(self.path / LOCK_FILE):
                    self._refuse_foreign()
                return FolderLock(self.path, self._output, create=False)
            except FileNotFoundError:  # its last holder renamed it just before we had the lock
                continue

    def _make_new(self) -> FolderLock:
        """Make the folder under another name, and rename it when the lock is in it."""
        delete_staged(self.path.parent)
        staged = _staged_path(self.path.parent)
        staged.mkdir()
        try:
            lock = FolderLock(staged, self._output)
        except MagMaxError as error:  # another process looks whether a kill left it, and holds its lock for a moment
            raise FileNotFoundError from error
        except OSError:
            with suppress(OSError):
                staged.rmdir()
            raise
        try:
            sync_folder(staged)
            os.rename(staged, self.path)
        except OSError as error:
            lock.release()
            with suppress(OSError):
                staged.rmdir()
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                raise FileNotFoundError from error
            raise
        lock.move(self.path)
        return lock

    def _refuse_foreign(self) -> None:
        if foreign := find_foreign_work(self.path):
            raise MagMaxError(describe_foreign(self.path, foreign)[0])

    def _close(self) -> None:
        """Let go of the lock, and delete the folder where nothing else is in it."""
        done = [path.name for path in self.path.iterdir()] == [LOCK_FILE]
        if done:
            with suppress(OSError):
                staged = _staged_path(self.path.parent)
                os.rename(self.path, staged)
                self._lock.move(staged)
                self._lock.release()
                staged.rmdir()
        self._lock.release(delete=False)


def _staged_path(folder: Path) -> Path:
    return folder / f".{secrets.token_hex(8)}{WORK_SUFFIX}"


def delete_staged(folder: Path) -> None:
    """Delete the working folders that kills left without a name."""
    for staged in list(folder.iterdir()):
        if STAGED_FOLDERS.fullmatch(staged.name) and kind_of(staged) == "folder":
            with suppress(OSError, MagMaxError):  # where another process is at it, or something was put there, it stays
                if [path.name for path in staged.iterdir()] == [LOCK_FILE] and is_lock(staged / LOCK_FILE):
                    FolderLock(staged, staged, create=False).release()
                staged.rmdir()


def _is_open_as(path: Path, fd: int) -> bool:
    """Return whether `path` still is the file that is open as `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
