"""Prices under which every element goes to the task that wants it most, and each task gets just its quota.

Maximising sum_p |tau_win(p)[p]| under quotas is a transport problem whose dual has one price a task. Prices are found
on a sample, then from the elements that are nearly undecided alone, ever fewer of them, until all of these are known
and the last few can be settled exactly. Should that not come about in some rounds, the best choice so far is taken,
which has the quotas and a bound too; only if there is none, all elements are held at once.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..statistics import Address, Block, Counts, Reduction
from .assignment import Winners, codes_of, moved_mask, split_block, take_from_winners
from .dual import MAX_MAGNITUDE, Candidates, PricedAssignment
from .transport import (
    Floats,
    Places,
    balance_prices,
    best_rows,
    count_misplaced,
    find_undecided,
    narrow_windows,
    solve_exactly,
)

ROOM = 1 << 21
"""Magnitudes held at once, but for at least LEAST_ROOM elements."""
LEAST_ROOM = 1 << 18
COPIES = 8
"""How often these are in memory, in one shape or another."""
MAX_ROUNDS = 10
DAMPING = 0.5
"""The part of a change of prices that is made at once, where it goes beyond what is known."""
MAX_MOVES = 1000
"""How many elements are moved one by one from a task to another, at most."""
NEGLIGIBLE_GAP = 1e-8
"""A gap at which a choice is taken though a better one may be found."""
NARROWING_FACTOR = 16
"""How many times fewer elements count as undecided from one round to the next."""
RELATIVE_TIE_BREAK = 2.0**-30
"""How far equal magnitudes are moved apart, as a part of a typical one."""
SAMPLE_MULTIPLIER = 0x9E3779B1


@dataclass(frozen=True)
class UndecidedReduction(Reduction):
    """A reduction that counts what prices decide and collects the elements that they nearly leave open.

    Of each block: how many moved elements each task wins by more than its `windows` over every other, the sums of their
    magnitudes and of their worths, the number of all others, and of a part of these (`rate`, chosen by their address)
    offset, random word and magnitudes.
    """

    priced: PricedAssignment
    windows: Floats
    rate: float
    per_block: bool = True

    def initial(self) -> Counts:
        return np.zeros(0, np.int64)

    def update(self, block: Block, into: Counts) -> None:
        clear, sums, near = np.zeros(len(self.priced.among), np.int64), np.zeros(2), 0
        parts: list[Candidates] = []
        for at, deltas in split_block(block):
            alive = moved_mask(codes_of(deltas, deltas[0].dtype == np.float64))
            words = self.priced.words(at, len(alive))
            if np.isinf(self.windows).all():
                open_ = np.flatnonzero(alive)
            else:
                open_ = self._find_open(at, deltas, alive, words, clear, sums)
            near += len(open_)
            taken = open_[_sample_mask(words[open_], self.rate)]
            parts.append(self.priced.columns(at, deltas, words, taken))
        body = [
            np.vstack([part.offsets, part.words.astype(np.int64), part.magnitudes.view(np.int64)]) for part in parts
        ]
        packed = np.hstack([clear, sums.view(np.int64), np.array([near]), np.hstack(body).reshape(-1)])
        into.resize(len(packed), refcheck=False)
        into[:] = packed

    def _find_open(
        self,
        address: Address,
        task_vectors: Sequence[NDArray[Any]],
        alive: NDArray[np.bool_],
        words: NDArray[np.uint32],
        clear: Counts,
        sums: Floats,
    ) -> Places:
        """Return which of the elements that begin at an address are undecided; adds up what is not.

        Noise and rounding are looked into only where they may matter.
        """
        priced = self.priced
        best, top, lead, margin = priced.leaders(task_vectors)
        with np.errstate(over="ignore"):
            reach = (self.windows + margin).astype(lead.dtype)
        np.fill_diagonal(reach, -np.inf)
        near = np.flatnonzero(alive & ~(lead > reach.max(axis=1)[best]))
        near = near[self._within_reach(task_vectors, near, best[near], top[near], reach)]
        sure = alive.copy()
        sure[near] = False
        columns = priced.columns(address, task_vectors, words, near)
        winners, open_ = find_undecided(priced.net(columns), self.windows)
        spots, clear_winners = np.flatnonzero(~open_), winners[~open_]
        clear += np.bincount(clear_winners, minlength=len(clear))
        clear += [np.count_nonzero(sure & (best == row)) for row in range(len(clear))]
        magnitudes = np.abs(take_from_winners(Block(address, task_vectors), np.asarray(priced.among, np.int16)[best]))
        magnitudes *= sure
        total = magnitudes.sum(dtype=np.float64)
        sums[0] += total + columns.magnitudes[clear_winners, spots].sum()
        sums[1] += total + columns.worth(priced.noise)[clear_winners, spots].sum()
        return near[open_]

    def _within_reach(
        self, task_vectors: Sequence[NDArray[Any]], spots: Places, best: Winners, top: NDArray[Any], reach: NDArray[Any]
    ) -> NDArray[np.bool_]:
        """Return which of the elements at these spots their best may not lead some other by as much as it must."""
        close = np.zeros(len(spots), bool)
        prices = np.asarray(self.priced.prices).astype(top.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            for row, task in enumerate(self.priced.among):
                lead = top - (np.abs(task_vectors[task][spots]) - prices[row])
                close |= ~(lead > reach[:, row][best])
        return close


def _sample_mask(words: NDArray[np.uint32], rate: float) -> NDArray[np.bool_]:
    return words * np.uint32(SAMPLE_MULTIPLIER) <= rate * ((1 << 32) - 1)


class UndecidedElements(NamedTuple):
    """The replies of all blocks to `UndecidedReduction`, together, in the order of their addresses."""

    clear: NDArray[np.int64]
    retained: float
    worth: float
    near: int
    columns: Candidates
    keys: list[str]

    @classmethod
    def read(cls, replies: Mapping[Address, Counts], tasks: int) -> UndecidedElements:
        order = sorted(replies)
        heads = np.stack([replies[at][: tasks + 3] for at in order])
        bodies = [replies[at][tasks + 3 :].reshape(tasks + 2, -1) for at in order]
        body = np.hstack(bodies)
        sums = np.ascontiguousarray(heads[:, tasks : tasks + 2]).view(np.float64)
        keys = [at.key for at, part in zip(order, bodies, strict=True) for _ in range(part.shape[1])]
        magnitudes = np.ascontiguousarray(body[2:]).view(np.float64)
        columns = Candidates(magnitudes, body[1].astype(np.uint32), body[0])
        retained, worth = (math.fsum(column) for column in sums.T)
        return cls(heads[:, :tasks].sum(axis=0), retained, worth, int(heads[:, -1].sum()), columns, keys)

    def thinned(self, rate: float) -> UndecidedElements:
        """With such a part of the elements only."""
        some = np.flatnonzero(_sample_mask(self.columns.words, rate))
        magnitudes, words, offsets = self.columns
        columns = Candidates(magnitudes[:, some], words[some], offsets[some])
        return self._replace(columns=columns, keys=[self.keys[place] for place in some])


def request_prices(
    among: Sequence[int], wanted: Sequence[int], seed: int
) -> Generator[Reduction, Any, PricedAssignment]:
    """Find who supplies each element, so that each of `among` supplies what is `wanted` of it and most is retained."""
    tasks, quota = len(among), np.array(wanted)
    room = max(LEAST_ROOM, ROOM // tasks)
    state = PricedAssignment(among, [0.0] * tasks, 0.0, seed, {})
    windows, rate = np.full((tasks, tasks), np.inf), min(1.0, room / sum(wanted))
    best: PricedAssignment | None = None
    for left in reversed(range(MAX_ROUNDS)):
        undecided = UndecidedElements.read((yield UndecidedReduction(state, windows, rate)), tasks)
        if len(undecided.keys) > 2 * room and left:
            rate = room / undecided.near
            undecided = undecided.thinned(rate)
        if not state.noise:
            state = replace(state, noise=tie_breaker(undecided.columns.magnitudes))
        worth, old = undecided.columns.worth(state.noise), np.array(state.prices)
        share = quota - undecided.clear
        if rate == 1 and share.min() >= 0:
            prices = balance_prices(worth, share, old)
            if not left or count_misplaced(worth, share, prices) <= MAX_MOVES:
                shift = prices - old
                prices, at = solve_exactly(worth, share, prices, windows - (shift[:, None] - shift))
                if _order_holds(prices - old, windows).all():
                    return _final_assignment(state, undecided, worth - prices[:, None], prices, at, share)
                best = _better_assignment(
                    best, _final_assignment(state, undecided, worth - old[:, None], old, at, share)
                )
                if best.gap < NEGLIGIBLE_GAP:
                    return best
        else:
            prices = balance_prices(worth, share.clip(0) * (worth.shape[1] / share.clip(0).sum()), old)
        if np.isfinite(windows).all():
            prices = old + largest_safe_shift((prices - old) * DAMPING, windows)
        state = replace(state, prices=prices.tolist())
        near = undecided.near
        if near > 0.9 * room:
            part = 0.9 * room / near if near < 2 * NARROWING_FACTOR * room else 1 / NARROWING_FACTOR
            net, sound = worth - prices[:, None], _order_holds(prices - old, windows)
            windows = np.where(sound, narrow_windows(net, windows, part), windows)
            near *= part if sound.all() else float(find_undecided(net, windows)[1].mean())
        rate = min(1.0, room / near)
        if left == 1:
            if best is not None:
                return best
            windows, rate = np.full((tasks, tasks), np.inf), 1.0
    raise AssertionError("in the last round every element is known")


def _better_assignment(best: PricedAssignment | None, candidate: PricedAssignment) -> PricedAssignment:
    """Return what retains more, with the lower of both bounds."""
    if best is None:
        return candidate
    return replace(max(best, candidate, key=lambda one: one.retained), bound=min(best.bound, candidate.bound))


def largest_safe_shift(shift: Floats, windows: Floats) -> Floats:
    """The largest change of prices, none above `shift`, under which every element that was clear is still its task's.

    Of what lies beyond the windows nothing is known, so that a price must not go there at once.
    """
    for _ in range(len(shift)):
        shift = (shift + windows).min(axis=1)
    return shift


def _order_holds(shift: Floats, windows: Floats) -> NDArray[np.bool_]:
    """For which pairs of tasks, after a change of prices, every element that was the first's is not the second's."""
    return shift[:, None] - shift <= windows


def tie_breaker(magnitudes: Floats) -> float:
    """The most that equal magnitudes are moved apart: a power of two, far below a typical magnitude."""
    typical = float(np.median(magnitudes.max(axis=0))) if magnitudes.size else 0.0
    return RELATIVE_TIE_BREAK * 2.0 ** math.frexp(min(typical, MAX_MAGNITUDE))[1]


def _final_assignment(
    state: PricedAssignment,
    undecided: UndecidedElements,
    net: Floats,
    prices: Floats,
    at: Places,
    share: NDArray[np.int64],
) -> PricedAssignment:
    """The answer, once every undecided element has its task `at`, and each task its `share` of them."""
    astray = np.flatnonzero(best_rows(net) != at)
    tasks = np.asarray(state.among, np.int16)[at[astray]]
    keys = np.array([undecided.keys[place] for place in astray], object)
    exceptions = {
        key: (undecided.columns.offsets[astray[keys == key]], tasks[keys == key]) for key in sorted(set(keys.tolist()))
    }
    retained = undecided.retained + float(undecided.columns.magnitudes[at, np.arange(len(at))].sum())
    bound = undecided.worth + float(net.max(axis=0).sum()) + float((share * prices).sum())
    return replace(state, prices=prices.tolist(), exceptions=exceptions, retained=retained, bound=bound)
