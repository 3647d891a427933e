"""How long task vectors and the merged one are, and at what angles: whether a model is a merge of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import MagMaxError

MIN_CORRELATION = 0.05
"""Below this multiple correlation with the task vectors, an update is taken for none of theirs."""

DOUBTFUL_CORRELATION = 0.3
"""Most merges have more than this; of one that has less a user is told."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class TaskVectorGram:
    """Inner products of the T task vectors and the merged one, tensor by tensor.

    Attributes:
        tensors: for each tensor that all have, a matrix of shape (T + 1, T + 1); the merged one is the last.
        left_out: the tensors that are not compared, and why.
        names: what the models are called.
    """

    tensors: Mapping[str, Matrix]
    left_out: Mapping[str, str]
    names: Sequence[str]

    @property
    def total(self) -> Matrix:
        """Over all tensors."""
        size = len(self.names) + 1
        return sum(self.tensors.values(), np.zeros((size, size)))

    def check(self, merged: str, any_model: bool = False) -> None:
        """Refuse what is no merge of the models.

        Every merge of task vectors, whichever rule made it, is correlated with them. The multiple correlation is
        R = |P m| / |m|, P the projection onto the span of tau_1 .. tau_T over the whole model. Merges of up to 20
        random task vectors, by every rule, have R of 0.1 (consensus of alike ones; 99 % dropped at random) to 1; an
        unrelated model has about sqrt(T / elements).

        Raises:
            MagMaxError: a task vector or the merged one is zero; or R < 0.05, unless `any_model`.
        """
        gram = self.total
        norms = np.sqrt(np.diag(gram))
        if still := [name for name, norm in zip(self.names, norms, strict=False) if norm == 0]:
            raise MagMaxError(f"{still[0]}: has the base's weights (a task vector of zeros); name fine-tuned models")
        if norms[-1] == 0:
            raise MagMaxError(f"{merged}: has the base's weights; name the model that the merge made")
        correlation = self.correlation
        if correlation < MIN_CORRELATION and not any_model:
            raise MagMaxError(
                f"{merged}: is not a merge of {', '.join(self.names)}: its change from the base has a multiple "
                f"correlation of {correlation:.2g} with theirs, and merges have {MIN_CORRELATION} or more; name the "
                "models it was made of, or calibrate it in spite of that with --any-model"
            )

    def doubtful_reason(self, merged: str) -> str:
        """Return what makes it doubtful that this is a merge of the models; empty where nothing does."""
        if self.correlation >= DOUBTFUL_CORRELATION:
            return ""
        return (
            f"{merged}: its change from the base has a multiple correlation of {self.correlation:.2g} with those of "
            f"{', '.join(self.names)}, and most merges have {DOUBTFUL_CORRELATION} or more; are these its models?"
        )

    @property
    def correlation(self) -> float:
        """R: how much of the merged task vector's length lies in the span of the others."""
        gram = self.total
        with_merged = gram[:-1, -1]
        weights = np.linalg.lstsq(gram[:-1, :-1], with_merged, rcond=None)[0]
        return float(np.sqrt(max(0.0, weights @ with_merged / gram[-1, -1]))) if gram[-1, -1] else 0.0

    def cosine(self, keys: Sequence[str]) -> float | None:
        """The mean cosine of pairs of task vectors over these tensors together; None where there is no such pair."""
        gram = sum((self.tensors[key] for key in keys if key in self.tensors), np.zeros_like(self.total))[:-1, :-1]
        norms = np.sqrt(np.diag(gram))
        moved = np.flatnonzero(norms > 0)
        pairs = [gram[a, b] / (norms[a] * norms[b]) for a in moved for b in moved if a < b]
        return float(np.mean(pairs)) if pairs else None

    def norms(self, keys: Sequence[str]) -> list[float]:
        """The L2 norms of the task vectors over these tensors together; the merged one's is the last."""
        gram = sum((self.tensors[key] for key in keys if key in self.tensors), np.zeros_like(self.total))
        return np.sqrt(np.diag(gram)).tolist()
