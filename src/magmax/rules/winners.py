"""Which task supplies each element of a block: what the selections of `tunable` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .magnitude import magnitude_codes
from .plan import Array, Block, Counts, Fold, namespace

Codes = Sequence[NDArray[Any]]
Winners = NDArray[np.int16]


def codes_of(block: Block, wide: bool) -> Codes:
    """Each task's magnitudes, as integers of the same order."""
    return [np.asarray(magnitude_codes(delta, wide)).reshape(-1) for delta in block.deltas]


def strongest(codes: Codes, among: Sequence[int], where: NDArray[Any] | slice = slice(None)) -> Winners:
    """The task of largest magnitude among these (from 0), at some places; of equal ones the latest."""
    best = codes[among[0]][where].copy()
    winners = np.full(len(best), among[0], np.int16)
    for task in among[1:]:
        rival = codes[task][where]
        beats = rival >= best
        np.copyto(best, rival, where=beats)
        np.copyto(winners, np.int16(task), where=beats)
    return winners


def moved(codes: Codes) -> NDArray[np.bool_]:
    """Where any task vector is not zero."""
    anything = codes[0].copy()
    for code in codes[1:]:
        anything |= code
    return anything != 0


def picked(block: Block, winners: Winners) -> Array:
    """Each element verbatim from the task that supplies it."""
    xp = namespace(block.deltas[0])
    flat = [xp.reshape(delta, (-1,)) for delta in block.deltas]
    merged = flat[0]
    device = getattr(merged, "device", None)
    for task, delta in enumerate(flat[1:], start=1):
        merged = xp.where(xp.asarray(winners == task, device=device), delta, merged)
    return xp.reshape(merged, block.deltas[0].shape)


@dataclass(frozen=True)
class Supply(Fold):
    """Per task: how many of the elements that moved MagMax takes from it."""

    tasks: int
    wide: bool

    def zeros(self) -> Counts:
        return np.zeros(self.tasks, np.int64)

    def count(self, block: Block, into: Counts) -> None:
        codes = codes_of(block, self.wide)
        winners = strongest(codes, range(self.tasks))[moved(codes)]
        into += np.bincount(winners, minlength=self.tasks)
