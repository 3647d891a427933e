"""How long a job takes: a model of two numbers, the disk's speed and the work of a processor on one element."""

from __future__ import annotations

from dataclasses import dataclass

ELEMENT_NS = 1.6
"""Nanoseconds of one processor for each element that is read or written, digests and checks included.

Measured: 1.3 (average) to 1.8 (TIES), float32 and bfloat16 alike, on an AMD EPYC; benchmarks/results/merge.md."""
DISKS = (200, 1_000, 5_000)
"""MB a second of a hard disk, of a fair and of a fast solid-state disk."""


@dataclass(frozen=True)
class Cost:
    """What a job moves.

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

        >>> Cost(disk_bytes=7 * 140 * 10**9, elements=7 * 70 * 10**9, threads=2).seconds(1_000)
        980.0
        """
        return max(self.disk_bytes / (mb_s * 1e6), self.processor_seconds / self.threads)
