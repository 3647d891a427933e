"""Preferences against their definitions, written plainly."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magmax import MagMaxError
from magmax.preference import (
    apply_temperature,
    choose_preference,
    from_labels,
    from_samples,
    geometric_weights,
    uniform_weights,
)
from magmax.preference.candidates import split_halves


def features(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 6)) + shift


def softmax(values: list[float]) -> list[float]:
    powers = [np.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def published_transport(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Sinkhorn's iterations as they are written in the paper's procedure."""
    cost = np.array([[((x - y) ** 2).sum() for y in theirs] for x in ours])
    cost = cost / cost.max()
    kernel = np.exp(-cost / 0.1)
    a, b = np.full(len(ours), 1 / len(ours)), np.full(len(theirs), 1 / len(theirs))
    u = np.ones_like(a)
    for _ in range(100):
        v = b / (kernel.T @ u)
        u = a / (kernel @ v)
    return float((u[:, None] * kernel * v[None, :] * cost).sum())


def plain_discrepancy(ours: np.ndarray, theirs: np.ndarray) -> float:
    everyone = [*ours, *theirs]
    n, m = len(ours), len(theirs)
    width = np.median([((x - y) ** 2).sum() for i, x in enumerate(everyone) for y in everyone[:i]])

    def kernel(x, y) -> float:
        return np.exp(-((x - y) ** 2).sum() / (2 * width))

    within = sum(kernel(x, y) for i, x in enumerate(ours) for j, y in enumerate(ours) if i != j) / (n * (n - 1))
    within += sum(kernel(x, y) for i, x in enumerate(theirs) for j, y in enumerate(theirs) if i != j) / (m * (m - 1))
    return within - 2 * sum(kernel(x, y) for x in ours for y in theirs) / (n * m)


def plain_angle(ours: np.ndarray, theirs: np.ndarray) -> float:
    one, other = ours.mean(0), theirs.mean(0)
    return 1 - one @ other / np.sqrt((one @ one) * (other @ other))


@pytest.mark.parametrize(
    ("method", "distance", "sharpness"),
    [("ot", published_transport, 100), ("cos", plain_angle, 50), ("mmd", plain_discrepancy, 100)],
)
def test_weights_from_samples_are_the_published_ones(method, distance, sharpness):
    pairs = [(features(n, 20 + n, 0.02 * n + 0.5), features(9, 12, 0.5)) for n in range(3)]
    wanted = softmax([-sharpness * distance(*pair) for pair in pairs])
    assert from_samples(pairs, method) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("method", ["ot", "cos", "mmd"])
def test_the_nearest_task_gets_most(method):
    target = features(9, 40, 2.0)
    weights = from_samples([(features(n, 30, shift), target) for n, shift in enumerate((-2.0, 2.0, 0.0))], method)
    assert weights[1] == max(weights)
    assert sum(weights) == pytest.approx(1)


def test_far_tasks_do_not_underflow_to_nothing_at_all():
    weights = from_samples([(features(0, 9, 50), -features(1, 9, 50)), (features(2, 9, 40), -features(3, 9, 50))], "ot")
    assert np.isfinite(weights).all()
    assert sum(weights) == pytest.approx(1)


def test_only_the_first_500_training_samples_count():
    many = features(0, 600)
    target = features(1, 5)
    assert from_samples([(many, target), (target, target)], "cos") == from_samples(
        [(many[:500], target), (target, target)], "cos"
    )


@pytest.mark.parametrize(
    ("pairs", "method", "words"),
    [
        ([(features(0, 3), features(0, 3))], "cosine", "did you mean 'cos'"),
        ([(features(0, 3), features(0, 3)[:, :2])], "cos", "one width"),
        ([(features(0, 3), features(0, 0))], "cos", "some samples"),
        ([(features(0, 3), features(0, 3) * np.nan)], "cos", "NaN"),
        ([(features(0, 3), features(0, 1))], "mmd", "needs two samples"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(pairs, method, words):
    with pytest.raises(MagMaxError, match=words):
        from_samples(pairs, method)


def test_labels_are_counted():
    assert from_labels([1, 1, 2, 7, 9], [{1, 5}, {2}, {7, 8}]) == [0.5, 0.25, 0.25]
    with pytest.raises(MagMaxError, match="none of the 2 target samples"):
        from_labels([1, 2], [{3}, {4}])


@given(st.floats(0.01, 100), st.integers(1, 60))
def test_a_schedule_is_geometric_and_its_inverse_its_mirror(a, tasks):
    weights = geometric_weights(a, tasks)
    assert sum(weights) == pytest.approx(1)
    assert weights == pytest.approx(geometric_weights(1 / a, tasks)[::-1], rel=1e-9)
    for one, other in pairwise(weights):
        if min(one, other) > 1e-250:
            assert other == pytest.approx(a * one, rel=1e-9)


def test_a_schedule_at_its_ends():
    assert geometric_weights(1, 4) == uniform_weights(4) == [0.25] * 4
    assert geometric_weights(0, 3) == [1, 0, 0]
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(MagMaxError):
            geometric_weights(wrong, 3)


def test_temperature_sharpens_and_evens():
    assert apply_temperature([0.2, 0.8], 1) == pytest.approx([0.2, 0.8])
    assert apply_temperature([0.2, 0.8], 0.5) == pytest.approx([0.04 / 0.68, 0.64 / 0.68])
    assert apply_temperature([0.0, 3.0, 3.0], 1000) == pytest.approx([0, 0.5, 0.5])


OWN = [0.5, 0.3, 0.2]


def always(weights):
    """A source that makes the same of all samples."""
    return lambda places: {"label": weights}


def test_a_source_is_scored_on_the_half_that_its_preference_was_not_made_of():
    """Against the definition, with a score that tells samples and preferences apart."""
    first, second = split_halves(7, seed=3)

    def candidates(places):
        return {"mean": [1.0, float(np.mean(places)), 2.0], "first": [1.0, 0.5, float(places[0])]}

    def score(weights):
        return [np.cos(sample) * weights[1] + weights[2] for sample in range(7)]

    choice = choose_preference(candidates, OWN, score, 7, seed=3, pull=0.3, temperatures=(0.5, 1, 3))
    assert len(choice.candidates) == 2 + 2 * 3
    for trial in choice.candidates:
        made = [candidates(half).get(trial.source, trial.weights) for half in (first, second)]
        of_first, of_second = (apply_temperature(weights, trial.temperature) for weights in made)
        seen = [score(of_second)[sample] for sample in first] + [score(of_first)[sample] for sample in second]
        assert trial.score == pytest.approx(np.mean(seen))
        away = sum((w - o) ** 2 for w, o in zip(trial.weights, OWN, strict=True))
        assert trial.objective == pytest.approx(np.mean(seen) - 0.3 * away)
        if trial.source in candidates([0]):
            assert trial.weights == pytest.approx(
                apply_temperature(candidates(range(7))[trial.source], trial.temperature)
            )
    assert choice.best.objective == max(trial.objective for trial in choice.candidates)


def test_each_preference_is_scored_once_and_ties_go_to_the_nearest_to_magmax():
    asked = []

    def score(weights):
        asked.append(tuple(weights))
        return [weights[2]] * 4

    choice = choose_preference(always([0.1, 0.1, 0.8]), OWN, score, 4, temperatures=(0.5, 1))
    assert (choice.best.source, choice.best.temperature) == ("label", 0.5)
    assert len(asked) == len(set(asked)) == 4
    assert choose_preference(always([0.1, 0.1, 0.8]), OWN, lambda weights: [0.7] * 4, 4).best.source == "magmax"
    assert choose_preference(always([0.1, 0.1, 0.8]), OWN, score, 4, pull=100).best.source == "magmax"


def test_a_source_that_a_half_is_too_small_for_is_not_tried():
    choice = choose_preference(
        lambda places: {"label": OWN} if len(places) > 2 else {}, OWN, lambda weights: [0.5] * 4, 4
    )
    assert [trial.source for trial in choice.candidates] == ["magmax", "uniform"]


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(MagMaxError, match="no number"):
        choose_preference(always(OWN), OWN, lambda weights: [0.5, float("nan")], 2)
    with pytest.raises(MagMaxError, match="two or more are needed, not 1"):
        choose_preference(always(OWN), OWN, lambda weights: [0.5], 1)


@given(st.integers(2, 50), st.integers(0, 5))
@settings(max_examples=50)
def test_halves_are_a_partition_with_something_in_both(count, seed):
    first, second = split_halves(count, seed)
    assert abs(len(first) - len(second)) <= 1
    assert sorted(first + second) == list(range(count))
