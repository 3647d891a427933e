"""Blocks as numbers: widened, checked, subtracted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint
from ..checkpoints.blocks import iter_chunks
from ..checkpoints.dtypes import compute_dtype, narrow, widen
from ..errors import MagMaxError
from .pipeline import InputBlock


@dataclass(frozen=True)
class BlockReader:
    """Blocks as numbers in the base's compute type, refusing NaN and infinity unless they are allowed.

    Attributes:
        finiteness_checked: whether all that is to be merged was read once already, and found finite.
    """

    inputs: Sequence[Checkpoint]
    allow_nonfinite: bool = False
    finiteness_checked: bool = False

    def read_numbers(self, block: InputBlock, number: int) -> NDArray[Any]:
        """The block in input `number`."""
        return self.widen(block, number, block.read(number))

    def widen(self, block: InputBlock, number: int, stored: NDArray[Any]) -> NDArray[Any]:
        """Units of input `number` as numbers."""
        dtype = block.spec(number).dtype
        if not self.allow_nonfinite and not self.finiteness_checked and not is_finite(stored, dtype):
            raise self._error(number, block.key)
        return widen(stored, dtype, compute_dtype(block.spec(0).dtype))

    def task_vector(self, block: InputBlock, number: int, base: NDArray[Any]) -> NDArray[Any]:
        vector = self.read_numbers(block, number)
        if self.inputs[number].is_task_vector:
            return vector
        with np.errstate(over="ignore", invalid="ignore"):
            vector -= base
        return vector

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
