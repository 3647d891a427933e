"""Ranges of bytes as servers give them: of the web, where every answer is checked, and of whatever fsspec opens."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any, NamedTuple

from ...errors import MagMaxError
from ..base import changed_file_error
from .urls import HTTP_SCHEMES, RemoteFileNotFoundError, display_url, open_filesystem

READ_TIMEOUT = 30.0
"""Seconds without a single byte after which a connection counts as broken."""
LEAST_BYTES = 1 << 14
"""Bytes that must come in each such time: a server that sends one a second would otherwise be waited for for ever."""
STAMP_FIELDS = (
    "ETag",
    "etag",
    "generation",
    "version_id",
    "VersionId",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
"""What file systems call that which changes with a file."""


class RangeResponse(NamedTuple):
    """The answer to a range request: bytes, size of the whole file, and a stamp that changes with the file."""

    content: bytes
    size: int
    stamp: list[object]


class RemoteSource(ABC):
    """A file, as far as a server gives it."""

    @abstractmethod
    def read_range(self, begin: int, end: int) -> RangeResponse:
        """Bytes begin..end, or fewer where the file ends before; one try. The stamp may be left out (empty)."""

    @abstractmethod
    def read_stamp(self) -> list[object]:
        """Size, and ETag or time, as the server tells them now."""


class FsspecSource(RemoteSource):
    """A file in an object store, or in any other file system of fsspec's."""

    def __init__(self, url: str) -> None:
        self._filesystem, self._path = open_filesystem(url)
        self._label, self._size = display_url(url), -1

    def read_range(self, begin: int, end: int) -> RangeResponse:
        stamp = [] if self._size >= 0 else self.read_stamp()
        if stamp:
            self._size = int(str(stamp[0]))
        end = min(end, self._size)
        content = self._filesystem.cat_file(self._path, start=begin, end=end) if begin < end else b""
        return RangeResponse(content, self._size, stamp)

    def read_stamp(self) -> list[object]:
        self._filesystem.invalidate_cache()
        info: dict[str, Any] = self._filesystem.info(self._path)
        if info.get("type") == "directory":
            raise RemoteFileNotFoundError(f"{self._label}: is a folder")
        return [info["size"], *(str(info[name]) for name in STAMP_FIELDS if info.get(name) is not None)]


class HttpSource(RemoteSource):
    """A file of an HTTP server. Every answer must be of the asked range and of the file as it was first seen."""

    def __init__(self, url: str) -> None:
        self._filesystem, self._url = open_filesystem(url)
        self._label = display_url(url)
        self._sync: Any = import_module("fsspec.asyn").sync
        self._aiohttp: Any = import_module("aiohttp")
        self._first_stamp: list[object] = []

    def read_range(self, begin: int, end: int) -> RangeResponse:
        try:
            return self._sync(self._filesystem.loop, self._read_range, begin, end)
        except TimeoutError as error:
            raise ConnectionError(f"nothing came for {READ_TIMEOUT:g} s") from error

    def read_stamp(self) -> list[object]:
        return self.read_range(0, 1).stamp

    async def _read_range(self, begin: int, end: int) -> RangeResponse:
        session = await self._filesystem.set_session()
        settings = dict(self._filesystem.kwargs)
        headers = {**settings.pop("headers", {}), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        settings["timeout"] = self._aiohttp.ClientTimeout(total=None, sock_connect=READ_TIMEOUT, sock_read=READ_TIMEOUT)
        async with session.get(self._filesystem.encode_url(self._url), headers=headers, **settings) as response:
            size = self._total_size(response, begin)
            stamp: list[object] = [size, response.headers.get("ETag") or response.headers.get("Last-Modified")]
            self._first_stamp = self._first_stamp or stamp
            if stamp != self._first_stamp:
                raise changed_file_error(self._label)
            wanted = max(0, min(end, size) - begin)
            content = bytearray()
            window_began, window_bytes = time.monotonic(), 0
            async for part in response.content.iter_any():
                content += part
                if time.monotonic() - window_began > READ_TIMEOUT:
                    came = len(content) - window_bytes
                    if came < min(LEAST_BYTES, wanted):
                        raise ConnectionError(f"the server sent {came:,} bytes in {READ_TIMEOUT:g} s")
                    window_began, window_bytes = time.monotonic(), len(content)
                if len(content) > wanted:
                    raise MagMaxError(
                        f"{self._label}: the server sends more than the bytes {begin:,} to {begin + wanted:,} that "
                        "were asked for; download the file first"
                    )
            return RangeResponse(bytes(content), size, stamp)

    def _total_size(self, response: Any, begin: int) -> int:
        """The bytes of the whole file, from an answer that holds a part of it."""
        status = int(response.status)
        if status in (404, 410):
            raise FileNotFoundError(self._label)
        if status in (401, 403):
            raise PermissionError(f"status {status}")
        if status == 412:
            raise changed_file_error(self._label)
        content_range = str(response.headers.get("Content-Range", ""))
        if status == 416 and (match := re.fullmatch(r"bytes \*/(\d+)", content_range)):
            return int(match[1])
        if status == 200:
            raise MagMaxError(
                f"{self._label}: the server sends whole files only, and no part of one; download it first"
            )
        if status != 206:
            kind = ConnectionError if status >= 500 or status in (408, 425, 429) else MagMaxError
            raise kind(f"{self._label}: the server answers with status {status} ({response.reason})")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range)
        if match is None or int(match[1]) != begin:
            raise MagMaxError(
                f"{self._label}: the server was asked for the bytes from {begin:,} on and says that it sends "
                f"{content_range or 'others'!r}; download the file first"
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise MagMaxError(f"{self._label}: the server compresses what it sends; download the file first")
        return int(match[3])


def open_source(url: str) -> RemoteSource:
    """Return what gives the file of a URL."""
    return HttpSource(url) if url.lower().startswith(HTTP_SCHEMES) else FsspecSource(url)
