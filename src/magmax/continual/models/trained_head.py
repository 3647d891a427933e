"""A linear layer that is trained and merged with the encoder, instead of a frozen head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import MagMaxError
from ..data.datasets import Dataset
from ..progress import ProgressCallback, no_progress
from .heads import nearest_class_mean
from .text_encoder import Encoder

HEAD = "head"


@dataclass(frozen=True)
class HeadedEncoder:
    """An encoder and a linear layer over its features, in one model: `body.*` and `head.weight`.

    What it gives for an item are the scores of all classes, `temperature * W @ features`, of no fixed length.
    """

    encoder: Encoder
    model: nn.ModuleDict
    temperature: float

    @property
    def variation(self) -> str:
        """As the encoder's."""
        return getattr(self.encoder, "variation", "")

    def prepare(self, items: Sequence[Any], progress: ProgressCallback = no_progress) -> Sequence[Any]:
        """As the encoder does."""
        return self.encoder.prepare(items, progress)

    def vary(self, items: Sequence[Any], random: np.random.Generator) -> Sequence[Any]:
        """As the encoder does, if it does."""
        vary = getattr(self.encoder, "vary", None)
        return vary(items, random) if vary else items

    def __call__(self, items: Sequence[Any]) -> Tensor:
        """The scores of n items, shape (n, classes)."""
        return self.temperature * self.model[HEAD](self.encoder(items))


def trained_head(of: Any, temperature: float = 20.0) -> HeadedEncoder:
    """A model of the registry, as a recipe writes it, that gets a trained layer: for the head `trained`."""
    from ..registry import build

    encoder = build("model", of)
    return HeadedEncoder(encoder, nn.ModuleDict({"body": encoder.model}), temperature)


def trained(encoder: HeadedEncoder, dataset: Dataset, start: Literal["zeros", "class_means"] = "zeros") -> Tensor:
    """Gives the encoder its layer, a row W_c for each class, and returns the identity: its scores are the logits.

    The layer is in the merge. Row c has a gradient only in the tasks that hold class c. From zeros (which weight decay
    leaves zero), tasks trained independently change disjoint rows, so a rule that keeps the largest change, or the
    sum, puts every task's own rows together, all times the scaling factor, which changes no decision; only a later
    task's weight decay, in sequential training, touches earlier rows. "class_means" starts at the nearest class means.
    """
    if not isinstance(encoder, HeadedEncoder):
        raise MagMaxError(f"the head 'trained' needs the model 'trained_head' around this {type(encoder).__name__}")
    means = nearest_class_mean(encoder.encoder, dataset, temperature=1.0)
    if start not in ("zeros", "class_means"):
        raise MagMaxError(f"trained: start {start!r} is neither 'zeros' nor 'class_means'")
    layer = nn.Linear(means.shape[1], means.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(means if start == "class_means" else torch.zeros_like(means))
    encoder.model[HEAD] = layer.to(next(encoder.model.parameters()).device)
    return torch.eye(len(dataset.classes))
