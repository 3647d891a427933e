"""Outputs on other machines: made here first, then uploaded so that they appear at once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ...errors import MagMaxError, UnfinishedError
from ..base import PREFIX
from .remote_file import in_parallel
from .urls import WEB, cache_folder, file_system, patiently, shown

MARKER = ".magmax-uploading"
"""An object in a folder whose upload has begun and not ended."""
PIECE = 8 << 20


def staged(url: str) -> Path:
    """Where the output for a URL is made on this machine."""
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
        self.name = shown(url)
        if url.lower().startswith((*WEB, PREFIX)):
            raise MagMaxError(f"{self.name}: cannot be written to; merge into a folder and upload that")
        self._files, path = file_system(url)
        self._path = path.rstrip("/")

    def problems(self, folder: bool, inputs: Collection[str]) -> list[str]:
        """What forbids to write here, seen without writing."""
        if self.name in inputs or any(each.startswith(self.name + "/") for each in inputs):
            return [f"{self.name}: is one of the inputs, or holds one; choose another place for the output"]
        return patiently(self.name, lambda: self._taken(folder))

    def begin(self, folder: bool) -> None:
        """Write a mark, which shows before any work whether this place can be written; in a folder it stays."""
        mark = self._inside(MARKER) if folder else f"{self._path}{MARKER}"
        patiently(self.name, lambda: self._files.pipe_file(mark, b""))
        if not folder:
            self._delete(mark)

    def give_up(self, folder: bool) -> None:
        """Take the mark back, if nothing else is there."""
        found: list[str] = patiently(self.name, lambda: self._files.find(self._path)) if folder else []
        if found == [self._inside(MARKER)]:
            self._delete(found[0])

    def send(self, path: Path) -> None:
        """Upload a file, or all files of a folder.

        Raises:
            UnfinishedError: what was made here is kept, and what was written there is given up.
        """
        if path.is_file():
            self._commit(self._written(path, self._path), path, self._path)
            return
        names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        last = [n for n in names if n.endswith(".index.json")] or [n for n in names if n.endswith(".safetensors")]
        order = [name for name in names if name not in last] + last
        opened: dict[str, Any] = {}
        try:
            in_parallel(lambda n: opened.__setitem__(n, self._written(path / n, self._inside(n))), order)
            for name in order:
                self._commit(opened.pop(name), path / name, self._inside(name))
        finally:
            for file in opened.values():
                file.discard()
        self._delete(self._inside(MARKER))

    def _written(self, source: Path, to: str) -> Any:
        """The file open there, with everything in it but not yet to be seen."""

        def once() -> Any:
            file = self._files.open(to, "wb", autocommit=False)
            try:
                with open(source, "rb") as content:
                    while piece := content.read(PIECE):
                        file.write(piece)
                file.close()
            except BaseException:
                file.discard()
                raise
            return file

        return patiently(f"{self.name}: {source.name}", once)

    def _commit(self, file: Any, source: Path, to: str) -> None:
        what = f"{self.name}: {source.name}"
        patiently(what, file.commit)
        self._files.invalidate_cache()
        size = patiently(what, lambda: self._files.info(to)["size"])
        if size != source.stat().st_size:
            raise UnfinishedError(f"{what}: has {size:,} of {source.stat().st_size:,} bytes there; run this again")

    def _taken(self, folder: bool) -> list[str]:
        self._files.invalidate_cache()
        found: list[str] = self._files.find(self._path)
        inside = [name for name in found if name.startswith(self._path + "/")]
        if not folder and inside:
            return [f"{self.name}: is a folder; choose another name"]
        if folder and found and self._inside(MARKER) not in found:
            return [f"{self.name}: is there already ({len(found)} objects); delete it, or choose another place"]
        return []

    def _delete(self, path: str) -> None:
        patiently(self.name, lambda: self._files.rm_file(path))

    def _inside(self, name: str) -> str:
        return f"{self._path}/{name}"
