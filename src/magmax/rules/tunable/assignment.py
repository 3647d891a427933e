"""Which task supplies each element of a block: what the selections of `tunable` have in common."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract import as_signed_bits
from ..selection import magnitude_codes
from ..statistics import Address, Array, Block, Counts, Reduction, namespace

Codes = Sequence[NDArray[Any]]
Winners = NDArray[np.int16]
SLICE_LENGTH = 1 << 15
"""How many elements are worked on at once, so that they stay in the processor's cache."""


def codes_of(task_vectors: Sequence[NDArray[Any]], wide: bool) -> Codes:
    """Each task's magnitudes, as integers of the same order."""
    return [magnitude_codes(delta, wide) for delta in task_vectors]


def largest_magnitude_task(codes: Codes, among: Sequence[int]) -> Winners:
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


def moved_mask(codes: Codes) -> NDArray[np.bool_]:
    """Return where any task vector is not zero."""
    anything = codes[0].copy()
    for code in codes[1:]:
        anything |= code
    return anything != 0


def split_block(block: Block) -> Generator[tuple[Address, list[NDArray[Any]]]]:
    """The block's task vectors, a part at a time, each with its address."""
    deltas = [np.asarray(delta).reshape(-1) for delta in block.task_vectors]
    for start in range(0, len(deltas[0]), SLICE_LENGTH):
        yield (
            Address(block.address.key, block.address.offset + start),
            [delta[start : start + SLICE_LENGTH] for delta in deltas],
        )


def take_from_winners(block: Block, winners: Winners) -> Array:
    """Each element verbatim from the task that supplies it."""
    xp = namespace(block.task_vectors[0])
    merged = xp.asarray(xp.reshape(block.task_vectors[0], (-1,)), copy=True)
    held, device = as_signed_bits(merged), getattr(merged, "device", None)
    for task, delta in enumerate(block.task_vectors[1:], start=1):
        mask = -xp.astype(xp.asarray(winners == task, device=device), held.dtype)
        mask &= held ^ as_signed_bits(xp.reshape(delta, (-1,)))
        held ^= mask
    return xp.reshape(merged, block.task_vectors[0].shape)


@dataclass(frozen=True)
class SupplyCount(Reduction):
    """Per task: how many of the elements that moved MagMax takes from it."""

    tasks: int
    float64: bool

    def initial(self) -> Counts:
        return np.zeros(self.tasks, np.int64)

    def update(self, block: Block, into: Counts) -> None:
        for _, deltas in split_block(block):
            codes = codes_of(deltas, self.float64)
            winners, there = largest_magnitude_task(codes, range(self.tasks)), moved_mask(codes)
            into += [np.count_nonzero(there & (winners == task)) for task in range(self.tasks)]
