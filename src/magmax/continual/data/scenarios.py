"""Scenarios: how classes, domains and whole data sets are dealt out to tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from ...errors import MagMaxError, list_problems
from ...rules import nearest_hint
from .datasets import Dataset

Tasks = TypeVar("Tasks", bound=Sequence["Task"])


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
        mask = np.isin(labels, self.classes)
        if self.domain is not None:
            if domains is None:
                raise MagMaxError(f"{self.name} is of domain {self.domain}, but the data have no domains")
            mask &= domains == self.domain
        return np.flatnonzero(mask)

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """The labels (all of this task) as rows of the task's own head."""
        order = np.argsort(self.classes)
        targets = order[np.searchsorted(self.classes, labels, sorter=order).clip(max=len(self.classes) - 1)]
        strangers = set(labels[np.asarray(self.classes)[targets] != labels].tolist())
        if strangers:
            raise MagMaxError(f"{self.name} holds the classes {self.classes}, not {sorted(strangers)}")
        return targets


def shuffled_classes(n: int, seed: int) -> tuple[int, ...]:
    """The classes 0..n-1 in a random order, the same for the same seed."""
    return tuple(np.random.default_rng(seed).permutation(n).tolist())


def class_incremental_tasks(
    dataset: Dataset, seed: int, tasks: int, shuffled: bool = True, order: str | Sequence[int] | None = None
) -> tuple[Task, ...]:
    """Deals a data set's classes to the tasks, in an order drawn from the seed or in the data set's own.

    `order` is instead the name of a published order (`cifar100`, ...), or the classes themselves.
    """
    n = len(dataset.classes)
    chosen: Sequence[int] = shuffled_classes(n, seed) if shuffled else range(n)
    if order is not None:
        chosen = published_order("classes", order) if isinstance(order, str) else order
    strangers = sorted(set(chosen) - set(range(n)))
    if strangers:
        raise MagMaxError(f"class order: the data set has the classes 0 to {n - 1}, not {strangers}")
    return check_tasks(dataset, class_incremental(chosen, tasks))


def domain_incremental(
    dataset: Dataset, seed: int, order: str | Sequence[str] | None = None, shuffled: bool = False
) -> tuple[Task, ...]:
    """A task for each domain, with all the classes, in the data set's own order or one drawn from the seed.

    `order` is instead the name of a published order (`domainnet`, `imagenet_r`), or the domains' names.
    """
    names = list(dataset.domains)
    if not names:
        raise MagMaxError("domain_incremental needs a data set with domains; this one has none")
    chosen = _names_in_order("domain", names, "domains", order, seed if shuffled else None)
    classes = tuple(range(len(dataset.classes)))
    return check_tasks(dataset, tuple(Task(name, classes, domain=names.index(name)) for name in chosen))


def data_sets(
    dataset: Dataset, seed: int, aware: bool = True, order: str | Sequence[str] | None = None, shuffled: bool = False
) -> tuple[Task, ...]:
    """A task for each of the data sets that were joined into this one (`joined`), with its own classes.

    Where `aware`, test examples are told apart among the classes of their own data set; else among all classes seen.
    `order` is the name of a published order (`eight`), or the data sets' names.
    """
    parts = dict(dataset.parts)
    if not parts:
        raise MagMaxError("data_sets needs several data sets joined into one; see the data set 'joined'")
    chosen = _names_in_order("data set", list(parts), "data_sets", order, seed if shuffled else None)
    tasks = tuple(Task(name, parts[name], among=parts[name] if aware else None) for name in chosen)
    return check_tasks(dataset, tasks)


def _names_in_order(
    what: str, names: list[str], kind: str, order: str | Sequence[str] | None, seed: int | None
) -> Sequence[str]:
    """The names in the order asked for, each once."""
    if order is None:
        return names if seed is None else [names[i] for i in shuffled_classes(len(names), seed)]
    wanted = published_order(kind, order) if isinstance(order, str) else order
    strangers = [
        f"there is no {what} {name!r}; {nearest_hint(str(name), names)}" for name in wanted if name not in names
    ]
    twice = [f"{what} {name!r} stands twice" for name in dict.fromkeys(wanted) if list(wanted).count(name) > 1]
    if strangers or twice:
        raise list_problems(f"the order of the {what}s does not fit", strangers + twice)
    return wanted


def published_order(kind: str, name: str) -> Any:
    """An order published with MagMax's experiments: kind is classes, domains or data_sets."""
    orders = json.loads(files("magmax.continual.data").joinpath("orders.json").read_text(encoding="utf-8"))[kind]
    if name not in orders:
        raise MagMaxError(f"there is no published order of {kind} called {name!r}; {nearest_hint(name, list(orders))}")
    return orders[name]


def check_tasks(dataset: Dataset, tasks: Tasks) -> Tasks:
    """The tasks as given. Raises MagMaxError that lists everything that training or evaluation would trip over:

    labels or domains out of range, not one label for each example, tasks without examples, and classes without any
    training or test example.
    """
    problems: list[str] = []
    for part, data in (("training", dataset.train), ("test", dataset.test)):
        problems += _find_range_problems(f"{part} labels", data.labels, len(data), len(dataset.classes))
        if data.domains is not None:
            problems += _find_range_problems(f"{part} domains", data.domains, len(data), len(dataset.domains))
        if not problems:
            empty = [task.name for task in tasks if not len(task.rows(data.labels, data.domains))]
            problems += [f"{name} has no {part} examples" for name in empty]
            held = {c for task in tasks for c in task.classes}
            missing = sorted(held - set(data.labels.tolist()))
            problems += [f"class {c} ({dataset.classes[c]}) has no {part} example" for c in missing]
    if problems:
        raise list_problems("the data do not fit the tasks", problems)
    return tasks


def _find_range_problems(what: str, numbers: np.ndarray, examples: int, n: int) -> list[str]:
    if numbers.shape != (examples,):
        return [f"{what} have the shape {numbers.shape}; there are {examples} examples"]
    wrong = np.unique(numbers[(numbers < 0) | (numbers >= n)]).tolist()
    return [f"{what} {wrong[:10]} are out of range: there are {n}, numbered from 0"] if wrong else []


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
