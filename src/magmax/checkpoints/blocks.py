"""Canonical slabs: the fixed cuts of a tensor by which it is read, merged, written and digested.

A slab is as many whole rows (along dimension 0) as fit in `SLAB` elements; a longer row is cut into flat ranges of
`SLAB`. The cuts depend on the shape alone, so whatever is defined slab by slab is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash
from numpy.typing import NDArray

from .dtypes import Spec

SLAB = 1 << 18
SLABS_A_CHUNK = 8


class Chunk(NamedTuple):
    """A run of neighbouring slabs of one tensor, the unit of work: unit offsets of its start and end."""

    key: str
    start: int
    stop: int

    def slabs(self, spec: Spec) -> Iterator[tuple[int, int]]:
        """The (start, stop) of each slab in the chunk, in units of the tensor."""
        rows, row = _cut(spec)
        at = self.start
        while at < self.stop:
            end = min(at + rows * row, self.stop) if rows else min(at + SLAB, (at // row + 1) * row)
            yield at, end
            at = end


def chunks(key: str, spec: Spec, whole: bool = False) -> Iterator[Chunk]:
    """The tensor's chunks in order, or all of it as one chunk; none for a tensor without elements."""
    rows, row = _cut(spec)
    stride = max(1, spec.units) if whole else rows * row * SLABS_A_CHUNK if rows else row
    for start in range(0, spec.units, stride):
        yield Chunk(key, start, min(start + stride, spec.units))


def slabs(key: str, spec: Spec) -> list[tuple[int, int]]:
    """The (start, stop) of each slab of the tensor, in units of it."""
    return [cut for chunk in chunks(key, spec) for cut in chunk.slabs(spec)]


def _cut(spec: Spec) -> tuple[int, int]:
    """(rows a slab, units a row); zero rows where a single row is longer than a slab."""
    if not spec.floating or not spec.shape:
        return SLAB, 1
    row = max(1, spec.units // max(1, spec.shape[0]))
    return SLAB // row, row


def slab_digest(stored: object) -> bytes:
    """xxh3-128 of a slab's bytes."""
    return xxhash.xxh3_128_digest(stored)  # pyright: ignore[reportArgumentType]


def slab_digests(stored: NDArray[Any], cuts: Sequence[tuple[int, int]]) -> bytes:
    """The digests of neighbouring slabs that lie one after another in `stored`, joined."""
    first = cuts[0][0]
    return b"".join(slab_digest(stored[start - first : stop - first]) for start, stop in cuts)


def tensor_digest(slab_digests: bytes) -> str:
    """xxh3-128 of the slabs' digests in order: every part of it can be computed by another worker."""
    return xxhash.xxh3_128_hexdigest(slab_digests)


def checkpoint_digest(specs: Mapping[str, Spec], digests: Mapping[str, str]) -> str:
    """One digest for named tensors, whatever the file or shards they lie in and in whatever order."""
    total = xxhash.xxh3_128()
    for key in sorted(digests):
        total.update(f"{key}\0{specs[key]}\0{digests[key]}\n".encode())
    return total.hexdigest()
