"""Merging with torch on a device gives the processor's bytes; a GPU's own tests are skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.models import load_tensors, same_bytes, save_tensors, small_model
from torch._subclasses import FakeTensorMode

import magmax
from magmax import MagMaxError
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.rules import (
    Average,
    Della,
    MagMax,
    MergedTransform,
    Rule,
    TaskVectorTransform,
    Tunable,
    all_components,
    chain,
)
from magmax.rules.statistics import Address, Block, Scope, run_locally

TASKS = {"nearswap": 1, "slerp": 1}
"""How many models a rule takes, where it does not take any number; three otherwise."""
HERE = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


def examples() -> dict[str, Rule]:
    """Every rule, and every transform in a chain."""
    found: dict[str, Rule] = {}
    for name, kind in all_components().items():
        if issubclass(kind, Rule):
            found[name] = kind(preference=(1, 2, 1)) if kind is Tunable else kind()
        elif issubclass(kind, TaskVectorTransform):
            found[name] = chain(kind(span="tensor") if kind is Della else kind(), MagMax())
        elif issubclass(kind, MergedTransform):
            found[name] = chain(Average(), kind())
    return found


ELEMENTWISE = {name: rule for name, rule in examples().items() if not rule.whole_tensor}


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_rule_that_is_not_of_whole_matrices_gives_the_same_bytes(name, device, dtype, tmp_path) -> None:
    rule = ELEMENTWISE[name]
    base, *models = (
        save_tensors(small_model(n, dtype), tmp_path / f"{n}.safetensors") for n in range(1 + TASKS.get(name, 3))
    )
    usual = magmax.merge(rule, base, models, out=tmp_path / "usual.safetensors")
    there = magmax.merge(
        rule, base, models, out=tmp_path / "there.safetensors", execution=ExecutionOptions(device=device)
    )
    assert same_bytes(load_tensors(there), load_tensors(usual))


@pytest.mark.parametrize("device", HERE)
def test_the_rule_sees_tensors_on_the_device(device, monkeypatch) -> None:
    seen: list[str] = []

    def step(self: MagMax, state: tuple, vector: torch.Tensor, task: int, at: Address) -> tuple:
        seen.append(vector.device.type)
        return (vector,)

    monkeypatch.setattr(MagMax, "step", step)
    base, *models = (small_model(n) for n in range(3))
    magmax.merge("magmax", base, models, execution=ExecutionOptions(device=device))
    assert set(seen) == {torch.device(device).type}


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize(("wide", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("name", [name for name, rule in examples().items() if rule.whole_tensor])
def test_task_vectors_of_whole_matrices_agree_to_rounding(name, wide, tolerance, device, tmp_path) -> None:
    base, *models = (save_tensors(small_model(n, wide), tmp_path / f"{n}.safetensors") for n in range(4))
    usual = load_tensors(magmax.merge(name, base, models, out=tmp_path / "usual.safetensors"))
    there = load_tensors(
        magmax.merge(name, base, models, out=tmp_path / "there.safetensors", execution=ExecutionOptions(device=device))
    )
    for key, start in load_tensors(base).items():
        change = torch.linalg.vector_norm(usual[key].double() - start.double())
        assert torch.linalg.vector_norm(there[key].double() - usual[key].double()) <= tolerance * change


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("out", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_results_are_rounded_once(device, out, dtype, tmp_path) -> None:
    base, *models = (save_tensors(small_model(n, dtype), tmp_path / f"{n}.safetensors") for n in range(3))
    usual = magmax.merge("magmax", base, models, 1 / 3, tmp_path / "usual.safetensors", dtype=out)
    there = magmax.merge(
        "magmax",
        base,
        models,
        1 / 3,
        tmp_path / "there.safetensors",
        dtype=out,
        execution=ExecutionOptions(device=device),
    )
    assert same_bytes(load_tensors(there), load_tensors(usual))


@pytest.mark.parametrize("device", HERE)
def test_what_is_not_finite_is_refused_and_let_through_alike(device, dtype, tmp_path) -> None:
    base, *models = (small_model(n, dtype) for n in range(3))
    models[1]["layer.weight"][3, 4] = float("nan")
    models[0]["layer.weight"][0, :2] = float("inf")
    paths = [save_tensors(tensors, tmp_path / f"{n}.safetensors") for n, tensors in enumerate([base, *models])]
    told: list[str] = []
    for settings in (ExecutionOptions(), ExecutionOptions(device=device)):
        with pytest.raises(MagMaxError, match="holds 0 NaN and 2 infinite") as refused:
            magmax.merge("magmax", paths[0], paths[1:], out=tmp_path / "none.safetensors", execution=settings)
        told.append(str(refused.value))
    assert told[0] == told[1]
    usual, there = (
        load_tensors(
            magmax.merge(
                "magmax", paths[0], paths[1:], out=tmp_path / f"{n}.safetensors", execution=s, allow_nonfinite=True
            )
        )
        for n, s in (("usual", ExecutionOptions()), ("there", ExecutionOptions(device=device)))
    )
    for key, expected in usual.items():  # NaN may have other bits on another device
        torch.testing.assert_close(there[key], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", HERE)
def test_an_overflow_is_the_same_error(device, tmp_path) -> None:
    base, model = {"w": torch.tensor([6e4]).half()}, {"w": torch.tensor([6.5e4]).half()}
    paths = [save_tensors(tensors, tmp_path / f"{n}.safetensors") for n, tensors in enumerate([base, model])]
    for settings in (ExecutionOptions(), ExecutionOptions(device=device)):
        with pytest.raises(MagMaxError, match="w: the merged values overflow F16"):
            magmax.merge("magmax", paths[0], paths[1:], 2.0, tmp_path / "out.safetensors", execution=settings)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("device", HERE)
def test_state_dicts_are_merged_there_too(device) -> None:
    base, *models = (small_model(n) for n in range(4))
    assert same_bytes(
        magmax.merge("ties", base, models, execution=ExecutionOptions(device=device)),
        magmax.merge("ties", base, models),
    )


@pytest.mark.parametrize("rule", [Tunable(preference=(1, 1)), chain(Della(span="tensor"), MagMax())], ids=str)
def test_a_rule_of_the_processors_says_so(rule, tmp_path) -> None:
    base, *models = (save_tensors(small_model(n), tmp_path / f"{n}.safetensors") for n in range(3))
    told: list[str] = []
    settings = ExecutionOptions(device="cpu", note=told.append)
    magmax.merge(rule, base, models, out=tmp_path / "out.safetensors", execution=settings)
    assert any(words.startswith(("tunable: ", "della: ")) and "processors alone" in words for words in told)


@pytest.mark.parametrize("name", ["warp", "meta", "cuda:99"])
def test_a_device_that_is_none_is_refused(name) -> None:
    with pytest.raises(MagMaxError, match=name):
        ExecutionOptions(device=name)


@pytest.mark.parametrize("name", [name for name, rule in ELEMENTWISE.items() if not rule.cpu_only_parts])
def test_no_rule_leaves_the_device_of_its_task_vectors(name, monkeypatch) -> None:
    """On tensors that only pretend to be on a GPU, so that it can be tested without one."""
    monkeypatch.setattr(torch.Tensor, "__invert__", _inverted)  # the pretence knows no ~ and no slices
    monkeypatch.setattr(torch.Tensor, "__getitem__", _narrowed)
    rule, count = ELEMENTWISE[name], TASKS.get(name, 3)
    draw, at, shape = np.random.default_rng(0), Address("layer.weight", 0), (8, 8)
    vectors = [draw.standard_normal(64, np.float32) for _ in range(count)]
    block = Block(at, vectors, draw.standard_normal(64, np.float32), shape)
    answer = run_locally(rule.statistics(Scope(count, 64, row_elements=8, shapes={"layer.weight": shape})), block)
    with FakeTensorMode(allow_non_fake_inputs=False):
        there = Block(at, [torch.empty(64, device="cuda") for _ in vectors], torch.empty(64, device="cuda"), shape)
        merged = rule.merge(there, answer)
    assert (merged.device.type, merged.dtype, merged.shape) == ("cuda", torch.float32, (64,))


def _inverted(tensor: torch.Tensor) -> torch.Tensor:
    return torch.bitwise_not(tensor)


def _narrowed(tensor: torch.Tensor, parts: slice | tuple[slice, ...]) -> torch.Tensor:
    for dimension, part in enumerate(parts if isinstance(parts, tuple) else (parts,)):
        start, stop, _ = part.indices(tensor.shape[dimension])
        tensor = tensor.narrow(dimension, start, stop - start)
    return tensor
