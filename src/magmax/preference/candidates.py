"""Choosing among preferences by trying them on samples of the target that they were not made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MagMaxError

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)

Weights = Sequence[float]
SampleIndices = Sequence[int]


@dataclass(frozen=True)
class PreferenceTrial:
    """A candidate: where it comes from, its weights, its mean score, and that less its pull."""

    source: str
    temperature: float
    weights: Weights
    score: float
    objective: float


@dataclass(frozen=True)
class PreferenceChoice:
    """The candidates that were tried, and the best of them."""

    candidates: Sequence[PreferenceTrial]
    best: PreferenceTrial


def apply_temperature(weights: Weights, temperature: float) -> list[float]:
    """w_t^(1/temperature), to the sum 1: above 1 evener, below 1 sharper; a weight of 0 stays 0.

    Of softmax(-b dist) it is softmax(-b dist / temperature).

    >>> apply_temperature([0.5, 1], 0.5)
    [0.2, 0.8]
    """
    values = np.asarray(weights, float)
    if not temperature > 0 or not values.max() > 0 or values.min() < 0:
        raise MagMaxError(f"a temperature above 0 and some weight above 0 are needed, not {temperature}, {weights}")
    values = (values / values.max()) ** (1 / temperature)
    return (values / values.sum()).tolist()


def choose_preference(
    make_candidates: Callable[[SampleIndices], Mapping[str, Weights]],
    magmax_shares: Weights,
    score: Callable[[Weights], Sequence[float] | NDArray[Any]],
    num_samples: int,
    *,
    seed: int = 0,
    pull: float = 0.01,
    temperatures: Sequence[float] = TEMPERATURES,
) -> PreferenceChoice:
    """The source of preferences, at some temperature, that does best on samples which it did not see.

    Each half of the samples makes preferences that are scored on the other half. The objective is the mean score over
    all samples, less pull * |w - magmax_shares|^2; w, and what is returned, is made of all samples.

    Args:
        make_candidates: preferences by the name of their source (label, ot, cos, mmd ...), made of the samples at these
            places. A source that lacks from a half is not tried; "uniform" and "magmax" (`magmax_shares`) always are.
        magmax_shares: MagMax's own shares, towards which the pull is.
        score: what a merge with this preference is worth on each of the samples, such as the probability that it gives
            to the right class, which tells more from a few samples than whether they are right. It is asked once for
            each different preference.
        num_samples: how many samples there are.
        seed: which samples are in which half.
        pull: how much an evident gain must exceed the distance from MagMax by. Of equal objectives the nearest wins.

    Raises:
        MagMaxError: fewer than two samples, a score that is no number.
    """
    first, second = split_halves(num_samples, seed)
    scores_by_weights: dict[tuple[float, ...], NDArray[Any]] = {}
    trials: list[PreferenceTrial] = []

    def scores(weights: Weights) -> NDArray[Any]:
        key = tuple(round(weight, 6) for weight in weights)
        if key not in scores_by_weights:
            scores_by_weights[key] = np.asarray(score(weights), float)
            if not np.isfinite(scores_by_weights[key]).all():
                raise MagMaxError(
                    f"a score of the preference {list(weights)} is no number: {scores_by_weights[key].tolist()}"
                )
        return scores_by_weights[key]

    def attempt(source: str, temperature: float, of_first: Weights, of_second: Weights, weights: Weights) -> None:
        mean = float(scores(of_first)[second].sum() + scores(of_second)[first].sum()) / num_samples
        trials.append(
            PreferenceTrial(source, temperature, weights, mean, mean - pull * _distance(weights, magmax_shares))
        )

    even = [1 / len(magmax_shares)] * len(magmax_shares)
    attempt("magmax", 1.0, magmax_shares, magmax_shares, magmax_shares)
    attempt("uniform", 1.0, even, even, even)
    candidates = make_candidates(first), make_candidates(second), make_candidates(range(num_samples))
    for source in candidates[2]:
        if all(source in each for each in candidates):
            for temperature in temperatures:
                attempt(source, temperature, *(apply_temperature(each[source], temperature) for each in candidates))
    return PreferenceChoice(
        trials, max(trials, key=lambda trial: (trial.objective, -_distance(trial.weights, magmax_shares)))
    )


def split_halves(num_samples: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """The places of samples, cut in half at random; both parts have some.

    Raises:
        MagMaxError: fewer than two samples.
    """
    if num_samples < 2:
        raise MagMaxError(f"samples of the target are cut in half, so two or more are needed, not {num_samples}")
    order = np.random.default_rng(seed).permutation(num_samples).tolist()
    return sorted(order[: (num_samples + 1) // 2]), sorted(order[(num_samples + 1) // 2 :])


def _distance(weights: Weights, other: Weights) -> float:
    return float(((np.asarray(weights) - np.asarray(other)) ** 2).sum())
