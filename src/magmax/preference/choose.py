"""Choosing among preferences by trying them on a part of the target's samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import MagMaxError

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
FIXED = ("uniform", "magmax")
"""Candidates that have no temperature."""

Weights = Sequence[float]


@dataclass(frozen=True)
class Trial:
    """A candidate: where it comes from, its weights, its score on the held-out samples, and that less its pull."""

    source: str
    temperature: float
    weights: Weights
    score: float
    objective: float


@dataclass(frozen=True)
class Choice:
    """What was tried, and the best of it."""

    trials: Sequence[Trial]
    best: Trial


def tempered(weights: Weights, temperature: float) -> list[float]:
    """w_t^(1/temperature), to the sum 1: above 1 evener, below 1 sharper; a weight of 0 stays 0.

    Of softmax(-b dist) it is softmax(-b dist / temperature).

    >>> tempered([0.5, 1], 0.5)
    [0.2, 0.8]
    """
    values = np.asarray(weights, float)
    if not temperature > 0 or not values.max() > 0 or values.min() < 0:
        raise MagMaxError(f"a temperature above 0 and some weight above 0 are needed, not {temperature}, {weights}")
    values = (values / values.max()) ** (1 / temperature)
    return (values / values.sum()).tolist()


def choose(
    candidates: Mapping[str, Weights],
    own: Weights,
    score: Callable[[Weights], float],
    *,
    pull: float = 0.01,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Choice:
    """The candidate, at some temperature, of the highest score less pull * |w - own|^2.

    Args:
        candidates: preferences by the name of their source (label, ot, cos, mmd ...), made without the held-out
            samples. "uniform" and "magmax" (the own counts) are always tried too.
        own: MagMax's own shares, towards which the pull is.
        score: what a preference is worth on the held-out samples, such as accuracy; it is asked once for each
            different preference.
        pull: how much an evident gain must exceed the distance from MagMax by. Of equal objectives the nearest wins.

    Raises:
        MagMaxError: a score that is no number.
    """
    tried = {"magmax": own, "uniform": [1 / len(own)] * len(own), **candidates}
    scores: dict[tuple[float, ...], float] = {}
    trials: list[Trial] = []
    for source, weights in tried.items():
        for temperature in (1.0,) if source in FIXED else temperatures:
            preference = tempered(weights, temperature)
            key = tuple(round(weight, 6) for weight in preference)
            if key not in scores:
                scores[key] = float(score(preference))
            if not np.isfinite(scores[key]):
                raise MagMaxError(f"the score of the preference {preference} is {scores[key]}, which is no number")
            away = float(((np.asarray(preference) - np.asarray(own)) ** 2).sum())
            trials.append(Trial(source, temperature, preference, scores[key], scores[key] - pull * away))
    best = max(trials, key=lambda trial: (trial.objective, -_away(trial.weights, own)))
    return Choice(trials, best)


def halves(count: int, seed: int = 0, held_out: float = 0.5) -> tuple[list[int], list[int]]:
    """The places of the samples that candidates are made of, and of those they are tried on; both have some.

    Raises:
        MagMaxError: fewer than two samples.
    """
    if count < 2:
        raise MagMaxError(f"a hold-out split needs two samples of the target or more, not {count}")
    order = np.random.default_rng(seed).permutation(count).tolist()
    cut = min(count - 1, max(1, round(count * (1 - held_out))))
    return sorted(order[:cut]), sorted(order[cut:])


def _away(weights: Weights, own: Weights) -> float:
    return float(((np.asarray(weights) - np.asarray(own)) ** 2).sum())
