"""TSV-M: each task's leading singular vectors, made orthogonal to those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..statistics import Array, namespace
from .svd import Noise, SpectralRule, as_float64, leading_singular_vectors, mean, nearest_isometry


@dataclass(frozen=True)
class TsvM(SpectralRule):
    """Task singular vectors: keep 1/T of each task's, and decorrelate all that is kept.

        U_t, s_t, V_t: the floor(r / T) largest singular values of tau_t, of rank r at most, and their vectors,
        M = polar([U_1 ... U_T]) diag(s_1 ... s_T) polar([V_1 ... V_T])^T

    polar(X) is the nearest matrix with orthonormal columns (U V^T of its own decomposition). What is no matrix is
    averaged, and embeddings are matrices, as in the released code; that leaves out, by name, CLIP's text projection.
    Left out here are zero singular values, for which the released code takes LAPACK's arbitrary directions. A matrix
    with fewer rows or columns than there are tasks, of which nothing would be kept, is averaged; there it becomes 0.
    Accuracy: see `SpectralRule`. The scaling factor is FusionBench's.

    >>> import numpy as np
    >>> TsvM()([np.float32([[3, 0], [0, 1]]), np.float32([[1, 0], [0, 2]])])
    array([[3., 0.],
           [0., 2.]], dtype=float32)
    """

    name: ClassVar[str] = "tsv_m"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = "Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv 2412.00081"

    def merge_matrices(self, matrices: Sequence[Array], noises: Sequence[Noise]) -> Array:
        each = min(matrices[0].shape) // len(matrices)
        if each == 0:
            return mean(matrices)
        xp = namespace(matrices[0])
        parts = [
            leading_singular_vectors(as_float64(matrix), each, noise)
            for matrix, noise in zip(matrices, noises, strict=True)
        ]
        us, ss, vhs = zip(*parts, strict=True)
        isometry = nearest_isometry(xp.concat(us, axis=1), matrices[0])
        return isometry * xp.concat(ss) @ nearest_isometry(xp.concat(vhs, axis=0), matrices[0])
