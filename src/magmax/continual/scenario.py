"""Scenarios: how classes are dealt out to tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from magmax.errors import MagMaxError


@dataclass(frozen=True)
class Task:
    """A task: its name and the classes it holds, in the order of its head's rows."""

    name: str
    classes: tuple[int, ...]

    def rows(self, labels: np.ndarray) -> np.ndarray:
        """The positions of the examples that belong to this task."""
        return np.flatnonzero(np.isin(labels, self.classes))

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
