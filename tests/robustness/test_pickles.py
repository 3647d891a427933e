"""Pickles: read where they hold tensors alone, refused where they hold code, which never runs."""

from __future__ import annotations

import os
import pickle
import shlex
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import magmax
from magmax import cli
from magmax.checkpoints import open_checkpoint

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


WRAPPED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a training's checkpoint": ("c.pt", lambda weights: {"model": weights, "optimizer": {"state": {}}, "epoch": 3}),
    "a model's state": ("c.pth", lambda weights: {"model_state_dict": weights, "loss": 0.5}),
    "Lightning's": ("c.ckpt", lambda weights: {"state_dict": weights, "epoch": 3, "global_step": 5}),
    "torchvision's": ("c.pth.tar", lambda weights: {"state_dict": weights, "best_acc1": torch.tensor(0.5)}),
    "a whole module": ("c.bin", lambda weights: loaded_module(weights)),
    "nested": ("c.pt", lambda weights: {"a": {"model": weights}}),
    "with a number beside": ("c.pt", lambda weights: {**weights, "epoch": 3}),
    "a name with spaces": ("a b's.pt", lambda weights: {"model": weights}),
}


def loaded_module(weights: Any) -> Any:
    module = torch.nn.Linear(8, 20)
    module.load_state_dict(weights)
    return module


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_holds_a_model_in_something_else_names_the_command_that_takes_it_out(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command in the message is run as it stands, and then the merge works."""
    name, wrap = WRAPPED[kind]
    monkeypatch.chdir(tmp_path)
    weights = dict(torch.nn.Linear(8, 20).state_dict())
    torch.save(wrap(weights), name)
    base = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    with pytest.raises(magmax.MagMaxError, match="magmax checkpoint convert") as caught:
        magmax.merge("magmax", base, [name])
    command = shlex.split("magmax " + str(caught.value).rpartition(": magmax ")[2])
    with pytest.raises(SystemExit) as end:
        cli.run(command[1:])
    assert end.value.code == 0
    merged = magmax.merge("magmax", base, [command[-1]], scaling_factor=1.0)
    assert all(torch.equal(merged[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_the_reader_gives_what_torch_gives(zipped: bool, tmp_path: Path) -> None:
    """Of state dicts of every type, shape, stride and wrapping that torch.load(weights_only=True) reads."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(7, 5, 3, generator=generator)
    state: dict[str, Any] = {
        "plain": whole.clone(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": whole.permute(2, 0, 1),
        "part": whole[2:5, ::2, 1],
        "expanded": whole[:1, :1].expand(4, 6, 3),
        "parameter": torch.nn.Parameter(whole[0].clone()),
        "buffer": torch.nn.Buffer(whole[1].clone()),
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "long": torch.arange(6).view(2, 3),
        "bool": torch.rand(9, generator=generator) > 0.5,
        "complex": torch.randn(4, dtype=torch.complex64, generator=generator),
    }
    kinds = "float16 bfloat16 float64 uint8 int8 int16 int32"
    if zipped:  # torch cannot read the others in its old format
        kinds += " uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    for kind in kinds.split():
        state[kind] = torch.arange(5.0).to(getattr(torch, kind))
    state["tied"] = state["plain"]
    for content in (state, OrderedDict(state), {"state_dict": state, "epoch": 3}):
        torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
        expected = torch.load(tmp_path / "c.pt", weights_only=True)
        expected = expected.get("state_dict", expected) if "state_dict" in expected else expected
        opened = open_checkpoint(tmp_path / "c.pt")
        assert opened.specs.keys() | opened.aliases.keys() == expected.keys()
        assert opened.aliases == {"tied": "plain"}
        for key, tensor in expected.items():
            spec = opened.spec(key)
            read = opened.read(opened.resolve_alias(key), 0, spec.num_units)
            assert spec.shape == tuple(tensor.shape)
            flat = tensor.detach().contiguous().reshape(-1)
            assert read.tobytes() == (flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
            if spec.num_units > 3:
                assert opened.read(opened.resolve_alias(key), 1, 3).tobytes() == read[1:3].tobytes()
