"""Models that do not fit their base: all that is wrong in one error, with both shapes and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.robustness.files import Tensors, small_model, write_safetensors

import magmax

Refusal = Callable[..., str]


def changed(**tensors: object) -> Tensors:
    """A model with some tensors replaced; None leaves one out."""
    return {key: value for key, value in (small_model(1) | tensors).items() if value is not None}


def test_a_missing_tensor_is_named_with_its_shape_and_both_files(merge_refused: Refusal, base: Path) -> None:
    tuned = write_safetensors(base.with_name("tuned.safetensors"), changed(bias=None))
    words = merge_refused(tuned)
    assert f"{tuned}: has no tensor bias, which is F32 [9] in {base}" in words
    assert "--mismatch base" in words


def test_an_extra_tensor_is_named_with_its_shape_and_both_files(merge_refused: Refusal, base: Path) -> None:
    tuned = write_safetensors(base.with_name("tuned.safetensors"), changed(head=np.zeros((2, 5), np.float32)))
    assert f"{tuned}: has a tensor head, F32 [2, 5], that {base} has not" in merge_refused(tuned)


def test_another_shape_is_named_with_both_shapes(merge_refused: Refusal, base: Path) -> None:
    tuned = write_safetensors(base.with_name("tuned.safetensors"), changed(weight=np.zeros((8, 20), np.float32)))
    assert f"{tuned}: weight has shape [8, 20], but [20, 8] in {base}" in merge_refused(tuned)


@pytest.mark.parametrize(
    ("key", "tensor", "said"),
    [
        ("weight", np.zeros((20, 8), np.int64), "weight is I64, but F32"),
        ("position_ids", np.zeros(3, np.float32), "position_ids is F32, but I64"),
        ("bias", np.zeros(9, np.float64), "bias is F64, wider than F32"),
        ("bias", np.zeros(9, np.bool_), "bias is BOOL, but F32"),
    ],
)
def test_another_family_of_types_is_named_with_both_types(
    key: str, tensor: object, said: str, merge_refused: Refusal, base: Path
) -> None:
    tuned = write_safetensors(base.with_name("tuned.safetensors"), changed(**{key: tensor}))
    words = merge_refused(tuned)
    assert f"{tuned}: {said}" in words
    assert str(base) in words


def test_every_mismatch_of_every_model_is_in_one_error(merge_refused: Refusal, base: Path) -> None:
    one = write_safetensors(base.with_name("one.safetensors"), changed(bias=None, head=np.ones(4, np.float32)))
    two = write_safetensors(
        base.with_name("two.safetensors"), changed(weight=np.ones((20, 1), np.float32), bias=np.ones(9, np.int64))
    )
    words = merge_refused(one, two)
    for said in (f"{one}: has no tensor bias", f"{one}: has a tensor head", f"{two}: weight", f"{two}: bias is I64"):
        assert said in words


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 1), (1,), (), (1, 4, 4), (16,)])
def test_nothing_broadcasts(shape: tuple[int, ...], tmp_path: Path, merge_refused: Refusal) -> None:
    square = write_safetensors(tmp_path / "square.safetensors", {"w": np.zeros((4, 4), np.float32)})
    other = write_safetensors(tmp_path / "other.safetensors", {"w": np.ones(shape, np.float32)})
    said = f"w has shape {list(shape)}, but [4, 4] in {square}"
    assert said in merge_refused(other, into=square)
    with pytest.raises(magmax.MagMaxError, match=r"shape"):
        magmax.merge("magmax", {"w": np.zeros((4, 4), np.float32)}, [{"w": np.ones(shape, np.float32)}])


@pytest.mark.parametrize(("value", "said"), [(np.nan, "1 NaN and 0 infinite"), (-np.inf, "0 NaN and 1 infinite")])
@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("key", ["weight", "bias", "scale"])
def test_nan_and_infinity_are_counted_and_named(
    key: str, which: str, value: float, said: str, base: Path, tuned: Path, merge_refused: Refusal
) -> None:
    bad = small_model(0 if which == "base" else 1)
    bad[key].reshape(-1)[-1] = value
    path = write_safetensors(base if which == "base" else tuned, bad)
    assert f"{path}: {key} holds {said} of {bad[key].size} elements" in merge_refused(tuned)
    assert "--allow-nonfinite" in merge_refused(tuned)


def test_a_bad_value_among_what_is_not_merged_is_nobodys_business(base: Path, tuned: Path, tmp_path: Path) -> None:
    write_safetensors(tuned, changed(position_ids=np.array([-1, -1, -1])))
    magmax.merge("magmax", base, [tuned], out=tmp_path / "out.safetensors")


def test_one_model_given_twice_is_refused(base: Path, tuned: Path, tmp_path: Path, merge_refused: Refusal) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(tuned)
    for again in (tuned, link, tuned.parent / "." / tuned.name):
        assert "is the same file as" in merge_refused(tuned, again)
    assert "is the same file as" in merge_refused(base)


def test_two_files_with_the_same_tensors_are_refused(tuned: Path, tmp_path: Path, merge_refused: Refusal) -> None:
    copy = write_safetensors(
        tmp_path / "copy.safetensors", small_model(1), {"note": "other bytes, but the same tensors"}
    )
    words = merge_refused(tuned, copy)
    assert str(tuned) in words
    assert str(copy) in words
    assert "same tensors" in words


def test_no_model_at_all_is_refused(merge_refused: Refusal) -> None:
    assert "at least one model" in merge_refused()


def test_a_k_beyond_the_number_of_models_is_refused(base: Path, tuned: Path, refused: Refusal, tmp_path: Path) -> None:
    from magmax.rules import KthMagnitude

    words = refused(magmax.merge, KthMagnitude(k=2), base, [tuned], out=tmp_path / "out.safetensors")
    assert "2" in words
    assert "1" in words


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_a_scaling_factor_must_be_finite(
    factor: float, base: Path, tuned: Path, refused: Refusal, tmp_path: Path
) -> None:
    assert "finite" in refused(magmax.merge, "magmax", base, [tuned], factor, out=tmp_path / "out.safetensors")


@pytest.mark.parametrize("key", [0, None, ("a", "b"), b"weight"])
def test_a_tensors_name_must_be_a_string(key: object) -> None:
    with pytest.raises(magmax.MagMaxError, match="not a string"):
        magmax.merge("magmax", {key: np.ones(3, np.float32)}, [{key: np.zeros(3, np.float32)}])
