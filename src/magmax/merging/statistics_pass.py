"""Collection of a rule's statistics over all blocks of the models: passes that only count."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from ..checkpoints.blocks import Chunk, iter_chunks
from ..rules import Address, Block, Rule
from ..rules.statistics import Counts, Reduction, Scope, Span, Statistics, StatisticsRequest, run_request
from .execution.pool import ShareTask, WorkerPool
from .pipeline import InputBlock, Prefetcher, Progress, blocks_of_chunk, keep_freed_memory, run_in_threads
from .reader import BlockReader

MIN_READ_RATIO = 64
"""How many times the bytes of its counts a share of the work reads, at least."""


class CollectedStatistics(NamedTuple):
    """The statistics that a rule requested, and the reader, which knows what it has checked.

    Attributes:
        by_tensor: the statistics by tensor; under None where the rule requests those of the whole model.
        reader: the reader, which need not check again what these passes read.
    """

    by_tensor: Mapping[str | None, Statistics]
    reader: BlockReader


def collect_statistics(
    rule: Rule,
    rules: Mapping[str, Rule],
    reader: BlockReader,
    elements: Mapping[str, int],
    pool: WorkerPool,
    progress: Progress,
) -> CollectedStatistics:
    """Collect the rule's statistics over all models: of the model at once, or of each tensor by its rule in `rules`.

    Args:
        elements: of each tensor to be merged, how many leading elements are.
    """
    keep_freed_memory()
    if rule.statistics_span is Span.MODEL:
        runner = StatisticsRunner(reader, elements, pool, progress, rule.whole_tensor)
        return CollectedStatistics({None: runner.collect(rule.statistics(runner.scope))}, runner.reader)
    tensor_task = TensorStatisticsTask(rules, reader, elements, rule.whole_tensor)
    asked = [key for key, count in elements.items() if count]
    statistics: dict[str | None, Statistics] = {}
    checked = True
    for key, reply in _statistics_by_tensor(tensor_task, asked, pool, progress):
        statistics[key] = reply.statistics
        checked &= reply.checked
    return CollectedStatistics({key: statistics[key] for key in asked}, replace(reader, finiteness_checked=checked))


class TensorStatistics(NamedTuple):
    """The statistics of one tensor, whether all of it was read, and the bytes read."""

    statistics: Statistics
    checked: bool
    read_bytes: int


@dataclass(frozen=True)
class TensorStatisticsTask(ShareTask):
    """The collection of a rule's statistics of each tensor by itself."""

    rules: Mapping[str, Rule]
    reader: BlockReader
    elements: Mapping[str, int]
    whole: bool

    @property
    def is_exclusive(self) -> bool:
        return self.whole

    def __call__(self, items: Sequence[str]) -> list[TensorStatistics]:
        keep_freed_memory()
        return [self.collect_tensor(key, lambda _: None) for key in items]

    def collect_tensor(self, key: str, progress: Progress) -> TensorStatistics:
        spec = self.reader.inputs[0].specs[key]
        count = self.elements[key]
        row = spec.numel // spec.shape[0] if len(spec.shape) > 1 else count
        read: list[int] = []

        def counted(size: int) -> None:
            read.append(size)
            progress(size)

        runner = StatisticsRunner(self.reader, {key: count}, WorkerPool(1), counted, self.whole)
        statistics = runner.collect(self.rules[key].statistics(replace(runner.scope, row_elements=row)))
        return TensorStatistics(statistics, runner.reader.finiteness_checked, sum(read))


def _statistics_by_tensor(
    tensor_task: TensorStatisticsTask, asked: Sequence[str], worker_pool: WorkerPool, progress: Progress
) -> Iterator[tuple[str, TensorStatistics]]:
    """Yield each tensor's statistics, as they come."""
    if worker_pool.executor is None:
        with ThreadPoolExecutor(1 if tensor_task.whole else worker_pool.count) as pool:
            yield from zip(asked, pool.map(partial(tensor_task.collect_tensor, progress=progress), asked), strict=True)
        return
    inputs = tensor_task.reader.inputs
    for share, replies in worker_pool.map_shares(
        tensor_task, asked, lambda key: len(inputs) * inputs[0].specs[key].nbytes
    ):
        progress(sum(reply.read_bytes for reply in replies))
        yield from zip(share, replies, strict=True)


@dataclass(frozen=True)
class ReductionTask(ShareTask):
    """One reduction over blocks, or over whole tensors where the rule merges these, so that both see the same.

    Attributes:
        elements: of each tensor, how many leading elements are merged.
    """

    reader: BlockReader
    reduction: Reduction
    elements: Mapping[str, int]
    whole: bool

    @property
    def is_exclusive(self) -> bool:
        return self.whole

    def __call__(self, items: Sequence[Chunk]) -> Counts | dict[Address, Counts]:
        keep_freed_memory()
        if self.reduction.per_block:
            return {at: counts for chunk in items for at, counts in self.count_blocks(chunk)}
        total = self.reduction.initial()
        for chunk in items:
            self.add_chunk(chunk, total)
        return total

    def add_chunk(self, chunk: Chunk, into: Counts) -> None:
        for block in self._blocks(chunk):
            with np.errstate(invalid="ignore"):
                self.reduction.update(block, into)

    def count_blocks(self, chunk: Chunk) -> Iterator[tuple[Address, Counts]]:
        for block in self._blocks(chunk):
            counts = self.reduction.initial()
            with np.errstate(invalid="ignore"):
                self.reduction.update(block, counts)
            yield block.address, counts

    def cost(self, chunk: Chunk) -> int:
        """Return the bytes that a chunk reads, where the reduction looks at all of it."""
        inputs = self.reader.inputs
        return (chunk.stop - chunk.start) * inputs[0].specs[chunk.key].storage_dtype.itemsize * len(inputs)

    def _blocks(self, chunk: Chunk) -> Iterator[Block]:
        inputs, reduction = self.reader.inputs, self.reduction
        for cuts in blocks_of_chunk(chunk, inputs[0].specs[chunk.key], self.whole):
            start, stop = cuts[0][0], min(cuts[-1][1], self.elements[chunk.key])
            if stop <= start:
                break
            if reduction.addresses is not None and Address(chunk.key, start) not in reduction.addresses:
                continue
            end = min(stop, start + reduction.sampled) if reduction.sampled else stop
            block = InputBlock(inputs, chunk.key, [(start, end)], digest=False)
            base = self.reader.read_numbers(block, 0)
            deltas = [self.reader.task_vector(block, task, base) for task in range(1, len(inputs))]
            shape = block.shape if self.whole and end == stop else None
            yield Block(Address(chunk.key, start), deltas, base, shape)


class StatisticsRunner:
    """A runner of statistics requests over some tensors of the inputs: the base, then the models."""

    def __init__(
        self,
        reader: BlockReader,
        elements: Mapping[str, int],
        pool: WorkerPool,
        progress: Progress,
        whole: bool = False,
    ) -> None:
        self.reader, self._pool, self._progress = reader, pool, progress
        self._whole = whole
        self._elements, specs = elements, reader.inputs[0].specs
        self._specs = {key: specs[key] for key in elements}
        wide = any(spec.dtype == "F64" for spec in self._specs.values())
        shapes = {key: _leading_shape(spec.shape, elements[key]) for key, spec in self._specs.items()}
        self.scope = Scope(len(reader.inputs) - 1, sum(elements.values()), wide, shapes=shapes)

    def collect(self, request: StatisticsRequest) -> Statistics:
        """Run the reductions of a request in turn, and return its statistics."""
        return run_request(request, self._run_reduction)

    def _run_reduction(self, reduction: Reduction) -> Counts | dict[Address, Counts]:
        counting = ReductionTask(self.reader, reduction, self._elements, self._whole)
        if self._pool.executor is not None:
            reply = self._run_on_workers(counting)
        else:
            reply = self._count_per_block(counting) if reduction.per_block else self._sum_in_threads(counting)
        if _reads_everything(reduction):
            self.reader = replace(self.reader, finiteness_checked=True)
        return reply

    def _run_on_workers(self, counting: ReductionTask) -> Counts | dict[Address, Counts]:
        """Add up the counts of all shares; integers can be added in any order."""
        reduction = counting.reduction
        counts_by_block: dict[Address, Counts] = {}
        total = reduction.initial()
        least = 0 if reduction.per_block else MIN_READ_RATIO * total.nbytes
        for share, reply in self._pool.map_shares(counting, self._chunks(), counting.cost, least):
            if reduction.per_block:
                counts_by_block |= reply
            else:
                total += reply
            if _reads_everything(reduction):
                self._progress(sum(map(counting.cost, share)))
        return counts_by_block if reduction.per_block else total

    def _sum_in_threads(self, counting: ReductionTask) -> Counts:
        """Each thread counts for itself; integers can be added in any order."""
        thread_local = threading.local()
        everyones: list[Counts] = []

        def work(chunk: Chunk) -> Chunk:
            if not hasattr(thread_local, "counts"):
                thread_local.counts = counting.reduction.initial()
                everyones.append(thread_local.counts)
            counting.add_chunk(chunk, thread_local.counts)
            return chunk

        self._for_each_chunk(work, counting)
        total = counting.reduction.initial()
        for counts in everyones:
            total += counts
        return total

    def _count_per_block(self, counting: ReductionTask) -> dict[Address, Counts]:
        counts_by_block: dict[Address, Counts] = {}

        def work(chunk: Chunk) -> Chunk:
            counts_by_block.update(counting.count_blocks(chunk))
            return chunk

        self._for_each_chunk(work, counting)
        return counts_by_block

    def _for_each_chunk(self, work: Callable[[Chunk], Chunk], counting: ReductionTask) -> None:
        threads = 1 if self._whole else self._pool.count
        one_by_one = (work(chunk) for chunk in self._chunks())
        ahead = Prefetcher(self.reader.inputs if _reads_everything(counting.reduction) else ())
        alone = threads == 1 and not any(checkpoint.url for checkpoint in self.reader.inputs)
        with closing(one_by_one if alone else run_in_threads(work, self._chunks(), threads, ahead)) as done:
            for chunk in done:
                if _reads_everything(counting.reduction):
                    self._progress(counting.cost(chunk))

    def _chunks(self) -> Iterator[Chunk]:
        return (chunk for key, spec in self._specs.items() for chunk in iter_chunks(key, spec, self._whole))


def _reads_everything(reduction: Reduction) -> bool:
    return not reduction.sampled and reduction.addresses is None


def _leading_shape(shape: tuple[int, ...], elements: int) -> tuple[int, ...]:
    """The shape of the leading rows that have so many elements."""
    row = math.prod(shape[1:])
    return (elements // row, *shape[1:]) if shape and row else shape
