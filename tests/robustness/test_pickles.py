"""Pickles: read where they hold tensors alone, refused where they hold code, which never runs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import magmax

torch = pytest.importorskip("torch")

Refusal = Callable[..., str]


class Trap:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
@pytest.mark.parametrize("way", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("inside_folder", [False, True])
def test_code_in_a_pickle_is_refused_and_never_runs(
    inside_folder: bool, way: str, suffix: str, base: Path, tmp_path: Path, refused: Refusal
) -> None:
    sprung = tmp_path / "sprung"
    content = {"weight": torch.ones(20, 8), "extra": Trap(sprung)}
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / f"model{suffix}"
    if way == "bare":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    words = refused(magmax.merge, "magmax", base, [folder if inside_folder else path], out=tmp_path / "out.safetensors")
    assert not sprung.exists()
    call = "torch.storage._load_from_bytes" if way == "bare" else "posix.mkdir"
    assert words.startswith(f"{path}: this pickle would call {call}, which is refused; it did not run")
    assert ("torch.save" if way == "bare" else f"magmax checkpoint convert {path} --out NEW.safetensors") in words


def test_a_whole_module_is_refused(base: Path, tmp_path: Path, refused: Refusal) -> None:
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert "magmax checkpoint convert" in refused(
        magmax.merge, "magmax", base, [path], out=tmp_path / "out.safetensors"
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_a_cut_pickle_is_refused(legacy: bool, base: Path, tmp_path: Path, refused: Refusal) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"weight": torch.ones(200, 8)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for size in (0, 1, 50, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        words = refused(magmax.merge, "magmax", base, [path], out=tmp_path / "out.safetensors")
        assert words.startswith(f"{path}: ")


@pytest.mark.parametrize("content", [b"hello, world", bytes(5000), b"\x80\x02.", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_pickle_is_refused(content: bytes, base: Path, tmp_path: Path, refused: Refusal) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    words = refused(magmax.merge, "magmax", base, [path], out=tmp_path / "out.safetensors")
    assert words.startswith(f"{path}: ")


@pytest.mark.parametrize("content", [[1, 2], 5, {"epoch": 3, "weight": torch.ones(3)}, {"a": {"b": torch.ones(3)}}])
def test_what_is_no_state_dict_is_refused(content: Any, base: Path, tmp_path: Path, refused: Refusal) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    words = refused(magmax.merge, "magmax", base, [path], out=tmp_path / "out.safetensors")
    assert "state dict" in words or "not a tensor" in words


def test_tensors_without_values_are_refused() -> None:
    """On the meta device, sparse, or of a type that cannot be stored."""
    fine = {"w": torch.ones(4)}
    for tensor in (torch.ones(4, device="meta"), torch.ones(4).to_sparse(), torch.ones(4, dtype=torch.complex128)):
        with pytest.raises(magmax.MagMaxError, match="w "):
            magmax.merge("magmax", fine, [{"w": tensor}])
