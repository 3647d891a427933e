"""Files on other machines, read by byte range: retried, in parallel, a bounded part of them in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from ...errors import MagMaxError
from ..base import changed_file_error
from .filesystems import open_source
from .urls import display_url, with_retries

FETCH_BYTES = 2 << 20
"""Bytes that are asked for at once; small tensors that lie side by side share a block."""
FIRST_FETCH_BYTES = 64 << 10
"""Bytes that are asked for first, so that most headers take one request."""
CONNECTIONS = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


class RemoteFile:
    """A file on another machine, open for reading at any place.

    What `prefetch` announces is fetched in the background, in blocks that end where multiples of `FETCH_BYTES` do, and
    stays in
    memory until `release_prefetched`; anything else is fetched when `fill` asks for it.

    Attributes:
        url: where it is, without anything secret.
        size: its bytes.
        stamp: size, and ETag or time, as they were when it was opened.

    Raises:
        MagMaxError: nothing there, no access, or a server that cannot send a part of a file.
    """

    def __init__(self, url: str) -> None:
        self._full_url, self.url = url, display_url(url)
        self._source = open_source(url)
        first = with_retries(self.url, lambda: self._source.read_range(0, FIRST_FETCH_BYTES))
        self._head, self.size, self.stamp = first.content, first.size, first.stamp
        self._fetches: dict[int, _Fetch] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the file is opened again; it must be the same still."""
        return _reopen, (self._full_url, self.stamp)

    def read_into(self, view: memoryview, offset: int, of: str = "") -> None:
        """Fill `view` with the bytes from `offset` on; `of` names the tensor that they belong to.

        Raises:
            MagMaxError: the file ends before, or has changed.
            UnfinishedError: the server cannot be reached, for the time being.
        """
        while view:
            content = self._read_some(offset, len(view), of)
            view[: len(content)] = content
            view, offset = view[len(content) :], offset + len(content)

    def read_bytes(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""
        content = bytearray(length)
        self.read_into(memoryview(content), offset)
        return bytes(content)

    def prefetch(self, begin: int, end: int) -> int:
        """Begin to fetch the blocks of a range and keep them; the bytes of memory that they take beside those held."""
        taken = 0
        with self._lock:
            for index in _fetch_indices(begin, end):
                if index not in self._fetches:
                    at, until = self._fetch_bounds(index)
                    self._fetches[index] = _Fetch(fetch_pool().submit(self._fetch, at, until, ""))
                    taken += until - at
                self._fetches[index].users += 1
        return taken

    def release_prefetched(self, begin: int, end: int) -> int:
        """Give up one hold on a range; the bytes of memory that this frees."""
        freed = 0
        with self._lock:
            for index in _fetch_indices(begin, end):
                block = self._fetches[index]
                block.users -= 1
                if not block.users:
                    block.future.cancel()
                    del self._fetches[index]
                    at, until = self._fetch_bounds(index)
                    freed += until - at
        return freed

    def read_stamp(self) -> list[object]:
        """The stamp that the server gives now."""
        return with_retries(self.url, self._source.read_stamp)

    def _read_some(self, offset: int, max_bytes: int, tensor_name: str) -> memoryview:
        """At least one byte from `offset` on: first read, of a held block, or fetched up to the next such block."""
        if offset < len(self._head):
            return memoryview(self._head)[offset : offset + max_bytes]
        index, end = offset // FETCH_BYTES, offset + max_bytes
        with self._lock:
            block = self._fetches.get(index)
            end = min([end, *(held * FETCH_BYTES for held in self._fetches if held > index)])
        if block is None:
            return memoryview(self._fetch(offset, end, tensor_name))
        try:
            content = block.future.result()
        except (MagMaxError, CancelledError):
            content = None
        if content is None:  # its tries are over, or it was given up; another may do, and its error names the tensor
            return memoryview(self._fetch(offset, min(end, (index + 1) * FETCH_BYTES), tensor_name))
        return memoryview(content)[offset - index * FETCH_BYTES :][:max_bytes]

    def _fetch(self, begin: int, end: int, tensor_name: str) -> bytes:
        what = f"{self.url}: {tensor_name and f'{tensor_name}: '}bytes {begin:,} to {end:,}"
        if end > self.size:
            raise MagMaxError(f"{what}: the file has {self.size:,} bytes; it is truncated: upload it again")
        return with_retries(what, lambda: self._fetch_once(begin, end, what))

    def _fetch_once(self, begin: int, end: int, label: str) -> bytes:
        piece = self._source.read_range(begin, end)
        if piece.stamp and piece.stamp != self.stamp:
            raise changed_file_error(self.url)
        if len(piece.content) != end - begin:
            raise ConnectionError(f"{len(piece.content):,} bytes came instead of {end - begin:,}")
        return piece.content

    def _fetch_bounds(self, index: int) -> tuple[int, int]:
        return index * FETCH_BYTES, min((index + 1) * FETCH_BYTES, self.size)


def _reopen(url: str, stamp: list[object]) -> RemoteFile:
    file = RemoteFile(url)
    if file.stamp != stamp:
        raise changed_file_error(file.url)
    return file


class _Fetch:
    """A block under way or here, and how many want it."""

    def __init__(self, content: Future[bytes]) -> None:
        self.future, self.users = content, 0


def map_parallel(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of each item, several at once: for what waits for a network. Not to be called within itself."""
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="magmax-open") as pool:
        return list(pool.map(work, items))


def _fetch_indices(begin: int, end: int) -> Iterator[int]:
    return iter(range(begin // FETCH_BYTES, -(-end // FETCH_BYTES)) if end > begin else ())


@lru_cache(maxsize=1)
def fetch_pool() -> ThreadPoolExecutor:
    """The threads that fetch: as many as there are connections at once, for all files together."""
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="magmax-fetch")
