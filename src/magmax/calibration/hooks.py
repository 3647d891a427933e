"""The unfolded form: the base's weights kept beside the merged ones, outputs corrected at every call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checkpoints import Checkpoint, open_checkpoint
from .calibration_report import LayerReport
from .feature_space import FeatureCalibration
from .foldable_layers import FoldablePart, Inputs, find_foldable_layers
from .rescale import read_widened


@contextmanager
def calibration_hooks(
    model: nn.Module, base: Any, calibration: FeatureCalibration, per: Literal["place", "layer"] = "place"
) -> Iterator[nn.Module]:
    """While a model with the merged weights gives pre(x) + xi (merged(x) - pre(x)) at every calibrated layer.

    As the paper's public code has it, for comparison: the base stays in memory, and every layer is computed twice. Per
    "layer", the result is that of the folded weights to rounding. Per "place", each token's position (channel, of a
    convolution) has the xi that was measured there; places that no sample had take the layer's. The projections inside
    `nn.MultiheadAttention` are left as they are.

    Args:
        model: with the merged weights, not the calibrated ones.
        base: a path, state dict, module or checkpoint with the model's keys.
        calibration: what `calibrate_features` returned.
    """
    opened = open_checkpoint(base)
    keys = {id(p): key for key, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    layers = {layer.name: layer for layer in calibration.report.layers}
    handles: list[Any] = []
    for site in find_foldable_layers(model)[0]:
        part = site.stages[0].parts[0]
        layer = layers.get(part.name)
        if len(site.stages) == 1 and layer and layer.xi != 1:
            start = {name: _read_like(opened, keys[id(p.parameter)], p.parameter) for name, p in part.pieces.items()}
            handles.append(
                site.module.register_forward_hook(_correction_hook(part, start, layer, per), with_kwargs=True)
            )
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _correction_hook(part: FoldablePart, base: dict[str, Tensor], layer: LayerReport, per: str) -> Any:
    places = torch.tensor(layer.by_place or [], dtype=torch.float64)
    here = threading.local()

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if getattr(here, "inside", False):  # `change` calls the layer
            return None
        inputs: Inputs = args, kwargs
        now = {name: piece.values for name, piece in part.pieces.items()}
        here.inside = True
        try:
            moved = part.change({name: now[name] - base[name] for name in now}, inputs).to(output)
        finally:
            here.inside = False
        xi = torch.tensor(layer.xi, dtype=torch.float64)
        if per == "place" and part.kind != "norm" and layer.measured == layer.xi:
            xi = _expand_place_coefficients(part, places, output, layer.xi)
        return output + (xi.to(output) - 1) * moved

    return after


def _expand_place_coefficients(part: FoldablePart, places: Tensor, output: Tensor, otherwise: float) -> Tensor:
    """xi at every place of an output with a batch ahead, in a shape that goes with it."""
    tail = next(iter(part.pieces.values())).parameter.dim() - 2 if part.kind == "conv" else 1
    shape = output.shape[1 : output.dim() - tail]
    count = shape.numel()
    padded = torch.cat([places, places.new_full((max(0, count - len(places)),), torch.nan)])[:count]
    padded = torch.where(padded.isnan(), otherwise, padded)
    return padded.reshape(*shape, *(1 for _ in range(tail)))


def _read_like(checkpoint: Checkpoint, key: str, like: Tensor) -> Tensor:
    return torch.from_numpy(read_widened(checkpoint, key)).reshape(like.shape).to(like)
