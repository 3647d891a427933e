"""Singular values and vectors of whole matrices, in float64, to a stated accuracy."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...errors import MagMaxError
from ..contract import Rule, divide_in_place
from ..statistics import Array, Block, Statistics, namespace

LARGEST_MAGNITUDE = 1e38
"""A number that float32 can hold, that no weight comes near, and whose square is still a float64."""
MIN_SQUARE_RATIO = 1e-6
"""The least ratio of squared singular values at which those of A are taken from the eigenvalues of A A^T."""


@dataclass(frozen=True)
class SpectralRule(Rule):
    """A rule that takes each matrix as a whole; a tensor that is none (of 0, 1, 3 or more dimensions) is averaged.

    Files are merged one tensor at a time, whatever the threads; numpy's BLAS has its own for the decomposition, and
    its last bits differ between one of these and several. So does the processor's kind matter: what is computed agrees
    to about 1e-10 of the largest value and is then rounded to the type that is merged in. OPENBLAS_NUM_THREADS=1 gives
    the same bytes on any number of cores, and is far faster where other work keeps them busy.
    """

    @property
    def whole_tensor(self) -> bool:
        return True

    @abstractmethod
    def merge_matrices(self, matrices: Sequence[Array], noises: Sequence[Noise]) -> Array:
        """Merge the task vectors' matrices; return float64 or the matrices' type.

        `noises`, one for each matrix, say which singular values are what rounding may have made of zero.
        """

    def merge(self, block: Block, statistics: Statistics) -> Array:
        shape, (first, *_) = block.shape, block.task_vectors
        xp = namespace(first)
        if shape is None or len(shape) != 2 or 0 in shape:
            return mean(block.task_vectors)
        if not all(bool(xp.all(abs(delta) < LARGEST_MAGNITUDE)) for delta in block.task_vectors):
            raise MagMaxError(
                f"{block.address.key}: {self.name} takes singular values, not of NaN, infinity or above "
                f"{LARGEST_MAGNITUDE:g}"
            )
        size = 0.0 if block.base is None else norm(block.base)
        noises = [Noise.of(norm(delta), size, shape, float(xp.finfo(delta.dtype).eps)) for delta in block.task_vectors]
        merged = self.merge_matrices([xp.reshape(delta, shape) for delta in block.task_vectors], noises)
        return xp.reshape(xp.astype(merged, first.dtype, copy=False), (-1,))


def mean(arrays: Sequence[Array]) -> Array:
    """The mean, a left fold in the arrays' own type."""
    merged = arrays[0] + 0
    for array in arrays[1:]:
        merged += array
    divide_in_place(merged, len(arrays))
    return merged


def sum_in_float64(matrices: Sequence[Array]) -> Array:
    """The sum, a left fold in float64."""
    merged = as_float64(matrices[0])
    for matrix in matrices[1:]:
        merged += matrix
    return merged


def as_float64(matrix: Array) -> Array:
    """A copy in float64."""
    xp = namespace(matrix)
    return xp.astype(matrix, xp.float64)


class Noise(NamedTuple):
    """What rounding adds to a matrix.

    Attributes:
        norm: singular values up to it are zeros to the rounding of the matrix itself.
        element: the root mean square of the error that each element has because theta_0 + tau was rounded to be stored.
    """

    norm: float = 0.0
    element: float = 0.0

    @classmethod
    def of(cls, norm: float, base_norm: float, shape: tuple[int, ...], eps: float) -> Noise:
        """The noise of a task vector of that Frobenius norm, of a base of another.

        Independent errors, eps / 4 of each element in the root mean square, have a largest singular value of
        norm * eps / 4 * (1 / sqrt(rows) + 1 / sqrt(columns)); the margin is sixteenfold. The decomposition has its own.
        """
        rows, columns = shape
        float64_rounding = max(shape) * float(np.finfo(np.float64).eps)
        own = norm * max(4 * eps * (1 / math.sqrt(rows) + 1 / math.sqrt(columns)), float64_rounding)
        return cls(own, base_norm * eps / 4 / math.sqrt(rows * columns))

    @classmethod
    def total(cls, noises: Sequence[Noise]) -> Noise:
        """The noise of a sum of matrices."""
        return cls(sum(noise.norm for noise in noises), math.hypot(*(noise.element for noise in noises)))

    def rank(self, s: Array, shape: tuple[int, ...]) -> int:
        """How many of a matrix's leading singular values are no noise.

        Where errors of `element` are all that a matrix of rank r has beyond r directions, its other singular values are
        at most element * (sqrt(rows - r) + sqrt(columns - r)), and stand apart from the first r. So they are left out
        up to four times that, after a gap of a factor of three, where they are an eighth of all at least: those of a
        matrix of full rank shrink by degrees, but perhaps for the last few. So a sum of LoRA adapters keeps its rank,
        and a fine-tuning of full rank every direction, however small it is.
        """
        values: list[float] = s.tolist()
        least = max(self.norm, max(shape) * float(np.finfo(np.float64).eps) * values[0])
        count = sum(value > least for value in values)
        rows, columns = shape
        for rank in range(1, min(count, 1 + 7 * min(shape) // 8)):
            largest = self.element * (math.sqrt(rows - rank) + math.sqrt(columns - rank))
            if values[rank] <= min(4 * largest, values[rank - 1] / 3):
                return rank
        return count


NO_NOISE = Noise()


def leading_singular_vectors(matrix: Array, count: int, noise: Noise = NO_NOISE) -> tuple[Array, Array, Array]:
    """The `count` largest singular values s of a float64 matrix, largest first, with their vectors: u * s @ vh.

    Fewer, where others are zero: those that rounding alone makes, by `noise`, or up to max(rows, columns) * 2^-52 times
    the largest, have no direction of their own.
    """
    xp = namespace(matrix)
    rows, columns = matrix.shape
    if rows > columns:
        v, s, uh = leading_singular_vectors(xp.matrix_transpose(matrix), count, noise)
        return xp.matrix_transpose(uh), s, xp.matrix_transpose(v)
    if count == 0 or rows == 0:
        return matrix[:, :0], matrix[:0, 0], matrix[:0, :]
    u, s, vh = _svd_from_gram(matrix, count) or xp.linalg.svd(matrix, full_matrices=False)
    rank = noise.rank(s[:count], matrix.shape)
    u, s, vh = (xp.asarray(part, copy=True) for part in (u[:, :rank], s[:rank], vh[:rank, :]))  # not views of all
    return u, s, vh


def _svd_from_gram(matrix: Array, count: int) -> tuple[Array, Array, Array] | None:
    """The same from the eigenvalues of A A^T, which is several times faster; None where it would be inaccurate."""
    xp = namespace(matrix)
    squares, u = xp.linalg.eigh(matrix @ xp.matrix_transpose(matrix))
    squares, u = xp.flip(squares)[:count], xp.flip(u[:, -count:], axis=1)
    if not float(squares[-1]) > MIN_SQUARE_RATIO * float(squares[0]):
        return None
    s = xp.sqrt(squares)
    vh = xp.matrix_transpose(u) @ matrix
    vh /= s[:, None]
    return u, s, vh


def nearest_isometry(matrix: Array, like: Array) -> Array:
    """The matrix with its singular values, but for zeros, replaced by 1: the orthogonal factor of its polar form.

    Its columns or rows are singular vectors of matrices of the type of `like`, known to its precision.
    """
    precision = Noise(64 * float(namespace(like).finfo(like.dtype).eps))
    u, _, vh = leading_singular_vectors(matrix, min(matrix.shape), precision)
    return u @ vh


def norm(matrix: Array) -> float:
    """The Frobenius norm."""
    xp = namespace(matrix)
    return math.sqrt(float(xp.sum(as_float64(matrix) ** 2)))
