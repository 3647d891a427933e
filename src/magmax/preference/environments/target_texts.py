"""Preferences for one environment, from a sample of it or from what is known of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ...continual.data.datasets import LabelledExamples
from ...rules import Tunable
from ..candidates import choose_preference
from ..estimators import DistanceMethod, Features, from_all_methods, from_labels, from_samples, uniform_weights
from .trained_models import TrainedModels

Weights = tuple[float, ...]
TEST, VALIDATION = 1, 2


class EnvironmentTarget(NamedTuple):
    """A sample of the environment: rows of the test examples (TEST), or of the held-out training ones (HELD_OUT)."""

    evaluator: TrainedModels
    split: int
    rows: NDArray[np.int64]

    @property
    def data(self) -> LabelledExamples:
        return self.evaluator.context.test if self.split == TEST else self.evaluator.context.validation

    def estimate_weights(self, source: str) -> list[float]:
        """A preference by labels or by features; see `from_labels` and `from_samples`."""
        if source == "label":
            return from_labels(self._labels, self._task_labels)
        return from_samples(self._feature_pairs, cast("DistanceMethod", source))

    def score_weights(self, weights: Sequence[float], factor: float) -> NDArray[np.float64]:
        """The probability that a merge with this preference gives to the right class of each row."""
        rule, rows = Tunable(preference=weights), self.rows
        everywhere = list(weights) in (self.evaluator.magmax_shares, uniform_weights(self.evaluator.num_tasks))
        if self.split == TEST and everywhere:  # tried in every environment
            return self.evaluator.test_likelihoods(rule, factor)[rows]
        (likelihoods,) = [
            self.evaluator.likelihoods(self.data, rows) for _ in self.evaluator.load_merges(rule, [factor])
        ]
        return likelihoods

    def choose_weights(self, factor: float, temperatures: Sequence[float], pull: float, seed: int) -> dict[str, Any]:
        """Return what `auto` finds: its weights, the source and temperature that won, and how many candidates there
        were.

        Raises MagMaxError for fewer than two rows.
        """
        choice = choose_preference(
            self._make_candidates,
            self.evaluator.magmax_shares,
            lambda weights: self.score_weights(weights, factor),
            len(self.rows),
            seed=seed,
            pull=pull,
            temperatures=temperatures,
        )
        best = choice.best
        details = {"origin": best.source, "temperature": best.temperature, "tries": len(choice.candidates)}
        return {"weights": list(best.weights), **details}

    def _make_candidates(self, sample_indices: Sequence[int]) -> dict[str, list[float]]:
        seen = self._replace(rows=self.rows[list(sample_indices)])
        return from_all_methods(seen._labels, self._task_labels, seen._feature_pairs)

    @property
    def _labels(self) -> list[int]:
        return self.data.labels[self.rows].tolist()

    @property
    def _task_labels(self) -> list[Collection[int]]:
        return [task.classes for task in self.evaluator.context.tasks]

    @property
    def _feature_pairs(self) -> list[tuple[Features, Features]]:
        features = map(self.evaluator.task_features, range(self.evaluator.num_tasks))
        return [(task_features[0], task_features[self.split][self.rows]) for task_features in features]


def reference_preferences(shares: Sequence[float], tasks: Sequence[int], num_tasks: int) -> dict[str, Weights]:
    """Without a sample: the environment's true mixture ("oracle"), and its tasks in equal parts ("manual").

    The second is what someone says who knows which tasks occur, and not how often.
    """
    oracle, manual = np.zeros(num_tasks), np.zeros(num_tasks)
    oracle[list(tasks)], manual[list(tasks)] = shares, 1 / len(tasks)
    return {"oracle": tuple(oracle.tolist()), "manual": tuple(manual.tolist())}
