"""Task vectors in memory, so that the merge under another preference takes a moment: prices from a sample, one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint
from ..merging.pipeline import InputBlock
from ..merging.reader import BlockReader
from ..rules.statistics import Address, Block
from ..rules.tunable.assignment import SupplyCount, take_from_winners
from ..rules.tunable.dual import Candidates, PricedAssignment
from ..rules.tunable.dual_prices import UndecidedElements, UndecidedReduction, tie_breaker
from ..rules.tunable.quotas import quotas
from ..rules.tunable.transport import balance_prices

SAMPLE_SIZE = 200_000
"""About so many moved elements decide the prices; a task's share of all elements is then off by about 0.1 %."""
PIECE = 1 << 19

WriteBlock = Callable[[Address, NDArray[Any]], None]
"""Takes merged elements and where they belong; called from several threads."""


@dataclass(frozen=True)
class PreviewMerges:
    """The task vectors of all tensors that moved, and a sample of their moved elements.

    Attributes:
        blocks: each tensor in pieces of at most PIECE elements.
        base_blocks: theta_0 at each of these.
        natural_counts: how many elements MagMax takes from each task.
        sampled_columns: some of the elements that moved, chosen by their addresses as `tunable` does.
    """

    blocks: Sequence[Block]
    base_blocks: Sequence[NDArray[Any]]
    natural_counts: Sequence[int]
    sampled_columns: Candidates

    @classmethod
    def read(
        cls,
        base: Checkpoint,
        models: Sequence[Checkpoint],
        sample_size: int = SAMPLE_SIZE,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> PreviewMerges:
        """Read all task vectors once. Raises MagMaxError for NaN and infinity."""
        reader = BlockReader([base, *models])
        keys = [key for key, spec in base.specs.items() if spec.is_mergeable and spec.numel]
        blocks: list[Block] = []
        starts: list[NDArray[Any]] = []
        for done, key in enumerate(keys, start=1):
            block = InputBlock(reader.inputs, key, [(0, base.specs[key].numel)], digest=False)
            start = reader.read_numbers(block, 0)
            deltas = [reader.task_vector(block, number, start) for number in range(1, len(reader.inputs))]
            if any(delta.any() for delta in deltas):
                cuts = [slice(at, at + PIECE) for at in range(0, len(start), PIECE)]
                blocks += [Block(Address(key, cut.start), [delta[cut] for delta in deltas]) for cut in cuts]
                starts += [start[cut] for cut in cuts]
            progress(done, len(keys))
        natural_counts = _count_winners(blocks, len(models))
        return cls(
            blocks,
            starts,
            natural_counts,
            _sample_elements(blocks, len(models), min(1.0, sample_size / max(1, sum(natural_counts)))),
        )

    @property
    def nbytes(self) -> int:
        """The memory that the task vectors and theta_0 take."""
        held = [*self.base_blocks, *(delta for block in self.blocks for delta in block.task_vectors)]
        return sum(array.nbytes for array in held)

    def assignment(self, weights: Sequence[float]) -> PricedAssignment:
        """Who supplies each element, by prices under which the sample has its quotas.

        With MagMax's own counts, or with one task alone, it is exact.
        """
        among = [task for task, weight in enumerate(weights) if weight > 0]
        wanted = quotas(weights, sum(self.natural_counts))
        if len(among) == 1 or wanted == list(self.natural_counts):
            return PricedAssignment(among, [0.0] * len(among), 0.0, 0, {})
        columns = self.sampled_columns._replace(magnitudes=self.sampled_columns.magnitudes[among])
        noise = tie_breaker(columns.magnitudes)
        worth = columns.worth(noise)
        shares = np.array([wanted[task] for task in among]) * (worth.shape[1] / sum(wanted))
        return PricedAssignment(among, balance_prices(worth, shares, np.zeros(len(among))).tolist(), noise, 0, {})

    def merge(self, weights: Sequence[float], scaling_factor: float, write_block: WriteBlock, threads: int) -> None:
        """Put base + scaling_factor * m, piece by piece, for all tensors that moved."""
        priced = self.assignment(weights)

        def work(block: Block, start: NDArray[Any]) -> None:
            values = take_from_winners(block, priced.winners(block)).astype(start.dtype)
            values *= start.dtype.type(scaling_factor)
            values += start
            write_block(block.address, values)

        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, self.blocks, self.base_blocks):
                pass


def _count_winners(blocks: Sequence[Block], tasks: int) -> list[int]:
    """Return how many elements MagMax takes from each task."""
    supply = SupplyCount(tasks, any(delta.dtype == np.float64 for block in blocks for delta in block.task_vectors))
    counts = supply.initial()
    for block in blocks:
        supply.update(block, counts)
    return counts.tolist()


def _sample_elements(blocks: Sequence[Block], tasks: int, rate: float) -> Candidates:
    """This part of the elements that moved."""
    every = UndecidedReduction(
        PricedAssignment(range(tasks), [0.0] * tasks, 0.0, 0, {}), np.full((tasks, tasks), np.inf), rate
    )
    replies = {block.address: every.initial() for block in blocks}
    for block in blocks:
        every.update(block, replies[block.address])
    return UndecidedElements.read(replies, tasks).columns
