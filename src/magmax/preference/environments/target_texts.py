"""Preferences for one environment, from a sample of it or from what is known of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ...continual.data.datasets import Labelled
from ...rules import Tunable
from ..candidates import choose
from ..estimators import Distance, Features, from_each, from_labels, from_samples, uniform
from .trained_models import Learned

Weights = tuple[float, ...]
TEST, HELD_OUT = 1, 2


class Target(NamedTuple):
    """A sample of the environment: rows of the test examples (TEST), or of the held-out training ones (HELD_OUT)."""

    learned: Learned
    part: int
    rows: NDArray[np.int64]

    @property
    def data(self) -> Labelled:
        return self.learned.here.test if self.part == TEST else self.learned.here.validation

    def weights(self, source: str) -> list[float]:
        """A preference by labels or by features; see `from_labels` and `from_samples`."""
        if source == "label":
            return from_labels(self._labels, self._task_labels)
        return from_samples(self._pairs, cast("Distance", source))

    def scores(self, weights: Sequence[float], factor: float) -> NDArray[np.float64]:
        """The probability that a merge with this preference gives to the right class of each row."""
        rule, rows = Tunable(preference=weights), self.rows
        everywhere = list(weights) in (self.learned.own, uniform(self.learned.tasks))
        if self.part == TEST and everywhere:  # tried in every environment
            return self.learned.likelihoods_of_all(rule, factor)[rows]
        (found,) = [self.learned.likelihoods(self.data, rows) for _ in self.learned.merged(rule, [factor])]
        return found

    def chosen(self, factor: float, temperatures: Sequence[float], pull: float, seed: int) -> dict[str, Any]:
        """What `auto` finds: its weights, the source and temperature that won, and how many candidates there were.

        Raises MagMaxError for fewer than two rows.
        """
        choice = choose(
            self._candidates,
            self.learned.own,
            lambda weights: self.scores(weights, factor),
            len(self.rows),
            seed=seed,
            pull=pull,
            temperatures=temperatures,
        )
        best = choice.best
        told = {"origin": best.source, "temperature": best.temperature, "tries": len(choice.trials)}
        return {"weights": list(best.weights), **told}

    def _candidates(self, places: Sequence[int]) -> dict[str, list[float]]:
        seen = self._replace(rows=self.rows[list(places)])
        return from_each(seen._labels, self._task_labels, seen._pairs)

    @property
    def _labels(self) -> list[int]:
        return self.data.labels[self.rows].tolist()

    @property
    def _task_labels(self) -> list[Collection[int]]:
        return [task.classes for task in self.learned.here.tasks]

    @property
    def _pairs(self) -> list[tuple[Features, Features]]:
        features = map(self.learned.features, range(self.learned.tasks))
        return [(own[0], own[self.part][self.rows]) for own in features]


def known(shares: Sequence[float], tasks: Sequence[int], total: int) -> dict[str, Weights]:
    """Without a sample: the environment's true mixture ("oracle"), and its tasks in equal parts ("manual").

    The second is what someone says who knows which tasks occur, and not how often.
    """
    oracle, manual = np.zeros(total), np.zeros(total)
    oracle[list(tasks)], manual[list(tasks)] = shares, 1 / len(tasks)
    return {"oracle": tuple(oracle.tolist()), "manual": tuple(manual.tolist())}
