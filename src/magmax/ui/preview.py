"""Task vectors in memory, so that the merge under another preference takes a moment: prices from a sample, one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint
from ..merging.pipeline import Slab
from ..merging.reader import Reader
from ..rules.statistics import Address, Block
from ..rules.tunable.assignment import Supply, picked
from ..rules.tunable.dual import Columns, Priced
from ..rules.tunable.dual_prices import Found, Undecided, tie_breaker
from ..rules.tunable.quotas import quotas
from ..rules.tunable.transport import balanced

SAMPLE = 200_000
"""About so many moved elements decide the prices; a task's share of all elements is then off by about 0.1 %."""
PIECE = 1 << 19

Put = Callable[[Address, NDArray[Any]], None]
"""Takes merged elements and where they belong; called from several threads."""


@dataclass(frozen=True)
class Held:
    """The task vectors of all tensors that moved, and a sample of their moved elements.

    Attributes:
        blocks: each tensor in pieces of at most PIECE elements.
        base: theta_0 at each of these.
        own: how many elements MagMax takes from each task.
        sample: some of the elements that moved, chosen by their addresses as `tunable` does.
    """

    blocks: Sequence[Block]
    base: Sequence[NDArray[Any]]
    own: Sequence[int]
    sample: Columns

    @classmethod
    def read(
        cls,
        base: Checkpoint,
        models: Sequence[Checkpoint],
        size: int = SAMPLE,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> Held:
        """Read all task vectors once. Raises MagMaxError for NaN and infinity."""
        reader = Reader([base, *models])
        keys = [key for key, spec in base.specs.items() if spec.floating and spec.elements]
        blocks: list[Block] = []
        starts: list[NDArray[Any]] = []
        for done, key in enumerate(keys, start=1):
            slab = Slab(reader.inputs, key, [(0, base.specs[key].elements)], digest=False)
            start = reader.numbers(slab, 0)
            deltas = [reader.task_vector(slab, number, start) for number in range(1, len(reader.inputs))]
            if any(delta.any() for delta in deltas):
                cuts = [slice(at, at + PIECE) for at in range(0, len(start), PIECE)]
                blocks += [Block(Address(key, cut.start), [delta[cut] for delta in deltas]) for cut in cuts]
                starts += [start[cut] for cut in cuts]
            tell(done, len(keys))
        own = _counts(blocks, len(models))
        return cls(blocks, starts, own, _sampled(blocks, len(models), min(1.0, size / max(1, sum(own)))))

    @property
    def nbytes(self) -> int:
        """The memory that the task vectors and theta_0 take."""
        held = [*self.base, *(delta for block in self.blocks for delta in block.deltas)]
        return sum(array.nbytes for array in held)

    def priced(self, weights: Sequence[float]) -> Priced:
        """Who supplies each element, by prices under which the sample has its quotas.

        With MagMax's own counts, or with one task alone, it is exact.
        """
        among = [task for task, weight in enumerate(weights) if weight > 0]
        wanted = quotas(weights, sum(self.own))
        if len(among) == 1 or wanted == list(self.own):
            return Priced(among, [0.0] * len(among), 0.0, 0, {})
        columns = self.sample._replace(magnitudes=self.sample.magnitudes[among])
        noise = tie_breaker(columns.magnitudes)
        worth = columns.worth(noise)
        shares = np.array([wanted[task] for task in among]) * (worth.shape[1] / sum(wanted))
        return Priced(among, balanced(worth, shares, np.zeros(len(among))).tolist(), noise, 0, {})

    def merge(self, weights: Sequence[float], scaling_factor: float, put: Put, threads: int) -> None:
        """Put base + scaling_factor * m, piece by piece, for all tensors that moved."""
        priced = self.priced(weights)

        def work(block: Block, start: NDArray[Any]) -> None:
            values = picked(block, priced.winners(block)).astype(start.dtype)
            values *= start.dtype.type(scaling_factor)
            values += start
            put(block.at, values)

        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, self.blocks, self.base):
                pass


def _counts(blocks: Sequence[Block], tasks: int) -> list[int]:
    """How many elements MagMax takes from each task."""
    supply = Supply(tasks, any(delta.dtype == np.float64 for block in blocks for delta in block.deltas))
    counts = supply.zeros()
    for block in blocks:
        supply.count(block, counts)
    return counts.tolist()


def _sampled(blocks: Sequence[Block], tasks: int, rate: float) -> Columns:
    """This part of the elements that moved."""
    every = Undecided(Priced(range(tasks), [0.0] * tasks, 0.0, 0, {}), np.full((tasks, tasks), np.inf), rate)
    replies = {block.at: every.zeros() for block in blocks}
    for block in blocks:
        every.count(block, replies[block.at])
    return Found.read(replies, tasks).columns
