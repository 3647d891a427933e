"""The measures against loops written straight from their definitions, and rows of R against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from magmax.continual.data.datasets import LabelledExamples  # noqa: E402
from magmax.continual.data.scenarios import Task  # noqa: E402
from magmax.continual.evaluation.accuracy import score  # noqa: E402
from magmax.continual.evaluation.measures import (  # noqa: E402
    MEASURES,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    matrix,
)


@pytest.fixture(params=[2, 3, 7])
def r(request: pytest.FixtureRequest) -> np.ndarray:
    return np.random.default_rng(request.param).random((request.param + 1, request.param))


def test_incremental_accuracy_by_loops(r: np.ndarray) -> None:
    tasks, total = r.shape[1], 0.0
    for i in range(1, tasks + 1):
        total += sum(r[i][j] for j in range(i)) / i
    assert average_incremental_accuracy(r) == pytest.approx(total / tasks, abs=1e-12)


def test_forgetting_by_loops(r: np.ndarray) -> None:
    tasks = r.shape[1]
    each = [max(r[i][j] for i in range(1, tasks)) - r[tasks][j] for j in range(tasks - 1)]
    assert forgetting(r) == pytest.approx(sum(each) / len(each), abs=1e-12)


def test_transfers_by_loops(r: np.ndarray) -> None:
    tasks = r.shape[1]
    backward = [r[tasks][j] - r[j + 1][j] for j in range(tasks - 1)]
    forward = [r[j][j] - r[0][j] for j in range(1, tasks)]
    assert backward_transfer(r) == pytest.approx(sum(backward) / len(backward), abs=1e-12)
    assert forward_transfer(r) == pytest.approx(sum(forward) / len(forward), abs=1e-12)


def test_forgetting_is_negative_where_the_last_row_is_the_best() -> None:
    assert forgetting(np.array([[0.0, 0.0], [0.5, 0.0], [0.8, 0.9]])) == pytest.approx(-0.3)


def test_what_was_not_measured_is_nan_and_not_a_number_that_looks_right() -> None:
    last_only = matrix({3: [0.5, 0.6, 0.7]}, 3)
    found = {name: measure(last_only) for name, measure in MEASURES.items()}
    assert found.pop("average accuracy") == pytest.approx(0.6)
    assert all(np.isnan(value) for value in found.values())


@pytest.mark.parametrize("among", ["seen", "all"])
@pytest.mark.parametrize("learned", [0, 1, 2, 3])
def test_a_row_by_counting(among: str, learned: int) -> None:
    random = np.random.default_rng(5)
    tasks = [Task("a", (3, 0)), Task("b", (1,)), Task("c", (4, 5))]  # class 2 belongs to none
    labels = random.integers(0, 6, 60)
    logits = random.normal(size=(60, 6)).astype(np.float32)
    row = score(logits, LabelledExamples(list(range(60)), labels), tasks, learned, among)  # pyright: ignore[reportArgumentType]
    right: dict[int, list[bool]] = {}
    for j, task in enumerate(tasks):
        hits = []
        for n in range(60):
            if labels[n] not in task.classes:
                continue
            known = tasks[:learned] if among == "seen" and j < learned else tasks
            candidates = [c for t in known for c in t.classes]
            hits.append(max(candidates, key=lambda c, n=n: logits[n, c]) == labels[n])
            right.setdefault(int(labels[n]), []).append(hits[-1])
        assert row.tasks[j] == pytest.approx(np.mean(hits))
    assert row.micro == pytest.approx(np.mean([hit for hits in right.values() for hit in hits]))
    assert row.macro == pytest.approx(np.mean([np.mean(hits) for hits in right.values()]))


def test_domains_and_classes_of_ones_own() -> None:
    labels, domains = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    logits = np.array([[1, 0, 9], [0, 1, 0], [0, 1, 0], [1, 2, 0]], dtype=np.float32)
    data = LabelledExamples(list(range(4)), labels, domains)
    tasks = [Task("photo", (0, 1), domain=0), Task("sketch", (0, 1), domain=1), Task("other", (2,), among=(2,))]
    assert score(logits, data, tasks[:2], 2).tasks == [1.0, 0.5]
    assert score(logits, data, [tasks[0]], 1, "all").tasks == [1.0]
    own = [Task("photo", (0, 1), domain=0, among=(0, 1)), Task("rest", (2,), domain=0)]
    more = LabelledExamples([*data.items, 4], np.append(labels, 2), np.append(domains, 0))
    assert score(np.vstack([logits, [[5, 5, 0]]]), more, own, 2).tasks == [1.0, 0.0]
