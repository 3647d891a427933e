"""What a job takes, known before any work: passes, bytes, memory, and time.

Time is a model of two numbers, the disk's speed and the work of a processor on one element.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from ..checkpoints.blocks import BLOCK_ELEMENTS
from .execution.executors import DaskCluster
from .execution.pool import WorkerPool, available_cores
from .execution.shared_files import SharedFiles
from .job import Job
from .pipeline import PREFETCH_BYTES

ARRAYS_PER_THREAD = 10
ARRAYS_PER_SVD = 16
"""What a singular value decomposition of a matrix takes at most, in float64 arrays of the matrix's size: measured."""
IMPORTS_BYTES = 45_000_000
DASK_BYTES = 60_000_000
"""What Dask itself takes in a worker, about; a generous guess."""
ELEMENT_NS = 1.6
"""Nanoseconds of one processor for each element that is read or written, digests and checks included.

Measured: 1.3 (average) to 1.8 (TIES), float32 and bfloat16 alike, on an AMD EPYC; benchmarks/results/merge.md."""
DISK_SPEEDS_MB_S = (200, 1_000, 5_000)
"""MB a second of a hard disk, of a fair and of a fast solid-state disk."""


@dataclass(frozen=True)
class JobCost:
    """The bytes, elements and threads of a job.

    t = max(disk_bytes / disk speed, elements * ELEMENT_NS / threads), for reading, computing and writing overlap.

    Attributes:
        disk_bytes: bytes read from and written to this machine's disk, over all passes.
        elements: elements read, over all inputs and passes, and written.
        threads: how many processors work on them.
    """

    disk_bytes: int
    elements: int
    threads: int

    @property
    def processor_seconds(self) -> float:
        """Seconds that the processors work, all together."""
        return self.elements * ELEMENT_NS * 1e-9

    def seconds(self, mb_s: float) -> float:
        """Seconds on a disk that reads or writes so many MB (10^6 bytes) a second, with nothing in the page cache.

        >>> JobCost(disk_bytes=7 * 140 * 10**9, elements=7 * 70 * 10**9, threads=2).seconds(1_000)
        980.0
        """
        return max(self.disk_bytes / (mb_s * 1e6), self.processor_seconds / self.threads)


def job_cost(job: Job, threads: int = 0) -> JobCost:
    """Return what a job moves, and so how long it takes; the decompositions of rules that need these are left out."""
    passes = 1 + job.extra_passes
    read = sum(checkpoint.nbytes - checkpoint.remote_bytes for checkpoint in job.inputs)
    elements = sum(spec.numel for checkpoint in job.inputs for spec in checkpoint.specs.values())
    written = sum(spec.nbytes for spec in job.specs.values()), sum(s.numel for s in job.specs.values())
    return JobCost(passes * read + written[0], passes * elements + written[1], _effective_threads(job, threads))


def preview(job: Job, threads: int = 0) -> dict[str, int]:
    """Passes, bytes to read and write, disk needed and free, peak memory."""
    size, threads = job.make_draft().size, _effective_threads(job, threads)
    remote = sum(checkpoint.remote_bytes for checkpoint in job.inputs)
    memory = job.memory + threads * job.memory_per_thread + min(remote, PREFETCH_BYTES)
    return {
        "passes": 1 + job.extra_passes,
        "read_bytes": job.read_bytes,
        "write_bytes": size,
        "read_remotely": (1 + job.extra_passes) * remote,
        "write_remotely": size if job.target.url else 0,
        "disk_needed": job.disk_needed,
        "disk_free": job.disk_free,
        "peak_memory": IMPORTS_BYTES + _array_bytes(job, threads) + memory,
    }


def preview_of_workers(job: Job, executor: Executor | None) -> list[tuple[int, int]]:
    """Of each worker of a Dask cluster, how many shares it does at once and the bytes it holds at most.

    Raises UnfinishedError if there is none, or one that does not see the inputs.
    """
    cluster = DaskCluster.of(executor)
    if cluster is None:
        return []
    WorkerPool(executor=executor, shared_files=SharedFiles.of(job.inputs)).check_workers()
    fixed = IMPORTS_BYTES + DASK_BYTES
    return [(n, fixed + _array_bytes(job, n) + n * job.memory_per_thread) for n in cluster.threads().values()]


def _effective_threads(job: Job, threads: int) -> int:
    return 1 if job.kernel.whole_tensor else threads or available_cores()


def _array_bytes(job: Job, threads: int) -> int:
    """Bytes of the arrays that are held at once: some blocks for each thread, or one tensor of every input."""
    specs = [*job.specs.values(), *job.inputs[0].specs.values()]
    widest = max([4, *(spec.storage_dtype.itemsize for spec in specs)])
    if job.kernel.whole_tensor:
        largest = max((spec.numel for spec in specs), default=0)
        return largest * (widest * (1 + len(job.inputs)) + 8 * ARRAYS_PER_SVD)
    return threads * (ARRAYS_PER_THREAD + 2 * len(job.inputs) * job.kernel.holds_all_inputs) * BLOCK_ELEMENTS * widest
