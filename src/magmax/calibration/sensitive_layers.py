"""Which tensors of a merged model must not grow: measured on a proxy set, with the noise of the measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..checkpoints import open_checkpoint
from ..errors import MagMaxError
from ..rules.transforms.sensitive_tensors import ScoreDrop, Sensitivity, largest_drops
from .foldable_layers import find_foldable_layers
from .layer_measurement import evaluation_mode
from .rescale import fold_tensor, read_widened

Scores = Callable[[nn.Module], Sequence[float] | NDArray[np.floating[Any]]]
"""The metric of a model on each example of a proxy set, such as 1 where it is right; more is better."""


def find_sensitive(
    model: nn.Module,
    base: Any,
    scores: Scores,
    *,
    name: str,
    metric: str = "accuracy",
    factor: float = 1.1,
    count: int = 10,
    draws: int = 1000,
    seed: int = 0,
) -> Sensitivity:
    """The tensors of foldable layers whose growth costs most: W = W_0 + factor (W_m - W_0), one tensor after another.

    drop = mean(scores before - scores after), over the same examples; noise = half the width of the middle 95 % of the
    drop over `draws` bootstrap samples of the examples. A tensor whose drop lies within its noise is never called
    sensitive, though it may be among the `count` worst. The weights are as before afterwards, to the bit.

    Args:
        model: with the merged weights.
        base: a path, state dict, module or checkpoint with the model's keys.
        scores: of examples that are neither trained on nor scored in the end.
        name: what the file calls the model; `Sensitivity.text()` is the file's content.

    Raises:
        MagMaxError: fewer than two examples; scores that are not finite, or not as many every time.
    """
    opened = open_checkpoint(base)
    parameters = dict(model.named_parameters())
    keys = {id(parameter): key for key, parameter in parameters.items()}
    pieces = (
        p
        for site in find_foldable_layers(model)[0]
        for s in site.stages
        for part in s.parts
        for p in part.pieces.values()
    )
    random = np.random.default_rng(seed)
    drops: dict[str, ScoreDrop] = {}
    with evaluation_mode(model), torch.no_grad():
        before = _score_examples(scores, model)
        picks = random.integers(0, len(before), (draws, len(before)))
        for key in dict.fromkeys(keys[id(piece.parameter)] for piece in pieces):
            values, original = parameters[key].data, parameters[key].detach().clone()
            wide = torch.float64 if values.dtype == torch.float64 else torch.float32
            start = torch.from_numpy(read_widened(opened, key)).reshape(values.shape).to(values.device, wide)
            if torch.equal(values.to(wide), start):
                continue
            try:
                fold_tensor(values, start, factor)
                lost = before - _score_examples(scores, model, len(before))
            finally:
                values.copy_(original)
            low, high = np.quantile(lost[picks].mean(axis=1), [0.025, 0.975])
            drops[key] = ScoreDrop(float(lost.mean()), float(high - low) / 2)
    return Sensitivity(name, metric, factor, len(before), drops, largest_drops(drops, count))


def _score_examples(scores: Scores, model: nn.Module, count: int | None = None) -> NDArray[np.float64]:
    values = np.asarray(scores(model), dtype=np.float64).reshape(-1)
    if len(values) < 2 or not np.isfinite(values).all() or count not in (None, len(values)):
        raise MagMaxError(
            f"a proxy set needs two examples or more, and a finite score of each; these are {len(values)} scores"
            + (f" where there were {count}" if count not in (None, len(values)) else "")
        )
    return values
