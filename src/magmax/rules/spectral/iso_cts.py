"""Iso-CTS: common and task-specific directions, all of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...errors import MagMaxError
from ..statistics import Array, namespace
from .svd import Noise, SpectralRule, as_float64, leading_singular_vectors, nearest_isometry, sum_in_float64


@dataclass(frozen=True)
class IsoCTS(SpectralRule):
    """Isotropic merging in common and task-specific subspaces, of matrices of rank r at most.

        U_c, s_c, V_c: the k largest of the sum's singular values and their vectors,
        U_t, s_t, V_t: the d largest of (I - U_c U_c^T) tau_t,   d = round((r - floor(common * r)) / T),   k = r - d T
        M = mean(s) * polar([U_1 ... U_T U_c]) polar([V_1 ... V_T V_c])^T

    polar(X) is the nearest matrix with orthonormal columns. What is no matrix, zero singular values, accuracy and the
    scaling factor: as in `IsoC`. Where rounding d up would leave k negative, d is floor(r / T), and the released code
    goes wrong. common = 1 is `iso_c`.

    >>> import numpy as np
    >>> IsoCTS(common=0.5)([np.float32([[3, 0], [0, 1]])])
    array([[2., 0.],
           [0., 2.]], dtype=float32)
    """

    name: ClassVar[str] = "iso_cts"
    scaling_factor: ClassVar[float] = 1.0
    paper: ClassVar[str] = "Marczak et al., No Task Left Behind, ICML 2025, arXiv 2502.04959"

    common: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.common <= 1:
            raise MagMaxError(f"iso_cts needs common, a fraction, from 0 to 1, not {self.common}")

    def merge_matrices(self, matrices: Sequence[Array], noises: Sequence[Noise]) -> Array:
        tasks, rank = len(matrices), min(matrices[0].shape)
        each = min(round((rank - int(self.common * rank)) / tasks), rank // tasks)
        common = leading_singular_vectors(sum_in_float64(matrices), rank - each * tasks, Noise.total(noises))
        xp = namespace(matrices[0])
        parts: list[tuple[Array, Array, Array]] = []
        for matrix, noise in zip(matrices, noises, strict=True):
            rest = as_float64(matrix)
            rest -= common[0] @ (xp.matrix_transpose(common[0]) @ rest)
            parts.append(leading_singular_vectors(rest, each, noise))
        us, ss, vhs = zip(*parts, common, strict=True)
        isometry = nearest_isometry(xp.concat(us, axis=1), matrices[0])
        return isometry * (xp.sum(xp.concat(ss)) / rank) @ nearest_isometry(xp.concat(vhs, axis=0), matrices[0])
