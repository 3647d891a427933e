"""Checkpoints written byte by byte, so that they can also be written wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPE_NAMES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8", "bool": "BOOL"}

Tensors = Mapping[str, NDArray]


def small_model(seed: int) -> dict[str, NDArray]:
    """Four tensors: rows, a vector, a scalar, and one that is not merged."""
    draw = np.random.default_rng(seed)
    return {
        "bias": draw.normal(size=9).astype(np.float32),
        "position_ids": np.arange(3),
        "scale": np.array(seed + 0.5, np.float32),
        "weight": draw.normal(size=(20, 8)).astype(np.float32),
    }


def header_entries(tensors: Tensors) -> dict[str, Any]:
    """What a right header says of tensors that lie one after the other."""
    told: dict[str, Any] = {}
    at = 0
    for key, tensor in tensors.items():
        dtype, shape = DTYPE_NAMES[tensor.dtype.name], list(tensor.shape)
        told[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    return told


def tensor_data(tensors: Tensors) -> bytes:
    return b"".join(tensor.tobytes() for tensor in tensors.values())


def build_file(header: Any, content: bytes) -> bytes:
    """A safetensors file of any header, right or wrong: JSON to be, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A right safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"__metadata__": dict(metadata)} | header_entries(tensors) if metadata else header_entries(tensors)
    path.write_bytes(build_file(header, tensor_data(tensors)))
    return path


def write_sharded(folder: Path, shards: Mapping[str, Tensors], index: Any = None) -> Path:
    """A folder of shards with an index: the right one, or the one given."""
    for name, tensors in shards.items():
        write_safetensors(folder / name, tensors)
    right = {"weight_map": {key: name for name, tensors in shards.items() for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(right if index is None else index))
    return folder


def read_tensor_bytes(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a right safetensors file, by a reader that knows nothing of ours."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    told = json.loads(whole[8 : 8 + length])
    spans = {key: entry["data_offsets"] for key, entry in told.items() if key != "__metadata__"}
    return {key: whole[8 + length + begin : 8 + length + end] for key, (begin, end) in spans.items()}
