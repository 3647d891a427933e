"""Element types as safetensors names them, and the one place where half precision is widened and rounded."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BITS_PER_ELEMENT = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip
"""Bits an element, for every type a safetensors file may name."""

STORAGE_DTYPES = {"F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
"""The floating types that can be merged, and the numpy type that holds each (bfloat16: its bits)."""

FLOAT_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
BYTE_DTYPE = np.dtype("u1")


class TensorSpec(NamedTuple):
    """The type (a key of `BITS_PER_ELEMENT`) and shape of a tensor, as a checkpoint's header states them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_mergeable(self) -> bool:
        """Return whether the tensor takes part in a merge; every other tensor is carried over byte by byte."""
        return self.dtype in STORAGE_DTYPES

    @property
    def numel(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def nbytes(self) -> int:
        return (self.numel * BITS_PER_ELEMENT[self.dtype] + 7) // 8

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """The numpy type of one unit on disk: an element of a floating tensor, a byte of any other."""
        return STORAGE_DTYPES.get(self.dtype, BYTE_DTYPE)

    @property
    def num_units(self) -> int:
        return self.numel if self.is_mergeable else self.nbytes

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def compute_dtype(dtype: str) -> np.dtype[Any]:
    """The type a merge computes in: float64 for float64, float32 for everything narrower."""
    return np.dtype(np.float64) if dtype == "F64" else np.dtype(np.float32)


def widen(raw: NDArray[Any], dtype: str, out_dtype: np.dtype[Any]) -> NDArray[Any]:
    """Stored units as numbers, exactly; may return `stored` itself. bfloat16 is the upper half of a float32."""
    if dtype != "BF16":
        return raw.astype(out_dtype, copy=False)
    wide = np.empty(raw.shape, np.uint32)
    np.copyto(wide, raw)
    wide <<= 16
    return wide.view(np.float32).astype(out_dtype, copy=False)


def narrow(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Numbers as stored units, rounded once to nearest, ties to even. May return `values` itself."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(STORAGE_DTYPES[dtype], copy=False)
    if values.dtype == np.float64:
        values = _round_to_odd(values)
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    stored = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        stored[nan] = (bits[nan] >> 16).astype(np.uint16) | np.uint16(0x40)
    return stored


def _round_to_odd(values: NDArray[Any]) -> NDArray[Any]:
    """float64 to float32 so that a second rounding, to a narrower type, gives what one rounding would."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    inexact = near.astype(np.float64) != values
    beyond = np.abs(near.astype(np.float64)) > np.abs(values)
    bits = near.view(np.uint32)
    bits -= (inexact & beyond).astype(np.uint32)
    bits |= inexact.astype(np.uint32)
    return near
