"""Outputs on other machines: made here first, then uploaded so that they appear at once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ...errors import MagMaxError, UnfinishedError
from ..base import HUB_PREFIX
from .remote_file import map_parallel
from .urls import HTTP_SCHEMES, cache_folder, display_url, open_filesystem, with_retries

UPLOAD_MARKER = ".magmax-uploading"
"""An object in a folder whose upload has begun and not ended."""
PART_BYTES = 8 << 20


def staging_path(url: str) -> Path:
    """Return where the output for a URL is made on this machine."""
    place = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(cache_folder(), "outgoing", place, PurePosixPath(urlsplit(url).path).name)


class Upload:
    """The way of an output to a URL: a single object, or a folder of them.

    No object is there before all of it is: what is written appears when it is committed, as a multipart upload does.
    In a folder everything is written first, then committed, the index or else the weights last.

    Raises:
        MagMaxError: a place that cannot be written through fsspec.
    """

    def __init__(self, url: str) -> None:
        self.label = display_url(url)
        if url.lower().startswith((*HTTP_SCHEMES, HUB_PREFIX)):
            raise MagMaxError(f"{self.label}: cannot be written to; merge into a folder and upload that")
        self._filesystem, path = open_filesystem(url)
        self._path = path.rstrip("/")

    def find_problems(self, is_folder: bool, inputs: Collection[str]) -> list[str]:
        """Return what forbids to write here, seen without writing."""
        if self.label in inputs or any(each.startswith(self.label + "/") for each in inputs):
            return [f"{self.label}: is one of the inputs, or holds one; choose another place for the output"]
        return with_retries(self.label, lambda: self._find_conflicts(is_folder))

    def write_marker(self, is_folder: bool) -> None:
        """Write a mark, which shows before any work whether this place can be written; in a folder it stays."""
        mark = self._path_of(UPLOAD_MARKER) if is_folder else f"{self._path}{UPLOAD_MARKER}"
        with_retries(self.label, lambda: self._filesystem.pipe_file(mark, b""))
        if not is_folder:
            self._delete(mark)

    def abandon(self, is_folder: bool) -> None:
        """Take the mark back, if nothing else is there."""
        paths: list[str] = with_retries(self.label, lambda: self._filesystem.find(self._path)) if is_folder else []
        if paths == [self._path_of(UPLOAD_MARKER)]:
            self._delete(paths[0])

    def send(self, path: Path) -> None:
        """Upload a file, or all files of a folder.

        Raises:
            UnfinishedError: what was made here is kept, and what was written there is given up.
        """
        if path.is_file():
            self._commit(self._write_uncommitted(path, self._path), path, self._path)
            return
        names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        last = [n for n in names if n.endswith(".index.json")] or [n for n in names if n.endswith(".safetensors")]
        order = [name for name in names if name not in last] + last
        opened: dict[str, Any] = {}
        try:
            map_parallel(lambda n: opened.__setitem__(n, self._write_uncommitted(path / n, self._path_of(n))), order)
            for name in order:
                self._commit(opened.pop(name), path / name, self._path_of(name))
        finally:
            for file in opened.values():
                file.discard()
        self._delete(self._path_of(UPLOAD_MARKER))

    def _write_uncommitted(self, source: Path, to: str) -> Any:
        """The file open there, with everything in it but not yet to be seen."""

        def once() -> Any:
            file = self._filesystem.open(to, "wb", autocommit=False)
            try:
                with open(source, "rb") as content:
                    while piece := content.read(PART_BYTES):
                        file.write(piece)
                file.close()
            except BaseException:
                file.discard()
                raise
            return file

        return with_retries(f"{self.label}: {source.name}", once)

    def _commit(self, file: Any, source: Path, to: str) -> None:
        what = f"{self.label}: {source.name}"
        with_retries(what, file.commit)
        self._filesystem.invalidate_cache()
        size = with_retries(what, lambda: self._filesystem.info(to)["size"])
        if size != source.stat().st_size:
            raise UnfinishedError(f"{what}: has {size:,} of {source.stat().st_size:,} bytes there; run this again")

    def _find_conflicts(self, is_folder: bool) -> list[str]:
        self._filesystem.invalidate_cache()
        paths: list[str] = self._filesystem.find(self._path)
        inside = [name for name in paths if name.startswith(self._path + "/")]
        if not is_folder and inside:
            return [f"{self.label}: is a folder; choose another name"]
        if is_folder and paths and self._path_of(UPLOAD_MARKER) not in paths:
            return [f"{self.label}: is there already ({len(paths)} objects); delete it, or choose another place"]
        return []

    def _delete(self, path: str) -> None:
        with_retries(self.label, lambda: self._filesystem.rm_file(path))

    def _path_of(self, name: str) -> str:
        return f"{self._path}/{name}"
