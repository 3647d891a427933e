"""Weighted rules against their definitions, written as plainly as numpy allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.models import Tensors
from tests.rules.test_planned import flat, model, top

import magmax
from magmax.rules import (
    Address,
    Average,
    Dare,
    Elect,
    ElectSum,
    MagMax,
    PerModel,
    Prune,
    TaskArithmetic,
    Ties,
    chain,
    selection,
)

WEIGHTS = (0.7, -0.2, 1.5)
DENSITIES = (0.0, 0.3, 1.0)


def vectors(dtype: type = np.float32, coarse: bool = True) -> list[np.ndarray]:
    source = np.random.default_rng(7)
    drawn = [source.normal(size=300) * 2 for _ in WEIGHTS]
    return [(np.round(v) if coarse else v).astype(dtype) for v in drawn]


def left_sum(terms: list[np.ndarray]) -> np.ndarray:
    total = terms[0] + terms[0].dtype.type(0)
    for term in terms[1:]:
        total = total + term
    return total


def elect(taken: list[np.ndarray], weights: tuple[float, ...], mean: bool, tie: float = 1) -> np.ndarray:
    """One element at a time: keep what has the sign of the weighted sum, divide by its weights."""
    dtype = taken[0].dtype.type
    weighted = [dtype(w) * v for v, w in zip(taken, weights, strict=True)]
    total = left_sum(weighted)
    merged = np.zeros_like(total)
    for n in range(len(total)):
        sign = np.sign(total[n]) or tie
        agree = [t for t, v in enumerate(weighted) if np.sign(v[n]) == sign]
        value, share = dtype(0), dtype(0)
        for t in agree:
            value, share = dtype(value + weighted[t][n]), dtype(share + dtype(weights[t]))
        merged[n] = value / (share or dtype(1)) if mean else value
    return merged


def definition(rule: str, taken: list[np.ndarray], weights: tuple[float, ...]) -> np.ndarray:
    weighted = [v.dtype.type(w) * v for v, w in zip(taken, weights, strict=True)]
    return {
        "task_arithmetic": lambda: left_sum(weighted),
        "average": lambda: left_sum(weighted) / taken[0].dtype.type(sum(weights)),
        "elect": lambda: elect(taken, weights, mean=True),
        "elect_sum": lambda: elect(taken, weights, mean=False),
    }[rule]()


RULES = {rule.name: rule for rule in (TaskArithmetic, Average, Elect, ElectSum)}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("weights", [WEIGHTS, (1, 1, 1), (0, 2, 2)])
def test_a_weighted_rule_is_its_definition_on_numpy_and_torch(name, dtype, coarse, weights):
    taken = vectors(dtype, coarse)
    rule = RULES[name](weights=PerModel(weights))
    wanted = definition(name, taken, weights)
    assert (rule(taken) == wanted).all()
    assert rule(taken).tobytes() == rule([torch.from_numpy(v) for v in taken]).numpy().tobytes()


@pytest.mark.parametrize("name", RULES)
def test_equal_weights_are_one_weight_and_ones_are_none(name):
    rule, taken = RULES[name], vectors()
    assert rule(weights=PerModel((0.3, 0.3, 0.3)))(taken).tobytes() == rule(weights=0.3)(taken).tobytes()
    assert rule(weights=PerModel((1, 1, 1)))(taken).tobytes() == rule()(taken).tobytes()


def test_one_unweighted_model_elects_itself():
    vector = vectors(coarse=False)[0]
    assert (Elect()([vector]) == vector).all()
    assert (ElectSum()([vector]) == vector).all()


def ties(taken: list[np.ndarray], densities: tuple[float, ...], weights: tuple[float, ...]) -> np.ndarray:
    trimmed = [top(v, round(d * len(v))) for v, d in zip(taken, densities, strict=True)]
    total = left_sum([np.float32(w) * v for v, w in zip(trimmed, weights, strict=True)])
    tie = -1.0 if (total > 0).sum() < (total < 0).sum() else 1.0
    return elect(trimmed, weights, mean=True, tie=tie)


@pytest.mark.parametrize("kind", ["fine", "coarse"])
@pytest.mark.parametrize("sample", [None, 1])
def test_weighted_ties_with_a_density_for_each_model_is_its_definition(kind, sample, monkeypatch):
    if sample:
        monkeypatch.setattr(selection, "SAMPLE", sample)
    base, models = model(0, kind), [model(n, kind) for n in (1, 2, 3)]
    rule = Ties(density=PerModel(DENSITIES), weights=PerModel(WEIGHTS))
    merged = flat(magmax.merge(rule, base, models, 1.0))
    wanted = ties([flat(m) - flat(base) for m in models], DENSITIES, WEIGHTS)
    assert (merged == flat(base) + wanted).all()


@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize("sample", [2048, 1])
def test_pruning_keeps_of_each_model_its_own_share(which, sample, monkeypatch):
    monkeypatch.setattr(selection, "SAMPLE", sample)
    base = model(0, "coarse")
    base = {key: torch.zeros_like(tensor) for key, tensor in base.items()}
    models = [model(n, "coarse") for n in (1, 2, 3)]
    for task, share in enumerate(DENSITIES):
        weights = PerModel(tuple(float(n == task) for n in range(3)))
        rule = chain(Prune(density=PerModel(DENSITIES), which=which), TaskArithmetic(weights=weights))
        kept = flat(magmax.merge(rule, base, models, 1.0))
        vector = flat(models[task])
        count = round(share * len(vector))
        wanted = top(vector, count) if which == "top" else vector - top(vector, len(vector) - count)
        assert (kept == wanted).all()


def test_trimming_and_electing_are_ties_but_for_the_zero_sums():
    base, models = model(0, "fine"), [model(n, "fine") for n in (1, 2, 3)]
    weights = PerModel(WEIGHTS)
    whole = magmax.merge(Ties(density=0.4, weights=weights), base, models)
    parts = magmax.merge(chain(Prune(density=0.4), Elect(weights=weights)), base, models, 0.3)
    assert (flat(whole) == flat(parts)).all()


@pytest.mark.parametrize("make", [lambda d: Dare(density=d), lambda d: Prune(density=d, which="random")])
def test_each_model_has_its_own_share_of_random_draws(make):
    shares, at = (1.0, 0.5, 0.1), Address("w", 40)
    for task, share in enumerate(shares, start=1):
        both = [part.apply(np.ones(999, np.float32), task, at, None) for part in (make(PerModel(shares)), make(share))]
        assert both[0].tobytes() == both[1].tobytes()


def weighted_by_hand(models: list[Tensors], base: Tensors) -> np.ndarray:
    return left_sum([np.float32(w) * (flat(m) - flat(base)) for m, w in zip(models, WEIGHTS, strict=True)])


def test_weights_after_a_transform_weigh_what_it_leaves():
    base, models = model(0, "fine"), [model(n, "fine") for n in (1, 2, 3)]
    rule = chain(Prune(density=1.0), TaskArithmetic(weights=PerModel(WEIGHTS)))
    assert (flat(magmax.merge(rule, base, models, 1.0)) == flat(base) + weighted_by_hand(models, base)).all()
    single = chain(Dare(density=0.5), MagMax())([flat(models[0])])
    weighted = chain(Dare(density=0.5), TaskArithmetic(weights=0.5))([flat(models[0])])
    assert (weighted == np.float32(0.5) * single).all()
