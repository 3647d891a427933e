"""Preferences for one environment, from a sample of it or from what is known of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ...continual.data import Labelled
from ...errors import MagMaxError
from ...rules import Tunable
from ..choose import choose
from ..sources import Distance, from_labels, from_samples, uniform
from .learned import Learned

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

    def of(self, places: Sequence[int]) -> Target:
        return self._replace(rows=self.rows[list(places)])

    def weights(self, source: str) -> list[float]:
        """A preference by labels or by features; see `from_labels` and `from_samples`."""
        if source == "label":
            return from_labels(self.data.labels[self.rows].tolist(), [task.classes for task in self.learned.here.tasks])
        features = map(self.learned.features, range(self.learned.tasks))
        return from_samples([(own[0], own[self.part][self.rows]) for own in features], cast("Distance", source))

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
            lambda places: dict(self._candidates(places)),
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

    def _candidates(self, places: Sequence[int]) -> Iterator[tuple[str, list[float]]]:
        for source in ("label", *get_args(Distance)):
            with suppress(MagMaxError):  # such as of mmd, which needs two rows
                yield source, self.of(places).weights(source)


def known(shares: Sequence[float], tasks: Sequence[int], total: int) -> dict[str, Weights]:
    """Without a sample: the environment's true mixture ("oracle"), and its tasks in equal parts ("manual").

    The second is what someone says who knows which tasks occur, and not how often.
    """
    oracle, manual = np.zeros(total), np.zeros(total)
    oracle[list(tasks)], manual[list(tasks)] = shares, 1 / len(tasks)
    return {"oracle": tuple(oracle.tolist()), "manual": tuple(manual.tolist())}
