"""Calibration in feature space as plainly as torch allows: whole models, one pass over all samples for every layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def l1_norms(kind: str, features: Tensor) -> Tensor:
    """L1 norms: of a sample's whole (norm), of each channel of a batched map (conv), of each token (else)."""
    if kind == "norm":
        return features.abs().sum().reshape(1)
    return features.abs().sum((2, 3)).reshape(-1) if kind == "conv" else features.abs().sum(-1).reshape(-1)


def layer_kind(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        return "conv"
    return "norm" if "Norm" in type(module).__name__ else "linear"


def copy_with_state(model: nn.Module, state: State) -> nn.Module:
    made = copy.deepcopy(model).eval()
    made.load_state_dict(state)
    return made


def capture_inputs(model: nn.Module, layer: str, item: object, run: Callable) -> list[tuple]:
    """What the layer is called with when the item goes through the model."""
    found: list[tuple] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: found.append(args))
    with torch.no_grad():
        run(model, [item])
    handle.remove()
    return found


def reference_calibration(
    model: nn.Module,
    base: State,
    merged: State,
    tasks: Sequence[State],
    samples: Sequence[Sequence],
    run: Callable,
    layers: Sequence[str],
    sequential: bool = True,
    ratio: str = "place",
) -> tuple[dict[str, float], State]:
    """xi of each of the layers, in the order of their calls, and the calibrated weights."""
    state = {key: value.clone() for key, value in merged.items()}
    whole = [copy_with_state(model, s) for s in (base, merged, *tasks)]
    xis: dict[str, float] = {}
    for layer in layers:
        here = copy_with_state(model, state if sequential else merged)
        start, now, *theirs = (other.get_submodule(layer) for other in whole)
        means = []
        for task, own in zip(theirs, samples, strict=True):
            ratios = []
            for item in own:
                for args in capture_inputs(here, layer, item, run):
                    with torch.no_grad():
                        kind = layer_kind(now) if ratio == "place" else "norm"
                        f_k = l1_norms(kind, task(*args).double() - start(*args).double())
                        f_m = l1_norms(kind, now(*args).double() - start(*args).double())
                    ratios.append((f_k / f_m)[f_m > 0])
            means.append(torch.cat(ratios).mean())
        xis[layer] = float(torch.stack(means).mean())
        parameters = dict(model.named_parameters(remove_duplicate=False))
        own = [parameters[f"{layer}.{name}"] for name in ("weight", "bias") if f"{layer}.{name}" in parameters]
        for key in [key for key, parameter in parameters.items() if any(parameter is each for each in own)]:
            state[key] = base[key] + xis[layer] * (merged[key] - base[key])
    return xis, state
