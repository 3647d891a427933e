"""Slabs as numbers: widened, checked, subtracted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint
from ..checkpoints.blocks import chunks
from ..checkpoints.dtypes import compute_dtype, widen
from ..errors import MagMaxError
from .pipeline import Slab


@dataclass(frozen=True)
class Reader:
    """Slabs as numbers in the base's compute type, refusing NaN and infinity unless they are allowed.

    Attributes:
        checked: whether all that is to be merged was read once already, and found finite.
    """

    inputs: Sequence[Checkpoint]
    allow_nonfinite: bool = False
    checked: bool = False

    def numbers(self, slab: Slab, number: int) -> NDArray[Any]:
        """The slab in input `number`."""
        return self.widened(slab, number, slab.stored(number))

    def widened(self, slab: Slab, number: int, stored: NDArray[Any]) -> NDArray[Any]:
        """Units of input `number` as numbers."""
        dtype = slab.spec(number).dtype
        if not self.allow_nonfinite and not self.checked and not finite(stored, dtype):
            raise self._error(number, slab.key)
        return widen(stored, dtype, compute_dtype(slab.spec(0).dtype))

    def task_vector(self, slab: Slab, number: int, base: NDArray[Any]) -> NDArray[Any]:
        vector = self.numbers(slab, number)
        if self.inputs[number].relative:
            return vector
        with np.errstate(over="ignore", invalid="ignore"):
            vector -= base
        return vector

    def _error(self, number: int, key: str) -> MagMaxError:
        """Count what is wrong in the whole tensor, so that the message is the same whichever slab came first."""
        checkpoint = self.inputs[number]
        name, spec = checkpoint.resolve(key), checkpoint.spec(key)
        bad = nan = 0
        for chunk in chunks(name, spec):
            for start, stop in chunk.slabs(spec):
                stored = checkpoint.read(name, start, stop)
                bad += int(nonfinite(stored, spec.dtype).sum())
                nan += int(np.isnan(widen(stored, spec.dtype, compute_dtype(spec.dtype))).sum())
        return MagMaxError(
            f"{checkpoint.label}: {key} holds {nan} NaN and {bad - nan} infinite of {spec.elements:,} elements; "
            "mend the model, or let them through with --allow-nonfinite"
        )


def finite(stored: NDArray[Any], dtype: str) -> bool:
    """Whether no stored unit is NaN or infinite."""
    if dtype == "BF16":
        return int((stored & np.uint16(0x7F80)).max()) < 0x7F80
    return bool(np.isfinite(stored).all())


def nonfinite(stored: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    """Which stored units are NaN or infinite."""
    if dtype == "BF16":
        return (stored & np.uint16(0x7F80)) == np.uint16(0x7F80)
    return ~np.isfinite(stored)
