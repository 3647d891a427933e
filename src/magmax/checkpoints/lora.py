"""PEFT LoRA adapters as models: base + adapter, computed in the ranges in which it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MagMaxError
from .base import Checkpoint
from .dtypes import Spec, widen
from .hub import hub_id
from .peft import CONFIG, WEIGHTS, Adapter, Factor, Update

TILE = 1 << 16
"""Elements worked on at once, so that they stay in the processor's cache; no result depends on it."""


class LoraModel(Checkpoint):
    """A base and an adapter as PEFT saves it, read as the model that merging the adapter into the base would give.

    A targeted weight is W + s * D, D[i, j] = sum over k of B[i, k] * A[k, j], where W is the base's, or the adapter's
    own full copy of it, and s is lora_alpha / r (lora_alpha / sqrt(r) with use_rslora). D is transposed for embeddings
    and where weights are stored transposed (fan_in_fan_out); a kernel of a convolution counts as a row. All factors
    are widened to the type in which W is merged (float64 for F64, else float32), and everything is rounded in that
    type: each product, the sum as a left fold over k = 0, 1, ..., s itself, its product with D, the sum with W. So
    every element is the same whatever range is read, and by whichever thread; the tuned weight is presented in that
    type (F64 or F32), not rounded to W's. Modules and biases that are saved in full stand in the base's place, and
    every other tensor is the base's.

    Raises:
        MagMaxError: an adapter of another kind, or one that does not fit the base.
    """

    def __init__(self, folder: Path, base: Checkpoint, label: str) -> None:
        super().__init__(label, {})
        self.path = None if base.path is None else folder
        self._base, self._adapter = base, Adapter(folder, base, label)
        self._updates, self._copies = self._adapter.updates, self._adapter.copies
        for key in dict.fromkeys([*base.specs, *self._copies]):
            source = self._adapter.source(key)
            tuned = Spec("F64" if source.dtype == "F64" else "F32", source.shape)
            self.specs[key] = tuned if key in self._updates else source
        self.aliases = {key: kept for key, kept in base.aliases.items() if key not in self.specs}

    def read(self, key: str, start: int, stop: int) -> NDArray[Any]:
        if key in self._copies:
            stored = self._stored(self._copies[key], start, stop)
        else:
            stored = self._base.read(key, start, stop)
        if key not in self._updates:
            return stored
        update = self._updates[key]
        tuned = np.empty(stop - start, self.specs[key].storage)
        with np.errstate(over="ignore", invalid="ignore"):
            for at, rows, columns in _pieces(start, stop, update.right.length):
                shape = rows.stop - rows.start, columns.stop - columns.start
                self._fold(update, rows, columns, tuned[at : at + shape[0] * shape[1]].reshape(shape))
            tuned *= tuned.dtype.type(update.scale)
            tuned += widen(stored, self._adapter.source(key).dtype, tuned.dtype)
        return tuned

    def files(self) -> list[Path]:
        return [*self._base.files(), *self._adapter.files()]

    def header_digests(self) -> list[str]:
        return [*self._base.header_digests(), *self._adapter.header_digests()]

    def _fold(self, update: Update, rows: slice, columns: slice, out: NDArray[Any]) -> None:
        """Fill `out` with left^T right for these rows and columns: a product and a sum for each k, tile by tile."""
        left, right = self._factor(update.left, rows, out.dtype), self._factor(update.right, columns, out.dtype)
        step = max(1, TILE // out.shape[1])
        products = np.empty((min(step, len(out)), out.shape[1]), out.dtype)
        for first in range(0, len(out), step):
            total = out[first : first + step]
            product = products[: len(total)]
            np.multiply(left[0, first : first + step, None], right[0], out=total)
            for k in range(1, update.left.rank):
                np.multiply(left[k, first : first + step, None], right[k], out=product)
                total += product

    def _factor(self, factor: Factor, part: slice, compute: np.dtype[Any]) -> NDArray[Any]:
        """A part of a factor's length, as (rank, part) in the compute type."""
        name, rank, length = factor.name, factor.rank, factor.length
        count = part.stop - part.start
        if not factor.rank_first:
            stored = self._stored(name, part.start * rank, part.stop * rank).reshape(count, rank).T
        elif count == length:
            stored = self._stored(name, 0, rank * length).reshape(rank, length)
        else:
            starts = range(part.start, rank * length, length)
            stored = np.stack([self._stored(name, at, at + count) for at in starts])
        return widen(np.ascontiguousarray(stored), self._adapter.weights.spec(name).dtype, compute)

    def _stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        weights = self._adapter.weights
        return weights.read(weights.resolve(name), start, stop)


def _pieces(start: int, stop: int, row: int) -> Iterator[tuple[int, slice, slice]]:
    """Units start..stop of a matrix as rectangles, whole rows or a part of one, each with its distance from `start`."""
    at = start
    while at < stop:
        first, column = divmod(at, row)
        if column or row > min(TILE, stop - at):
            end = min(stop, at + min(TILE, row - column))
            yield at - start, slice(first, first + 1), slice(column, column + end - at)
        else:
            count = (stop - at) // row
            end = at + count * row
            yield at - start, slice(first, first + count), slice(0, row)
        at = end


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    others = [file.name for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)]
    return (folder / CONFIG).is_file() and not set(others) - {*WEIGHTS, "training_args.bin"}


def base_and_adapter(text: str, folder: str = "") -> tuple[str, str] | None:
    """The halves of "BASE+ADAPTER", where nothing has that very name and ADAPTER is the folder of an adapter, or both
    are there or on the hub."""
    if "+" not in text or os.path.lexists(os.path.join(folder, text)):
        return None
    for place in (n for n, letter in enumerate(text) if letter == "+"):
        base, adapter = text[:place], text[place + 1 :]
        if not base or not adapter:
            continue
        if Path(folder, adapter, CONFIG).is_file():
            return base, adapter
        with suppress(MagMaxError):  # at this plus the text does not fall into two ids
            if hub_id(adapter, folder) and (hub_id(base, folder) or os.path.lexists(os.path.join(folder, base))):
                return base, adapter
    return None


def within(folder: str, text: str) -> str:
    """A path, or both of "BASE+ADAPTER", as seen from where `folder` is; an id of the hub as hf://..."""
    halves = [(part, hub_id(part, folder)) for part in base_and_adapter(text, folder) or (text,)]
    return "+".join(named.address if named else os.path.join(folder, part) for part, named in halves)


def seen_from(folder: str, text: str) -> str:
    """A path, or both of "BASE+ADAPTER", so that `within(folder, ...)` gives it back."""
    parts = base_and_adapter(text) or (text,)
    named = [hub_id(part) for part in parts]
    return "+".join(n.address if n else os.path.relpath(p, folder or ".") for p, n in zip(parts, named, strict=True))
