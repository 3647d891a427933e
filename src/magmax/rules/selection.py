"""The exact k-th largest magnitude over any number of blocks, in constant memory."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .statistics import Address, Array, Block, Counts, Reduction, Scope, namespace

BINS = 1 << 16
SAMPLE = 1 << 11


class KthMagnitudeCode(NamedTuple):
    """The k-th largest magnitude of one task vector.

    Attributes:
        code: the magnitude, as the integer its bits spell.
        wanted: how many of the entries equal to it are among the k largest.
        equal: how many there are.
    """

    code: int
    wanted: int
    equal: int


@dataclass(frozen=True)
class LargestEntries:
    """The k largest entries of one task vector: those above a magnitude, and the first of those equal to it.

    Attributes:
        code: the magnitude, as the integer its bits spell.
        last_equal: the block in which the last of the equal entries to keep lies; None means that all are kept.
        equal_in_last: how many of the equal entries in that block are kept.
        float64: whether `code` is of float64.
    """

    code: int
    last_equal: Address | None = None
    equal_in_last: int = 0
    float64: bool = False

    def mask(self, task_vector: Array, address: Address) -> Array:
        """All ones (as signed integers) where an entry is kept, all zeros elsewhere."""
        codes = magnitude_codes(task_vector, self.float64)
        least = self.code if self.last_equal is None or address <= self.last_equal else self.code + 1
        equal = namespace(codes).nonzero(codes == self.code)[0] if address == self.last_equal else ()
        surplus = equal[self.equal_in_last :]
        mask = (least - 1) - codes
        mask >>= 63 if self.float64 else 31
        if len(surplus):
            mask[surplus] = 0
        return mask

    def drops_any_equal(self, address: Address, equal: int) -> bool:
        """Return whether not all of a block's `equal` entries of just this magnitude are kept."""
        return (
            equal > 0
            and self.last_equal is not None
            and (address > self.last_equal or (address == self.last_equal and equal > self.equal_in_last))
        )


def apply_mask(values: Array, mask: Array, invert: bool = False) -> None:
    """Zero, in place, the bits `values` wherever the mask is zero (or, inverted, is not), whatever its width."""
    values &= namespace(mask).astype(~mask if invert else mask, values.dtype, copy=False)


def magnitude_codes(task_vector: Array, wide: bool) -> Array:
    """Magnitudes as integers of the same order: the bits of |delta|, of float64 if `wide`, else of float32."""
    xp = namespace(task_vector)
    if wide:
        return xp.astype(task_vector, xp.float64, copy=False).view(xp.int64) & ((1 << 63) - 1)
    return task_vector.view(xp.int32) & ((1 << 31) - 1)


@dataclass(frozen=True)
class CodeHistogram(Reduction):
    """Per task: how many magnitudes lie above a window of codes, and a histogram of those within it."""

    lows: Sequence[int]
    shift: int
    float64: bool
    sampled: int = 0

    def initial(self) -> Counts:
        return np.zeros((len(self.lows), 1 + BINS), np.int64)

    def update(self, block: Block, into: Counts) -> None:
        reach = BINS << self.shift
        for low, delta, counts in zip(self.lows, block.task_vectors, into, strict=True):
            above = np.asarray(magnitude_codes(delta, self.float64)).reshape(-1)
            above -= above.dtype.type(low)
            inside = above.view(f"u{above.itemsize}") < reach
            places = above[inside] >> self.shift
            if len(places) < BINS:
                np.add.at(counts, places + 1, 1)
            else:
                counts[1:] += np.bincount(places, minlength=BINS)
            counts[0] += np.count_nonzero(above >= 0) - len(places)


@dataclass(frozen=True)
class EqualCounts(Reduction):
    """Per task: how many magnitudes are exactly its code, block by block."""

    codes: Sequence[int]
    float64: bool
    per_block: bool = True

    def initial(self) -> Counts:
        return np.zeros(len(self.codes), np.int64)

    def update(self, block: Block, into: Counts) -> None:
        for task, (code, delta) in enumerate(zip(self.codes, block.task_vectors, strict=True)):
            into[task] += np.count_nonzero(np.asarray(magnitude_codes(delta, self.float64)) == code)


def request_largest(keeps: Sequence[int], scope: Scope) -> Generator[Reduction, Any, list[LargestEntries]]:
    """Find each task vector's entries of largest magnitude, exactly as many as `keeps` says of it.

    Equal ones go by tensor name, then offset.

    One pass over everything, mostly, as of `ranked`; where more entries are equal to the k-th than are to be kept,
    another finds the last of them.
    """
    ranks = yield from request_kth_magnitudes(keeps, scope)
    if all(rank.wanted == rank.equal for rank in ranks):
        return [LargestEntries(rank.code, float64=scope.float64) for rank in ranks]
    return largest_entries(ranks, (yield EqualCounts([rank.code for rank in ranks], scope.float64)), scope.float64)


def largest_entries(
    ranks: Sequence[KthMagnitudeCode], equals: Mapping[Address, Counts], wide: bool
) -> list[LargestEntries]:
    """Return which entries are the largest, given how many entries of each block equal each task's k-th."""
    order = sorted(equals)
    entries: list[LargestEntries] = []
    for task, (code, wanted, equal) in enumerate(ranks):
        if wanted == equal:
            entries.append(LargestEntries(code, float64=wide))
            continue
        counts = np.array([int(equals[at][task]) for at in order])
        last = int(np.searchsorted(np.cumsum(counts), wanted))
        entries.append(LargestEntries(code, order[last], wanted - int(counts[:last].sum()), wide))
    return entries


def request_kth_magnitudes(keeps: Sequence[int], scope: Scope) -> Generator[Reduction, Any, list[KthMagnitudeCode]]:
    """Find each task vector's k-th largest magnitude, exactly; k is its own of `keeps`.

    A sample says where to look; one pass over everything counts what lies above and in a narrow window there, and as a
    rule the magnitude is in it. Where it is not, the whole range is counted and narrowed.
    """
    top = (1 << (63 if scope.float64 else 31)) - 1
    known = {
        n: KthMagnitudeCode(0 if keep > 0 else top + 1, 0, 0)
        for n, keep in enumerate(keeps)
        if not 0 < keep < scope.elements
    }
    if len(known) == len(keeps):
        return [known[n] for n in range(len(keeps))]
    widest, narrow = (47, 29) if scope.float64 else (15, 0)
    everywhere = [0] * scope.tasks
    sampled: NDArray[np.int64] = yield CodeHistogram(everywhere, widest, scope.float64, SAMPLE)
    shares = [min(max(0, keep), scope.elements) / scope.elements for keep in keeps]
    shift = narrow
    middles = [_quantile(sampled[task, 1:], share, widest) for task, share in enumerate(shares)]
    lows = [max(0, middle - (BINS // 2 << shift)) for middle in middles]
    while True:
        counted: NDArray[np.int64] = yield CodeHistogram(lows, shift, scope.float64)
        located = [(0, 0, 0) if n in known else locate_kth(counts, keeps[n]) for n, counts in enumerate(counted)]
        if None in located:
            lows, shift = everywhere, widest
            continue
        bins = [place for place in located if place is not None]
        lows = [low + (place << shift) for low, (place, _, _) in zip(lows, bins, strict=True)]
        if shift == 0:
            codes = [KthMagnitudeCode(low, wanted, equal) for low, (_, wanted, equal) in zip(lows, bins, strict=True)]
            return [known.get(n, rank) for n, rank in enumerate(codes)]
        shift = max(0, shift - 16)


def locate_kth(counts: NDArray[np.int64], keep: int) -> tuple[int, int, int] | None:
    """The bin of the k-th largest, how many are wanted of it, and how many it holds; None if it is outside."""
    wanted = keep - int(counts[0])
    downward = np.cumsum(counts[:0:-1])
    if wanted <= 0 or wanted > downward[-1]:
        return None
    steps = int(np.searchsorted(downward, wanted))
    place = BINS - 1 - steps
    held = int(counts[1 + place])
    return place, wanted - (int(downward[steps]) - held), held


def _quantile(histogram: NDArray[np.int64], share: float, shift: int) -> int:
    """The code above which about this share of the sample lies, interpolated within its bin."""
    downward: NDArray[np.int64] = np.cumsum(histogram[::-1])
    target = share * int(downward[-1])
    steps = int(np.searchsorted(downward, target))
    part = (int(downward[steps]) - target) / max(1, int(histogram[BINS - 1 - steps]))
    return int((BINS - 1 - steps + part) * (1 << shift))
