"""Processes that die, or whose disk fails, at a chosen call; and what then lies on the disk.

A nursery is a lean process that forks a child for each piece of work. In the child every call that changes the disk is
counted, and a fault may befall one of them. What was written before a kill stays, as it does for a real process: the
kernel keeps it. Waiting for the disk (fsync) is therefore counted, but not done.
"""

from __future__ import annotations

import builtins
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import numpy as np

from magmax.checkpoints import blocks
from magmax.errors import MagMaxError
from magmax.merging import pipeline
from magmax.rules import MagMax

TIMEOUT_SECONDS = 60
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR
CHANGE_CALLS = ("ftruncate", "mkdir", "rename", "replace", "rmdir", "unlink")
WRITE_CALLS = ("pwrite", "write")
SYNC_CALLS = ("fdatasync", "fsync")

Call = tuple[Any, ...]
"""A call that changes the disk: its name, the path it is about, and its arguments, a length in place of content."""

FileContents = Mapping[str, bytes]
KillMoment = Literal["before", "torn", "after"]


@dataclass(frozen=True)
class Fault:
    """What befalls no call at all; the base of what does."""

    def before(self, number: int, call: Call) -> None:
        """Called before the call with that number, which counts from 1."""

    def after(self, number: int, call: Call) -> None:
        """Called after it, even if it raised."""

    def write_limit(self, number: int, call: Call) -> int | None:
        """How many bytes a write may take; None for all."""
        return None


@dataclass(frozen=True)
class Kill(Fault):
    """The process dies just before call `call_number`, just after it, or after half of what it writes."""

    call_number: int
    moment: KillMoment

    def before(self, number: int, call: Call) -> None:
        if (number, "before") == (self.call_number, self.moment):
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, number: int, call: Call) -> None:
        if number == self.call_number:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_limit(self, number: int, call: Call) -> int | None:
        return call[-1] // 2 if (number, "torn") == (self.call_number, self.moment) else None


ForeignKind = Literal["file", "folder", "full folder", "link", "dangling link", "pipe", "hard link"]


def plant(path: Path, kind: ForeignKind, elsewhere: Path) -> None:
    """Put something at a path that nobody of ours made, as another program might; `elsewhere` is where links lead.

    Nothing where something is there already, or its folder is not. What it put is listed in `elsewhere`/planted.
    """
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    target = elsewhere / f"of {path.name}"
    if kind in ("link", "hard link"):
        target.write_bytes(b"precious")
    if kind == "file":
        path.write_bytes(b"precious")
    elif kind in ("link", "dangling link"):
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "hard link":
        os.link(target, path)
    else:
        path.mkdir()
        if kind == "full folder":
            (path / "mine.txt").write_bytes(b"precious")
    with (elsewhere / "planted").open("a", encoding="utf-8") as file:
        print(json.dumps([path.name, path.lstat().st_ino, kind, str(target)]), file=file)


@dataclass(frozen=True)
class Disturbance(Kill):
    """Just before a call something of someone else appears; the process may be killed at another call."""

    planted_at: int
    path: Path
    kind: ForeignKind
    elsewhere: Path

    def before(self, number: int, call: Call) -> None:
        if number == self.planted_at:
            plant(self.path, self.kind, self.elsewhere)
        super().before(number, call)


@dataclass(frozen=True)
class DiskFailure(Fault):
    """Call `first_call`, and every later one of the same name, fails with that error of the system."""

    first_call: int
    call_name: str
    error_code: int

    def before(self, number: int, call: Call) -> None:
        if number >= self.first_call and call[0] == self.call_name:
            raise OSError(self.error_code, os.strerror(self.error_code))


@dataclass(frozen=True)
class ShortWrites(Fault):
    """Every write takes at most so many bytes, as the system is free to do."""

    max_bytes: int

    def write_limit(self, number: int, call: Call) -> int | None:
        return self.max_bytes


@dataclass
class DiskMonitor:
    """The calls of this process that change the disk, in order, and the fault that befalls one of them."""

    fault: Fault
    calls: list[Call] = field(default_factory=list)
    paths_by_fd: dict[int, str] = field(default_factory=dict)
    _lock: Any = field(default_factory=RLock)

    def watch_calls(self) -> None:
        """Watch every call from now on. There is no way back: this is for a child alone."""
        for name in CHANGE_CALLS:
            setattr(os, name, self._wrap_call(name, getattr(os, name)))
        for name in WRITE_CALLS:
            setattr(os, name, self._wrap_write(name, getattr(os, name)))
        for name in SYNC_CALLS:
            setattr(os, name, self._wrap_call(name, lambda *_: None))
        opened, creating = os.open, self._wrap_call("open", os.open)

        def watched_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            fd = (creating if flags & WRITE_FLAGS else opened)(path, flags, *rest, **more)
            self.paths_by_fd[fd] = str(path)
            return fd

        vars(os)["open"] = watched_open

    def _wrap_call(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **more: Any) -> Any:
            with self._lock:
                number, call = self._record_call(name, *args)
                try:
                    return real(*args, **more)
                finally:
                    self.fault.after(number, call)

        return watched

    def _wrap_write(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def watched(fd: int, content: Any, *rest: Any) -> int:
            with self._lock:
                number, call = self._record_call(name, fd, *rest, len(content))
                try:
                    return real(fd, content[: self.fault.write_limit(number, call)], *rest)
                finally:
                    self.fault.after(number, call)

        return watched

    def _record_call(self, name: str, first: Any, *rest: Any) -> tuple[int, Call]:
        call = (name, self.paths_by_fd[first] if type(first) is int else str(first), *rest)
        self.calls.append(call)
        self.fault.before(len(self.calls), call)
        return len(self.calls), call


@dataclass(frozen=True)
class ChildResult:
    """How a child ended: killed, or with a result, or with the words of a MagMaxError; and its calls, if it lived."""

    is_killed: bool
    result: Any = None
    error_message: str = ""
    calls: Sequence[Call] = ()


class ForkServer:
    """Forks children from a process that has neither torch nor threads. Works must be functions of a module."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from tests.crash.harness import serve_forks; serve_forks()"]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)

    def __call__(
        self, work: Callable[..., Any], *args: Any, fault: Fault | None = None, threads: bool = False
    ) -> ChildResult:
        """Do the work in a child; any end but a result, a MagMaxError or a kill that was asked for fails here."""
        assert self._process.stdin
        assert self._process.stdout
        pickle.dump((work, args, fault or Fault(), threads), self._process.stdin)
        self._process.stdin.flush()
        kind, *content = pickle.load(self._process.stdout)
        assert kind != "crash", content[0]
        assert kind != "killed" or (isinstance(fault, Kill) and content[0] == signal.SIGKILL), content
        return ChildResult(is_killed=True) if kind == "killed" else ChildResult(False, *content)

    def close(self) -> None:
        self._process.communicate()


def serve_forks() -> None:
    """The nursery's own work: a child for each request, until the requests end."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    MagMax()([np.zeros(1), np.ones(1)])  # whatever a rule imports when it is first used
    gc.freeze()
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_fork_child(*request), answers)
        answers.flush()


def _fork_child(work: Callable[..., Any], args: Sequence[Any], fault: Fault, threads: bool) -> tuple[Any, ...]:
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        write = os.write
        said = pickle.dumps(_child_main(work, args, fault, threads))
        while said:
            said = said[write(theirs, said) :]
        os.kill(os.getpid(), signal.SIGTERM)
    os.close(theirs)
    with builtins.open(ours, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    return pickle.loads(said) if said else ("killed", os.WTERMSIG(status))


def _child_main(work: Callable[..., Any], args: Sequence[Any], fault: Fault, threads: bool) -> tuple[Any, ...]:
    signal.alarm(TIMEOUT_SECONDS)
    disk = DiskMonitor(fault)
    try:
        use_small_blocks()
        if not threads:
            vars(pipeline)["run_in_threads"] = run_in_order
        disk.watch_calls()
        return "end", work(*args), "", disk.calls
    except MagMaxError as error:
        return "end", None, str(error), disk.calls
    except BaseException:
        return "crash", traceback.format_exc()


def use_small_blocks() -> None:
    """Cut small tensors into many chunks, and note each of them in the journal at once."""
    blocks.BLOCK_ELEMENTS, blocks.BLOCKS_PER_CHUNK = 32, 2
    pipeline.JOURNAL_SECONDS = -1.0


def run_in_order(work: Callable[[Any], Any], items: Iterable[Any], threads: int, ahead: Any = None) -> Iterator[Any]:
    """What `pipeline.run_in_threads` does, in one thread, so that the calls always come in one order."""
    yield from map(work, items)


def all_kills(calls: Sequence[Call]) -> Iterator[Kill]:
    """A kill before, amid and after each call of an undisturbed run; just after one is just before the next."""
    for number, call in enumerate(calls, start=1):
        yield Kill(number, "before")
        if call[0] in WRITE_CALLS:
            yield Kill(number, "torn")
    yield Kill(len(calls), "after")


def sampled_kills(calls: Sequence[Call]) -> Iterator[Kill]:
    """A kill before every call but for most of those that write tensors or note them, and one at the end."""
    for number, call in enumerate(calls, start=1):
        if call[0] not in ("pwrite", "write", "fdatasync") or number % 5 == 0:
            yield Kill(number, "before")
    yield Kill(len(calls), "after")


def read_contents(path: Path) -> FileContents | None:
    """The content of a file (under "") or of every file in a folder, or None where there is nothing."""
    if path.is_file():
        return {"": path.read_bytes()}
    if not path.exists():
        return None
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
