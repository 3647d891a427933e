"""Which task supplies each element of a block: what the selections of `tunable` have in common."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract import bits
from ..selection import magnitude_codes
from ..statistics import Address, Array, Block, Counts, Fold, namespace

Codes = Sequence[NDArray[Any]]
Winners = NDArray[np.int16]
PIECE = 1 << 15
"""How many elements are worked on at once, so that they stay in the processor's cache."""


def codes_of(deltas: Sequence[NDArray[Any]], wide: bool) -> Codes:
    """Each task's magnitudes, as integers of the same order."""
    return [magnitude_codes(delta, wide) for delta in deltas]


def strongest(codes: Codes, among: Sequence[int]) -> Winners:
    """The task of largest magnitude among these (ascending, from 0); of equal ones the latest."""
    best = codes[among[0]].copy()
    winners = np.full(len(best), among[0], np.int16)
    beats = np.empty(len(best), np.int16)
    for task in among[1:]:
        rival = codes[task]
        np.multiply(rival >= best, np.int16(task), out=beats)
        np.maximum(winners, beats, out=winners)
        np.maximum(best, rival, out=best)
    return winners


def moved(codes: Codes) -> NDArray[np.bool_]:
    """Where any task vector is not zero."""
    anything = codes[0].copy()
    for code in codes[1:]:
        anything |= code
    return anything != 0


def pieces(block: Block) -> Generator[tuple[Address, list[NDArray[Any]]]]:
    """The block's task vectors, a part at a time, each with its address."""
    deltas = [np.asarray(delta).reshape(-1) for delta in block.deltas]
    for start in range(0, len(deltas[0]), PIECE):
        yield Address(block.at.key, block.at.offset + start), [delta[start : start + PIECE] for delta in deltas]


def picked(block: Block, winners: Winners) -> Array:
    """Each element verbatim from the task that supplies it."""
    xp = namespace(block.deltas[0])
    merged = xp.asarray(xp.reshape(block.deltas[0], (-1,)), copy=True)
    held, device = bits(merged), getattr(merged, "device", None)
    for task, delta in enumerate(block.deltas[1:], start=1):
        mask = -xp.astype(xp.asarray(winners == task, device=device), held.dtype)
        mask &= held ^ bits(xp.reshape(delta, (-1,)))
        held ^= mask
    return xp.reshape(merged, block.deltas[0].shape)


@dataclass(frozen=True)
class Supply(Fold):
    """Per task: how many of the elements that moved MagMax takes from it."""

    tasks: int
    wide: bool

    def zeros(self) -> Counts:
        return np.zeros(self.tasks, np.int64)

    def count(self, block: Block, into: Counts) -> None:
        for _, deltas in pieces(block):
            codes = codes_of(deltas, self.wide)
            winners, there = strongest(codes, range(self.tasks)), moved(codes)
            into += [np.count_nonzero(there & (winners == task)) for task in range(self.tasks)]
