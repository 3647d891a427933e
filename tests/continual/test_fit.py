"""Training: the schedule, the batches, and that it learns the same thing twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from magmax.continual.data.datasets import LabelledExamples  # noqa: E402
from magmax.continual.data.scenarios import Task  # noqa: E402
from magmax.continual.evaluation.accuracy import accuracy_by_task, predict  # noqa: E402
from magmax.continual.models.text_encoder import TextEncoder  # noqa: E402
from magmax.continual.training.fit import FitSettings, batches, fit  # noqa: E402
from magmax.continual.training.losses import Classifier, TaskLoss  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402


def tuned(encoder: TextEncoder, head: Any, data: LabelledExamples, settings: FitSettings, seed: Any) -> list[float]:
    """Fine-tuned under all rows of the head."""
    loss = TaskLoss(Classifier(encoder, head), range(len(head)))
    return fit(encoder.model, data, loss, settings, seed)


SETTINGS = FitSettings(steps=40, batch=16, learning_rate=3e-3)


def test_the_loss_falls_and_the_classes_are_learned(encoder: TextEncoder, data: LabelledExamples, head: Any) -> None:
    losses = tuned(encoder, head, data, SETTINGS, seed=0)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    assert (predict(encoder, head, data.items) == data.labels).mean() > 0.9


def test_the_same_seed_gives_the_same_weights_and_another_others(
    make_encoder: Callable[..., TextEncoder], data: LabelledExamples, head: Any
) -> None:
    trained = []
    for seed in (0, 0, 1):
        encoder = make_encoder()
        encoder.model.train()
        torch.rand(seed + 1)  # the global state must not matter
        tuned(encoder, head, data, FitSettings(steps=5, learning_rate=1e-3), seed)
        trained.append(torch.nn.utils.parameters_to_vector(encoder.model.parameters()).detach())
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_the_global_random_state_is_left_alone(encoder: TextEncoder, data: LabelledExamples, head: Any) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # pyright: ignore
    tuned(encoder, head, data, FitSettings(steps=2), seed=0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # pyright: ignore


def test_frozen_word_embeddings_stay(encoder: TextEncoder, data: LabelledExamples, head: Any) -> None:
    encoder.freeze_word_embeddings()
    before = {key: value.clone() for key, value in encoder.model.state_dict().items()}
    tuned(encoder, head, data, FitSettings(steps=3, learning_rate=1e-3), seed=0)
    after = encoder.model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert "embeddings.word_embeddings.weight" not in moved
    assert "embeddings.position_embeddings.weight" in moved
    assert "encoder.layer.1.output.dense.weight" in moved


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    factor = FitSettings(steps=50, warmup=0.1).factor
    assert [factor(step) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factor(5) == 1.0
    assert factor(5 + 45 // 3) == pytest.approx(0.75)
    assert factor(50) == pytest.approx(0.0)
    assert FitSettings(steps=1).factor(0) == FitSettings(steps=10, warmup=0).factor(0) == 1.0


@pytest.mark.parametrize("n", [1, 7, 16, 200])
def test_an_epoch_of_batches_holds_every_item_once(n: int) -> None:
    sizes = np.random.default_rng(0).integers(1, 60, n)
    epoch = list(batches(sizes.tolist(), 16, -(-n // 16), seed=0))
    assert sorted(np.concatenate(epoch)) == list(range(n))
    assert len(list(batches(sizes.tolist(), 16, 100, seed=0))) == 100


def test_batches_hold_items_of_about_one_size() -> None:
    sizes = np.random.default_rng(0).integers(1, 65, 2000)
    spread = [np.ptp(sizes[rows]) for rows in batches(sizes.tolist(), 32, 60, seed=0)]
    assert np.mean(spread) < 12  # 62 in batches drawn without looking


def test_no_items_and_targets_of_another_number(encoder: TextEncoder, head: Any) -> None:
    with pytest.raises(MagMaxError, match="0 items and 0 labels"):
        tuned(encoder, head, LabelledExamples([], np.array([], dtype=np.int64)), SETTINGS, seed=0)
    with pytest.raises(MagMaxError, match="1 items and 2 labels"):
        tuned(encoder, head, LabelledExamples([[1]], np.array([0, 0])), SETTINGS, seed=0)


def test_predictions_do_not_depend_on_the_batch(encoder: TextEncoder, data: LabelledExamples, head: Any) -> None:
    one = predict(encoder, head, data.items, batch=1)
    naive = [int((encoder([item]) @ head.T)[0].argmax()) for item in data.items]
    assert one.tolist() == naive == predict(encoder, head, data.items, batch=64).tolist()


def test_accuracy_by_task_counts_only_the_tasks_own_examples() -> None:
    tasks = [Task("Task 1", (0, 2)), Task("Task 2", (1,))]
    labels, predicted = np.array([0, 2, 0, 2, 1, 1]), np.array([0, 2, 1, 2, 1, 0])
    assert accuracy_by_task(predicted, labels, tasks) == [0.75, 0.5]
