"""Laws of the scenarios."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magmax.continual.data.scenarios import Task, class_incremental, shuffled_classes
from magmax.errors import MagMaxError


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], int]:
    n = draw(st.integers(1, 120))
    return draw(st.permutations(range(n))), draw(st.integers(1, n))


@given(splits())
def test_every_class_belongs_to_one_task_and_the_order_stays(split: tuple[list[int], int]) -> None:
    order, tasks = split
    dealt = class_incremental(order, tasks)
    assert [c for task in dealt for c in task.classes] == order
    assert len(dealt) == tasks
    assert all(task.classes for task in dealt)


@given(splits())
def test_the_published_split(split: tuple[list[int], int]) -> None:
    order, tasks = split
    n = len(order)
    for i, task in enumerate(class_incremental(order, tasks)):
        first, last = math.floor(n * i / tasks), math.floor(n * (i + 1) / tasks)
        assert task.classes == tuple(order[first:last])


def test_cub_in_twenty_tasks_and_cars_in_twenty_tasks() -> None:
    assert {len(task.classes) for task in class_incremental(range(200), 20)} == {10}
    assert [len(task.classes) for task in class_incremental(range(196), 20)] == [9, 10, 10, 10, 10] * 4


@pytest.mark.parametrize("tasks", [0, -1, 6])
def test_too_many_or_too_few_tasks(tasks: int) -> None:
    with pytest.raises(MagMaxError, match="choose 1 to 5"):
        class_incremental(range(5), tasks)


def test_a_class_named_twice() -> None:
    with pytest.raises(MagMaxError, match=r"\[3\] twice"):
        class_incremental([1, 3, 2, 3], 2)


def test_shuffled_classes_are_a_permutation_given_by_the_seed() -> None:
    assert sorted(shuffled_classes(20, 4)) == list(range(20))
    assert shuffled_classes(20, 4) == shuffled_classes(20, 4) != shuffled_classes(20, 5)


@given(st.permutations(range(8)), st.lists(st.integers(0, 7), max_size=30))
def test_rows_and_targets_lead_back_to_the_labels(order: list[int], listed: list[int]) -> None:
    labels = np.array(listed, dtype=np.int64)
    for task in class_incremental(order, 3):
        rows = task.rows(labels)
        assert [task.classes[target] for target in task.targets(labels[rows])] == labels[rows].tolist()


@pytest.mark.parametrize("stranger", [0, 5, 9])
def test_a_label_of_another_task(stranger: int) -> None:
    with pytest.raises(MagMaxError, match=rf"\(7, 2\), not \[{stranger}\]"):
        Task("Task 1", (7, 2)).targets(np.array([2, stranger, 7]))
