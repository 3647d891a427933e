"""Data sets joined into one, long tails, and the scenarios over domains and data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from magmax.continual import registry
from magmax.continual.data.combine import ConcatenatedSequence, join_datasets, joined_datasets, thin_classes
from magmax.continual.data.datasets import Dataset, LabelledExamples
from magmax.continual.data.scenarios import (
    Task,
    check_tasks,
    class_incremental_tasks,
    data_sets,
    domain_incremental,
    published_order,
)
from magmax.errors import MagMaxError


def dataset(name: str, classes: int, per_class: int = 4, domains: int = 0) -> Dataset:
    labels = np.arange(classes * per_class) % classes
    data = LabelledExamples([f"{name} {i}" for i in range(len(labels))], labels)
    if domains:
        data = LabelledExamples(data.items, labels, np.arange(len(labels)) // classes % domains)
    names = [f"{name} {c}" for c in range(classes)]
    return Dataset(data, data, names, [f"domain {d}" for d in range(domains)])


PAIR = join_datasets({"one": dataset("a", 3), "two": dataset("b", 2)})


def test_each_example_keeps_its_class_under_another_number() -> None:
    assert PAIR.classes == ["a 0", "a 1", "a 2", "b 0", "b 1"]
    assert PAIR.parts == [("one", (0, 1, 2)), ("two", (3, 4))]
    for item, label in zip(PAIR.train.items, PAIR.train.labels, strict=True):
        name, number = item.split()
        assert PAIR.classes[label] == f"{name} {int(number) % (3 if name == 'a' else 2)}"
    assert PAIR.prompts[3] == ["b 0"]


def test_chained_is_the_list_of_all() -> None:
    parts: list[list[int]] = [[], [1, 2], [], [3], [4, 5, 6], []]
    whole, expected = ConcatenatedSequence(parts), [1, 2, 3, 4, 5, 6]
    assert list(whole) == [whole[i] for i in range(6)] == expected
    assert [whole[i] for i in range(-6, 0)] == whole[:] == expected
    assert whole[1:5:2] == expected[1:5:2]
    with pytest.raises(IndexError):
        whole[6]


def test_joined_in_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.DATASETS, "letters", dataset)
    choice = {"letters": {"name": "x", "classes": 2}}
    assert registry.build("data", {"joined": {"of": {"p": choice, "q": choice}}}).classes == ["x 0", "x 1"] * 2
    with pytest.raises(MagMaxError, match="under a name of its own"):
        joined_datasets([choice, choice])
    with pytest.raises(MagMaxError, match="at least one"):
        joined_datasets([])
    tail = registry.build("data", {"long_tail": {"of": choice, "imbalance": 4}})
    assert np.bincount(tail.train.labels).tolist() == [4, 1]


@pytest.mark.parametrize("aware", [True, False])
def test_a_task_for_each_data_set(aware: bool) -> None:
    tasks = data_sets(PAIR, seed=0, aware=aware, order=["two", "one"])
    assert [(task.name, task.classes) for task in tasks] == [("two", (3, 4)), ("one", (0, 1, 2))]
    assert [task.among for task in tasks] == ([(3, 4), (0, 1, 2)] if aware else [None, None])


def test_a_task_for_each_domain() -> None:
    data = dataset("d", 2, per_class=6, domains=3)
    tasks = domain_incremental(data, seed=0)
    assert [(task.name, task.domain, task.classes) for task in tasks] == [(f"domain {d}", d, (0, 1)) for d in range(3)]
    rows = np.concatenate([task.rows(data.train.labels, data.train.domains) for task in tasks])
    assert sorted(rows) == list(range(12))
    orders = {tuple(task.name for task in domain_incremental(data, seed=s, shuffled=True)) for s in range(9)}
    assert len(orders) > 1
    assert orders == {tuple(task.name for task in domain_incremental(data, s, shuffled=True)) for s in range(9)}


@pytest.mark.parametrize(
    ("order", "why"),
    [(["domain 0", "domian 1"], "no domain 'domian 1'.*'domain 1'"), (["domain 1"] * 2, "'domain 1' stands twice")],
)
def test_an_order_that_does_not_fit(order: list[str], why: str) -> None:
    with pytest.raises(MagMaxError, match=why):
        domain_incremental(dataset("d", 2, domains=2), seed=0, order=order)


def test_data_without_domains_or_parts() -> None:
    with pytest.raises(MagMaxError, match="needs a data set with domains"):
        domain_incremental(dataset("d", 2), seed=0)
    with pytest.raises(MagMaxError, match="joined"):
        data_sets(dataset("d", 2), seed=0)


def test_published_orders() -> None:
    sizes = {"cifar100": 100, "cub200": 200, "imagenet_r": 200, "domainnet": 345, "cars": 196}
    for name, n in sizes.items():
        assert sorted(published_order("classes", name)) == list(range(n))
    assert published_order("classes", "cifar100")[:5] == [70, 89, 11, 13, 63]
    assert published_order("classes", "cars") == list(range(196))
    assert published_order("domains", "imagenet_r")[:3] == ["tattoo", "sketch", "graphic"]
    with pytest.raises(MagMaxError, match=r"'cifar10'.*cifar100"):
        published_order("classes", "cifar10")
    big = dataset("c", 100, per_class=1)
    tasks = class_incremental_tasks(big, seed=0, tasks=20, order="cifar100")
    assert tasks[0].classes == (70, 89, 11, 13, 63)
    with pytest.raises(MagMaxError, match="has the classes 0 to 99, not"):
        class_incremental_tasks(big, seed=0, tasks=5, order="cub200")
    assert [task.classes for task in class_incremental_tasks(big, 0, 2, order=[4, 9])] == [(4,), (9,)]


def broken(labels: list[int], domains: list[int] | None = None, test: list[int] | None = None) -> Dataset:
    train = LabelledExamples(["x"] * 4, np.array(labels), None if domains is None else np.array(domains))
    tested = LabelledExamples(
        ["x"] * 4, np.array(test or [0, 1, 2, 2]), None if domains is None else np.array([0, 1, 0, 1])
    )
    return Dataset(train, tested, ["cat", "dog", "hen"], ["p", "q"] if domains is not None else [])


TASKS = (Task("first", (0, 1)), Task("second", (2,)))


@pytest.mark.parametrize(
    ("data", "tasks", "problems"),
    [
        (broken([0, 1, 3, -1]), TASKS, [r"training labels \[-1, 3\] are out of range"]),
        (broken([0, 1, 2]), TASKS, [r"training labels have the shape \(3,\); there are 4"]),
        (broken([0, 0, 1, 1]), TASKS, ["second has no training examples", r"class 2 \(hen\) has no training"]),
        (broken([0, 2, 2, 2]), TASKS, [r"class 1 \(dog\) has no training example"]),
        (broken([0, 1, 2, 2], test=[0, 0, 0, 1]), TASKS, ["second has no test examples", r"\(hen\) has no test"]),
        (broken([0, 1, 2, 2], [0, 1, 2, 2]), TASKS, [r"training domains \[2\] are out of range"]),
        (broken([0, 1, 2, 2], [0, 0, 0, 0]), (Task("q", (0, 1, 2), domain=1),), ["q has no training examples"]),
    ],
)
def test_everything_that_would_be_tripped_over_is_listed(
    data: Dataset, tasks: tuple[Task, ...], problems: list[str]
) -> None:
    with pytest.raises(MagMaxError) as error:
        check_tasks(data, tasks)
    for problem in problems:
        assert error.match(problem)
    assert check_tasks(broken([0, 1, 2, 2]), TASKS) is TASKS


def test_a_long_tail_falls_from_the_largest_class_to_one_in_a_hundred() -> None:
    whole = dataset("t", 5, per_class=200)
    tail = thin_classes(whole, imbalance=100, seed=0)
    assert np.bincount(tail.train.labels).tolist() == [200, 63, 20, 6, 2]  # 200 * 100^(-c / 4)
    assert tail.test is whole.test
    kept: list[Any] = list(tail.train.items)
    assert kept == [item for item in whole.train.items if item in set(kept)]
    assert (
        kept == list(thin_classes(whole, 100, seed=0).train.items) != list(thin_classes(whole, 100, seed=1).train.items)
    )
    with pytest.raises(MagMaxError, match="choose 1 or more"):
        thin_classes(whole, 0.1, seed=0)
