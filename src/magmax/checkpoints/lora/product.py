"""Products of an adapter's two factors, computed in the ranges in which they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base import Checkpoint
from ..dtypes import TensorSpec, widen
from .peft import LowRankUpdate, PeftAdapter, StoredFactor

TILE_ELEMENTS = 1 << 16
"""Elements worked on at once, so that they stay in the processor's cache; no result depends on it."""


class LoraTaskVectors(Checkpoint):
    """The task vectors of an adapter, s * B A, without the base; zero for each of `specs` that it does not target.

    Every product and sum is rounded in the type that `specs` names (F32 or F64), as in `LoraModel`.
    """

    def __init__(
        self, adapter: PeftAdapter, updates: Mapping[str, LowRankUpdate], specs: dict[str, TensorSpec]
    ) -> None:
        super().__init__(adapter.label, specs)
        self.path, self._adapter, self._updates = adapter.path, adapter, updates

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        if key not in self._updates:
            return np.zeros(stop - start, self.specs[key].storage_dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            return compute_delta(self._adapter, self._updates[key], start, stop, self.specs[key].storage_dtype)

    def files(self) -> list[Path]:
        return self._adapter.files()

    def header_digests(self) -> list[str]:
        return self._adapter.header_digests()


def compute_delta(
    weights: Checkpoint, update: LowRankUpdate, start: int, stop: int, out_dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Units start..stop of scale * (left^T right), flattened."""
    out = np.empty(stop - start, out_dtype)
    for at, rows, columns in _split_rectangles(start, stop, update.right.length):
        shape = rows.stop - rows.start, columns.stop - columns.start
        _add_product(weights, update, rows, columns, out[at : at + shape[0] * shape[1]].reshape(shape))
    out *= out.dtype.type(update.scale)
    return out


def read_factor(weights: Checkpoint, factor: StoredFactor, part: slice, out_dtype: np.dtype[Any]) -> NDArray[Any]:
    """A part of a factor's length, as (rank, part) in the compute type."""
    name, rank, length = weights.resolve_alias(factor.tensor_name), factor.rank, factor.length
    count = part.stop - part.start
    if not factor.is_rank_first:
        stored = weights.read(name, part.start * rank, part.stop * rank).reshape(count, rank).T
    elif count == length:
        stored = weights.read(name, 0, rank * length).reshape(rank, length)
    else:
        starts = range(part.start, rank * length, length)
        stored = np.stack([weights.read(name, at, at + count) for at in starts])
    return widen(np.ascontiguousarray(stored), weights.spec(name).dtype, out_dtype)


def _add_product(weights: Checkpoint, update: LowRankUpdate, rows: slice, columns: slice, out: NDArray[Any]) -> None:
    """Fill `out` with left^T right for these rows and columns: a product and a sum for each k, tile by tile."""
    left = read_factor(weights, update.left, rows, out.dtype)
    right = read_factor(weights, update.right, columns, out.dtype)
    step = max(1, TILE_ELEMENTS // out.shape[1])
    products = np.empty((min(step, len(out)), out.shape[1]), out.dtype)
    for first in range(0, len(out), step):
        total = out[first : first + step]
        product = products[: len(total)]
        np.multiply(left[0, first : first + step, None], right[0], out=total)
        for k in range(1, update.left.rank):
            np.multiply(left[k, first : first + step, None], right[k], out=product)
            total += product


def _split_rectangles(start: int, stop: int, row: int) -> Iterator[tuple[int, slice, slice]]:
    """Units start..stop of a matrix as rectangles, whole rows or a part of one, each with its distance from `start`."""
    at = start
    while at < stop:
        first, column = divmod(at, row)
        if column or row > min(TILE_ELEMENTS, stop - at):
            end = min(stop, at + min(TILE_ELEMENTS, row - column))
            yield at - start, slice(first, first + 1), slice(column, column + end - at)
        else:
            count = (stop - at) // row
            end = at + count * row
            yield at - start, slice(first, first + count), slice(0, row)
        at = end
