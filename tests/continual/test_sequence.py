"""The training of fine-tunings: resumed after a kill, redone after a change, one file a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from magmax.continual.data.datasets import LabelledExamples  # noqa: E402
from magmax.continual.data.scenarios import class_incremental  # noqa: E402
from magmax.continual.models.text_encoder import TextEncoder  # noqa: E402
from magmax.continual.training import sequence  # noqa: E402
from magmax.continual.training.fit import FitSettings, fit  # noqa: E402
from magmax.continual.training.losses import Classifier, TaskLoss  # noqa: E402
from magmax.continual.training.sequence import TrainingMethod, fine_tune  # noqa: E402
from magmax.continual.training.weight_files import load_weights, read_metadata, save_weights  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

TASKS = class_incremental([2, 0, 3, 1], 2)
SETTINGS = FitSettings(steps=4, batch=16, learning_rate=1e-3)
Make = Callable[..., TextEncoder]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tasks that were really trained, by their number."""
    trained: list[int] = []

    def counted(*args: Any, **options: Any) -> list[float]:
        trained.append(args[4][1])
        return fit(*args, **options)

    monkeypatch.setattr(sequence, "fit", counted)
    return trained


def contents(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def test_theta_0_is_the_encoder_and_each_task_moves_on(
    make_encoder: Make, data: LabelledExamples, head: Any, tmp_path: Path
) -> None:
    start = {key: value.clone() for key, value in make_encoder().model.state_dict().items()}
    paths = fine_tune(make_encoder(), head, data, TASKS, TrainingMethod(SETTINGS), tmp_path, seed=0)
    assert [path.name for path in paths] == [f"theta_{t}.safetensors" for t in range(3)]
    encoder = make_encoder(seed=9)
    load_weights(encoder.model, paths[0])
    assert all(torch.equal(start[key], value) for key, value in encoder.model.state_dict().items())
    assert len(set(contents(paths))) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json", *(path.name for path in paths)]


def test_a_second_run_trains_nothing(
    make_encoder: Make, data: LabelledExamples, head: Any, tmp_path: Path, calls: list[int]
) -> None:
    first = contents(fine_tune(make_encoder(), head, data, TASKS, TrainingMethod(SETTINGS), tmp_path, seed=0))
    second = contents(fine_tune(make_encoder(), head, data, TASKS, TrainingMethod(SETTINGS), tmp_path, seed=0))
    assert calls == [1, 2]
    assert first == second


@pytest.mark.parametrize("killed_in", ["fit", "save_weights"])
def test_a_killed_run_goes_on_after_the_last_finished_task(
    make_encoder: Make,
    data: LabelledExamples,
    head: Any,
    tmp_path: Path,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
    killed_in: str,
) -> None:
    whole = contents(fine_tune(make_encoder(), head, data, TASKS, TrainingMethod(SETTINGS), tmp_path / "whole", seed=0))
    real, count = getattr(sequence, killed_in), {"fit": 2, "save_weights": 3}[killed_in]

    def killed(*args: Any, **options: Any) -> Any:
        nonlocal count
        count -= 1
        if count == 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sequence, killed_in, killed)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(make_encoder(), head, data, TASKS, TrainingMethod(SETTINGS), tmp_path / "killed", seed=0)
    calls.clear()
    paths = fine_tune(make_encoder(), head, data, TASKS, TrainingMethod(SETTINGS), tmp_path / "killed", seed=0)
    assert calls == [2]
    assert contents(paths) == whole


def test_any_change_starts_afresh_where_it_matters(
    make_encoder: Make, data: LabelledExamples, head: Any, tmp_path: Path, calls: list[int]
) -> None:
    def run(**changes: Any) -> list[int]:
        calls.clear()
        given = {
            "encoder": make_encoder(),
            "head": head,
            "data": data,
            "tasks": TASKS,
            "protocol": TrainingMethod(SETTINGS),
        }
        fine_tune(**{**given, "folder": tmp_path, "seed": 0, **changes})
        return list(calls)

    assert run() == [1, 2]
    assert run(seed=1) == [1, 2]
    assert run(head=2 * head) == [1, 2]
    assert run(encoder=make_encoder(seed=1)) == [1, 2]
    assert run(protocol=TrainingMethod(FitSettings(steps=3))) == [1, 2]
    assert run() == [1, 2]
    assert run(tasks=class_incremental([2, 0, 1, 3], 2)) == [2]
    assert run() == [2]
    last = LabelledExamples([*data.items[:-1], [1, 2]], data.labels)  # of class 3, which task 2 holds
    assert run(data=last) == [2]


def test_independent_tasks_start_at_the_base(
    make_encoder: Make, data: LabelledExamples, head: Any, tmp_path: Path
) -> None:
    protocol = TrainingMethod(SETTINGS, start="base")
    paths = fine_tune(make_encoder(), head, data, TASKS, protocol, tmp_path, seed=0)
    alone = make_encoder()
    rows = TASKS[1].rows(data.labels)
    targets = TASKS[1].targets(data.labels[rows])
    loss = TaskLoss(Classifier(alone, head), TASKS[1].classes)
    fit(alone.model, LabelledExamples(data.pick(rows).items, targets), loss, SETTINGS, [0, 2])
    merged = make_encoder(seed=9)
    load_weights(merged.model, paths[2])
    pairs = zip(alone.model.state_dict().values(), merged.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weights_of_another_model_and_no_weights_at_all(make_encoder: Make, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_weights(torch.nn.Linear(2, 3), path, {"made_from": "a test"})
    assert read_metadata(path) == {"made_from": "a test"}
    with pytest.raises(MagMaxError, match=r"other.safetensors does not hold the weights of this BertModel"):
        load_weights(make_encoder().model, path)
    path.write_bytes(path.read_bytes()[:50])
    assert read_metadata(path) == read_metadata(tmp_path / "none") == {}
    with pytest.raises(MagMaxError, match=r"other.safetensors does not hold"):
        load_weights(make_encoder().model, path)


@pytest.mark.parametrize("balanced", [True, False])
def test_replay_keeps_so_many_examples_of_a_class_and_balanced_repeats_them(
    make_encoder: Make,
    data: LabelledExamples,
    head: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    balanced: bool,
) -> None:
    seen: list[LabelledExamples] = []

    def watched(*args: Any, **options: Any) -> list[float]:
        seen.append(args[1])
        return fit(*args, **options)

    monkeypatch.setattr(sequence, "fit", watched)
    protocol = TrainingMethod(SETTINGS, replay=5, balanced=balanced)
    fine_tune(make_encoder(), head, data, TASKS, protocol, tmp_path, seed=0)
    classes, counts = np.unique(seen[1].labels, return_counts=True)
    assert dict(zip(classes, counts, strict=True)) == {0: 24 if balanced else 5, 1: 24 if balanced else 5, 2: 24, 3: 24}
    for row in (0, 1):  # the head's rows of the first task's classes, 2 and 0
        first = {bytes(item) for item, label in zip(seen[0].items, seen[0].labels, strict=True) if label == row}
        again = {bytes(item) for item, label in zip(seen[1].items, seen[1].labels, strict=True) if label == row}
        assert len(again) == 5
        assert again <= first
