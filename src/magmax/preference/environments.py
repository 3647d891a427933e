"""The protocol of Tunable MagMax: mixtures of tasks to deploy to, and what each preference is worth in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import MagMaxError

MIXTURES: Mapping[str, tuple[float, ...]] = {
    "D1": (0.5, 0.5),
    "D2": (0.8, 0.2),
    "D3": (1 / 3, 1 / 3, 1 / 3),
    "D4": (0.4, 0.4, 0.2),
    "D5": (0.6, 0.2, 0.2),
}
"""The shares of the tasks of each kind of environment, as published."""

Rows = NDArray[np.int64]
Weights = tuple[float, ...]


@dataclass(frozen=True)
class Environment:
    """Where a merged model is to work.

    Attributes:
        mixture: its kind, such as D1.
        draw: which draw of that kind, from 0.
        tasks: the tasks in it (from 0), in the order of the mixture's shares.
        target: the rows of the test data that a preference may be made of.
        scored: the rows it is scored on; none is in both.
    """

    mixture: str
    draw: int
    tasks: Sequence[int]
    target: Rows
    scored: Rows


class Record(NamedTuple):
    """The micro accuracy of one method in one environment."""

    mixture: str
    draw: int
    method: str
    accuracy: float
    weights: Weights


def environments(
    task_of: NDArray[np.integer],
    *,
    mixtures: Mapping[str, Sequence[float]] = MIXTURES,
    draws: int = 5,
    target: float = 0.1,
    seed: int | Sequence[int] = 0,
) -> list[Environment]:
    """Draw environments from test data, as many samples each as its mixture allows without taking one twice.

    Args:
        task_of: the task (from 0) of each row of the test data; -1 for a row of none.
        target: the part of each task's samples that is the target sample, at least one of each; the rest is scored.

    Raises:
        MagMaxError: fewer tasks than a mixture has, or fewer samples of a task than two.
    """
    rows = {int(task): np.flatnonzero(task_of == task) for task in np.unique(task_of) if task >= 0}
    widest = max(map(len, mixtures.values()))
    if len(rows) < widest or min(map(len, rows.values())) < 2:
        counts = {task: len(own) for task, own in rows.items()}
        raise MagMaxError(f"the mixtures need {widest} tasks with two test samples each or more, not {counts}")
    random = np.random.default_rng(seed)
    found: list[Environment] = []
    for name, shares in mixtures.items():
        for draw in range(draws):
            tasks = random.permutation(sorted(rows))[: len(shares)].tolist()
            whole = min(len(rows[task]) / share for task, share in zip(tasks, shares, strict=True))
            parts: tuple[list[Rows], list[Rows]] = ([], [])
            for task, share in zip(tasks, shares, strict=True):
                count = max(2, int(share * whole + 1e-9))
                own = random.permutation(rows[task])[:count]
                cut = min(count - 1, max(1, round(target * count)))
                parts[0].append(own[:cut])
                parts[1].append(own[cut:])
            found.append(Environment(name, draw, tasks, *(np.sort(np.concatenate(part)) for part in parts)))
    return found


def score_methods(
    drawn: Sequence[Environment],
    methods: Mapping[str, Callable[[Environment], Sequence[float]]],
    predict: Callable[[Weights], NDArray[np.integer]],
    labels: NDArray[np.integer],
) -> list[Record]:
    """The micro accuracy of every method in every environment.

    Args:
        methods: for an environment, of which only the target rows may be looked at, a preference.
        predict: the class of every row of the test data under the merge with a preference; asked once for each
            different preference. `predictor` of `preference.text` makes one for an encoder and a head over all classes.
        labels: the class of every row.
    """
    known: dict[Weights, NDArray[np.integer]] = {}
    records: list[Record] = []
    for environment in drawn:
        for method, preference in methods.items():
            weights = tuple(float(weight) for weight in preference(environment))
            if weights not in known:
                known[weights] = predict(weights)
            right = known[weights][environment.scored] == labels[environment.scored]
            records.append(Record(environment.mixture, environment.draw, method, float(right.mean()), weights))
    return records
