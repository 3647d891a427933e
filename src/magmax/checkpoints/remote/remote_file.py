"""Files on other machines, read by byte range: retried, in parallel, a bounded part of them in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from ...errors import MagMaxError
from .filesystems import source_of
from .urls import changed, patiently, shown

BLOCK = 2 << 20
"""Bytes that are asked for at once; small tensors that lie side by side share a block."""
HEAD = 64 << 10
"""Bytes that are asked for first, so that most headers take one request."""
CONNECTIONS = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


class RemoteFile:
    """A file on another machine, open for reading at any place.

    What `hold` announces is fetched in the background, in blocks that end where multiples of `BLOCK` do, and stays in
    memory until `release`; anything else is fetched when `fill` asks for it.

    Attributes:
        url: where it is, without anything secret.
        size: its bytes.
        stamp: size, and ETag or time, as they were when it was opened.

    Raises:
        MagMaxError: nothing there, no access, or a server that cannot send a part of a file.
    """

    def __init__(self, url: str) -> None:
        self._given, self.url = url, shown(url)
        self._source = source_of(url)
        first = patiently(self.url, lambda: self._source.get(0, HEAD))
        self._head, self.size, self.stamp = first.content, first.size, first.stamp
        self._blocks: dict[int, _Block] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the file is opened again; it must be the same still."""
        return _reopened, (self._given, self.stamp)

    def fill(self, view: memoryview, offset: int, of: str = "") -> None:
        """Fill `view` with the bytes from `offset` on; `of` names the tensor that they belong to.

        Raises:
            MagMaxError: the file ends before, or has changed.
            UnfinishedError: the server cannot be reached, for the time being.
        """
        while view:
            content = self._some(offset, len(view), of)
            view[: len(content)] = content
            view, offset = view[len(content) :], offset + len(content)

    def bytes(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""
        content = bytearray(length)
        self.fill(memoryview(content), offset)
        return bytes(content)

    def hold(self, begin: int, end: int) -> int:
        """Begin to fetch the blocks of a range and keep them; the bytes of memory that they take beside those held."""
        taken = 0
        with self._lock:
            for index in _blocks(begin, end):
                if index not in self._blocks:
                    at, until = self._bounds(index)
                    self._blocks[index] = _Block(fetchers().submit(self._fetch, at, until, ""))
                    taken += until - at
                self._blocks[index].holders += 1
        return taken

    def release(self, begin: int, end: int) -> int:
        """Give up one hold on a range; the bytes of memory that this frees."""
        freed = 0
        with self._lock:
            for index in _blocks(begin, end):
                block = self._blocks[index]
                block.holders -= 1
                if not block.holders:
                    block.content.cancel()
                    del self._blocks[index]
                    at, until = self._bounds(index)
                    freed += until - at
        return freed

    def stamp_now(self) -> list[object]:
        """The stamp that the server gives now."""
        return patiently(self.url, self._source.stamp)

    def _some(self, offset: int, most: int, of: str) -> memoryview:
        """At least one byte from `offset` on: first read, of a held block, or fetched up to the next such block."""
        if offset < len(self._head):
            return memoryview(self._head)[offset : offset + most]
        index, end = offset // BLOCK, offset + most
        with self._lock:
            block = self._blocks.get(index)
            end = min([end, *(held * BLOCK for held in self._blocks if held > index)])
        if block is None:
            return memoryview(self._fetch(offset, end, of))
        try:
            content = block.content.result()
        except (MagMaxError, CancelledError):
            content = None
        if content is None:  # its tries are over, or it was given up; another may do, and its error names the tensor
            return memoryview(self._fetch(offset, min(end, (index + 1) * BLOCK), of))
        return memoryview(content)[offset - index * BLOCK :][:most]

    def _fetch(self, begin: int, end: int, of: str) -> bytes:
        what = f"{self.url}: {of and f'{of}: '}bytes {begin:,} to {end:,}"
        if end > self.size:
            raise MagMaxError(f"{what}: the file has {self.size:,} bytes; it is truncated: upload it again")
        return patiently(what, lambda: self._checked(begin, end, what))

    def _checked(self, begin: int, end: int, what: str) -> bytes:
        piece = self._source.get(begin, end)
        if piece.stamp and piece.stamp != self.stamp:
            raise changed(self.url)
        if len(piece.content) != end - begin:
            raise ConnectionError(f"{len(piece.content):,} bytes came instead of {end - begin:,}")
        return piece.content

    def _bounds(self, index: int) -> tuple[int, int]:
        return index * BLOCK, min((index + 1) * BLOCK, self.size)


def _reopened(url: str, stamp: list[object]) -> RemoteFile:
    file = RemoteFile(url)
    if file.stamp != stamp:
        raise changed(file.url)
    return file


class _Block:
    """A block under way or here, and how many want it."""

    def __init__(self, content: Future[bytes]) -> None:
        self.content, self.holders = content, 0


def in_parallel(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of each item, several at once: for what waits for a network. Not to be called within itself."""
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="magmax-open") as pool:
        return list(pool.map(work, items))


def _blocks(begin: int, end: int) -> Iterator[int]:
    return iter(range(begin // BLOCK, -(-end // BLOCK)) if end > begin else ())


@lru_cache(maxsize=1)
def fetchers() -> ThreadPoolExecutor:
    """The threads that fetch: as many as there are connections at once, for all files together."""
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="magmax-fetch")
