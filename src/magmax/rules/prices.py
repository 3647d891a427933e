"""Prices under which every element goes to the task that wants it most, and each task gets just its quota.

Maximising sum_p |tau_win(p)[p]| under quotas is a transport problem whose dual has one price a task. Prices are found
on a sample, then from the elements that are nearly undecided alone, ever fewer of them, until all of these are known
and the last few can be settled exactly. Should that not come about in some rounds, all elements are held at once.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .chance import draws
from .plan import Address, Block, Counts, Fold
from .settle import balanced, best_of, narrowed, settled
from .winners import Winners

Floats = NDArray[np.float64]

ROOM = 1 << 21
"""Magnitudes held at once."""
COPIES = 8
"""How often these are in memory, in one shape or another."""
ROUNDS = 10
ZOOM = 16
"""How many times fewer elements count as undecided from one round to the next."""
TINY = 2.0**-30
"""How far equal magnitudes are moved apart, as a part of a typical one."""
LARGEST = 1e300
PIECE = 1 << 15
SAMPLER = 0x9E3779B1


@dataclass(frozen=True)
class Priced:
    """Which task supplies an element: argmax_t (|tau_t| + noise * u_t - price_t), but for some exceptions.

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

    def winners(self, block: Block) -> Winners:
        """The task that supplies each element."""
        found = np.empty(math.prod(block.deltas[0].shape), np.int16)
        for start, columns in self.pieces(block):
            best = best_of(columns.worth(self.noise) - np.array(self.prices)[:, None])
            found[start : start + len(best)] = np.asarray(self.among, np.int16)[best]
        offsets, tasks = self.exceptions.get(block.at.key, (np.zeros(0, np.int64), np.zeros(0, np.int16)))
        first, last = np.searchsorted(offsets, [block.at.offset, block.at.offset + len(found)])
        found[offsets[first:last] - block.at.offset] = tasks[first:last]
        return found

    def pieces(self, block: Block) -> Generator[tuple[int, Columns]]:
        """The block's magnitudes, a part at a time, each with its distance from the block's start."""
        deltas = [np.asarray(delta).reshape(-1) for delta in block.deltas]
        for start in range(0, len(deltas[0]), PIECE):
            parts = [delta[start : start + PIECE] for delta in deltas]
            magnitudes = np.empty((len(self.among), len(parts[0])))
            for row, task in zip(magnitudes, self.among, strict=True):
                np.nan_to_num(np.abs(parts[task], out=row), False, LARGEST, LARGEST)
            words = draws("tunable", self.seed, 0, Address(block.at.key, block.at.offset + start), len(parts[0]))
            offsets = np.arange(len(words)) + (block.at.offset + start)
            yield start, Columns(magnitudes, words, offsets, np.any([part != 0 for part in parts], axis=0))


class Columns(NamedTuple):
    """Some elements: magnitudes (task, element), a random word and the flat offset of each, and whether it moved."""

    magnitudes: Floats
    words: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    moved: NDArray[np.bool_]

    def worth(self, noise: float) -> Floats:
        """Magnitudes with equal ones moved apart."""
        odd = np.arange(len(self.magnitudes), dtype=np.uint32) * np.uint32(0x85EBCA6A) + np.uint32(0xC2B2AE35)
        return self.magnitudes + (self.words * odd[:, None]) * (noise / (1 << 32))


@dataclass(frozen=True)
class Undecided(Fold):
    """What prices decide, and the elements that they nearly leave open.

    Of each block: how many moved elements each task wins by more than its `windows` over every other, the sums of their
    magnitudes and of their worths, the number of all others, and of a part of these (`rate`, chosen by their address)
    offset, random word and magnitudes.
    """

    priced: Priced
    windows: Floats
    rate: float
    apart: bool = True

    def zeros(self) -> Counts:
        return np.zeros(0, np.int64)

    def count(self, block: Block, into: Counts) -> None:
        tasks = len(self.priced.among)
        clear, sums, near = np.zeros(tasks, np.int64), np.zeros(2), 0
        parts: list[NDArray[np.int64]] = []
        for _, columns in self.priced.pieces(block):
            worth = columns.worth(self.priced.noise)
            net = worth - np.array(self.priced.prices)[:, None]
            best = best_of(net)
            rows = np.arange(len(best))
            lead = net[best, rows] - net
            lead[best, rows] = np.inf
            open_ = columns.moved & (lead <= self.windows[best].T).any(axis=0)
            sure = np.flatnonzero(columns.moved & ~open_)
            clear += np.bincount(best[sure], minlength=tasks)
            sums += columns.magnitudes[best[sure], sure].sum(), worth[best[sure], sure].sum()
            near += np.count_nonzero(open_)
            taken = np.flatnonzero(open_ & (columns.words * np.uint32(SAMPLER) <= self.rate * ((1 << 32) - 1)))
            parts.append(
                np.vstack(
                    [
                        columns.offsets[taken],
                        columns.words[taken].astype(np.int64),
                        columns.magnitudes[:, taken].view(np.int64),
                    ]
                )
            )
        told = np.hstack([clear, sums.view(np.int64), np.array([near]), np.hstack(parts).reshape(-1)])
        into.resize(len(told), refcheck=False)
        into[:] = told


class Found(NamedTuple):
    """The replies of all blocks to `Undecided`, together, in the order of their addresses."""

    clear: NDArray[np.int64]
    retained: float
    worth: float
    near: int
    columns: Columns
    keys: list[str]

    @classmethod
    def read(cls, replies: Mapping[Address, Counts], tasks: int) -> Found:
        order = sorted(replies)
        heads = np.stack([replies[at][: tasks + 3] for at in order])
        bodies = [replies[at][tasks + 3 :].reshape(tasks + 2, -1) for at in order]
        body = np.hstack(bodies)
        sums = np.ascontiguousarray(heads[:, tasks : tasks + 2]).view(np.float64)
        keys = [at.key for at, part in zip(order, bodies, strict=True) for _ in range(part.shape[1])]
        magnitudes = np.ascontiguousarray(body[2:]).view(np.float64)
        columns = Columns(magnitudes, body[1].astype(np.uint32), body[0], np.ones(len(keys), np.bool_))
        retained, worth = (math.fsum(column) for column in sums.T)
        return cls(heads[:, :tasks].sum(axis=0), retained, worth, int(heads[:, -1].sum()), columns, keys)


def priced(among: Sequence[int], wanted: Sequence[int], seed: int) -> Generator[Fold, Any, Priced]:
    """Find who supplies each element, so that each of `among` supplies what is `wanted` of it and most is retained."""
    tasks, quota = len(among), np.array(wanted)
    room = max(1 << 12, ROOM // tasks)
    state = Priced(among, [0.0] * tasks, 0.0, seed, {})
    windows, rate = np.full((tasks, tasks), np.inf), min(1.0, room / sum(wanted))
    for left in reversed(range(ROUNDS)):
        found = Found.read((yield Undecided(state, windows, rate)), tasks)
        if not state.noise:
            state = replace(state, noise=tie_breaker(found.columns.magnitudes))
        worth, old = found.columns.worth(state.noise), np.array(state.prices)
        share = quota - found.clear
        if rate == 1 and share.min() >= 0:
            prices, at = settled(worth, share, balanced(worth, share, old))
            if _within(prices - old, windows):
                return _finished(state, found, prices, at, quota)
        else:
            prices = balanced(worth, share.clip(0) * (worth.shape[1] / share.clip(0).sum()), old)
        state = replace(state, prices=prices.tolist())
        near = found.near
        if _within(prices - old, windows) and near > 0.9 * room:
            wanted_near = 0.9 * room if near < 2 * ZOOM * room else near / ZOOM
            windows, near = narrowed(worth - prices[:, None], windows, wanted_near / near), wanted_near
        rate = min(1.0, room / near)
        if left == 1:
            windows, rate = np.full((tasks, tasks), np.inf), 1.0
    raise AssertionError("in the last round every element is known")


def _within(shift: Floats, windows: Floats) -> bool:
    """Whether after a change of prices every element that was clear is still its task's."""
    return bool((shift[:, None] - shift <= windows).all())


def tie_breaker(magnitudes: Floats) -> float:
    """The most that equal magnitudes are moved apart: a power of two, far below a typical magnitude."""
    typical = float(magnitudes.max(axis=0).mean()) if magnitudes.size else 0.0
    return TINY * 2.0 ** math.frexp(min(typical, LARGEST))[1]


def _finished(state: Priced, found: Found, prices: Floats, at: NDArray[np.intp], quota: NDArray[np.int64]) -> Priced:
    """The answer, once every undecided element has its task `at`."""
    worth, rows = found.columns.worth(state.noise), np.arange(len(at))
    net = worth - prices[:, None]
    astray = np.flatnonzero(best_of(net) != at)
    tasks = np.asarray(state.among, np.int16)[at[astray]]
    keys = np.array([found.keys[place] for place in astray], object)
    exceptions = {
        key: (found.columns.offsets[astray[keys == key]], tasks[keys == key]) for key in sorted(set(keys.tolist()))
    }
    retained = found.retained + float(found.columns.magnitudes[at, rows].sum())
    bound = found.worth + float(net.max(axis=0).sum()) + float(((quota - found.clear) * prices).sum())
    return replace(state, prices=prices.tolist(), exceptions=exceptions, retained=retained, bound=bound)
