"""LwF and EWC against their definitions, worked out in float64 by hand; their memory over tasks and over a kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.continual import toys  # noqa: E402

from magmax.continual.data.datasets import LabelledExamples  # noqa: E402
from magmax.continual.data.scenarios import class_incremental  # noqa: E402
from magmax.continual.training.fit import FitSettings  # noqa: E402
from magmax.continual.training.losses import Classifier  # noqa: E402
from magmax.continual.training.penalties import EWC, LwF, ReleasedEWC, fisher  # noqa: E402
from magmax.continual.training.sequence import TrainingMethod, fine_tune  # noqa: E402
from magmax.continual.training.weight_files import load_weights  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

OWN = [4, 1]


@pytest.fixture
def data() -> LabelledExamples:
    return toys.blobs(per_class=5).train


@pytest.fixture
def learner() -> Classifier:
    """In double precision, so that tolerances say something."""
    encoder = toys.encoder()
    encoder.model.double()
    return Classifier(encoder, toys.head(encoder, toys.blobs()).double())


def moved(learner: Classifier, by: float) -> None:
    with torch.no_grad():
        for p in learner.model.parameters():
            p += by


def own_gradient(learner: Classifier, items: Sequence[np.ndarray]) -> torch.Tensor:
    """d/dp of the mean over items of -log softmax(own logits)[argmax], as one long vector, by backward()."""
    learner.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for item in items:
        logits = learner([item])[0][OWN]
        total = total - torch.log_softmax(logits, 0)[logits.argmax()] / len(items)
    total.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.model.parameters()]
    found = torch.cat([part.reshape(-1) for part in parts])
    learner.model.zero_grad()
    return found


def flat(state: dict[str, torch.Tensor], learner: Classifier) -> torch.Tensor:
    return torch.cat([state[name].reshape(-1) for name, _ in learner.model.named_parameters()])


def test_the_fisher_is_the_mean_of_squares_and_not_the_square_of_the_mean(
    learner: Classifier, data: LabelledExamples
) -> None:
    items = data.items[:7]
    by_hand = sum(own_gradient(learner, [item]) ** 2 for item in items) / 7
    found = flat(fisher(learner, items, OWN), learner)
    torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(found, own_gradient(learner, items) ** 2, rtol=0.1)


@pytest.mark.parametrize("kind", [EWC, ReleasedEWC])
def test_the_fisher_is_that_of_evaluation_and_moves_no_statistics(kind: type, data: LabelledExamples) -> None:
    encoder = toys.batch_norm_encoder()
    learner = Classifier(encoder, toys.head(encoder, toys.blobs()))
    expected, found = kind(), kind()
    encoder.model.eval()
    expected.after_task(learner, data, OWN)
    before = {key: value.clone() for key, value in encoder.model.state_dict().items()}
    encoder.model.train()
    found.after_task(learner, data, OWN)
    assert encoder.model.training
    assert all(torch.equal(value, before[key]) for key, value in encoder.model.state_dict().items())
    assert all(torch.equal(value, expected.state[key]) for key, value in found.state.items())


def test_ewc_is_nothing_in_the_first_task_and_a_parabola_after(learner: Classifier, data: LabelledExamples) -> None:
    penalty = EWC(weight=3.0, samples=6, seed=0)
    logits = learner(data.items[:2])
    penalty.before_task(learner, [])
    assert penalty(learner, data.items[:2], logits).item() == 0
    penalty.after_task(learner, data, OWN)
    rows = np.sort(np.random.default_rng(0).permutation(len(data))[:6])
    by_hand = sum(own_gradient(learner, [data.items[i]]) ** 2 for i in rows) / 6
    torch.testing.assert_close(flat(penalty.state, learner), by_hand, rtol=1e-10, atol=1e-14)
    penalty.before_task(learner, OWN)
    moved(learner, 0.25)
    value = penalty(learner, data.items[:2], logits)
    assert value.item() == pytest.approx(3.0 * by_hand.sum().item() * 0.25**2, rel=1e-9)
    value.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in learner.model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, 2 * 3.0 * by_hand * 0.25, rtol=1e-9, atol=1e-14)


def test_the_fisher_of_the_second_task_counts_half(learner: Classifier, data: LabelledExamples) -> None:
    penalty = EWC(samples=1000)
    penalty.after_task(learner, data, OWN)
    first = flat(penalty.state, learner)
    moved(learner, 0.1)
    second = flat(fisher(learner, data.items, OWN), learner)
    penalty.after_task(learner, data, OWN)
    torch.testing.assert_close(flat(penalty.state, learner), 0.5 * first + 0.5 * second, rtol=1e-10, atol=1e-14)


def test_the_released_variant_makes_the_published_mistakes(learner: Classifier, data: LabelledExamples) -> None:
    penalty, items = ReleasedEWC(batch=8), data.items
    grown = by_hand = torch.zeros(())
    for start in range(0, 30, 8):
        grown = grown + own_gradient(learner, items[start : start + 8])
        by_hand = by_hand + grown**2 * len(items[start : start + 8])
    penalty.after_task(learner, data, OWN)
    torch.testing.assert_close(flat(penalty.state, learner), 0.5 * by_hand / 32, rtol=1e-10, atol=1e-14)


def test_lwf_by_hand(learner: Classifier, data: LabelledExamples) -> None:
    penalty, items, seen = LwF(weight=0.3, temperature=2.0), data.items[:5], [5, 0, 2]
    penalty.before_task(learner, [])
    assert penalty(learner, items, learner(items)).item() == 0
    with torch.no_grad():
        old = learner(items)[:, seen].numpy()
    penalty.before_task(learner, seen)
    moved(learner, 0.05)
    logits = learner(items)
    value = penalty(learner, items, logits)
    new = logits.detach().numpy()[:, seen]
    p = np.exp(old / 2) / np.exp(old / 2).sum(1, keepdims=True)
    q = np.exp(new / 2) / np.exp(new / 2).sum(1, keepdims=True)
    assert value.item() == pytest.approx(0.3 * -(p * np.log(q)).sum(1).mean(), rel=1e-10)
    (gradient,) = torch.autograd.grad(value, logits)
    expected = np.zeros((5, toys.CLASSES))
    expected[:, seen] = 0.3 * (q - p) / 2 / 5
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-12)


def test_lwf_does_not_train_the_old_model(learner: Classifier, data: LabelledExamples) -> None:
    penalty = LwF()
    penalty.before_task(learner, [0])
    penalty(learner, data.items, learner(data.items)).backward()
    assert all(p.requires_grad for p in learner.model.parameters())
    penalty.after_task(learner, data, OWN)
    assert penalty(learner, data.items, learner(data.items)).item() == 0


@pytest.mark.parametrize("penalty", [LwF, EWC, ReleasedEWC])
def test_a_penalty_resumed_after_a_task_goes_on_as_if_it_had_not_stopped(penalty: type, tmp_path: Path) -> None:
    dataset = toys.blobs(per_class=6)
    tasks = class_incremental(range(toys.CLASSES), 3)
    protocol = TrainingMethod(FitSettings(steps=5, batch=4, learning_rate=0.02), penalty=lambda: penalty(weight=0.7))

    def run(folder: Path, stop_after: int = 3) -> list[bytes]:
        encoder = toys.encoder()

        def stop(t: int, path: Path) -> None:
            if t == stop_after:
                raise KeyboardInterrupt

        head = toys.head(encoder, dataset)
        paths = fine_tune(encoder, head, dataset.train, tasks, protocol, folder, seed=0, done=stop)
        return [path.read_bytes() for path in paths]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_after=2)
    assert run(tmp_path / "killed", 9) == run(tmp_path / "whole", 9)
    plain = TrainingMethod(protocol.settings)
    encoder = toys.encoder()
    head = toys.head(encoder, dataset)
    without = fine_tune(encoder, head, dataset.train, tasks, plain, tmp_path / "plain", seed=0)
    same = toys.encoder()
    load_weights(same.model, tmp_path / "whole" / "theta_1.safetensors")
    load_weights(encoder.model, without[1])
    pairs = [zip(same.model.parameters(), encoder.model.parameters(), strict=True)]
    assert all(torch.equal(a, b) for pair in pairs for a, b in pair)
    load_weights(same.model, tmp_path / "whole" / "theta_3.safetensors")
    load_weights(encoder.model, without[3])
    assert any(not torch.equal(a, b) for a, b in zip(same.model.parameters(), encoder.model.parameters(), strict=True))


def test_a_lost_memory_is_an_error_and_not_another_result(tmp_path: Path) -> None:
    dataset, encoder = toys.blobs(per_class=6), toys.encoder()
    tasks = class_incremental(range(toys.CLASSES), 2)
    protocol = TrainingMethod(FitSettings(steps=2, batch=4), penalty=EWC)
    args = (encoder, toys.head(encoder, dataset), dataset.train, tasks, protocol, tmp_path)
    fine_tune(*args, seed=0)
    (tmp_path / "theta_2.safetensors").unlink()
    load_weights(encoder.model, tmp_path / "theta_0.safetensors")
    with pytest.raises(MagMaxError, match=r"penalty_1.safetensors: is missing, and task 2 needs it"):
        fine_tune(*args, seed=0)
