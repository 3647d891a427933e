"""Files read by byte range, from any thread."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import IO, Any

from ..errors import MagMaxError


class RangeFile:
    """A file open for reading at any place. Raises MagMaxError where it cannot be opened."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path, self.label = path, label or str(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MagMaxError(f"{self.label}: cannot be opened: {error.strerror}") from error
        weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the file is opened again."""
        return type(self), (self.path.absolute(), self.label)

    def read_into(self, view: memoryview, offset: int, tensor_name: str = "") -> None:
        """Fill `view` with the bytes from `offset` on; `of` names the tensor that they belong to."""
        while view:
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise MagMaxError(f"{self.label}: cannot be read at byte {offset}: {error.strerror}") from error
            if not count:
                raise MagMaxError(
                    f"{self.label}: the file ends at byte {offset}, where data was promised; copy or download it again"
                )
            view, offset = view[count:], offset + count

    def read_bytes(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on. Raises MagMaxError where the file has not as many."""
        if not 0 <= offset <= offset + length <= self.size:
            raise MagMaxError(
                f"{self.label}: the file has {self.size:,} bytes, but bytes {offset:,} to {offset + length:,} were "
                "promised; it is truncated or corrupt: copy or download it again"
            )
        content = bytearray(length)
        self.read_into(memoryview(content), offset)
        return bytes(content)


class BoundedStream:
    """A stream that gives at most so many bytes, and allocates nothing for a promise of more."""

    def __init__(self, stream: IO[bytes], max_bytes: int) -> None:
        self._stream, self._left = stream, max_bytes

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise ValueError(f"it promises {size:,} bytes")
        self._left -= size
        return self._stream.read(size)

    def readline(self) -> bytes:
        line = self._stream.readline(self._left + 1)
        if len(line) > self._left:
            raise ValueError(f"it has a line of more than {self._left:,} bytes")
        self._left -= len(line)
        return line
