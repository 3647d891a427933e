"""Matrices as products of two thin ones: the nearest of a rank, from a sum of products or from a dense matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...checkpoints.dtypes import narrow, widen

WIDEN_ELEMENTS = 1 << 20
"""Elements of a dense matrix that are widened at once."""

Matrix = NDArray[Any]


class FactorPair(NamedTuple):
    """left^T right, of shape (rows, columns), from factors of shape (rank, rows) and (rank, columns)."""

    left: Matrix
    right: Matrix

    def stored(self, dtype: str) -> tuple[FactorPair, FactorPair]:
        """The pair in a type of storage, and what it is worth there, in float64."""
        stored = FactorPair(*(narrow(np.ascontiguousarray(f, np.float64), dtype) for f in self))
        return stored, FactorPair(*(widen(f, dtype, np.dtype(np.float64)) for f in stored))


def nearest_to_sum(whole: FactorPair, rank: int) -> FactorPair:
    """The best product of that rank for a product of any rank: M = L^T R, without forming M.

    With L^T = Q_L T_L and R^T = Q_R T_R, M = Q_L (T_L T_R^T) Q_R^T, so the singular values of M are those of the
    small core, and its singular vectors are the core's, turned by Q_L and Q_R.
    """
    (q_left, t_left), (q_right, t_right) = (np.linalg.qr(factor.T) for factor in whole)
    u, s, vt = np.linalg.svd(t_left @ t_right.T, full_matrices=False)
    root = np.sqrt(s[:rank, None])
    return _fix_signs(root * (q_left @ u[:, :rank]).T, root * (vt[:rank] @ q_right.T))


def nearest_to_dense(dense: Matrix, rank: int) -> FactorPair:
    """The best product of that rank for a dense matrix M (rows, columns).

    Its right singular vectors V are the eigenvectors of M^T M (or its left ones those of M M^T, if M is wide), in
    float64. M V V^T then errs from the best in the square of the error of V: by 1e-7 of M's norm at the most.
    """
    if dense.shape[0] < dense.shape[1]:
        return FactorPair(*reversed(nearest_to_dense(dense.T, rank)))
    gram = sum((part.T @ part for _, part in _row_slices(dense)), np.zeros((dense.shape[1],) * 2))
    v = np.linalg.eigh(gram)[1][:, ::-1][:, :rank]
    left = np.concatenate([part @ v for _, part in _row_slices(dense)]).T
    s = np.linalg.norm(left, axis=1)[:, None]
    root = np.sqrt(s)
    return _fix_signs(np.divide(left, root, where=root > 0, out=np.zeros_like(left)), root * v.T)


def product_norm(pair: FactorPair) -> float:
    """The Frobenius norm of left^T right, without forming it."""
    r_left, r_right = (np.linalg.qr(factor.T)[1] for factor in pair)
    return float(np.linalg.norm(r_left @ r_right.T))


def sum_error(whole: FactorPair, near: FactorPair) -> float:
    """The Frobenius norm of the difference of two products."""
    left = np.concatenate([whole.left, -near.left])
    return product_norm(FactorPair(left, np.concatenate([whole.right, near.right])))


def dense_norm(dense: Matrix) -> float:
    """The Frobenius norm of a dense matrix."""
    return math.sqrt(math.fsum(float(np.vdot(part, part)) for _, part in _row_slices(dense)))


def dense_error(dense: Matrix, near: FactorPair) -> float:
    """The Frobenius norm of the difference of a dense matrix and a product."""
    apart = (part - near.left[:, rows].T @ near.right for rows, part in _row_slices(dense))
    return math.sqrt(math.fsum(float(np.vdot(part, part)) for part in apart))


def _row_slices(dense: Matrix) -> Iterator[tuple[slice, Matrix]]:
    """The matrix in float64, some rows at a time."""
    step = max(1, WIDEN_ELEMENTS // dense.shape[1])
    for first in range(0, dense.shape[0], step):
        rows = slice(first, first + step)
        yield rows, dense[rows].astype(np.float64)


def _fix_signs(left: Matrix, right: Matrix) -> FactorPair:
    """The pair with the sign that a decomposition leaves open chosen: the largest entry of each `right` is positive."""
    largest = np.take_along_axis(right, np.abs(right).argmax(axis=1)[:, None], axis=1)
    sign = np.where(largest < 0, -1.0, 1.0)
    return FactorPair(left * sign, right * sign)
