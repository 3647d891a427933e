"""What was measured of a part, call after call: ratios of magnitudes, and the coefficient that they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Sum = tuple[float, int]


@dataclass
class RatioStatistics:
    """Sums over the places (tokens, channels) of every sample of every task.

    Attributes:
        ratios: by task and sample, the sum of ||F_k|| / ||F_m|| over places where F_m is not zero, and their number.
        task_magnitudes, merged: by task, the sum of ||F_k||, and of ||F_m|| on that task's samples, and the number of
            places.
        places: by task, at each place of a call the sum of the ratio, and how many samples have it.
    """

    tasks: int
    ratios: dict[tuple[int, int], Sum] = field(default_factory=dict[tuple[int, int], Sum])
    task_magnitudes: list[Sum] = field(default_factory=list[Sum])
    merged: list[Sum] = field(default_factory=list[Sum])
    places: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])

    def __post_init__(self) -> None:
        self.task_magnitudes, self.merged = [(0.0, 0)] * self.tasks, [(0.0, 0)] * self.tasks

    def add(self, task: int, sample: int, task_magnitudes: Tensor, merged: Tensor) -> None:
        """One call on one sample: the magnitudes at its places, under the task's model and under the merged one."""
        counted = merged > 0
        ratio = torch.where(counted, task_magnitudes / merged, 0.0)
        self.ratios[task, sample] = _add_sums(self.ratios.get((task, sample), (0.0, 0)), ratio, int(counted.sum()))
        self.task_magnitudes[task] = _add_sums(self.task_magnitudes[task], task_magnitudes, task_magnitudes.numel())
        self.merged[task] = _add_sums(self.merged[task], merged, merged.numel())
        sums = self.places.get(task, (ratio.new_zeros(0), ratio.new_zeros(0)))
        size = max(len(sums[0]), len(ratio))
        self.places[task] = (
            _pad(sums[0], size) + _pad(ratio, size),
            _pad(sums[1], size) + _pad(counted.to(ratio.dtype), size),
        )

    def xi(self, samples: int | None = None) -> float | None:
        """mean_k mean_places ||F_k|| / ||F_m||, of each task's first samples alone where so many are named.

        A place where the merged features do not move has no ratio, and a task without a place does not count; None
        where there is none at all.
        """
        means: list[float] = []
        for task in range(self.tasks):
            sums = [s for (k, n), s in self.ratios.items() if k == task and (samples is None or n < samples)]
            if count := sum(number for _, number in sums):
                means.append(sum(total for total, _ in sums) / count)
        return sum(means) / len(means) if means else None

    def by_place(self) -> list[float] | None:
        """The same, place by place: the mean over tasks of the mean over the samples that have it."""
        size = max((len(sums) for sums, _ in self.places.values()), default=0)
        total, tasks = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for sums, counts in self.places.values():
            there = _pad(counts, size).cpu() > 0
            total[there] += (_pad(sums, size).cpu() / _pad(counts, size).cpu())[there]
            tasks += there
        return torch.where(tasks > 0, total / tasks, torch.nan).tolist() if size else None


def mean_magnitudes(sums: Sequence[Sum]) -> list[float]:
    """The mean magnitude of each task."""
    return [total / count if count else 0.0 for total, count in sums]


def _add_sums(sums: Sum, values: Tensor, count: int) -> Sum:
    return sums[0] + float(values.sum()), sums[1] + count


def _pad(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values.new_zeros(size - len(values))])
