from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.robustness.files import small_model, write_safetensors

import magmax


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_safetensors(tmp_path / "base.safetensors", small_model(0))


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return write_safetensors(tmp_path / "tuned.safetensors", small_model(1))


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """The words with which something is refused, after seeing that it changed nothing on the disk."""

    def refusal(work: Callable[..., Any], *given: Any, **more: Any) -> str:
        before = read_folder(tmp_path)
        with pytest.raises(magmax.MagMaxError) as caught:
            work(*given, **more)
        assert read_folder(tmp_path) == before
        return str(caught.value)

    return refusal


@pytest.fixture
def merge_refused(refused: Callable[..., str], base: Path, tmp_path: Path) -> Callable[..., str]:
    """The words with which a merge of these models into the base is refused, to a file and to a folder alike."""

    def refusal(*models: Path | str, into: Path | str = base) -> str:
        words = [
            refused(magmax.merge, "magmax", into, list(models), out=tmp_path / out)
            for out in ("out.safetensors", "out")
        ]
        assert words[0] == words[1]
        return words[0]

    return refusal


def read_folder(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: the content of files, where links lead, and that folders are there."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found
