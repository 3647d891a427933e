"""Encoders that compute in bfloat16: what they give, and that they see the weights of this moment."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from tests.continual import toys  # noqa: E402
from torch import Tensor  # noqa: E402

from magmax.continual.context import build_context  # noqa: E402
from magmax.continual.experiment import Experiment, digest_of  # noqa: E402
from magmax.continual.models.text_encoder import Bfloat16Encoder  # noqa: E402


def features(encoder: Bfloat16Encoder | toys.ToyEncoder) -> Tensor:
    return encoder(toys.blobs(4).test.items)


def test_features_are_float32_and_about_those_of_float32() -> None:
    exact = features(toys.encoder())
    found = features(Bfloat16Encoder(toys.encoder()))
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)


def test_weights_and_their_gradients_stay_float32() -> None:
    encoder = Bfloat16Encoder(toys.encoder())
    features(encoder)[:, 0].sum().backward()
    weight = next(encoder.model.parameters())
    assert weight.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_a_changed_weight_counts_at_once_inside_an_autocast_of_the_caller() -> None:
    encoder = Bfloat16Encoder(toys.encoder())
    with torch.autocast("cpu", torch.bfloat16):
        before = features(encoder)
        with torch.no_grad():
            next(encoder.model.parameters()).mul_(-1)
        assert not torch.equal(features(encoder), before)


def test_a_copy_has_weights_of_its_own() -> None:
    encoder = Bfloat16Encoder(toys.encoder())
    old, before = copy.deepcopy(encoder), features(encoder)
    with torch.no_grad():
        next(encoder.model.parameters()).zero_()
    assert torch.equal(features(old), before)


def test_a_recipe_chooses_it_and_its_records_are_others() -> None:
    plain, half = (Experiment.model_validate({**toys.RECIPE, **told}) for told in ({}, {"precision": "bfloat16"}))
    assert isinstance(build_context(half, 0).encoder, Bfloat16Encoder)
    assert not isinstance(build_context(plain, 0).encoder, Bfloat16Encoder)
    assert torch.equal(build_context(half, 0).head, build_context(plain, 0).head)
    told = [experiment.training_recipe(0, "sequential") for experiment in (plain, half)]
    assert digest_of(told[0]) != digest_of(told[1])
    assert "precision" not in told[0]
