"""Canonical blocks: the fixed cuts of a tensor by which it is read, merged, written and digested.

A block is as many whole rows (along dimension 0) as fit in `BLOCK_ELEMENTS` elements; a longer row is cut into flat
ranges of
`BLOCK_ELEMENTS`. The cuts depend on the shape alone, so whatever is defined block by block is the same on every
machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash
from numpy.typing import NDArray

from .dtypes import TensorSpec

BLOCK_ELEMENTS = 1 << 18
BLOCKS_PER_CHUNK = 8


class Chunk(NamedTuple):
    """A run of neighbouring blocks of one tensor, the unit of work: unit offsets of its start and end."""

    key: str
    start: int
    stop: int

    def blocks(self, spec: TensorSpec) -> Iterator[tuple[int, int]]:
        """The (start, stop) of each block in the chunk, in units of the tensor."""
        rows, row = _block_shape(spec)
        at = self.start
        while at < self.stop:
            end = min(at + rows * row, self.stop) if rows else min(at + BLOCK_ELEMENTS, (at // row + 1) * row)
            yield at, end
            at = end


def iter_chunks(key: str, spec: TensorSpec, whole: bool = False) -> Iterator[Chunk]:
    """The tensor's chunks in order, or all of it as one chunk; none for a tensor without elements."""
    rows, row = _block_shape(spec)
    stride = max(1, spec.num_units) if whole else rows * row * BLOCKS_PER_CHUNK if rows else row
    for start in range(0, spec.num_units, stride):
        yield Chunk(key, start, min(start + stride, spec.num_units))


def canonical_blocks(key: str, spec: TensorSpec) -> list[tuple[int, int]]:
    """The (start, stop) of each block of the tensor, in units of it."""
    return [cut for chunk in iter_chunks(key, spec) for cut in chunk.blocks(spec)]


def _block_shape(spec: TensorSpec) -> tuple[int, int]:
    """(rows a block, units a row); zero rows where a single row is longer than a block."""
    if not spec.is_mergeable or not spec.shape:
        return BLOCK_ELEMENTS, 1
    row = max(1, spec.num_units // max(1, spec.shape[0]))
    return BLOCK_ELEMENTS // row, row


def block_digest(raw: object) -> bytes:
    """xxh3-128 of a block's bytes."""
    return xxhash.xxh3_128_digest(raw)  # pyright: ignore[reportArgumentType]


def block_digests(raw: NDArray[Any], bounds: Sequence[tuple[int, int]]) -> bytes:
    """The digests of neighbouring blocks that lie one after another in `stored`, joined."""
    first = bounds[0][0]
    return b"".join(block_digest(raw[start - first : stop - first]) for start, stop in bounds)


def tensor_digest(block_digests: bytes) -> str:
    """xxh3-128 of the blocks' digests in order: every part of it can be computed by another worker."""
    return xxhash.xxh3_128_hexdigest(block_digests)


def checkpoint_digest(specs: Mapping[str, TensorSpec], digests: Mapping[str, str]) -> str:
    """One digest for named tensors, whatever the file or shards they lie in and in whatever order."""
    total = xxhash.xxh3_128()
    for key in sorted(digests):
        total.update(f"{key}\0{specs[key]}\0{digests[key]}\n".encode())
    return total.hexdigest()
