"""A safetensors file written in one pass: header first, then the tensors in order, in parts of any size."""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

Shapes = dict[str, tuple[int, ...]]
ITEM_BYTES = {"F32": 4, "BF16": 2}


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one tensor: `tensor_bytes((2, 3), "BF16")` is 12."""
    return int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]


class StreamWriter:
    """Opens `path`, writes the header for `shapes`, then takes the tensors' bytes in that order."""

    def __init__(self, path: Path, shapes: Shapes, dtype: str) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + tensor_bytes(shape, dtype)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._left = end
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, values: np.ndarray) -> None:
        self._left -= values.nbytes
        self._file.write(values.data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None and self._left:
            raise ValueError(f"{self._file.name}: {self._left} bytes were announced and not written")
