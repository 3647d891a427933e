"""Iso-C: the sum of the task vectors, its spectrum made flat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..statistics import Array, namespace
from .svd import Noise, SpectralRule, leading_singular_vectors, sum_in_float64


@dataclass(frozen=True)
class IsoC(SpectralRule):
    """Isotropic merging in the common subspace: each singular value of the summed matrices becomes their mean.

        M = mean(s) * U V^T,   U diag(s) V^T = tau_1 + ... + tau_T

    Tensors that are no matrices are averaged, not summed, and embeddings are matrices, as in the released code; that
    leaves out, by name, CLIP's text projection. Directions whose singular value is zero, but for rounding, are left out
    here, where the released code takes whatever directions LAPACK completes U and V with, at full length; so a sum of
    low rank, as of LoRA adapters, keeps its rank here, and any other has all its directions. Accuracy: see
    `SpectralRule`. The authors choose the scaling factor on validation data; 1 is FusionBench's.

    >>> import numpy as np
    >>> IsoC()([np.float32([[3, 0], [0, 0]]), np.float32([[0, 0], [0, -1]])])
    array([[ 2.,  0.],
           [ 0., -2.]], dtype=float32)
    """

    name: ClassVar[str] = "iso_c"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = "Marczak et al., No Task Left Behind, ICML 2025, arXiv 2502.04959"

    def merge_matrices(self, matrices: Sequence[Array], noises: Sequence[Noise]) -> Array:
        summed = sum_in_float64(matrices)
        rank = min(summed.shape)
        u, s, vh = leading_singular_vectors(summed, rank, Noise.total(noises))
        return u * (namespace(s).sum(s) / rank) @ vh
