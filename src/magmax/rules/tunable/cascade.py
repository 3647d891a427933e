"""The published selection of Tunable MagMax: winners released task by task until every quota is met.

Each step cuts the members of a task in two, by magnitude or at random. Where to cut is guessed from a sample, with a
margin; what lies within the margins is then known in ever larger parts, until all of it is and every cut is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..random import random_words
from ..statistics import Address, Block
from .assignment import Codes, Winners, codes_of, largest_magnitude_task, moved_mask, split_block
from .thresholds import CascadeSteps, Keys, Mask, Places, ThresholdWindow, WindowSteps


class CascadeElements(NamedTuple):
    """Some elements: magnitudes by row of `among`, whether each is to be followed, and random words by stream."""

    codes: Codes
    alive: Mask
    words: Callable[[int], NDArray[Any]]


@dataclass(frozen=True)
class Cascade:
    """All steps, and where each cuts.

    Step n < A releases winners of the n-th last of the A tasks in `among`; then, for each but the first, which of the
    elements that the first released it takes because it is the strongest there; and then, which of the rest it takes.

    Attributes:
        tasks: how many task vectors there are.
        among: the tasks with a quota, in order, counted from 0.
        at_random: release random elements of a task, not its smallest.
        float64: whether magnitudes are compared as float64.
        windows: of each step; none at all means that nobody releases anything.
    """

    tasks: int
    among: Sequence[int]
    at_random: bool
    seed: int
    float64: bool
    windows: Sequence[ThresholdWindow] = ()

    def winners(self, block: Block) -> Winners:
        """The task that supplies each element, once all cuts are exact."""
        winners = np.empty(math.prod(block.task_vectors[0].shape), np.int16)
        among = np.asarray(self.among, np.int16)
        for at, deltas in split_block(block):
            start = at.offset - block.address.offset
            rows = self.run_steps(self.elements(at, deltas), WindowSteps(self.windows, at))
            winners[start : start + len(rows)] = among[rows]
        return winners

    @property
    def streams(self) -> Sequence[int]:
        """Of the random words."""
        return [*(task + 1 for task in self.among if self.at_random), 0, self.tasks + 1]

    def elements(self, address: Address, task_vectors: Sequence[NDArray[Any]]) -> CascadeElements:
        """Return the elements of a block that begins at an address."""
        codes = codes_of(task_vectors, self.float64)

        def words(stream: int) -> NDArray[Any]:
            return random_words("tunable", self.seed, stream, address, len(task_vectors[0]))

        return CascadeElements([codes[task] for task in self.among], moved_mask(codes), words)

    def run_steps(self, elements: CascadeElements, steps: CascadeSteps) -> Winners:
        """Take all steps; returns the row of `among` of each element. What is undecided is no longer `alive`."""
        codes, alive, words = elements
        tasks = len(codes)
        winners = largest_magnitude_task(codes, range(tasks))
        if not self.windows:
            return winners
        for step, row in enumerate(reversed(range(tasks))):
            members = (winners == row) & alive
            if steps.all_stay(step, members):
                continue
            spots = np.flatnonzero(members)
            keys = self._keys(words(self.among[row] + 1) if self.at_random else codes[row], spots)
            sure, most = steps.cut(step, keys, spots)
            alive[spots[most & ~sure]] = False
            gone = spots[~most]
            if row:
                winners[gone] = largest_magnitude_task([code[gone] for code in codes[:row]], range(row))
            else:
                self._assign_released(elements, steps, winners, gone)
        return winners

    def _assign_released(self, elements: CascadeElements, steps: CascadeSteps, winners: Winners, gone: Places) -> None:
        """Give what the first task released to those in want of some, where they are the strongest, and then at all."""
        codes, alive, words = elements
        labels = 1 + largest_magnitude_task([code[gone] for code in codes[1:]], range(len(codes) - 1))
        keys = self._keys(words(0), gone)
        left = np.ones(len(gone), np.bool_)
        for row in range(1, len(codes)):
            elements_of_row = np.flatnonzero(labels == row)
            sure, most = steps.cut(len(codes) + row - 1, keys[elements_of_row], gone[elements_of_row])
            winners[gone[elements_of_row[sure]]] = row
            alive[gone[elements_of_row[most & ~sure]]] = False
            left[elements_of_row[most]] = False
        rest = gone[left]
        keys = self._keys(words(self.tasks + 1), rest)
        for row in range(1, len(codes)):
            sure, most = steps.cut(2 * len(codes) + row - 2, keys, rest)
            winners[rest[sure]] = row
            alive[rest[most & ~sure]] = False
            keys, rest = keys[~most], rest[~most]

    def _keys(self, values: NDArray[Any], spots: Places) -> Keys:
        """Magnitudes, or 31 random bits, of some elements; the very largest count as equal."""
        keys = values[spots]
        keys = (keys >> 1 if values.dtype == np.uint32 else keys).astype(np.int64)
        return np.minimum(keys, (1 << 63) - 1 - (1 << 47) if self.float64 else (1 << 31) - 1 - (1 << 15))
