"""The journal beside an unfinished output: what it is to be, and which parts of it are safe on disk."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import MagMaxError


class Journal:
    """Lines of JSON: first the identity of the work, then one line per finished part.

    The open journal is locked, so that one process alone writes an output. A torn last line, which a crash can leave,
    is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise MagMaxError(f"{path.parent}: cannot be written to: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise MagMaxError(f"{path}: another magmax is writing this output; wait for it to end") from error

    def load(self) -> tuple[Any, list[Any]]:
        """(identity, parts) of the interrupted work; (None, []) where there is none."""
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            lines = file.read().split(b"\n")[:-1]
        parsed: list[Any] = []
        for line in lines:
            try:
                parsed.append(json.loads(line))
            except ValueError:
                break
        return (parsed[0], parsed[1:]) if parsed else (None, [])

    def start(self, identity: Any) -> None:
        """Forget everything and begin the journal of this work."""
        os.ftruncate(self._fd, 0)
        self.append([identity])

    def append(self, parts: Iterable[Any]) -> None:
        """Add finished parts; they are on disk when this returns."""
        lines = "".join(json.dumps(part, separators=(",", ":")) + "\n" for part in parts).encode()
        os.lseek(self._fd, 0, os.SEEK_END)
        while lines:
            lines = lines[os.write(self._fd, lines) :]
        os.fdatasync(self._fd)

    def remove(self) -> None:
        """Delete the journal: the work is published or given up."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
