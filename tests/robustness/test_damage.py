"""Files that are cut, corrupt, or that lie about themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.robustness.files import (
    build_file,
    header_entries,
    small_model,
    tensor_data,
    write_safetensors,
    write_sharded,
)

Refusal = Callable[..., str]

MODEL = small_model(1)
TOLD = header_entries(MODEL)
DATA = tensor_data(MODEL)


def telling(key: str, **words: Any) -> dict[str, Any]:
    """The right header but for one tensor's words."""
    return TOLD | {key: TOLD[key] | words}


def twice(key: str) -> bytes:
    text = json.dumps(TOLD)
    return f'{{"{key}": {json.dumps(TOLD[key])}, {text[1:]}'.encode()


def offsets(key: str, begin: int, end: int) -> dict[str, Any]:
    first, last = TOLD[key]["data_offsets"]
    return telling(key, data_offsets=[first + begin, last + end])


LIES: dict[str, tuple[Any, str]] = {
    "a gap before a tensor": (offsets("position_ids", 4, 4), "leaves a hole"),
    "two tensors in one place": (offsets("position_ids", -4, -4), "overlaps"),
    "offsets beyond the end": (offsets("weight", 8, 8), "truncated or corrupt"),
    "offsets far beyond the end": (offsets("weight", 2**62, 2**62), "truncated or corrupt"),
    "offsets in the wrong order": (telling("bias", data_offsets=[36, 0]), "truncated or corrupt"),
    "more bytes than the shape takes": (telling("bias", shape=[8]), "gives bias 36 bytes, but F32 [8] takes 32"),
    "fewer bytes than the type takes": (telling("bias", dtype="F64"), "gives bias 36 bytes, but F64 [9] takes 72"),
    "a shape that overflows 64 bits": (telling("bias", shape=[2**40, 2**40]), "more elements than any file"),
    "a length of thousands of digits": (telling("bias", shape=[10**4000] * 2), "bias"),
    "a million dimensions": (telling("bias", shape=[2] * 1_000_000), "bias"),
    "a negative length": (telling("bias", shape=[-9]), "[-9]"),
    "two negative lengths": (telling("weight", shape=[-20, -8]), "weight"),
    "a length that is true": (telling("scale", shape=[True]), "[True]"),
    "a length that is a fraction": (telling("bias", shape=[9.0]), "[9.0]"),
    "a length that is text": (telling("bias", shape=["9"]), "['9']"),
    "a shape that is text": (telling("scale", shape=""), "scale"),
    "a shape that is a map": (telling("scale", shape={}), "scale"),
    "no shape": (telling("scale", shape=None), "scale"),
    "offsets that are true": (telling("bias", data_offsets=[False, 36]), "bias"),
    "one offset": (telling("bias", data_offsets=[0]), "two data_offsets"),
    "three offsets": (telling("bias", data_offsets=[0, 36, 36]), "two data_offsets"),
    "a type that does not exist": (telling("bias", dtype="F33"), "stores bias as F33"),
    "a type that is a list": (telling("bias", dtype=["F32"]), "bias"),
    "a tensor that is a number": (TOLD | {"bias": 3}, "bias"),
    "a tensor that is null": (TOLD | {"bias": None}, "bias"),
    "a tensor without a type": (TOLD | {"bias": {"shape": [9], "data_offsets": [0, 36]}}, "bias"),
    "a tensor left out": ({key: TOLD[key] for key in ("bias", "position_ids", "scale")}, "after its last tensor"),
    "no tensor": ({}, "after its last tensor"),
    "a tensor told twice": (twice("bias"), "twice"),
    "a word told twice": (json.dumps(TOLD).replace('"shape"', '"dtype"', 1).encode(), "twice"),
    "metadata that is a list": (TOLD | {"__metadata__": []}, "__metadata__"),
    "metadata that holds numbers": (TOLD | {"__metadata__": {"format": 1}}, "__metadata__"),
    "a list": (["bias"], "not a JSON object"),
    "a number": (b"17", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "nothing": (b"", "not JSON"),
    "half of it": (json.dumps(TOLD).encode()[:80], "not JSON"),
    "pickled": (b"\x80\x04\x95\x0b\x00", "not JSON"),
    "UTF-16": (json.dumps(TOLD).encode("utf-16"), "not JSON"),
    "a name that is no text": (json.dumps(TOLD).replace("bias", "\\ud800").encode(), "not JSON"),
    "nested without end": (b"[" * 100_000, "not JSON"),
    "a number of ten thousand digits": (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
}


@pytest.mark.parametrize(("header", "said"), LIES.values(), ids=LIES.keys())
@pytest.mark.parametrize("role", ["base", "model"])
def test_a_header_that_lies_is_refused_with_the_file_and_the_reason(
    role: str, header: Any, said: str, tuned: Path, tmp_path: Path, merge_refused: Refusal
) -> None:
    liar = tmp_path / "liar.safetensors"
    liar.write_bytes(build_file(header, DATA))
    words = merge_refused(tuned, into=liar) if role == "base" else merge_refused(liar)
    assert words.startswith(f"{liar}: ")
    assert said in words
    assert len(words) < 2000


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10_000])
def test_a_header_longer_than_its_file_is_refused(length: int, tmp_path: Path, merge_refused: Refusal) -> None:
    liar = tmp_path / "liar.safetensors"
    liar.write_bytes(length.to_bytes(8, "little") + build_file(TOLD, DATA)[8:])
    words = merge_refused(liar)
    assert f"{liar}: the file promises a header of {length:,} bytes" in words


def test_a_file_cut_at_any_byte_is_refused(tuned: Path, tmp_path: Path, merge_refused: Refusal) -> None:
    whole = tuned.read_bytes()
    for size in [*range(12), *range(12, len(whole), 31), len(whole) - 1]:
        tuned.write_bytes(whole[:size])
        assert merge_refused(tuned).startswith(f"{tuned}: the file ")


def test_bytes_after_the_end_are_refused(tuned: Path, merge_refused: Refusal) -> None:
    tuned.write_bytes(tuned.read_bytes() + b"\0")
    assert "1 bytes after its last tensor" in merge_refused(tuned)


def test_a_file_cut_while_it_is_read_is_refused(base: Path, tuned: Path, refused: Refusal, tmp_path: Path) -> None:
    import magmax

    opened = magmax.open_checkpoint(tuned)
    tuned.write_bytes(tuned.read_bytes()[:-100])
    words = refused(magmax.merge, "magmax", base, [opened], out=tmp_path / "out.safetensors")
    assert words.startswith(f"{tuned}: the file ends at byte")


def test_what_is_not_there_or_of_no_known_kind_is_refused(tuned: Path, tmp_path: Path, merge_refused: Refusal) -> None:
    assert "there is no such file or folder" in merge_refused(tmp_path / "nowhere.safetensors")
    text = tmp_path / "notes.txt"
    text.write_text("a model")
    assert ".safetensors" in merge_refused(text)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: the folder holds no weights" in merge_refused(empty)
    for name in ("one", "two"):
        write_safetensors(tmp_path / "both" / f"{name}.safetensors", MODEL)
    assert "2 weight files and no index" in merge_refused(tmp_path / "both")


SHARDS = {"1.safetensors": {k: MODEL[k] for k in ("bias", "scale")}, "2.safetensors": {"weight": MODEL["weight"]}}
PLACES = {"bias": "1.safetensors", "scale": "1.safetensors", "weight": "2.safetensors"}

INDEXES: dict[str, tuple[Any, str]] = {
    "a file above the folder": (PLACES | {"weight": "../2.safetensors"}, "outside the folder"),
    "a file of the system": (PLACES | {"weight": "/etc/passwd"}, "outside the folder"),
    "a file below the folder": (PLACES | {"weight": "sub/2.safetensors"}, "outside the folder"),
    "the folder itself": (PLACES | {"weight": "."}, "outside the folder"),
    "the folder above": (PLACES | {"weight": ".."}, ".."),
    "no name": (PLACES | {"weight": ""}, "not there"),
    "a name with a zero byte": (PLACES | {"weight": "a\0b"}, "not there"),
    "a name longer than names can be": (PLACES | {"weight": "a" * 5000}, "not there"),
    "a file that is not there": (PLACES | {"weight": "3.safetensors"}, "names 3.safetensors, which is not there"),
    "the wrong file": (PLACES | {"weight": "1.safetensors"}, "places weight in 1.safetensors, which does not hold it"),
    "a tensor that is nowhere": (PLACES | {"head": "1.safetensors"}, "places head in 1.safetensors"),
    "no tensor": ({}, "not a map"),
    "a list": (["1.safetensors"], "not a map"),
    "numbers": (PLACES | {"weight": 2}, "not a map"),
    "null": (None, "not a map"),
}


@pytest.mark.parametrize(("places", "said"), INDEXES.values(), ids=INDEXES.keys())
def test_an_index_that_lies_is_refused(places: Any, said: str, tmp_path: Path, merge_refused: Refusal) -> None:
    folder = write_sharded(tmp_path / "model", SHARDS, {"weight_map": places})
    write_safetensors(tmp_path / "2.safetensors", {"weight": MODEL["weight"]})
    words = merge_refused(folder)
    assert str(folder) in words
    assert said in words


def test_all_lies_of_an_index_are_told_at_once(tmp_path: Path, merge_refused: Refusal) -> None:
    folder = write_sharded(
        tmp_path / "model", SHARDS, {"weight_map": PLACES | {"a": "3.safetensors", "b": "4.safetensors"}}
    )
    words = merge_refused(folder)
    assert "names 3.safetensors" in words
    assert "names 4.safetensors" in words


@pytest.mark.parametrize("text", ["", "[]", "{}", "nothing", '{"weight_map": ', "[" * 100_000, "\ud800"])
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path, merge_refused: Refusal) -> None:
    folder = write_sharded(tmp_path / "model", SHARDS)
    index = folder / "model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert f"{index}: is not an index with a weight_map" in merge_refused(folder)


def test_two_indexes_of_which_none_comes_first_are_refused(tmp_path: Path, merge_refused: Refusal) -> None:
    folder = write_sharded(tmp_path / "model", SHARDS)
    index = (folder / "model.safetensors.index.json").rename(folder / "one.safetensors.index.json")
    (folder / "two.safetensors.index.json").write_text("{}")
    assert f"several indexes (one.safetensors.index.json, two.safetensors.index.json); name one: {index}" in (
        merge_refused(folder)
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1234567\n"
OTHER_FORMATS: dict[str, tuple[str, bytes, str]] = {
    "a pointer": ("model.safetensors", POINTER, "git lfs pull"),
    "a pointer in a pickle's place": ("pytorch_model.bin", POINTER, "git lfs pull"),
    "gguf": ("model.gguf", b"GGUF\x03\0\0\0" + bytes(50), "GGUF"),
    "gguf under another name": ("model.safetensors", b"GGUF\x03\0\0\0" + bytes(50), "GGUF"),
    "a login page": ("model.safetensors", b"<!doctype html><html>" + b" " * 50, "web page"),
    "a pickle": ("model.safetensors", b"\x80\x02}q\0." + bytes(50), "name it .pt"),
    "an archive": ("model.safetensors", b"PK\x03\x04" + bytes(50), "name it .pt"),
    "hdf5": ("tf_model.h5", b"\x89HDF\r\n\x1a\n" + bytes(50), "from_tf=True"),
    "flax": ("flax_model.msgpack", b"\x81\xa1" + bytes(50), "from_flax=True"),
    "onnx": ("model.onnx", bytes(50), "ONNX"),
    "json": ("model.safetensors", b'{"weight_map": {}}' + b" " * 50, "JSON"),
    "gzip": ("model.bin", b"\x1f\x8b\x08" + bytes(50), "gzip"),
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_another_format_is_named_with_what_to_do(kind: str, tmp_path: Path, merge_refused: Refusal) -> None:
    name, content, words = OTHER_FORMATS[kind]
    path = tmp_path / "model" / name
    path.parent.mkdir()
    path.write_bytes(content)
    for given in (path, path.parent):
        said = merge_refused(given)
        assert said.startswith(str(given))
        assert words in said


FOLDERS: dict[str, tuple[list[str], str]] = {
    "zero": (["zero_to_fp32.py", "latest", "global_step5/x_optim_states.pt"], "zero_to_fp32.py {0} OUT"),
    "zero, its inner folder": (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "ZeRO"),
    "a pipeline": (["model_index.json", "unet/a.safetensors", "vae/b.safetensors"], "{0}/unet, {0}/vae"),
    "a training": (["checkpoint-5/model.safetensors", "checkpoint-9/model.safetensors"], "such as {0}/checkpoint-9"),
    "flax and tensorflow": (["flax_model.msgpack", "tf_model.h5", "config.json"], "from_flax=True"),
    "gguf": (["a-Q4.gguf", "a-Q5.gguf", "README.md"], "a-Q4.gguf, a-Q5.gguf, which are GGUF"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_kind_is_named_with_what_to_give(kind: str, tmp_path: Path, merge_refused: Refusal) -> None:
    files, words = FOLDERS[kind]
    model = tmp_path / "model"
    for name in files:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(b"")
    said = merge_refused(model)
    assert said.startswith(f"{model}: ")
    assert words.format(model) in said
