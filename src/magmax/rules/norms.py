"""How long task vectors and what is merged of them are, and at what angles they stand; by parts of a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .contract import MergeFunction
from .statistics import Address, Array, Block, Reduction, StatisticsRequest, Sums, namespace

SLICE_LENGTH = 1 << 14
"""Elements multiplied at once: few enough to stay in the processor's cache."""


class NormStatistics(NamedTuple):
    """The dot products and norms of the tensors.

    Attributes:
        parts: of each tensor, how many elements its parts have: all of it, or a row.
        vectors: by tensor, the `measures` of the task vectors alone, shape (T, T + 1).
        cut_parts: by their beginnings, those of the parts that lie in several blocks, and of the merged vector with
        them,
            shape (T + 1, T + 2).
        left: other tensors, and why they are not measured.
    """

    parts: Mapping[str, int]
    vectors: Mapping[str, Sums]
    cut_parts: Mapping[Address, Sums]
    left: Mapping[str, str] = MappingProxyType({})

    def of(self, block: Block, merge: MergeFunction, angles: bool) -> tuple[Array, Sums]:
        """The merge of a block, and the measures of each of its parts, shape (parts, T + 1, T + 2)."""
        size = self.parts[block.address.key]
        if _splits_parts(block, size):
            return merge(block), self.cut_parts[_part_start(block.address, size)][None]
        merged = merge(_copy_block(block))
        return merged, dot_products_and_norms([*block.task_vectors, merged], size, angles)


def dot_products_and_norms(vectors: Sequence[Array], size: int, angles: bool) -> Sums:
    """The dot products of n vectors and, last, their L1 norms, in float64, over each `size` elements: (m, n, n + 1).

    Without `angles`, only those of a vector with itself; the others are zero. Products of float32 numbers are exact in
    float64, and numpy's own pairwise sums are the same on every processor and for any number of its cores.
    """
    count, parts = len(vectors), vectors[0].shape[0] // size
    products = np.zeros((parts, count, count + 1))
    many = max(1, SLICE_LENGTH // size)
    xp = namespace(vectors[0])
    for top in range(0, parts, many):
        rows = [xp.reshape(vector[top * size : (top + many) * size], (-1, size)) for vector in vectors]
        for left in range(0, size, SLICE_LENGTH):
            cut = [xp.astype(row[:, left : left + SLICE_LENGTH], xp.float64) for row in rows]
            for n, one in enumerate(cut):
                products[top : top + many, n, -1] += np.asarray(xp.sum(abs(one), axis=1))
                for k in range(0 if angles else n, n + 1):
                    products[top : top + many, n, k] += np.asarray(xp.sum(one * cut[k], axis=1))
    dots = np.tril(products[:, :, :-1])
    products[:, :, :-1] = dots + np.tril(dots, -1).transpose(0, 2, 1)
    return products


@dataclass(frozen=True)
class NormReduction(Reduction):
    """The `measures` of task vectors and, of a block with no whole number of parts, of its merge; zeros elsewhere."""

    parts: Mapping[str, int]
    merge: MergeFunction
    tasks: int
    angles: bool
    per_block: bool = True

    def initial(self) -> Sums:
        return np.zeros((self.tasks + 1, self.tasks + 2))

    def update(self, block: Block, into: Sums) -> None:
        size = self.parts.get(block.address.key)
        if size is None:
            return
        vectors = list(block.task_vectors)
        if _splits_parts(block, size):
            vectors.append(self.merge(_copy_block(block)))
        (measures,) = dot_products_and_norms(vectors, vectors[0].shape[0], self.angles)
        into[: len(vectors), : len(vectors)] += measures[:, :-1]
        into[: len(vectors), -1] += measures[:, -1]


def request_norms(parts: Mapping[str, int], merge: MergeFunction, tasks: int, angles: bool) -> StatisticsRequest:
    """Measure the tensors that `parts` names, adding up in the order of addresses; asks nothing if there are none."""
    vectors: dict[str, Sums] = {}
    cut: dict[Address, Sums] = {}
    measures: Mapping[Address, Sums] = (yield NormReduction(parts, merge, tasks, angles)) if parts else {}
    for at in sorted(at for at in measures if at.key in parts):
        beginning = _part_start(at, parts[at.key])
        cut[beginning] = cut.get(beginning, 0) + measures[at]
        vectors_alone = np.delete(measures[at], tasks, axis=1)[:tasks]
        vectors[at.key] = vectors.get(at.key, 0) + vectors_alone
    return NormStatistics(parts, vectors, cut)


def cosines(dots: Sums) -> NDArray[np.float64]:
    """The cosine matrix of n vectors from their dot products, (n, n); 0 with a vector of length zero."""
    norms = np.sqrt(dots.diagonal())
    products = np.outer(norms, norms)
    return np.clip(np.divide(dots, products, where=products > 0, out=np.zeros_like(dots)), -1, 1)


def mean_cosine(dots: Sums) -> float:
    """The mean cosine of two different vectors of n, from the dot products (n, n); 0 for a single one."""
    count = len(dots)
    matrix = cosines(dots)
    return math.fsum(matrix[np.tril_indices(count, -1)]) / max(1, count * (count - 1) // 2)


def _splits_parts(block: Block, size: int) -> bool:
    """Return whether the block holds no whole number of parts."""
    return block.address.offset % size != 0 or block.task_vectors[0].shape[0] % size != 0


def _part_start(address: Address, size: int) -> Address:
    """Return where the part that an address lies in begins."""
    return Address(address.key, address.offset // size * size)


def _copy_block(block: Block) -> Block:
    return replace(block, task_vectors=[delta + 0 for delta in block.task_vectors])
