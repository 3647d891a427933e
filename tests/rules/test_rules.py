"""Each rule against its definition, on numpy and on torch, with ties, signed zeros and extreme values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests import models as reference

import magmax
from magmax import MagMaxError
from magmax.rules import Address, Average, KthMagnitude, MagMax, RandomMix, TaskArithmetic
from magmax.rules.random import random_words

RULES = [
    (MagMax(), reference.magmax),
    (Average(), reference.average),
    (TaskArithmetic(), reference.task_arithmetic),
    (KthMagnitude(k=1), reference.magmax),
    (KthMagnitude(k=2), lambda v: reference.kth_magnitude(v, 2)),
    (KthMagnitude(k=3), lambda v: reference.kth_magnitude(v, 3)),
]


def task_vectors(dtype=np.float32, least=3):
    """Stacks of task vectors in which ties of magnitude, signed zeros and subnormals are common."""
    width = 32 if dtype == np.float32 else 64
    numbers = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 2.0**-140, -(2.0**-140)]),
        st.floats(-(2.0**99), 2.0**99, width=width, allow_subnormal=True),
    )
    shapes = st.tuples(st.integers(least, 6), st.integers(1, 40))
    return shapes.flatmap(lambda shape: hnp.arrays(dtype, shape, elements=numbers)).map(list)


@pytest.mark.parametrize(("rule", "definition"), RULES, ids=lambda r: getattr(r, "name", ""))
@given(vectors=task_vectors())
@settings(max_examples=60, deadline=None)
def test_a_rule_is_its_definition_bit_for_bit(rule, definition, vectors):
    expected = definition([torch.from_numpy(v) for v in vectors]).numpy()
    assert rule(vectors).tobytes() == expected.tobytes()


@pytest.mark.parametrize("rule", [MagMax(), Average(), TaskArithmetic(), RandomMix(seed=5), KthMagnitude(k=2)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_and_torch_give_the_same_bytes(rule, dtype):
    source = np.random.default_rng(1)
    vectors = [source.integers(-3, 4, (50, 7)).astype(dtype) * dtype(0.1) for _ in range(5)]
    assert rule(vectors).tobytes() == rule([torch.from_numpy(v) for v in vectors]).numpy().tobytes()


@pytest.mark.parametrize("rule", [MagMax(), Average(), RandomMix(), KthMagnitude(k=2)], ids=str)
def test_a_rule_leaves_its_arguments_as_they_were(rule):
    vectors = [np.float32([1, -2, 3]), np.float32([-4, 1, -3]), np.float32([0, 0, 9])]
    before = [v.copy() for v in vectors]
    rule(vectors)
    assert all((now == then).all() for now, then in zip(vectors, before, strict=True))


@given(vectors=task_vectors())
def test_magmax_is_idempotent(vectors):
    merged = MagMax()(vectors)
    assert MagMax()([merged, merged]).tobytes() == merged.tobytes()
    assert (abs(MagMax()([*vectors, merged])) == abs(merged)).all()


@given(vectors=task_vectors())
def test_magmax_of_mirrored_vectors_is_mirrored(vectors):
    assert MagMax()([-v for v in vectors]).tobytes() == (-MagMax()(vectors)).tobytes()


@given(vectors=task_vectors(least=4))
def test_magmax_can_be_folded_in_parts(vectors):
    halves = [MagMax()(vectors[:2]), MagMax()(vectors[2:])]
    assert MagMax()(halves).tobytes() == MagMax()(vectors).tobytes()


@given(vectors=task_vectors())
def test_the_kth_magnitudes_are_the_vectors_in_another_order(vectors):
    ranked = np.stack([KthMagnitude(k=k)(vectors) for k in range(1, len(vectors) + 1)])
    assert (np.sort(ranked, axis=0) == np.sort(np.stack(vectors), axis=0)).all()
    assert (np.diff(abs(ranked), axis=0) <= 0).all()


@pytest.mark.parametrize("rule", [MagMax(), Average(), TaskArithmetic(), RandomMix(), KthMagnitude(k=1)], ids=str)
def test_one_task_vector_merges_into_itself(rule):
    vector = np.float32([1.5, -0.0, 3e-42, -7])
    assert rule([vector]).tobytes() == vector.tobytes()


def test_nan_is_never_lost():
    nan = np.float32([np.nan, 1])
    for order in ([nan, np.float32([5, 5])], [np.float32([np.inf, 5]), nan]):
        assert np.isnan(MagMax()(order)[0])


def test_half_precision_is_computed_in_float32_and_rounded_once():
    vectors = [torch.full((4,), v, dtype=torch.bfloat16) for v in (1.0, 2.0**-8, 2.0**-8)]
    assert (TaskArithmetic()(vectors) == torch.tensor(1 + 2.0**-7).bfloat16()).all()
    assert TaskArithmetic()(vectors).dtype == torch.bfloat16


def test_random_mix_draws_every_task_equally_often():
    tasks, count = 5, 200_000
    mixed = RandomMix()([np.full(count, t, np.float32) for t in range(tasks)])
    shares = np.bincount(mixed.astype(int), minlength=tasks) / count
    assert abs(shares - 1 / tasks).max() < 5 * np.sqrt(0.2 * 0.8 / count)


def test_random_draws_depend_on_the_place_alone():
    whole = random_words("mix", 7, 2, Address("w", 0), 1000)
    for start in (0, 1, 7, 8, 13, 500):
        assert (random_words("mix", 7, 2, Address("w", start), 100) == whole[start : start + 100]).all()
    others = [
        random_words("mix", 8, 2, Address("w", 0), 1000),
        random_words("mix", 7, 2, Address("v", 0), 1000),
        random_words("mix", 7, 3, Address("w", 0), 1000),
    ]
    assert all((other != whole).mean() > 0.99 for other in others)


@pytest.mark.parametrize("vectors", [[], [np.zeros(4), np.zeros((4, 4))]])
def test_nothing_to_merge_and_unlike_shapes_are_errors(vectors):
    with pytest.raises(MagMaxError, match=r"at least one|\(4,\), \(4, 4\)"):
        MagMax()([np.float32(v) for v in vectors])


def test_more_ranks_than_tasks_is_an_error():
    with pytest.raises(MagMaxError, match="k = 3 needs at least 3 models; 2 given"):
        KthMagnitude(k=3)([np.zeros(2, np.float32)] * 2)


def test_mixed_types_are_merged_in_the_wider_one_and_integers_refused():
    assert Average()([np.float32([1]), np.float64([2])]).dtype == np.float64
    with pytest.raises(MagMaxError, match="must be floating, not int64"):
        Average()([np.array([1]), np.array([2])])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 2)])
@pytest.mark.parametrize("kind", [*magmax.rules.RULES, *magmax.rules.TRANSFORMS], ids=lambda kind: kind.name)
def test_every_rule_and_transform_takes_empty_arrays(kind, shape):
    rule = kind(preference=(1, 1)) if kind.name == "tunable" else kind()
    if kind in magmax.rules.TRANSFORMS:
        parts = (magmax.rules.Average(), rule)
        rule = magmax.rules.chain(*(parts if isinstance(rule, magmax.rules.MergedTransform) else reversed(parts)))
    empty = np.zeros(shape, np.float32)
    assert rule([empty] * (1 if kind.name in ("slerp", "nearswap") else 2), base=empty).shape == shape
