"""One file out of an archive: wheels and zips, tarballs, Debian packages, and archives inside archives."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ARCHIVE_ERRORS = (KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError)
"""What `extract` raises where the archive is damaged or lacks the file."""

AR_MAGIC = b"!<arch>\n"  # a Debian package is an ar archive: this, then members with headers of 60 bytes


def extract(archive: Path, steps: list[str], target: Path) -> None:
    """Writes the last of the steps to the target; each step before it is an archive inside the one before."""
    with _open_member(archive, steps[0]) as inner:
        if len(steps) == 1:
            _copy(inner, target)
            return
        with tempfile.TemporaryDirectory(dir=target.parent.parent) as scratch:
            nested = Path(scratch, Path(steps[0]).name)
            _copy(inner, nested)
            extract(nested, steps[1:], target)


def _copy(source: IO[bytes], target: Path) -> None:
    with target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


@contextmanager
def _open_member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    """The bytes of one member."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened, opened.open(name) as member:
            yield member
        return
    with archive.open("rb") as file:
        if archive.suffix == ".deb":
            _seek_to_data(file)
        # As a stream: inside a Debian package the tarball does not begin where the file does.
        with tarfile.open(fileobj=file, mode="r|*") as opened:
            for info in opened:
                member = opened.extractfile(info) if info.name == name else None
                if member is not None:
                    yield member
                    return
    raise KeyError(f"there is no file {name!r} in {archive.name}")


def _seek_to_data(file: IO[bytes]) -> None:
    """Moves to the tarball of a Debian package's files, the member data.tar of its ar archive."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise tarfile.ReadError("not a Debian package")
    while len(header := file.read(60)) == 60:
        if header.startswith(b"data.tar"):
            return
        size = int(header[48:58])
        file.seek(size + size % 2, 1)
    raise tarfile.ReadError("a Debian package without files")
