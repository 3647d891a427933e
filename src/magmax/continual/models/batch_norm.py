"""The statistics of batch normalisation in merged models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .text_encoder import Encoder


@torch.no_grad()
def recalibrate(encoder: Encoder, items: Sequence[Any], batch: int = 64) -> None:
    """Takes the batch-norm statistics of a merged model anew from prepared items, the weights as they are.

    The mean and variance of each layer become the averages over the batches. As REPAIR does for merged networks
    (Jordan et al., ICLR 2023).
    """
    norms = [m for m in encoder.model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # a plain average
    for start in range(0, len(items), batch):
        encoder(items[start : start + batch])
    for norm, (training, momentum) in zip(norms, before, strict=True):
        norm.train(training)
        norm.momentum = momentum
