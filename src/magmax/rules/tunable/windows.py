"""How the cuts of the published selection of `tunable` are found: guessed from a sample, then on ever fewer elements.

The steps are taken on a sample, which says about where each cuts, and so for most elements surely how they fare. The
others are sampled again, more closely, until all of them are held and the same steps on them cut exactly. Should that
not come about in some rounds, all elements are held at once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..random import random_words
from ..statistics import Address, Block, Counts, Reduction
from .assignment import split_block
from .cascade import Cascade, CascadeElements
from .thresholds import KEEP_ALL, NONE, CascadeSteps, Keys, Mask, Places, StepThreshold, ThresholdWindow, WindowSteps

ROOM = 1 << 23
"""Words of 32 bits held at once."""
LEAST = 1 << 17
"""Elements held at once, at least, however many words each of them takes."""
COPIES = 4
"""How often these are in memory, in one shape or another."""
MAX_ROUNDS = 16
MARGIN = 3.0
"""A margin, in roots of the number of elements that a guess rests on."""


@dataclass(frozen=True)
class UndecidedSteps(Reduction):
    """A reduction that counts what the windows decide and collects the elements that they leave open.

    Of each block: for each step how many members surely stay and surely go, the number of elements that are open, and
    of a part of these (`rate`, chosen by their address) offset, magnitudes and random words.
    """

    cascade: Cascade
    rate: float
    per_block: bool = True

    def initial(self) -> Counts:
        return np.zeros(0, np.int64)

    def update(self, block: Block, into: Counts) -> None:
        replay = self.cascade
        counts = np.zeros((len(replay.windows), 2), np.int64)
        near, parts = 0, list[NDArray[np.uint32]]()
        for at, deltas in split_block(block):
            elements = replay.elements(at, deltas)
            open_ = elements.alive.copy()
            if any(window != ThresholdWindow() for window in replay.windows):
                replay.run_steps(elements, WindowSteps(replay.windows, at, counts))
                open_ &= ~elements.alive
            spots = np.flatnonzero(open_)
            near += len(spots)
            if self.rate < 1:
                chosen = random_words("tunable sample", replay.seed, 0, at, len(open_))[spots]
                spots = spots[chosen <= self.rate * ((1 << 32) - 1)]
            rows = [*elements.codes, *(elements.words(stream) for stream in replay.streams)]
            parts.append(_pack_columns([spots + at.offset, *(row[spots] for row in rows)]))
        packed = np.hstack([counts.reshape(-1), np.array([near]), np.hstack(parts).reshape(-1).view(np.int64)])
        into.resize(len(packed), refcheck=False)
        into[:] = packed


def _pack_columns(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint32]:
    """Columns of 32 or 64 bits as rows of words, of which there are an even number."""
    count = len(columns[0])
    rows = [np.ascontiguousarray(column).view(np.uint32).reshape(count, column.itemsize // 4).T for column in columns]
    odd = sum(map(len, rows)) % 2
    return np.vstack([*rows, np.zeros((odd, count), np.uint32)])


class SampledElements(NamedTuple):
    """The replies of all blocks to `UndecidedSteps`, together.

    Attributes:
        order: the addresses of the blocks, sorted.
        starts: the number of the first element of each, and how many there are.
    """

    counts: NDArray[np.int64]
    near: int
    order: Sequence[Address]
    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    elements: CascadeElements

    @classmethod
    def read(cls, replies: Mapping[Address, Counts], replay: Cascade) -> SampledElements:
        order, steps = sorted(replies), len(replay.windows)
        width = 2 if replay.float64 else 1
        rows = 2 + width * len(replay.among) + len(replay.streams)
        bodies = [replies[at][2 * steps + 1 :].view(np.uint32).reshape(rows + rows % 2, -1) for at in order]
        body = np.hstack(bodies)
        kind = np.int64 if replay.float64 else np.int32

        def column(first: int, words: int, kind: Any) -> NDArray[Any]:
            return np.ascontiguousarray(body[first : first + words].T).view(kind).reshape(-1)

        codes = [column(2 + width * row, width, kind) for row in range(len(replay.among))]
        streams = dict(zip(replay.streams, body[rows - len(replay.streams) :], strict=False))
        return cls(
            np.sum([replies[at][: 2 * steps].reshape(steps, 2) for at in order], axis=0),
            sum(int(replies[at][2 * steps]) for at in order),
            order,
            np.cumsum([0, *(part.shape[1] for part in bodies)]),
            column(0, 2, np.int64),
            CascadeElements(codes, np.ones(body.shape[1], np.bool_), streams.__getitem__),
        )

    def address(self, number: int) -> Address:
        """Return where an element lies."""
        block = int(np.searchsorted(self.starts, number, side="right")) - 1
        return Address(self.order[block].key, int(self.offsets[number]))

    def upto(self, last: Address) -> int:
        """Return how many elements lie no further than an address."""
        block = bisect_right(self.order, last) - 1
        if block < 0:
            return 0
        first, end = self.starts[block : block + 2].tolist()
        if self.order[block].key != last.key:
            return end
        return first + int(np.searchsorted(self.offsets[first:end], last.offset, side="right"))


class GuessedSteps(CascadeSteps):
    """Steps on sampled elements, which locate each threshold; exactly if all elements were sampled.

    Attributes:
        windows: where each step cuts.
        open: the elements that these windows leave open.
        failed: whether a cut lies outside its former window.
    """

    def __init__(
        self,
        elements: SampledElements,
        windows: Sequence[ThresholdWindow],
        wanted: Sequence[int],
        rate: float,
        margin: float,
    ) -> None:
        self._found, self._quotas, self._rate, self._margin = elements, wanted, rate, margin
        self.windows = list(windows)
        self.open = np.zeros(len(elements.offsets), np.bool_)
        self.failed = False
        self._shortfalls: dict[int, float] = {}
        self._met_quotas: set[int] = set()
        self._released_count = 0

    def all_stay(self, step: int, members: Mask) -> bool:
        return False

    def cut(self, step: int, keys: Keys, spots: Places) -> tuple[Mask, Mask]:
        tasks = len(self._quotas)
        releases = step < tasks
        row = tasks - 1 - step if releases else 1 + (step - tasks) % (tasks - 1)
        stay, go = self._found.counts[step].tolist()
        members = stay + go + len(keys) / self._rate
        keep = self._quotas[row] if releases else self._shortfalls[row]
        share = self._released_count / (row + 1 if releases else tasks - 1)
        off = 0 if self._rate == 1 or row in self._met_quotas else self._margin * math.sqrt(len(keys) + share) + 8
        self._shortfalls[row] = max(0, keep - members)
        if (members - keep) * self._rate > off:
            self._met_quotas.add(row)
        rank, old = (keep - stay) * self._rate, self.windows[step]
        least, most = (int(np.count_nonzero(self._keep_mask(cut, keys, spots))) for cut in old)
        self.failed |= (stay > 0 and rank < least - off) or (go > 0 and rank > most + off)

        def cut_at(rank: float) -> StepThreshold:
            if rank == least or (rank < least and stay):
                return old.surely_kept
            if rank == most or (rank > most and go):
                return old.possibly_kept
            return self._largest(math.floor(rank), keys, spots)

        guess = self._keep_mask(cut_at(round(rank)), keys, spots)
        self.windows[step] = window = ThresholdWindow(cut_at(rank - off), cut_at(rank + off))
        self.open[
            spots[
                self._keep_mask(window.possibly_kept, keys, spots) & ~self._keep_mask(window.surely_kept, keys, spots)
            ]
        ] = True
        if releases:
            self._released_count += int(np.count_nonzero(~guess))
        return guess, guess

    def _largest(self, rank: int, keys: Keys, spots: Places) -> StepThreshold:
        """The cut above which so many members are; of equal keys the first."""
        if not 0 < rank < len(keys):
            return NONE if rank <= 0 else KEEP_ALL
        key = int(np.partition(keys, len(keys) - rank)[len(keys) - rank])
        above = np.count_nonzero(keys > key)
        return StepThreshold(key, self._found.address(int(spots[np.flatnonzero(keys == key)[rank - above - 1]])))

    def _keep_mask(self, cut: StepThreshold, keys: Keys, spots: Places) -> Mask:
        mask = keys > cut.key
        if cut.last is not None:
            mask |= (keys == cut.key) & (spots < self._found.upto(cut.last))
        return mask


def request_windows(replay: Cascade, wanted: Sequence[int]) -> Generator[Reduction, Any, Cascade]:
    """Find where each step cuts; `wanted` is the quota of each task of `among`."""
    unknown = [ThresholdWindow()] * (3 * len(wanted) - 2)
    words = _words_per_element(len(wanted), replay.at_random, replay.float64)
    room, total, margin = max(LEAST, ROOM // words), sum(wanted), MARGIN
    replay, rate = replace(replay, windows=unknown), min(1.0, room / total)
    for left in reversed(range(MAX_ROUNDS)):
        elements = SampledElements.read((yield UndecidedSteps(replay, rate)), replay)
        guess = GuessedSteps(elements, replay.windows, wanted, rate, margin)
        replay.run_steps(elements.elements, guess)
        near = np.count_nonzero(guess.open) / rate
        if guess.failed or (rate < 1 and near >= elements.near):
            replay, near, margin = replace(replay, windows=unknown), total, 2 * margin
        else:
            replay = replace(replay, windows=guess.windows)
            if rate == 1:
                return replay
        rate = min(1.0, 0.95 * room / max(near, 1.0))
        if left == 1:
            replay, rate = replace(replay, windows=unknown), 1.0
    raise AssertionError("in the last round every element is known")


def _words_per_element(tasks: int, at_random: bool, wide: bool) -> int:
    """Return how many words an element takes, of so many tasks with a quota: its offset, magnitudes and random
    words.
    """
    return 2 + (2 if wide else 1) * tasks + (tasks if at_random else 0) + 2


def cascade_memory(tasks: int, at_random: bool) -> int:
    """Bytes that the questions of the published selection take, at the usual most."""
    return 4 * COPIES * max(ROOM, LEAST * _words_per_element(tasks, at_random, wide=True))
