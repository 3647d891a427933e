"""A tensor is sensitive where growing it costs more than chance would show; the measurement leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.calibration.nets import average_states, build_model, make_task_states  # noqa: E402
from tests.calibration.test_features import mlp  # noqa: E402

from magmax import MagMaxError  # noqa: E402
from magmax.calibration import find_sensitive  # noqa: E402
from magmax.rules.transforms.sensitive_tensors import read_sensitivity  # noqa: E402


def moved(model, base, merged, key):
    """How far a tensor is beyond its merged value, in units of its update."""
    return float(((model.state_dict()[key] - merged[key]) / (merged[key] - base[key])).mean())


def scores_of(base, merged, cost, spread, count=400):
    """Scores that fall by cost[key] for each tenth that a tensor grows, for half of the examples more than others."""
    noise = np.random.default_rng(0).normal(size=count)

    def scores(model):
        lost = sum(c * 10 * moved(model, base, merged, key) for key, c in cost.items())
        return 1 - lost * (1 + spread * noise)

    return scores


@pytest.fixture
def parts():
    model = build_model(mlp)
    base, models = make_task_states(model)
    merged = average_states(base, models)
    model.load_state_dict(merged)
    return model, base, merged


def test_drops_are_measured_and_the_worst_named(parts, tmp_path):
    """The mean of cost * (1 + 2 noise) has a 95 % half-width of cost * 2 * 1.96 / sqrt(400), to about a tenth."""
    model, base, merged = parts
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cost = {"0.weight": 0.01, "2.weight": 0.03, "3.weight": -0.02}
    found = find_sensitive(model, base, scores_of(base, merged, cost, 2), name="toy")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(found.drops) == set(merged)
    scale = float(1 + 2 * np.random.default_rng(0).normal(size=400).mean())
    for key, drop in found.drops.items():
        assert drop.drop == pytest.approx(cost.get(key, 0) * scale, abs=1e-9)
        assert drop.noise == pytest.approx(abs(cost.get(key, 0)) * 2 * 1.96 / 20, rel=0.15, abs=1e-9)
    assert list(found.sensitive) == ["2.weight", "0.weight"]
    (tmp_path / "s.json").write_text(found.to_json())
    assert read_sensitivity(tmp_path / "s.json") == found
    fewer = find_sensitive(model, base, scores_of(base, merged, cost, 2), name="toy", count=1)
    assert list(fewer.sensitive) == ["2.weight"]


def test_what_lies_within_the_noise_is_never_sensitive(parts):
    model, base, merged = parts
    cost = {"0.weight": 0.01, "2.weight": 0.03}
    found = find_sensitive(model, base, scores_of(base, merged, cost, 40), name="toy", count=99)
    drops = [found.drops[key].drop for key in cost]
    assert max(map(abs, drops)) > 0.01
    assert not found.sensitive


def test_a_tensor_that_the_merge_does_not_move_is_not_measured(parts):
    model, base, _ = parts
    with torch.no_grad():
        model[3].weight.copy_(base["3.weight"])
    found = find_sensitive(model, base, lambda m: np.ones(5), name="toy")
    assert "3.weight" not in found.drops
    assert "3.bias" in found.drops


@pytest.mark.parametrize("scores", [[1.0], [1.0, np.nan], []])
def test_scores_that_are_none(parts, scores):
    model, base, _ = parts
    with pytest.raises(MagMaxError, match="a proxy set needs two examples or more"):
        find_sensitive(model, base, lambda m: scores, name="toy")
    sizes = iter([5, 4])
    with pytest.raises(MagMaxError, match="4 scores where there were 5"):
        find_sensitive(model, base, lambda m: np.ones(next(sizes)), name="toy")
    assert torch.equal(model[0].weight, parts[2]["0.weight"])
