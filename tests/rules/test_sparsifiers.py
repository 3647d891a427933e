"""Breadcrumbs, DELLA and SCE against their definitions, a sort and a loop over the elements of each tensor."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from tests.models import Tensors, load_tensors, same_bytes, save_tensors
from tests.rules.test_planned import flat, model, top

import magmax
from magmax import MagMaxError
from magmax.checkpoints import blocks
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.rules import (
    Breadcrumbs,
    Della,
    Elect,
    Layers,
    MagMax,
    PerModel,
    Sce,
    TaskArithmetic,
    Ties,
    chain,
    rule_from,
)
from magmax.rules.random import random_words
from magmax.rules.statistics import Address, Block, Scope, run_locally

NUMBERS = [(0.5, 0.1), (0.9, 0.01), (0.7, 0.6), (0.0, 0.2), (1.0, 0.2), (0.4, 0.0)]


def alone(transform, base: Tensors, tensors: Tensors) -> np.ndarray:
    """What a transform leaves of a model's task vector."""
    zero = {key: torch.zeros_like(tensor) for key, tensor in base.items()}
    moved = {key: tensor - base[key] for key, tensor in tensors.items()}
    return flat(magmax.merge(chain(transform, MagMax()), zero, [moved], 1.0))


def crumbs(vector: np.ndarray, density: float, gamma: float) -> np.ndarray:
    keep, outliers = round(density * len(vector)), round(gamma * len(vector))
    outliers = min(outliers, len(vector) - keep)
    return top(vector, outliers + keep) - top(vector, outliers)


@pytest.mark.parametrize("kind", ["fine", "coarse"])
@pytest.mark.parametrize("span", ["tensor", "model"])
@pytest.mark.parametrize(("density", "gamma"), NUMBERS)
def test_breadcrumbs_drops_both_ends(kind, span, density, gamma):
    base, tensors = model(0, kind), model(1, kind)
    left = alone(Breadcrumbs(density=density, gamma=gamma, span=span), base, tensors)
    parts = [flat({key: tensors[key] - base[key]}) for key in sorted(base)]
    if span == "model":
        parts = [np.concatenate(parts)]
    wanted = np.concatenate([crumbs(part, density, gamma) for part in parts])
    assert (left == wanted).all()


def test_breadcrumbs_has_numbers_for_each_model():
    vectors = [np.random.default_rng(n).normal(size=200).astype(np.float32) for n in range(2)]
    rule = chain(Breadcrumbs(density=PerModel((0.2, 0.9)), gamma=PerModel((0.3, 0))), TaskArithmetic())
    assert (rule(vectors) == crumbs(vectors[0], 0.2, 0.3) + crumbs(vectors[1], 0.9, 0)).all()


def magprune(values: np.ndarray, key: str, density: float, epsilon: float, ranks: np.ndarray, seed: int) -> np.ndarray:
    """One element at a time, with the numbers drawn for task 1."""
    drawn = random_words("della", seed, 1, Address(key, 0), values.size)
    left = np.zeros_like(values.reshape(-1))
    for n, (value, rank) in enumerate(zip(values.reshape(-1), ranks.reshape(-1), strict=True)):
        keep = density - epsilon + 2 * epsilon * rank
        if int(drawn[n]) < round(keep * 2**32):
            left[n] = value / values.dtype.type(keep)
    return left


def row_ranks(values: np.ndarray) -> np.ndarray:
    rows = values.reshape(1, -1) if values.ndim < 2 else values.reshape(len(values), -1)
    ranks = np.zeros(rows.shape)
    for row, out in zip(rows, ranks, strict=True):
        order = sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))
        for place, i in enumerate(order):
            out[i] = (len(row) - 1 - place) / (len(row) - 1) if len(row) > 1 else 0.5
    return ranks


def coarse_ranks(values: np.ndarray) -> np.ndarray:
    """The mean rank of the entries whose magnitudes, cut to their first bits, are equal."""
    flat = abs(values.reshape(-1))
    first = flat.view(np.int32) >> 15 if flat.dtype == np.float32 else flat.view(np.int64) >> 47
    below = np.array([(first < one).sum() for one in first])
    equal = np.array([(first == one).sum() for one in first])
    return (below + (equal - 1) / 2) / (len(flat) - 1) if len(flat) > 1 else np.full(1, 0.5)


SHAPES = [(40, 30), (5, 6, 3, 2), (500,), (), (1, 9), (9, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("span", "ranks"), [("row", row_ranks), ("tensor", coarse_ranks), ("model", coarse_ranks)])
def test_della_is_its_definition_on_numpy_and_torch(shape, dtype, span, ranks):
    values = np.asarray(np.random.default_rng(3).normal(size=shape), dtype)
    values[abs(values) < 0.2] = 0
    rule = chain(Della(density=0.6, epsilon=0.3, span=span, seed=5), MagMax())
    wanted = magprune(values, "w", 0.6, 0.3, ranks(values), 5)
    assert (rule([values], key="w").reshape(-1) == wanted).all()
    in_file = magmax.merge(rule, {"w": torch.zeros(shape, dtype=torch.tensor(values).dtype)}, [{"w": values}], 1.0)["w"]
    assert (in_file.numpy().reshape(-1) == wanted).all()
    assert rule([values], key="w").tobytes() == rule([torch.from_numpy(values)], key="w").numpy().tobytes()


def test_della_ranks_over_the_whole_model():
    base, tensors = model(0, "fine"), model(1, "fine")
    left = alone(Della(density=0.5, epsilon=0.4, span="model"), base, tensors)
    moved = {key: (tensors[key] - base[key]).numpy() for key in sorted(base)}
    ranks = np.split(coarse_ranks(flat(tensors) - flat(base)), np.cumsum([v.size for v in moved.values()])[:-1])
    parts = [magprune(v, key, 0.5, 0.4, r, 0) for (key, v), r in zip(moved.items(), ranks, strict=True)]
    assert (left == np.concatenate(parts)).all()


@pytest.mark.parametrize("span", ["row", "tensor"])
def test_della_keeps_the_share_the_mean_and_more_of_the_large(span):
    values = np.random.default_rng(0).normal(size=(50, 4000)).astype(np.float32)
    left = chain(Della(density=0.3, epsilon=0.2, span=span), MagMax())([values])
    kept = left != 0
    assert abs(kept.mean() - 0.3) < 5 * np.sqrt(0.25 / values.size)
    assert abs(left.mean() - values.mean()) < 5 * abs(values).mean() / 0.1 / np.sqrt(values.size)
    large = abs(values) > np.median(abs(values))
    assert abs(kept[large].mean() - 0.4) < 0.01
    assert abs(kept[~large].mean() - 0.2) < 0.01


def test_della_without_a_window_is_random_pruning_and_at_one_keeps_all():
    values = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    assert (chain(Della(density=1, epsilon=0), MagMax())([values]) == values).all()
    assert (chain(Della(density=0, epsilon=0), MagMax())([values]) == 0).all()
    left = chain(Della(density=0.5, epsilon=0, span="row"), MagMax())([values])
    assert set(np.unique(left)) <= {0, *np.unique(values / np.float32(0.5))}


def test_rows_longer_than_a_block_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)
    base, tensors = {"w": torch.zeros(2, 100)}, {"w": torch.ones(2, 100)}
    with pytest.raises(MagMaxError, match=r"w: its rows of 100 elements are too long.*span: tensor"):
        magmax.merge(chain(Della(), MagMax()), base, [tensors])
    magmax.merge(chain(Della(span="tensor"), MagMax()), base, [tensors])


def sce(vectors: list[np.ndarray], density: float) -> np.ndarray:
    """The whole definition for one tensor, the sums of squares as fractions."""
    dtype, count = vectors[0].dtype.type, len(vectors)
    first = vectors[0].astype(float)
    apart = [v.astype(float) - first for v in vectors]
    mean = sum(apart[1:], apart[0] + 0) / count
    spread = sum([(a - mean) ** 2 for a in apart[1:]], (apart[0] - mean) ** 2 + 0)
    chosen = np.ones(len(first), bool)
    if density < 1:
        chosen = top(spread, round(density * np.count_nonzero(spread))) != 0
    taken = [np.where(chosen, v, dtype(0)) for v in vectors]
    sums = [sum((Fraction(float(x) * float(x)) for x in v), Fraction(0)) for v in taken]
    total = sum(sums)
    weights = [float(s / total) if total else 1 / count for s in sums]
    merged = np.zeros_like(taken[0])
    for n in range(len(merged)):
        column = [v[n] for v in taken]
        sign = np.sign(sum(column[1:], column[0])) or 1
        value, share = dtype(0), dtype(0)
        for x, w in zip(column, weights, strict=True):
            if np.sign(x) == sign:
                value, share = dtype(value + x * dtype(w)), dtype(share + dtype(w))
        merged[n] = value / (share or dtype(1))
    return merged


@pytest.mark.parametrize("kind", ["fine", "coarse"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_sce_is_its_definition_tensor_by_tensor(kind, density, count):
    base, models = model(0, kind), [model(n, kind) for n in range(1, count + 1)]
    merged = flat(magmax.merge(Sce(density=density), base, models, 1.0))
    parts = [
        sce([flat({key: m[key] - base[key]}) for m in models], density) for key in sorted(base) if base[key].numel()
    ]
    assert (merged == flat(base) + np.concatenate(parts)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e15])
def test_sce_is_its_definition_for_any_size_and_type(dtype, size):
    vectors = [(np.random.default_rng(n).normal(size=150) * size).astype(dtype) for n in range(3)]
    vectors[1][:60] = vectors[2][:60] = vectors[0][:60]
    for density in (0.5, 1.0):
        rule = Sce(density=density)
        assert (rule(vectors) == sce(vectors, density)).all()
        assert rule(vectors).tobytes() == rule([torch.from_numpy(v) for v in vectors]).numpy().tobytes()


SCHEDULED = [
    chain(Breadcrumbs(density=0.4, gamma=0.1), Elect(weights=PerModel((1, 2, 3)))),
    chain(Breadcrumbs(density=0.4, gamma=0.1, span="model"), Ties()),
    chain(Della(span="tensor"), Elect()),
    chain(Della(span="model"), Ties()),
    Sce(density=0.3),
    Ties(density=Layers((0.1, 0.9)), weights=0.5, span="tensor"),
]


@pytest.mark.parametrize("rule", SCHEDULED, ids=str)
def test_slabs_and_threads_change_no_byte(rule, tmp_path, monkeypatch):
    paths = [save_tensors(model(n, "coarse"), tmp_path / f"{n}.safetensors") for n in range(4)]
    usual = magmax.merge(rule, paths[0], paths[1:], out=tmp_path / "usual.safetensors")
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64)
    out = magmax.merge(
        rule, paths[0], paths[1:], out=tmp_path / "other.safetensors", execution=ExecutionOptions(threads=3)
    )
    assert same_bytes(load_tensors(out), load_tensors(usual))
    assert rule_from(rule.describe()) == rule


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Della(density=0.9, epsilon=0.2), r"density -\+ epsilon from 0 to 1, not 0.9 -\+ 0.2"),
        (lambda: Della(density=PerModel((0.5, 0.1))), r"not 0.1 -\+ 0.15"),
        (lambda: Della(span="rows"), "row, tensor or model"),
        (lambda: Breadcrumbs(span="row"), "model or tensor"),
        (lambda: Breadcrumbs(gamma=2), "gamma from 0 to 1"),
        (lambda: Sce(density=-1), "density from 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_an_error(make, words):
    with pytest.raises(MagMaxError, match=words):
        make()


def test_a_number_that_makes_no_sense_in_one_layer_is_refused_before_any_work():
    rule = chain(Della(density=Layers((0.5, 0.95))), MagMax())
    base = {f"layers.{n}.w": torch.zeros(3, 3) for n in range(3)}
    with pytest.raises(MagMaxError, match=r"layers.2.w: della needs .* not 0.95 -\+ 0.15"):
        magmax.merge(rule, base, [base])


def test_della_over_tensors_remembers_only_the_magnitudes_that_a_tensor_has():
    draw = np.random.default_rng(0)
    vectors = [draw.normal(size=5000).astype(dtype) for dtype in ("f4", "f4")]
    vectors[0][::7] = 0
    block = Block(Address("w", 0), vectors)
    for wide in (False, True):
        answer = run_locally(Della(span="tensor").statistics(Scope(2, 5000, wide)), block)
        assert sum(array.nbytes for pair in answer.tables for array in pair) < 60_000
        for task, vector in enumerate(vectors, start=1):
            codes = np.abs(vector).astype("f8" if wide else "f4").view("i8" if wide else "i4") >> (47 if wide else 15)
            wanted = [((codes < code).sum() + ((codes == code).sum() - 1) / 2) / 4999 for code in codes]
            assert (answer.of(vector, task, block.address) == wanted).all()
