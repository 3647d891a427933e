"""The published selection of Tunable MagMax: winners released task by task until every quota is met.

Which task supplies an element is a pure function of the block and of the cuts found so far, so that each step is one
question to all blocks, and nothing is held between the steps but a few cuts a task.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .chance import draws
from .magnitude import Cut, Equals, Rank, Window, exact_cuts, locate
from .plan import Address, Block, Fold, Seen
from .winners import Codes, Winners, codes_of, moved, strongest

Keys = NDArray[Any]
"""One integer an element: 0 where it is not a member, and the larger the sooner it is kept where it is."""


@dataclass(frozen=True)
class Replay:
    """The steps taken so far.

    Attributes:
        among: the tasks with a quota, in order, counted from 0.
        at_random: release random elements of a task, not its smallest.
        wide: whether magnitudes are compared as float64.
        kept: for the last of `among`, the one before it and so on, which of its winners it keeps; None means all.
        matched: for every other than the first, which elements that the first releases it takes because it is the
            strongest there.
        filled: for each of these, which of the rest it takes, or one before it does.
    """

    among: Sequence[int]
    at_random: bool
    seed: int
    wide: bool
    kept: Sequence[Cut | None] = ()
    matched: Sequence[Cut] = ()
    filled: Sequence[Cut] = ()

    def winners(self, block: Block) -> Winners:
        """The task that supplies each element, as far as the steps go."""
        return self._replayed(block)[1]

    def as_deltas(self, block: Block) -> Block:
        """The block with its keys, as the numbers whose magnitudes they are, in the place of task vectors."""
        return replace(block, deltas=[_floats(keys) for keys in self.keys(block)])

    def keys(self, block: Block) -> list[Keys]:
        """What the next cuts are to be found on."""
        codes, winners, released = self._replayed(block)
        if len(self.kept) < len(self.among):
            task = self.among[-1 - len(self.kept)]
            return [self._own_keys(block.at, codes, task, (winners == task) & moved(codes))]
        label = self._label(codes, released)
        if not self.matched:
            keys = self._random_keys(block.at, 0, released)
            return [np.where(label == task, keys, 0) for task in self.among[1:]]
        rest = released & ~self._match(block.at, winners, label, released)
        return [self._random_keys(block.at, len(block.deltas) + 1, rest)] * (len(self.among) - 1)

    def _replayed(self, block: Block) -> tuple[Codes, Winners, NDArray[np.bool_]]:
        """Magnitudes, winners, and what the first task released."""
        codes = codes_of(block, self.wide)
        winners, alive = strongest(codes, self.among), moved(codes)
        released = np.zeros_like(alive)
        for place, cut in enumerate(self.kept):
            task, before = self.among[-1 - place], self.among[: -1 - place]
            if cut is None:
                continue
            members = (winners == task) & alive
            gone = members & (cut.mask(_floats(self._own_keys(block.at, codes, task, members)), block.at) == 0)
            if before:
                spots = np.flatnonzero(gone)
                winners[spots] = strongest(codes, before, spots)
            else:
                released = gone
        if self.matched:
            label = self._label(codes, released)
            rest = released & ~self._match(block.at, winners, label, released)
            self._fill(block, winners, rest)
        return codes, winners, released

    def _label(self, codes: Codes, released: NDArray[np.bool_]) -> Winners:
        """The strongest of all but the first task, where the first released an element; -1 elsewhere."""
        label = np.full(len(released), -1, np.int16)
        spots = np.flatnonzero(released)
        label[spots] = strongest(codes, self.among[1:], spots)
        return label

    def _match(self, at: Address, winners: Winners, label: Winners, released: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Give each task its part of the elements where it is the strongest; returns which were given."""
        keys = self._random_keys(at, 0, released)
        given = np.zeros_like(released)
        for task, cut in zip(self.among[1:], self.matched, strict=True):
            mine = cut.mask(_floats(np.where(label == task, keys, 0)), at) != 0
            winners[mine] = task
            given |= mine
        return given

    def _fill(self, block: Block, winners: Winners, rest: NDArray[np.bool_]) -> None:
        """Give out what is left, each task taking what no task before it took."""
        if not self.filled or not rest.any():
            return
        keys = _floats(self._random_keys(block.at, len(block.deltas) + 1, rest))
        for task, cut in reversed(list(zip(self.among[1:], self.filled, strict=True))):
            winners[cut.mask(keys, block.at) != 0] = task

    def _own_keys(self, at: Address, codes: Codes, task: int, members: NDArray[np.bool_]) -> Keys:
        if self.at_random:
            return self._random_keys(at, task + 1, members)
        return self._lifted(codes[task], members)

    def _random_keys(self, at: Address, stream: int, members: NDArray[np.bool_]) -> Keys:
        """31 random bits, as large as a magnitude can be."""
        drawn = draws("tunable", self.seed, stream, at, len(members)) >> 1
        return self._lifted(drawn.astype(np.int64) << 31 if self.wide else drawn.astype(np.int32), members)

    def _lifted(self, keys: Keys, members: NDArray[np.bool_]) -> Keys:
        """Members' keys moved above the first bin of the widest window, so that they are counted along; others' 0."""
        least = 1 << _widest(self.wide)
        top = (1 << (63 if self.wide else 31)) - 1
        return np.where(members, np.minimum(keys, keys.dtype.type(top - least)) + keys.dtype.type(least), 0)


def replayed(replay: Replay, wanted: Sequence[int], supply: Sequence[int] | None) -> Generator[Fold, Any, Replay]:
    """Take all steps: `wanted` is the quota of each task of `among`, `supply` what it wins at first, if known."""
    held = list(supply or wanted)
    counted = supply is not None
    for place in reversed(range(len(held))):
        keep = wanted[place]
        if counted and held[place] <= keep:
            replay = replace(replay, kept=(*replay.kept, None))
            continue
        cuts, (held[place],) = yield from largest_members(replay, 1, lambda members, keep=keep: [keep])
        counted = False
        replay = replace(replay, kept=(*replay.kept, cuts[0] if held[place] > keep else None))
        held[place] = min(held[place], keep)
    needs = [want - has for want, has in zip(wanted[1:], held[1:], strict=True)]
    if not any(needs):
        return replay
    cuts, members = yield from largest_members(replay, len(needs), lambda members: needs)
    replay = replace(replay, matched=cuts)
    left = [max(0, need - has) for need, has in zip(needs, members, strict=True)]
    if not any(left):
        return replay
    upto = list(accumulate(left))
    cuts, _ = yield from largest_members(replay, len(left), lambda members: upto)
    return replace(replay, filled=cuts)


def largest_members(
    replay: Replay, arrays: int, wanted: Callable[[Sequence[int]], Sequence[int]]
) -> Generator[Fold, Any, tuple[list[Cut], list[int]]]:
    """For each array of the replay's next keys, its `wanted` largest members, exactly, and how many members it has.

    `wanted` is told how many. Equal keys go by tensor name, then offset.
    """
    wide, shift = replay.wide, _widest(replay.wide)
    lows = [0] * arrays
    counts = yield Seen(Window(lows, shift, wide), replay.as_deltas)
    members = [int(own[2:].sum()) for own in counts]
    keeps = wanted(members)
    none = 1 << (63 if wide else 31)
    sure = [keep <= 0 or keep >= has for keep, has in zip(keeps, members, strict=True)]
    ranks = [Rank(none if keep <= 0 else 1, 0, 0) for keep in keeps]
    while not all(sure):
        for n, keep in enumerate(keeps):
            place = None if sure[n] else locate(counts[n], keep)
            if place is not None:
                lows[n] += place[0] << shift
                ranks[n] = Rank(lows[n], *place[1:])
        if shift == 0:
            break
        shift = max(0, shift - 16)
        counts = yield Seen(Window(lows, shift, wide), replay.as_deltas)
    if all(rank.wanted == rank.equal for rank in ranks):
        return [Cut(rank.code, wide=wide) for rank in ranks], members
    equals = yield Seen(Equals([rank.code for rank in ranks], wide), replay.as_deltas)
    return exact_cuts(ranks, equals, wide), members


def _widest(wide: bool) -> int:
    """The shift of a window over all magnitudes."""
    return 47 if wide else 15


def _floats(keys: Keys) -> Keys:
    """Integers as the numbers whose magnitudes they are."""
    return np.ascontiguousarray(keys).view(np.float64 if keys.dtype.itemsize == 8 else np.float32)
