"""Measures of continual learning, from the accuracies R alone.

R has shape (T + 1, T): R[i, j - 1] is the accuracy on task j after learning the tasks 1..i; row 0 is the model before
any. Rows that were not measured are NaN, and so is what needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np


def average_accuracy(r: np.ndarray) -> float:
    """The mean over tasks after the last: mean_j R[T, j].

    >>> round(average_accuracy(np.array([[0.1, 0.2], [0.9, 0.2], [0.7, 0.8]])), 3)
    0.75
    """
    return float(r[-1].mean())


def average_incremental_accuracy(r: np.ndarray) -> float:
    """The mean over i = 1..T of the mean accuracy on the tasks 1..i after task i.

    >>> round(average_incremental_accuracy(np.array([[0.1, 0.2], [0.9, 0.2], [0.7, 0.8]])), 3)
    0.825
    """
    return float(np.mean([r[i, :i].mean() for i in range(1, len(r))]))


def forgetting(r: np.ndarray) -> float:
    """The mean over j < T of max_{1 <= i < T} R[i, j] - R[T, j]; negative where the last row is the best.

    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018. MagMax's scripts let i run to T, so that
    theirs cannot be negative. 0 for a single task, which has nothing to forget.

    >>> round(forgetting(np.array([[0.1, 0.2], [0.9, 0.2], [0.7, 0.8]])), 3)
    0.2
    """
    if len(r) <= 2:
        return 0.0
    return float((r[1:-1, :-1].max(0) - r[-1, :-1]).mean())


def backward_transfer(r: np.ndarray) -> float:
    """Return what later tasks did to earlier ones: the mean over j < T of R[T, j] - R[j, j]; 0 for a single task.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017.
    """
    return float(np.mean([r[-1, j - 1] - r[j, j - 1] for j in range(1, len(r) - 1)] or [0.0]))


def forward_transfer(r: np.ndarray) -> float:
    """Return what earlier tasks did for later ones: the mean over j > 1 of R[j - 1, j] - R[0, j]; 0 for a single task.

    Lopez-Paz and Ranzato, with the pre-trained model in the place of a random one.
    """
    return float(np.mean([r[j - 1, j - 1] - r[0, j - 1] for j in range(2, len(r))] or [0.0]))


MEASURES: Mapping[str, Callable[[np.ndarray], float]] = {
    "average accuracy": average_accuracy,
    "average incremental accuracy": average_incremental_accuracy,
    "forgetting": forgetting,
    "backward transfer": backward_transfer,
    "forward transfer": forward_transfer,
}


def matrix(rows: Mapping[int, Sequence[float]], tasks: int) -> np.ndarray:
    """R from the rows that were measured, by their number (0..T)."""
    r = np.full((tasks + 1, tasks), np.nan)
    for number, row in rows.items():
        r[number] = row
    return r
