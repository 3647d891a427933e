"""The arithmetic of a merge on one slab: base + scaling_factor * rule(task vectors)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint, Spec
from ..checkpoints.dtypes import compute_dtype, narrow, widen
from ..checkpoints.slabs import chunks
from ..errors import MagMaxError
from ..rules import Address, Rule
from .stream import Slab


@dataclass(frozen=True)
class Reader:
    """Slabs as numbers in the base's compute type, refusing NaN and infinity unless they are allowed."""

    inputs: Sequence[Checkpoint]
    allow_nonfinite: bool = False

    def numbers(self, slab: Slab, number: int) -> NDArray[Any]:
        stored, dtype = slab.stored(number), slab.spec(number).dtype
        if not self.allow_nonfinite and not finite(stored, dtype):
            raise self._error(number, slab.key)
        return widen(stored, dtype, compute_dtype(slab.spec(0).dtype))

    def task_vector(self, slab: Slab, number: int, base: NDArray[Any]) -> NDArray[Any]:
        vector = self.numbers(slab, number)
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


@dataclass(frozen=True)
class MergeKernel:
    """The merged tensor of one slab; input 0 is the base, inputs 1 to T are the models.

    Attributes:
        out: the specs of what is written.
        carried: tensors copied from the base as they are, and why.
    """

    reader: Reader
    rule: Rule
    tasks: int
    scaling_factor: float
    out: Mapping[str, Spec]
    carried: Mapping[str, str]

    def __call__(self, slab: Slab) -> list[NDArray[Any]]:
        if slab.key in self.carried:
            return [self.carry(slab)]
        base = self.reader.numbers(slab, 0)
        return [self.scaled(slab, base, self.task_vector(slab, base))]

    def task_vector(self, slab: Slab, base: NDArray[Any]) -> NDArray[Any]:
        """The rule's merge of the models' task vectors, unscaled."""
        state = ()
        at = Address(slab.key, slab.start)
        for task in range(1, self.tasks + 1):
            state = self.rule.step(state, self.reader.task_vector(slab, task, base), task, at)
        return self.rule.finish(state, self.tasks)

    def scaled(self, slab: Slab, base: NDArray[Any], merged: NDArray[Any]) -> NDArray[Any]:
        """base + scaling_factor * merged, the product and the sum rounded separately, stored in the output's type."""
        dtype = self.out[slab.key].dtype
        with np.errstate(over="ignore", invalid="ignore"):
            merged *= merged.dtype.type(self.scaling_factor)
            merged += base
        stored = narrow(merged, dtype)
        if not self.reader.allow_nonfinite and not finite(stored, dtype):
            raise MagMaxError(f"{slab.key}: the merged values overflow {dtype}; choose a wider --dtype")
        return stored

    def carry(self, slab: Slab) -> NDArray[Any]:
        """The base's own tensor; the models' are read where they can be, for their digests alone."""
        base = slab.stored(0)
        spec = slab.spec(0)
        for task in range(1, self.tasks + 1):
            if self.reader.inputs[task].specs.get(self.reader.inputs[task].resolve(slab.key)) == spec:
                slab.stored(task)
        dtype = self.out[slab.key].dtype
        return base if dtype == spec.dtype else narrow(widen(base, spec.dtype, compute_dtype(spec.dtype)), dtype)
