"""Scenarios: how classes are dealt out to tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from magmax.continual.data import Dataset
from magmax.errors import MagMaxError


@dataclass(frozen=True)
class Task:
    """A task: its name, the classes it holds, in the order of its head's rows, and its domain, if it is of one.

    `among`, where given, are the classes that its test examples are told apart from whatever else was learned (a
    data set of its own); by default all classes that were seen, whatever their task.
    """

    name: str
    classes: tuple[int, ...]
    domain: int | None = None
    among: tuple[int, ...] | None = None

    def rows(self, labels: np.ndarray, domains: np.ndarray | None = None) -> np.ndarray:
        """The positions of the examples that belong to this task, of training or of test data."""
        own = np.isin(labels, self.classes)
        if self.domain is not None:
            if domains is None:
                raise MagMaxError(f"{self.name} is of domain {self.domain}, but the data have no domains")
            own &= domains == self.domain
        return np.flatnonzero(own)

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """The labels (all of this task) as rows of the task's own head."""
        order = np.argsort(self.classes)
        found = order[np.searchsorted(self.classes, labels, sorter=order).clip(max=len(self.classes) - 1)]
        strangers = set(labels[np.asarray(self.classes)[found] != labels].tolist())
        if strangers:
            raise MagMaxError(f"{self.name} holds the classes {self.classes}, not {sorted(strangers)}")
        return found


def shuffled_classes(n: int, seed: int) -> tuple[int, ...]:
    """The classes 0..n-1 in a random order, the same for the same seed."""
    return tuple(np.random.default_rng(seed).permutation(n).tolist())


def class_incremental_tasks(dataset: Dataset, seed: int, tasks: int, shuffled: bool = True) -> tuple[Task, ...]:
    """Deals a data set's classes to the tasks, in an order drawn from the seed or in the data set's own."""
    n = len(dataset.classes)
    return class_incremental(shuffled_classes(n, seed) if shuffled else range(n), tasks)


def class_incremental(class_order: Sequence[int], tasks: int) -> tuple[Task, ...]:
    """Deals n classes to T tasks: task i (from 0) holds class_order[floor(n*i/T) : floor(n*(i+1)/T)].

    Raises MagMaxError where a class stands twice or there are fewer classes than tasks.
    The splits of "MagMax: Leveraging Model Merging for Seamless Continual Learning" (ECCV 2024).
    """
    n = len(class_order)
    if len(set(class_order)) != n:
        twice = sorted({c for c in class_order if list(class_order).count(c) > 1})
        raise MagMaxError(f"class_order names the classes {twice} twice; each class belongs to one task")
    if not 1 <= tasks <= n:
        raise MagMaxError(f"{n} classes cannot be dealt to {tasks} tasks; choose 1 to {n} tasks")
    cuts = [n * i // tasks for i in range(tasks + 1)]
    return tuple(Task(f"Task {i}", tuple(class_order[a:b])) for i, (a, b) in enumerate(pairwise(cuts), start=1))
