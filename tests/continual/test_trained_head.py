"""A head that is trained: it learns, it is merged, and the merge keeps every task's own rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

import magmax  # noqa: E402
from magmax.continual import registry  # noqa: E402
from magmax.continual.data.datasets import Dataset, LabelledExamples  # noqa: E402
from magmax.continual.data.scenarios import class_incremental  # noqa: E402
from magmax.continual.evaluation.accuracy import logits_of, predict  # noqa: E402
from magmax.continual.models.heads import nearest_class_mean  # noqa: E402
from magmax.continual.models.text_encoder import TextEncoder  # noqa: E402
from magmax.continual.models.trained_head import HeadedEncoder  # noqa: E402
from magmax.continual.training.fit import FitSettings  # noqa: E402
from magmax.continual.training.sequence import TrainingMethod, fine_tune  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402


@pytest.fixture
def texts() -> Dataset:
    """Texts of 4 classes; class c mostly uses the words 10c to 10c + 9."""
    random = np.random.default_rng(0)
    labels = np.arange(96) % 4
    items = [" ".join(map(str, random.integers(10 * c, 10 * c + 10, 6))) for c in labels]
    return Dataset(LabelledExamples(items, labels), LabelledExamples(items, labels), list("abcd"))


@pytest.fixture
def headed(make_encoder: Callable[..., TextEncoder], monkeypatch: pytest.MonkeyPatch) -> HeadedEncoder:
    monkeypatch.setitem(registry.MODELS, "tiny", make_encoder)
    return registry.build("model", {"trained_head": {"of": "tiny", "temperature": 10.0}})


def test_independent_tasks_change_rows_of_their_own_and_the_merge_has_them_all(
    headed: HeadedEncoder, texts: Dataset, tmp_path: Path
) -> None:
    head = registry.build("head", "trained", headed, texts)
    data = LabelledExamples(headed.prepare(texts.train.items), texts.train.labels)
    assert (logits_of(headed, head, data.items) == 0).all()  # it starts at zeros
    protocol = TrainingMethod(FitSettings(steps=40, batch=16, learning_rate=5e-3), start="base")
    tasks = class_incremental([2, 0, 3, 1], 2)
    base, *tuned = fine_tune(headed, head, data, tasks, protocol, tmp_path, seed=0)
    rows = [load_file(path)["head.weight"] for path in tuned]
    for task, own in zip(tasks, rows, strict=True):
        assert own.abs().sum(1).nonzero().ravel().tolist() == sorted(task.classes)
        mine = task.rows(data.labels)
        headed.model.load_state_dict(load_file(tuned[tasks.index(task)]))
        assert (predict(headed, head, [data.items[i] for i in mine]) == data.labels[mine]).mean() > 0.9
    magmax.merge("magmax", base=base, models=tuned, out=tmp_path / "merged.safetensors", scaling_factor=0.5)
    merged = load_file(tmp_path / "merged.safetensors")["head.weight"]
    assert torch.equal(merged, 0.5 * (rows[0] + rows[1]))


def test_from_class_means_it_begins_as_their_head(headed: HeadedEncoder, texts: Dataset) -> None:
    head = registry.build("head", {"trained": {"start": "class_means"}}, headed, texts)
    plain: Any = headed.encoder
    items = headed.prepare(texts.test.items)
    expected = logits_of(plain, nearest_class_mean(plain, texts, temperature=10.0), items)
    np.testing.assert_allclose(logits_of(headed, head, items), expected, atol=1e-5)


def test_a_head_without_its_model_and_a_start_that_is_none(
    headed: HeadedEncoder, encoder: TextEncoder, texts: Dataset
) -> None:
    with pytest.raises(MagMaxError, match="needs the model 'trained_head' around this TextEncoder"):
        registry.build("head", "trained", encoder, texts)
    with pytest.raises(MagMaxError, match="'ones' is neither"):
        registry.build("head", {"trained": {"start": "ones"}}, headed, texts)
