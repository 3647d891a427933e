"""Blocks as numbers: widened, checked, subtracted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint
from ..checkpoints.blocks import iter_chunks
from ..checkpoints.dtypes import compute_dtype, narrow, widen
from ..checkpoints.zero_base import ZeroBase
from ..errors import MagMaxError
from .pipeline import InputBlock

F64 = np.dtype(np.float64)


class FixedElements(NamedTuple):
    """The elements of a block that are not finite in the base, which a merge leaves as they are.

    Attributes:
        places: where they are in the block.
        units: the base's stored units there.
        dtype: the type of the units.
    """

    places: NDArray[np.bool_]
    units: NDArray[Any]
    dtype: str

    def equal(self, stored: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
        """Return at which of the places another input's units are the same numbers, NaN with the same bits."""
        units = stored[self.places]
        if dtype != self.dtype:
            return _bits(widen(units, dtype, F64)) == _bits(widen(self.units, self.dtype, F64))
        return _bits(units) == _bits(self.units)

    def restore(self, merged: NDArray[Any], dtype: str) -> None:
        """Put the elements into merged units of a type: bit for bit, if that is the base's."""
        same = dtype == self.dtype
        merged[self.places] = self.units if same else narrow(widen(self.units, self.dtype, F64), dtype)


@dataclass(frozen=True)
class BlockReader:
    """Blocks as numbers in the base's compute type, refusing NaN and infinity unless they are allowed.

    What is not finite in the base has no task vector. Such elements are read as zero in every input, so that no rule
    meets them, and are remembered in `InputBlock.fixed`: the merge leaves them as the base has them. A model that has
    other bits there is refused, unless NaN and infinity are allowed. So the base is always to be read first.

    Attributes:
        finiteness_checked: whether all that is to be merged was read once already, and found finite.
    """

    inputs: Sequence[Checkpoint]
    allow_nonfinite: bool = False
    finiteness_checked: bool = False

    def read_numbers(self, block: InputBlock, number: int) -> NDArray[Any]:
        """The block in input `number`."""
        return self.widen(block, number, block.read(number))

    def read_model(self, block: InputBlock, number: int) -> NDArray[Any]:
        """The block in a model, which must have the base's elements where these are not finite."""
        stored = block.read(number)
        if block.fixed is not None and not self.allow_nonfinite:
            same = block.fixed.equal(stored, block.spec(number).dtype)
            if not same.all():
                raise self._error(0, block.key)
        return self.widen(block, number, stored)

    def widen(self, block: InputBlock, number: int, stored: NDArray[Any]) -> NDArray[Any]:
        """Units of input `number` as numbers."""
        dtype = block.spec(number).dtype
        values = widen(stored, dtype, compute_dtype(block.spec(0).dtype))
        if block.fixed is None and (self._is_unchecked(number) or is_finite(stored, dtype)):
            return values
        bad = nonfinite_mask(stored, dtype)
        if number == self._first:
            block.fixed = self._find_fixed(block, bad, stored)
        fixed = bad if block.fixed is None else block.fixed.places
        if not self.allow_nonfinite and (block.fixed is None or (bad & ~fixed).any()):
            raise self._error(number, block.key)
        return values if block.fixed is None else np.where(fixed, values.dtype.type(0), values)

    def task_vector(self, block: InputBlock, number: int, base: NDArray[Any]) -> NDArray[Any]:
        if self.inputs[number].is_task_vector:
            return self.read_numbers(block, number)
        vector = self.read_model(block, number)
        with np.errstate(over="ignore", invalid="ignore"):
            vector -= base
        return vector

    @property
    def _first(self) -> int:
        """Return the input that tells which elements are fixed: the base, or the first model where that is zeros."""
        return int(isinstance(self.inputs[0], ZeroBase))

    def _is_unchecked(self, number: int) -> bool:
        """Return whether an input may be read without a look at whether it is finite."""
        return number > self._first and (self.allow_nonfinite or self.finiteness_checked)

    def _find_fixed(self, block: InputBlock, bad: NDArray[np.bool_], stored: NDArray[Any]) -> FixedElements | None:
        """What is not finite in the base; or, where the base is zeros, what is not and is the same in all models."""
        dtype = block.spec(self._first).dtype
        fixed = FixedElements(bad, stored[bad], dtype)
        if self._first:
            same = np.ones(len(fixed.units), np.bool_)
            for number in range(2, len(self.inputs)):
                same &= fixed.equal(block.read(number), block.spec(number).dtype)
            places = bad.copy()
            places[bad] = same
            fixed = FixedElements(places, fixed.units[same], dtype)
        return fixed if len(fixed.units) else None

    def _error(self, number: int, key: str) -> MagMaxError:
        """Count what is wrong in the whole tensor, so that the message is the same whichever block came first."""
        checkpoint = self.inputs[number]
        name, spec = checkpoint.resolve_alias(key), checkpoint.spec(key)
        bad = nan = 0
        for chunk in iter_chunks(name, spec):
            for start, stop in chunk.blocks(spec):
                stored = checkpoint.read(name, start, stop)
                bad += int(nonfinite_mask(stored, spec.dtype).sum())
                nan += int(np.isnan(widen(stored, spec.dtype, compute_dtype(spec.dtype))).sum())
        return MagMaxError(
            f"{checkpoint.label}: {key} holds {nan} NaN and {bad - nan} infinite of {spec.numel:,} elements; "
            "mend the model, or let them through with --allow-nonfinite"
        )


def cast_units(stored: NDArray[Any], key: str, dtype: str, wanted: str) -> NDArray[Any]:
    """Stored units in another floating type; refuses finite numbers that overflow it."""
    if dtype == wanted:
        return stored
    cast = narrow(widen(stored, dtype, compute_dtype(dtype)), wanted)
    if is_finite(stored, dtype) and not is_finite(cast, wanted):
        raise MagMaxError(f"{key}: the values overflow {wanted}; convert the base to a wider dtype")
    return cast


def is_finite(stored: NDArray[Any], dtype: str) -> bool:
    """Return whether no stored unit is NaN or infinite."""
    if dtype == "BF16":
        return int((stored & np.uint16(0x7F80)).max()) < 0x7F80
    return bool(np.isfinite(stored).all())


def nonfinite_mask(stored: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    """Return which stored units are NaN or infinite."""
    if dtype == "BF16":
        return (stored & np.uint16(0x7F80)) == np.uint16(0x7F80)
    return ~np.isfinite(stored)


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    """The same memory as integers, which NaN equals too."""
    return values.view(f"u{values.itemsize}")
