"""Whether a model is a merge of others is told from its update alone, for every rule."""

from __future__ import annotations

import numpy as np
import pytest

import magmax
from magmax import MagMaxError
from magmax.calibration.gram import TaskVectorGram
from magmax.calibration.weight_space import measure_gram
from magmax.checkpoints import open_checkpoint
from magmax.rules import rule_from

RULES = [
    "average", "task_arithmetic", "magmax", "ties", "random_mix", "kth_magnitude", "consensus", "sce", "model_stock",
    "karcher", "iso_c", "iso_cts", "tsv_m",  "elect", [{"dare": {"density": 0.1}}, "average"],
    [{"prune": {"density": 0.1}}, "magmax"], ["magmax", "calibrate_weights"],
]  # fmt: skip


def states(tasks: int, alike: float = 0.0):
    """A base and fine-tuned models, whose task vectors have this cosine."""
    draw = np.random.default_rng(0)
    base = {"a": draw.normal(size=(200, 150)), "b": draw.normal(size=300)}
    base = {key: value.astype(np.float32) for key, value in base.items()}
    common = {key: draw.normal(size=value.shape) for key, value in base.items()}
    models = [
        {k: (v + np.sqrt(alike) * common[k] + np.sqrt(1 - alike) * draw.normal(size=v.shape)).astype(np.float32)
         for k, v in base.items()}
        for _ in range(tasks)
    ]  # fmt: skip
    return base, models


def measured(base, merged, models) -> TaskVectorGram:
    return measure_gram(
        open_checkpoint(base), open_checkpoint(merged), [open_checkpoint(m) for m in models], "abcdefgh"[: len(models)]
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("tasks", [2, 8])
def test_every_rule_makes_a_merge(rule, tasks):
    base, models = states(tasks)
    merged = magmax.merge(rule_from(rule), base, models)
    found = measured(base, merged, models)
    vectors = np.stack([np.concatenate([(m[k] - base[k]).ravel() for k in base]) for m in (*models, merged)])
    vectors = vectors.astype(np.float64)
    np.testing.assert_allclose(found.total, vectors @ vectors.T, rtol=1e-9, atol=1e-6)
    fit, *_ = np.linalg.lstsq(vectors[:-1].T, vectors[-1], rcond=None)
    share = np.linalg.norm(fit @ vectors[:-1]) / np.linalg.norm(vectors[-1])
    assert found.correlation == pytest.approx(share, abs=1e-6)
    found.check("merged")


def test_a_merge_of_others_that_are_a_little_alike_is_doubted() -> None:
    base, models = states(4, 0.05)
    merged = magmax.merge("average", base, models[:2])
    assert measured(base, merged, models[:2]).doubtful_reason("merged") == ""
    doubtful = measured(base, merged, models[2:])
    assert "a, b" in doubtful.doubtful_reason("merged")
    assert 0.05 < doubtful.correlation < 0.3


def test_an_unrelated_model_is_refused_and_lengths_and_cosines_are_told():
    base, (first, second, other) = states(3, 0.0)
    found = measured(base, other, [first, second])
    assert found.correlation < 0.05
    with pytest.raises(MagMaxError, match=r"merged\.safetensors: is not a merge of a, b"):
        found.check("merged.safetensors")
    found.check("merged.safetensors", any_model=True)
    base, models = states(4, 0.5)
    found = measured(base, models[0], models[1:])
    assert found.cosine(["a", "b"]) == pytest.approx(0.5, abs=0.05)
    assert found.norms(["b"])[-1] == pytest.approx(np.linalg.norm(models[0]["b"] - base["b"]), rel=1e-5)
