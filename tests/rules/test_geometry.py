"""Rules of angles and distances against their definitions in float64, in memory, on files and in any cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tests.models import load_tensors, same_bytes, save_tensors

import magmax
from magmax import MagMaxError
from magmax.checkpoints import blocks
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.rules import Address, Consensus, Dare, Karcher, ModelStock, NearSwap, Slerp, chain, make_rule
from magmax.rules.statistics import Scope

TOLERANCE = {np.float32: 1e-6, np.float64: 1e-11}
"""Of the largest value: a few roundings of the type that is merged in."""

SHAPES = {"conv": (8, 4, 3, 3), "one": (1,), "rows": (130, 24), "scale": (), "vector": (500,)}


def slerp(base, models, t):
    (model,) = models
    norms = np.linalg.norm(base) * np.linalg.norm(model)
    cosine = (base * model).sum() / norms if norms else 1
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * model
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * model) / np.sin(angle)


def karcher(base, models):
    """Steps along the sphere, on the vectors themselves, until they no longer move."""
    norms = [np.linalg.norm(model) for model in models]
    units = [model / norm for model, norm in zip(models, norms, strict=True) if norm]
    if not units:
        return np.zeros_like(base)
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(60):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = np.clip((mean * unit).sum(), -1, 1)
            away = unit - cosine * mean
            if np.linalg.norm(away) > 1e-12:
                tangent += np.arccos(cosine) * away / np.linalg.norm(away) / len(units)
        size = np.linalg.norm(tangent)
        if size > 1e-13:
            mean = np.cos(size) * mean + np.sin(size) * tangent / size
    return np.mean(norms) * mean


def model_stock(base, models):
    vectors = [model - base for model in models]
    cosines = [
        (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 0
        for a, b in itertools.combinations(vectors, 2)
    ]
    mean, tasks = np.mean(cosines), len(models)
    denominator = 1 + (tasks - 1) * mean
    ratio = 0 if abs(denominator) < 1e-6 else tasks * mean / denominator
    return ratio * sum(models) / tasks + (1 - ratio) * base


def nearswap(base, models, t):
    (model,) = models
    distance = abs(model - base)
    weight = np.clip(t / np.where(distance == 0, 1, distance), 0, 1)
    return weight * model + (1 - weight) * base


def consensus(base, models, threshold, tasks):
    vectors = [model - base for model in models]
    total = sum(vectors)
    votes = sum((abs(v) >= threshold * abs(total - v)).astype(int) for v in vectors)
    return base + np.where(votes >= tasks, total, 0)


CASES = [
    pytest.param(Slerp(t=0.3), 1, lambda b, m: slerp(b, m, 0.3), id="slerp"),
    pytest.param(Slerp(t=1), 1, lambda b, m: m[0], id="slerp-1"),
    pytest.param(Karcher(max_iter=60, tol=1e-12), 3, karcher, id="karcher"),
    pytest.param(ModelStock(), 3, model_stock, id="model_stock"),
    pytest.param(ModelStock(), 2, model_stock, id="model_stock-2"),
    pytest.param(NearSwap(t=0.04), 1, lambda b, m: nearswap(b, m, 0.04), id="nearswap"),
    pytest.param(Consensus(), 3, lambda b, m: consensus(b, m, 0.4, 2), id="consensus"),
    pytest.param(Consensus(threshold=0.9, tasks=1), 4, lambda b, m: consensus(b, m, 0.9, 1), id="consensus-1"),
]
GRAM = [("slerp", 1), ("karcher", 3), ("model_stock", 3)]


def model(seed, far=True, dtype=np.float32):
    """Models far apart in every direction, or near the one of seed 0, as fine-tuned ones are."""
    draws, start = np.random.default_rng(seed), np.random.default_rng(0)
    drawn = {key: draws.normal(size=shape) for key, shape in SHAPES.items()}
    if not far and seed:
        drawn = {key: start.normal(size=SHAPES[key]) + 0.03 * moved for key, moved in drawn.items()}
    return {key: np.asarray(values, dtype) for key, values in drawn.items()}


def close(ours, wanted, dtype=np.float32):
    size = max(abs(wanted).max(), 1e-30)
    return ours.shape == wanted.shape and abs(np.float64(ours) - wanted).max() <= TOLERANCE[dtype] * size


def torch_files(tmp_path, count, far=True):
    tensors = [{key: torch.from_numpy(np.array(v)) for key, v in model(n, far).items()} for n in range(count + 1)]
    base, *tasks = [save_tensors(t, tmp_path / f"{n}.safetensors") for n, t in enumerate(tensors)]
    return base, tasks


@pytest.mark.parametrize(("rule", "count", "definition"), CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("far", [True, False], ids=["far", "near"])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_a_rule_is_its_definition(rule, count, definition, dtype, far, library):
    base, *models = [model(n, far, dtype) for n in range(count + 1)]
    for key, start in base.items():
        wanted = definition(np.float64(start), [np.float64(m[key]) for m in models])
        vectors = [library(np.array(m[key] - start)) for m in models]
        merged = np.asarray(rule(vectors, base=library(start.copy())))
        assert merged.dtype == dtype
        assert close(start + merged, wanted, dtype), key


@pytest.mark.parametrize(("rule", "count", "definition"), CASES)
@pytest.mark.parametrize("slab", [64, 1 << 18])
def test_files_cut_into_slabs_merge_to_the_definition(rule, count, definition, slab, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", slab)
    base, tasks = torch_files(tmp_path, count)
    merged = load_tensors(magmax.merge(rule, base, tasks, 1.0, out=tmp_path / "out.safetensors"))
    start, *models = [model(n) for n in range(count + 1)]
    for key, values in start.items():
        wanted = definition(np.float64(values), [np.float64(m[key]) for m in models])
        assert close(merged[key].numpy(), wanted), key
    assert same_bytes(magmax.merge(rule, load_tensors(base), [load_tensors(t) for t in tasks], 1.0), merged)


@pytest.mark.parametrize(("name", "count"), GRAM)
@pytest.mark.parametrize("span", ["tensor", "model"])
def test_threads_change_no_byte(name, count, span, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)
    base, tasks = torch_files(tmp_path, count)
    rule = make_rule(name, {"span": span})
    outs = [
        magmax.merge(rule, base, tasks, out=tmp_path / f"out{n}.safetensors", execution=ExecutionOptions(threads=n))
        for n in (1, 4)
    ]
    assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.parametrize("name", ["karcher", "model_stock"])
def test_sums_are_added_in_the_order_of_addresses_in_whatever_order_they_come(name):
    draws = np.random.default_rng(0)
    places = [Address(key, at) for key in "ab" for at in range(0, 4000, 100)]
    parts = [(at, np.outer(v, v)) for at, v in zip(places, draws.normal(size=(len(places), 3)), strict=True)]
    answers = set()
    for _ in range(20):
        draws.shuffle(parts)
        plan = make_rule(name).statistics(Scope(2, 80, True))
        next(plan)
        with pytest.raises(StopIteration) as end:
            plan.send(dict(parts))
        answers.add(tuple(end.value.value))
    assert len(answers) == 1


@pytest.mark.parametrize(("rule", "count", "definition"), [c for c in CASES if c.id in ("slerp", "model_stock")])
def test_over_the_model_all_tensors_are_one_vector(rule, count, definition):
    base, *models = [model(n) for n in range(count + 1)]
    spanning = make_rule(rule.name, {**rule.describe()[rule.name], "span": "model"})
    merged = magmax.merge(spanning, base, models, 1.0)

    def flat(tensors):
        return np.concatenate([np.float64(tensors[key]).reshape(-1) for key in SHAPES])

    assert close(flat(merged), definition(flat(base), [flat(m) for m in models]))


def test_equal_models_are_their_own_mean_and_opposite_ones_are_the_bases():
    base, tuned = model(0), model(1)
    for rule in (Karcher(), ModelStock(), Slerp(t=1)):
        merged = magmax.merge(rule, base, [tuned] * (1 if rule.name == "slerp" else 2), 1.0)
        assert all(close(merged[key], np.float64(tuned[key])) for key in SHAPES), rule.name
    vector = np.float32([3, -1, 2])
    assert (ModelStock()([vector, -vector]) == 0).all()
    for noise in (0, 1e-6):
        opposite = Karcher()([np.float64(vector), noise - vector], base=np.zeros(3))
        assert np.allclose(opposite, vector, atol=1e-5)


@pytest.mark.parametrize(("rule", "count", "definition"), CASES)
def test_task_vectors_of_zeros_leave_the_base_as_it_is(rule, count, definition):
    base = model(0)
    merged = magmax.merge(rule, base, [base] * count, 1.0)
    assert all(close(merged[key], np.float64(base[key])) for key in SHAPES)
    nothing = {key: np.zeros_like(values) for key, values in base.items()}
    merged = magmax.merge(rule, nothing, [nothing] * count, 1.0)
    assert all((merged[key] == 0).all() for key in SHAPES)


def test_a_zero_tensor_has_no_direction():
    vector = np.float32([1, 2])
    assert close(Slerp(t=0.25)([vector], base=np.zeros(2, np.float32)), np.sin(np.pi / 8) * np.float64(vector))
    assert close(Slerp(t=0.25)([-vector], base=vector), (np.sin(3 * np.pi / 8) - 1) * np.float64(vector))
    mean = Karcher()([vector, np.zeros(2, np.float32)], base=np.zeros(2, np.float32))
    assert close(mean, np.float64(vector) / 2)
    assert (ModelStock()([vector, np.zeros(2, np.float32)]) == 0).all()
    assert Slerp()([np.zeros((0, 3), np.float32)], base=np.zeros((0, 3), np.float32)).shape == (0, 3)


@pytest.mark.parametrize("rule", [Slerp(), Karcher(), ModelStock()], ids=lambda rule: rule.name)
def test_a_chain_merges_what_its_transform_leaves(rule, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)
    count = 1 if rule.name == "slerp" else 3
    base, *models = [model(n) for n in range(count + 1)]
    dare = Dare(density=0.5)
    merged = magmax.merge(chain(dare, rule), base, models, 1.0)
    for key, start in base.items():
        vectors = [(m[key] - start).reshape(-1) for m in models]
        dropped = [dare.apply(v, t, Address(key, 0), None).reshape(start.shape) for t, v in enumerate(vectors, start=1)]
        assert close(merged[key], np.float64(start) + rule(dropped, base=start)), key
    if rule.needs_base:
        with pytest.raises(MagMaxError, match="give base=theta_0"):
            chain(dare, rule)([np.ones(3, np.float32)] * count)


def test_the_base_is_left_as_it_was():
    for rule, count in ((Slerp(), 1), (Karcher(), 2)):
        base, vectors = np.float32([1, 2]), [np.float32([-2, 1]) + n for n in range(count)]
        rule(vectors, base=base)
        assert (base == [1, 2]).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Slerp()([np.zeros(2, np.float32)]), "slerp combines whole weights.*base=theta_0"),
        (lambda: Karcher()([np.zeros(2, np.float32)]), "karcher combines whole weights"),
        (lambda: Slerp()([np.zeros(2, np.float32)], base=np.zeros(3, np.float32)), r"\(2,\), \(3,\)"),
        (lambda: Slerp().check(3), "slerp merges exactly one model with the base; 3 given"),
        (lambda: NearSwap().check(0), "nearswap merges exactly one model with the base; none given"),
        (lambda: ModelStock().check(1), "model_stock needs at least 2 models.*1 given"),
        (lambda: Consensus(tasks=3).check(2), "consensus with tasks = 3 needs at least 3 models; 2 given"),
        (lambda: Slerp(t=1.5), "t from 0"),
        (lambda: NearSwap(t=-1.0), "t of at least 0"),
        (lambda: NearSwap(t=float("nan")), "t of at least 0"),
        (lambda: Consensus(threshold=-0.1), "at least 0"),
        (lambda: Karcher(tol=0.0), "tol between 0 and 1"),
        (lambda: Karcher(max_iter=-1), "max_iter of at least 0"),
        (lambda: make_rule("model_stock", {"span": "layer"}), "one of model, tensor"),
    ],
)
def test_what_makes_no_sense_is_an_error(make, words):
    with pytest.raises(MagMaxError, match=words):
        make()


@pytest.mark.parametrize(("name", "count"), GRAM)
def test_an_angle_with_nan_is_an_error_that_names_the_tensor(name, count):
    base, *models = [model(n) for n in range(count + 1)]
    models[0]["rows"][7, 5] = np.nan
    with pytest.raises(MagMaxError, match=rf"rows: {name} measures angles"):
        magmax.merge(name, base, models, allow_nonfinite=True)


@pytest.mark.parametrize("name", ["slerp", "karcher", "model_stock", "nearswap", "consensus", "iso_c"])
def test_none_of_them_runs_over_tasks(name, tmp_path):
    with pytest.raises(MagMaxError, match=rf"{name} looks at all models at once"):
        magmax.Running(tmp_path / "state", name, model(0))
    with pytest.raises(MagMaxError, match="looks at all models at once"):
        magmax.Running(tmp_path / "state", chain(Dare(), make_rule(name)), model(0))
