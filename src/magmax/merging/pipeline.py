"""One pass over checkpoints: every chunk of every tensor read, worked on, written and digested, in threads."""

from __future__ import annotations

import ctypes
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import Checkpoint, TensorSpec
from ..checkpoints.blocks import Chunk, block_digests, iter_chunks
from ..checkpoints.journal import Journal
from ..checkpoints.renamed import TensorSink
from .digests import DigestCollector
from .execution.pool import ShareTask, WorkerPool

JOURNAL_SECONDS = 2.0
SYNC_BYTES = 64_000_000
"""How much is written before the disk is told to take it: waiting for it then overlaps with work on what follows."""
MAX_QUEUED_CHUNKS = 64
KEPT_FREE_BYTES = 24 << 20
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""What mallopt of the C library calls them."""
PREFETCH_BYTES = 256_000_000
"""The most memory that is filled ahead of the work with what comes from other machines."""

Progress = Callable[[int], None]
"""Called with a number of bytes read since the last call."""


class InputBlock:
    """One block of one tensor, several neighbouring ones, or the beginning of these, as a kernel sees it.

    `cuts` are the blocks themselves; `fixed` is what of it a merge leaves as it is in the base, for it is not finite
    there (`BlockReader` finds it).
    """

    def __init__(self, inputs: Sequence[Checkpoint], key: str, cuts: Sequence[tuple[int, int]], digest: bool) -> None:
        self.key, self.start, self.stop = key, cuts[0][0], cuts[-1][1]
        self.cuts = cuts
        self._inputs, self._digest = inputs, digest
        self.digests: dict[int, bytes] = {}
        self.fixed: Any = None

    def spec(self, number: int) -> TensorSpec:
        return self._inputs[number].spec(self.key)

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape, of a block that is all of its tensor or the leading rows of it: with as many rows."""
        shape = self.spec(0).shape
        row = math.prod(shape[1:])
        return ((self.stop - self.start) // row, *shape[1:]) if shape and row else shape

    def read(self, number: int) -> NDArray[Any]:
        """The block's units in input `number`, digested as they are read; the caller may overwrite them."""
        checkpoint = self._inputs[number]
        units = checkpoint.read(checkpoint.resolve_alias(self.key), self.start, self.stop)
        if self._digest:
            self.digests[number] = block_digests(units, self.cuts)
        return units

    def leading_part(self, limit: int) -> InputBlock:
        """The part of the block before an offset in the tensor, which may be nothing; digests go to the whole block."""
        if limit >= self.stop:
            return self
        head = copy(self)
        head.stop = max(self.start, limit)
        return head

    def read_for_digest(self, number: int) -> None:
        """Read input `number` for its digest alone, if its tensor has the base's type and shape."""
        checkpoint = self._inputs[number]
        if checkpoint.specs.get(checkpoint.resolve_alias(self.key)) == self.spec(0):
            self.read(number)


class Kernel(ABC):
    """The function that a pass applies to each block."""

    @property
    def whole_tensor(self) -> bool:
        """Return whether it gets each tensor as one block; a pass then works on one tensor at a time, whatever its
        threads.
        """
        return False

    @property
    def holds_all_inputs(self) -> bool:
        """Return whether it holds a block of every input at once."""
        return False

    @abstractmethod
    def __call__(self, block: InputBlock) -> Sequence[NDArray[Any] | None]:
        """Read what is needed of the block; return the stored units for each sink, or None to leave that sink alone."""

    def prepare(self, pool: WorkerPool, progress: Progress) -> Self:
        """Return the kernel with all that it needs before the pass. By default it needs nothing."""
        return self

    def note(self) -> str:
        """Return what a user should hear once it is prepared. By default, nothing."""
        return ""


Inner = TypeVar("Inner", bound=Kernel)


@dataclass(frozen=True)
class WrappedKernel(Kernel, Generic[Inner]):
    """A kernel that makes something of what a merge's kernel does, and needs what that needs."""

    merge: Inner

    @property
    def whole_tensor(self) -> bool:
        return self.merge.whole_tensor

    @property
    def holds_all_inputs(self) -> bool:
        return self.merge.holds_all_inputs

    def prepare(self, pool: WorkerPool, progress: Progress) -> Self:
        return replace(self, merge=self.merge.prepare(pool, progress))

    def note(self) -> str:
        return self.merge.note()


@dataclass(frozen=True)
class ChunkTask(ShareTask):
    """The work of a pass: chunk by chunk, from the inputs into the sinks."""

    inputs: Sequence[Checkpoint]
    sinks: Sequence[TensorSink]
    kernel: Kernel
    digest: bool

    @property
    def is_exclusive(self) -> bool:
        return self.kernel.whole_tensor

    def __call__(self, items: Sequence[Chunk]) -> list[list[bytes]]:
        """The digests of each chunk, once what was written is on disk."""
        keep_freed_memory()
        digests = [self.process(chunk)[1] for chunk in items]
        for sink in self.sinks:
            sink.sync()
        return digests

    def process(self, chunk: Chunk) -> tuple[Chunk, list[bytes]]:
        """One chunk, block by block; with it the block digests of each input and then of each sink, joined."""
        joined = [b""] * (len(self.inputs) + len(self.sinks))
        for cuts in blocks_of_chunk(chunk, self.inputs[0].specs[chunk.key], self.kernel.whole_tensor):
            block = InputBlock(self.inputs, chunk.key, cuts, self.digest)
            outputs = self.kernel(block)
            for number, (sink, stored) in enumerate(zip(self.sinks, outputs, strict=True), start=len(self.inputs)):
                if stored is not None:
                    sink.write(chunk.key, block.start, stored)
                    if self.digest:
                        block.digests[number] = block_digests(stored, cuts)
            for number, digest in block.digests.items():
                joined[number] += digest
        return chunk, joined


@dataclass(frozen=True)
class BlockPipeline:
    """A pass over `inputs`, of which the first names the tensors, into `sinks`.

    Attributes:
        pool: who works on the chunks.
        digest: whether everything read and written is digested.
        journal: where finished chunks are noted every few seconds.
        parts: the journal's chunks of an interrupted run, not to be done again.
    """

    inputs: Sequence[Checkpoint]
    sinks: Sequence[TensorSink]
    kernel: Kernel
    pool: WorkerPool = field(default_factory=WorkerPool)
    digest: bool = True
    journal: Journal | None = None
    parts: Sequence[Any] = ()

    def run(self, progress: Progress) -> DigestCollector:
        """Do every chunk that is not done yet; the first error of any worker stops them all and is raised."""
        specs = self.inputs[0].specs
        whole = self.kernel.whole_tensor
        collector = DigestCollector(specs, len(self.inputs) + len(self.sinks), whole)
        done = set[tuple[str, int]]()
        for key, start, stop, digests in self.parts:
            collector.add_chunk(key, start, [bytes.fromhex(d) for d in digests])
            done.add((key, start))
            progress(self.cost(key, start, stop))
        keep_freed_memory()
        todo = (c for key, spec in specs.items() for c in iter_chunks(key, spec, whole) if (c.key, c.start) not in done)
        pending: list[Any] = []
        saved, unsaved = time.monotonic(), 0
        results = self._process_chunks(todo)
        try:
            for chunk, digests in results:
                collector.add_chunk(chunk.key, chunk.start, digests)
                pending.append([*chunk, [d.hex() for d in digests]])
                cost = self.cost(*chunk)
                unsaved += cost // len(self.inputs)
                if unsaved > SYNC_BYTES or time.monotonic() - saved > JOURNAL_SECONDS:
                    self._note_finished(pending)
                    pending, saved, unsaved = [], time.monotonic(), 0
                progress(cost)
        except BaseException:
            results.close()
            with suppress(OSError):
                self._note_finished(pending)
            raise
        return collector

    @property
    def reused(self) -> int:
        """Bytes that the finished chunks of an interrupted run have read already."""
        return sum(self.cost(key, start, stop) for key, start, stop, _ in self.parts)

    def cost(self, key: str, start: int, stop: int) -> int:
        """Bytes that a chunk reads: what progress counts."""
        return (stop - start) * self.inputs[0].specs[key].storage_dtype.itemsize * len(self.inputs)

    def _note_finished(self, pending: list[Any]) -> None:
        """Note finished chunks, once what they wrote is on disk."""
        if self.journal is None:
            return
        for sink in self.sinks:
            sink.sync()
        self.journal.append(pending)

    def _process_chunks(self, todo: Iterable[Chunk]) -> Generator[tuple[Chunk, list[bytes]]]:
        """Each chunk with its digests, as they come."""
        work = ChunkTask(self.inputs, self.sinks, self.kernel, self.digest)
        if self.pool.executor is None:
            threads = 1 if self.kernel.whole_tensor else self.pool.count
            yield from run_in_threads(work.process, todo, threads, Prefetcher(self.inputs))
            return
        for share, digests in self.pool.map_shares(work, todo, lambda chunk: self.cost(*chunk)):
            yield from zip(share, digests, strict=True)


def blocks_of_chunk(chunk: Chunk, spec: TensorSpec, whole: bool) -> list[list[tuple[int, int]]]:
    """The blocks of a chunk, each by itself, or together as one."""
    blocks = list(chunk.blocks(spec))
    return [blocks] if whole else [[block] for block in blocks]


def keep_freed_memory() -> None:
    """Have the C library keep freed blocks of up to 24 MB for the next use, instead of returning them to the kernel.

    glibc raises its threshold to the largest block it has seen freed. Below the threshold a block's temporary arrays
    are
    reused; above it each would be mapped, zeroed and unmapped again, which takes four times as long as the arithmetic.
    Where the environment fixes a threshold for returning memory, as Dask's nannies do, glibc raises neither by itself.
    """
    np.empty(KEPT_FREE_BYTES, np.uint8)
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        with suppress(AttributeError, OSError):
            for threshold in (MMAP_THRESHOLD, TRIM_THRESHOLD):
                ctypes.CDLL(None).mallopt(threshold, KEPT_FREE_BYTES)


class Prefetcher:
    """A prefetcher of remote ranges: chunk after chunk, up to `PREFETCH_BYTES`."""

    def __init__(self, inputs: Sequence[Checkpoint]) -> None:
        self._inputs = [checkpoint for checkpoint in inputs if checkpoint.url]
        self._holders: dict[Chunk, list[Checkpoint]] = {}
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        return self._bytes >= PREFETCH_BYTES

    def begin(self, chunk: Chunk) -> None:
        """Have every input that has the chunk fetch it, while there is room."""
        holders = self._holders[chunk] = list[Checkpoint]()
        for checkpoint in self._inputs:
            key = checkpoint.resolve_alias(chunk.key)
            if key in checkpoint.specs and not self.is_full:
                self._bytes += checkpoint.prefetch(key, chunk.start, chunk.stop)
                holders.append(checkpoint)

    def end(self, chunk: Chunk) -> None:
        """Give up what was fetched for a chunk."""
        for checkpoint in self._holders.pop(chunk):
            self._bytes -= checkpoint.release_prefetched(checkpoint.resolve_alias(chunk.key), chunk.start, chunk.stop)


def run_in_threads(
    work: Callable[[Chunk], Any], todo: Iterable[Chunk], threads: int, ahead: Prefetcher | None = None
) -> Generator[Any]:
    """Results of `work` as they come, with a bounded number under way; closing it waits for those that run."""
    ahead = ahead or Prefetcher(())
    waiting: dict[Future[Any], Chunk] = {}

    def some() -> list[Any]:
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            ahead.end(waiting.pop(future))
        return [future.result() for future in done]

    with ThreadPoolExecutor(threads, thread_name_prefix="magmax") as pool:
        try:
            for chunk in todo:
                while len(waiting) >= (threads if ahead.is_full else threads + MAX_QUEUED_CHUNKS):
                    yield from some()
                ahead.begin(chunk)
                waiting[pool.submit(work, chunk)] = chunk
            while waiting:
                yield from some()
        finally:
            for future, chunk in waiting.items():
                future.cancel()
                ahead.end(chunk)
