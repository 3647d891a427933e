"""The environments of Tunable MagMax's protocol: mixtures of tasks to deploy to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

RowIndices = NDArray[np.int64]


@dataclass(frozen=True)
class TargetEnvironment:
    """An environment of a merged model: a mixture of tasks, with samples to tune on and rows to score.

    Attributes:
        mixture: its kind, such as D1.
        draw: which draw of that kind, from 0.
        tasks: the tasks in it (from 0), in the order of the mixture's shares.
        target_rows: the rows of the test data that a preference may be made of.
        scored_rows: the rows it is scored on; none is in both.
    """

    mixture: str
    draw: int
    tasks: Sequence[int]
    target_rows: RowIndices
    scored_rows: RowIndices


def draw_environments(
    task_ids: NDArray[np.integer],
    *,
    mixtures: Mapping[str, Sequence[float]] = MIXTURES,
    draws: int = 5,
    target_fraction: float = 0.1,
    seed: int | Sequence[int] = 0,
) -> list[TargetEnvironment]:
    """Draw environments from test data, as many samples each as its mixture allows without taking one twice.

    Args:
        task_ids: the task (from 0) of each row of the test data; -1 for a row of none.
        target_fraction: the part of each task's samples that is the target sample, at least one of each; the rest is
            scored.

    Raises:
        MagMaxError: fewer tasks than a mixture has, or fewer samples of a task than two.
    """
    rows = {int(task): np.flatnonzero(task_ids == task) for task in np.unique(task_ids) if task >= 0}
    widest = max(map(len, mixtures.values()))
    if len(rows) < widest or min(map(len, rows.values())) < 2:
        counts = {task: len(drawn) for task, drawn in rows.items()}
        raise MagMaxError(f"the mixtures need {widest} tasks with two test samples each or more, not {counts}")
    random = np.random.default_rng(seed)
    environments: list[TargetEnvironment] = []
    for name, shares in mixtures.items():
        for draw in range(draws):
            tasks = random.permutation(sorted(rows))[: len(shares)].tolist()
            whole = min(len(rows[task]) / share for task, share in zip(tasks, shares, strict=True))
            parts: tuple[list[RowIndices], list[RowIndices]] = ([], [])
            for task, share in zip(tasks, shares, strict=True):
                count = max(2, int(share * whole + 1e-9))
                drawn = random.permutation(rows[task])[:count]
                cut = min(count - 1, max(1, round(target_fraction * count)))
                parts[0].append(drawn[:cut])
                parts[1].append(drawn[cut:])
            environments.append(
                TargetEnvironment(name, draw, tasks, *(np.sort(np.concatenate(part)) for part in parts))
            )
    return environments
