"""Files read by byte range, from any thread, with a bounded number of them open at once."""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

from ..errors import MagMaxError
from .base import stamp_of

FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe, which is read only once",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class _Descriptor:
    """A file that may be open: its descriptor, or -1, and how many threads read from it now."""

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        self.fd, self.users = -1, 0
        self.size = 0
        self.identity: tuple[int, ...] = ()
        self.stamp: list[object] = []

    def open(self) -> None:
        """Open the file; the second time it must be the same as the first."""
        kind = stat.S_IFMT(self.path.stat().st_mode)
        if kind != stat.S_IFREG:
            raise MagMaxError(f"{self.label}: is {FILE_KINDS.get(kind, 'no file')}; give a regular file")
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # never waits, whatever it is by now
        status = os.fstat(self.fd)
        identity = (status.st_dev, status.st_ino, status.st_size)
        if self.identity and identity != self.identity:
            self.close()
            raise MagMaxError(f"{self.label}: was replaced while it was read; start again")
        if not self.identity:
            self.identity, self.size, self.stamp = identity, status.st_size, stamp_of(status)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _DescriptorPool:
    """The descriptors that are open, those used last at the end. At most half of what the process may open."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # `forget` may run at any allocation, within the other methods too
        self._open: OrderedDict[_Descriptor, None] = OrderedDict()

    def acquire(self, descriptor: _Descriptor) -> int:
        """Return the descriptor of an open file, which stays open until `release`."""
        with self._lock:
            if descriptor.fd < 0:
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                if limit != resource.RLIM_INFINITY:
                    self._close_unused(limit // 2 - 1)
                try:
                    descriptor.open()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                        raise
                    self._close_unused(len(self._open) // 2)  # others of this process hold the rest
                    descriptor.open()
                self._open[descriptor] = None
            self._open.move_to_end(descriptor)
            descriptor.users += 1
            return descriptor.fd

    def release(self, descriptor: _Descriptor) -> None:
        with self._lock:
            descriptor.users -= 1

    def forget(self, descriptor: _Descriptor) -> None:
        """Close a file that nobody reads any more."""
        with self._lock:
            self._open.pop(descriptor, None)
            descriptor.close()

    def _close_unused(self, keep: int) -> None:
        """Close the files used longest ago until `keep` are left, apart from those that are being read."""
        unused = [descriptor for descriptor in list(self._open) if not descriptor.users]
        for descriptor in unused[: max(0, len(self._open) - keep)]:
            self.forget(descriptor)


_pool = _DescriptorPool()


class RangeFile:
    """A file for reading at any place. Raises MagMaxError where it cannot be opened, or is no regular file."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path, self.label = path, label or str(path)
        self._descriptor = _Descriptor(path, self.label)
        try:
            _pool.acquire(self._descriptor)
        except OSError as error:
            raise MagMaxError(f"{self.label}: cannot be opened: {error.strerror}") from error
        _pool.release(self._descriptor)
        weakref.finalize(self, _pool.forget, self._descriptor)
        self.size, self.stamp = self._descriptor.size, self._descriptor.stamp

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the file is opened again."""
        return type(self), (self.path.absolute(), self.label)

    def read_into(self, view: memoryview, offset: int, tensor_name: str = "") -> None:
        """Fill `view` with the bytes from `offset` on; `tensor_name` names the tensor that they belong to."""
        try:
            fd = _pool.acquire(self._descriptor)
        except OSError as error:
            raise MagMaxError(f"{self.label}: cannot be opened again: {error.strerror}") from error
        try:
            while view:
                count = os.preadv(fd, [view], offset)
                if not count:
                    raise MagMaxError(
                        f"{self.label}: the file ends at byte {offset}, where data was promised; copy or download it "
                        "again"
                    )
                view, offset = view[count:], offset + count
        except OSError as error:
            raise MagMaxError(f"{self.label}: cannot be read at byte {offset}: {error.strerror}") from error
        finally:
            _pool.release(self._descriptor)

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
