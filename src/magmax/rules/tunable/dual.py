"""Who supplies an element under prices: the task that bids most, its magnitude less its price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..random import random_words
from ..statistics import Address, Block
from .assignment import Winners, split_block
from .transport import Floats, Places, best_rows

MAX_MAGNITUDE = 1e300


@dataclass(frozen=True)
class PricedAssignment:
    """An assignment by prices: element to argmax_t (|tau_t| + noise * u_t - price_t), with some exceptions.

    u_t is a random number in [0, 1) that depends on (seed, tensor name, flat offset, task): it decides between equal
    magnitudes.

    Attributes:
        among: the tasks with a quota, counted from 0.
        noise: the most that a magnitude is moved.
        exceptions: by tensor, sorted offsets and the task of each.
        retained: the sum of the magnitudes kept.
        bound: the most that any choice with these quotas could keep.
    """

    among: Sequence[int]
    prices: Sequence[float]
    noise: float
    seed: int
    exceptions: Mapping[str, tuple[NDArray[np.int64], Winners]]
    retained: float = math.nan
    bound: float = math.nan

    @property
    def gap(self) -> float:
        """Return how much more another choice could keep at most, as a part of that."""
        return max(0.0, self.bound - self.retained) / self.bound if self.bound else 0.0

    def winners(self, block: Block) -> Winners:
        """The task that supplies each element."""
        winners = np.empty(math.prod(block.task_vectors[0].shape), np.int16)
        among = np.asarray(self.among, np.int16)
        for at, deltas in split_block(block):
            best, _, lead, margin = self.leaders(deltas)
            close = np.flatnonzero(~(lead > margin))
            if len(close):
                columns = self.columns(at, deltas, self.words(at, len(best)), close)
                best[close] = best_rows(self.net(columns))
            start = at.offset - block.address.offset
            winners[start : start + len(best)] = among[best]
        offsets, tasks = self.exceptions.get(block.address.key, (np.zeros(0, np.int64), np.zeros(0, np.int16)))
        first, last = np.searchsorted(offsets, [block.address.offset, block.address.offset + len(winners)])
        winners[offsets[first:last] - block.address.offset] = tasks[first:last]
        return winners

    def leaders(self, task_vectors: Sequence[NDArray[Any]]) -> tuple[Winners, NDArray[Any], NDArray[Any], float]:
        """Of some elements the best of `among` (its row), its worth less its price, and by how much it leads the next.

        All are told in the type of the task vectors and without the noise; the last answer is the most that this
        matters to a lead. Where numbers are not finite, the lead does not exceed it.
        """
        kind = task_vectors[0].dtype.type
        with np.errstate(over="ignore", invalid="ignore"):
            prices = np.asarray(self.prices).astype(kind)
            best = np.abs(task_vectors[self.among[0]])
            best -= prices[0]
            winners, beats = np.zeros(len(best), np.int16), np.empty(len(best), np.int16)
            second, net, lower = np.full_like(best, -np.inf), np.empty_like(best), np.empty_like(best)
            for row, task in enumerate(self.among[1:], start=1):
                np.abs(task_vectors[task], out=net)
                net -= prices[row]
                np.multiply(net >= best, np.int16(row), out=beats)
                np.maximum(winners, beats, out=winners)
                np.minimum(best, net, out=lower)
                np.maximum(second, lower, out=second)
                np.maximum(best, net, out=best)
            info = np.finfo(kind)
            scale = abs(float(best.max(initial=0.0))) + 2 * float(np.abs(prices).max())
            return winners, best, best - second, self.noise + 8 * (float(info.eps) * scale + float(info.tiny))

    def words(self, address: Address, count: int) -> NDArray[np.uint32]:
        """A random word for each of so many elements from an address on."""
        return random_words("tunable", self.seed, 0, address, count)

    def columns(
        self, address: Address, task_vectors: Sequence[NDArray[Any]], words: NDArray[np.uint32], spots: Places
    ) -> Candidates:
        """Some of the elements that begin at an address."""
        magnitudes = np.empty((len(self.among), len(spots)))
        for row, task in zip(magnitudes, self.among, strict=True):
            np.fmin(np.abs(task_vectors[task][spots], out=row), MAX_MAGNITUDE, out=row)
        return Candidates(magnitudes, words[spots], spots + address.offset)

    def net(self, columns: Candidates) -> Floats:
        """Worths less prices."""
        return columns.worth(self.noise) - np.array(self.prices)[:, None]


class Candidates(NamedTuple):
    """Some elements: magnitudes (task, element), a random word and the flat offset of each."""

    magnitudes: Floats
    words: NDArray[np.uint32]
    offsets: NDArray[np.int64]

    def worth(self, noise: float) -> Floats:
        """Magnitudes with equal ones moved apart."""
        odd = np.arange(len(self.magnitudes), dtype=np.uint32) * np.uint32(0x85EBCA6A) + np.uint32(0xC2B2AE35)
        worth = np.empty_like(self.magnitudes)
        for row, magnitudes, factor in zip(worth, self.magnitudes, odd, strict=True):
            np.multiply(self.words * factor, noise / (1 << 32), out=row)
            row += magnitudes
        return worth
