"""A short training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from magmax.continual.encoder import Encoder
from magmax.continual.progress import Tell, silent
from magmax.errors import MagMaxError


@dataclass(frozen=True)
class FitSettings:
    """AdamW, a linear warm-up (a fraction of the steps), then a cosine to zero; gradients clipped by norm."""

    steps: int
    batch: int = 32
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warmup: float = 0.1
    clip: float = 1.0

    def factor(self, step: int) -> float:
        """The share of learning_rate used at this step (from 0)."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def fit(
    encoder: Encoder,
    head: Tensor,
    items: Sequence[Any],
    targets: np.ndarray,
    settings: FitSettings,
    seed: int | Sequence[int],
    tell: Tell = silent,
) -> list[float]:
    """Fine-tunes the encoder's trainable weights in place under a frozen head; returns each step's loss.

    The loss is the cross-entropy of `encoder(items) @ head.T`, head of shape (classes, width), against
    targets of shape (n,), rows of the head. Dropout stays off, so that the order of the items, drawn from the
    seed, is all there is of chance: the same seed gives the same weights on the same machine.
    Raises MagMaxError where there are no items, or not one target for each.
    """
    if len(items) == 0 or len(items) != len(targets):
        given = f"{len(items)} items and {len(targets)} targets"
        raise MagMaxError(f"fit needs at least one item, and one target for each; it was given {given}")
    weights = [p for p in encoder.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.factor)
    encoder.model.eval()
    losses: list[float] = []
    tell(0, settings.steps)
    for rows in batches([np.size(item) for item in items], settings.batch, settings.steps, seed):
        logits = encoder([items[i] for i in rows]) @ head.T
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(targets[rows]).to(logits.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, settings.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        tell(len(losses), settings.steps, f"loss {np.mean(losses[-10:]):.3f}")
    return losses


def batches(
    sizes: Sequence[int], batch: int, steps: int, seed: int | Sequence[int], pool: int = 8
) -> Iterator[np.ndarray]:
    """Yields the positions of each of `steps` batches, epoch after epoch in a new random order.

    Within a pool of 8 batches the items are sorted by size, so that a batch holds items of about one size and
    little of it is padding; the batches of a pool come in random order.
    """
    random = np.random.default_rng(seed)
    done = 0
    while done < steps:
        order = random.permutation(len(sizes))
        for start in range(0, len(order), pool * batch):
            some = order[start : start + pool * batch]
            some = some[np.argsort(np.asarray(sizes)[some], kind="stable")]
            cuts = [some[i : i + batch] for i in range(0, len(some), batch)]
            for i in random.permutation(len(cuts))[: steps - done]:
                done += 1
                yield cuts[i]
