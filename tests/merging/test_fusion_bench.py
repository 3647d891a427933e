"""FusionBench's two names behave as FusionBench documents them."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from tests import models as reference
from tests.models import reference_merge, same_bytes

import magmax


def net(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def expected(base, tasks, factor):
    return reference_merge(reference.magmax, base.state_dict(), [t.state_dict() for t in tasks], factor)


def test_magmax_merge_mutates_the_base_in_place_by_default():
    base, tasks = net(0), [net(1), net(2)]
    wanted = expected(base, tasks, 1.0)
    merged = magmax.magmax_merge(base, tasks)
    assert merged is base
    assert same_bytes(dict(base.state_dict()), wanted)


def test_magmax_merge_out_of_place_leaves_the_base_alone():
    base, tasks = net(0), [net(1), net(2)]
    before = copy.deepcopy(dict(base.state_dict()))
    merged = magmax.magmax_merge(base, tasks, scaling_factor=0.5, inplace=False)
    assert merged is not base
    assert same_bytes(dict(base.state_dict()), before)
    assert same_bytes(dict(merged.state_dict()), expected(base, tasks, 0.5))


def test_scaling_by_zero_gives_the_base():
    base = net(0)
    before = copy.deepcopy(dict(base.state_dict()))
    assert same_bytes(dict(magmax.magmax_merge(base, [net(1)], 0.0).state_dict()), before)


def test_signatures_are_theirs():
    merge = inspect.signature(magmax.magmax_merge).parameters
    required = inspect.Parameter.empty
    assert [(name, p.default) for name, p in merge.items()] == [
        ("pretrained_model", required),
        ("finetuned_models", required),
        ("scaling_factor", 1.0),
        ("inplace", True),
    ]
    algorithm = inspect.signature(magmax.MagMaxAlgorithm).parameters
    assert [(name, p.default) for name, p in algorithm.items()] == [("scaling_factor", 0.5), ("inplace", True)]


def test_an_empty_list_is_a_value_error():
    with pytest.raises(ValueError, match="at least one fine-tuned model"):
        magmax.magmax_merge(net(0), [])


@pytest.mark.parametrize("inplace", [True, False])
def test_the_algorithm_merges_a_dict_pool(inplace):
    pool = {"_pretrained_": net(0), "cars": net(1), "mnist": net(2), "_merged_": net(9)}
    wanted = expected(pool["_pretrained_"], [pool["cars"], pool["mnist"]], 0.5)
    merged = magmax.MagMaxAlgorithm(inplace=inplace).run(pool)
    assert same_bytes(dict(merged.state_dict()), wanted)
    assert (merged is pool["_pretrained_"]) is inplace


def test_the_algorithm_merges_anything_with_load_model_and_model_names():
    class Pool:
        model_names = ("a", "b")

        def load_model(self, name):
            return net({"_pretrained_": 0, "a": 1, "b": 2}[name])

    merged = magmax.MagMaxAlgorithm(scaling_factor=0.3).run(Pool())
    assert same_bytes(dict(merged.state_dict()), expected(net(0), [net(1), net(2)], 0.3))


def test_a_pool_without_a_base_is_a_key_error():
    with pytest.raises(KeyError, match="_pretrained_"):
        magmax.MagMaxAlgorithm().run([net(0), net(1)])


def test_nothing_broadcasts():
    base, task = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 1, bias=False)
    with pytest.raises(ValueError, match=r"weight has shape \[1, 4\], but \[4, 4\]"):
        magmax.magmax_merge(base, [task])
