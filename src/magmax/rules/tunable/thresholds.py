"""Where the steps of the published selection of `tunable` cut: exactly, or within a window as far as is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..statistics import Address

Keys = NDArray[np.int64]
Mask = NDArray[np.bool_]
Places = NDArray[np.intp]


class StepThreshold(NamedTuple):
    """The threshold of a step: members with larger keys stay, and those of the key itself up to an address."""

    key: int
    last: Address | None = None

    def keeps(self, keys: Keys, spots: Places, address: Address) -> Mask:
        """Return which of some members stay, `spots` behind an address."""
        mask = keys > self.key
        if self.last is not None and address.key <= self.last.key:
            equal = keys == self.key
            mask |= equal if address.key < self.last.key else equal & (spots <= self.last.offset - address.offset)
        return mask

    @property
    def order(self) -> tuple[int, Address]:
        """Grows with what is kept."""
        return -self.key, self.last or Address("", -1)


KEEP_ALL, NONE = StepThreshold(-1), StepThreshold((1 << 63) - 1)


class ThresholdWindow(NamedTuple):
    """The window of a threshold: the members that surely stay, and those that possibly do."""

    surely_kept: StepThreshold = NONE
    possibly_kept: StepThreshold = KEEP_ALL


class CascadeSteps(ABC):
    """A decision at each step of the cascade which members stay."""

    @abstractmethod
    def all_stay(self, step: int, members: Mask) -> bool:
        """Return whether no member goes, so that their keys need not be known."""

    @abstractmethod
    def cut(self, step: int, keys: Keys, spots: Places) -> tuple[Mask, Mask]:
        """Return which members stay surely, and which may."""


class WindowSteps(CascadeSteps):
    """Decisions by the windows of all steps for the elements of a block; counts them if asked to.

    Attributes:
        counts: for each step, how many members stay surely, and how many surely go.
    """

    def __init__(
        self, windows: Sequence[ThresholdWindow], address: Address, counts: NDArray[np.int64] | None = None
    ) -> None:
        self._windows, self._address, self.counts = windows, address, counts

    def all_stay(self, step: int, members: Mask) -> bool:
        if self._windows[step].surely_kept != KEEP_ALL:
            return False
        if self.counts is not None:
            self.counts[step, 0] += np.count_nonzero(members)
        return True

    def cut(self, step: int, keys: Keys, spots: Places) -> tuple[Mask, Mask]:
        window = self._windows[step]
        sure = window.surely_kept.keeps(keys, spots, self._address)
        most = (
            sure
            if window.possibly_kept == window.surely_kept
            else window.possibly_kept.keeps(keys, spots, self._address)
        )
        if self.counts is not None:
            self.counts[step] += np.count_nonzero(sure), np.count_nonzero(~most)
        return sure, most
