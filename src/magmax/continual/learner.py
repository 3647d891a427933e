"""A classifier with a frozen head, and the loss of one task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from magmax.continual.encoder import Encoder
from magmax.continual.penalties import Penalty


@dataclass(frozen=True)
class Classifier:
    """An encoder under a frozen head of shape (all classes, width): logits of n items, shape (n, all classes)."""

    encoder: Encoder
    head: Tensor

    @property
    def model(self) -> nn.Module:
        return self.encoder.model

    def __call__(self, items: Sequence[Any]) -> Tensor:
        features = self.encoder(items)
        return features @ self.head.to(features).T


@dataclass(frozen=True)
class TaskLoss:
    """The cross-entropy among a task's own classes, and a penalty, if there is one.

    Labels are places in `classes`, of shape (n,).
    """

    learner: Classifier
    classes: Sequence[int]
    penalty: Penalty | None = None

    @property
    def reads_weights(self) -> bool:
        """Whether the penalty computes with the model's weights."""
        return getattr(self.penalty, "reads_weights", False)

    def __call__(self, items: Sequence[Any], labels: Tensor) -> Tensor:
        logits = self.learner(items)
        loss = nn.functional.cross_entropy(logits[:, list(self.classes)], labels)
        return loss if self.penalty is None else loss + self.penalty(self.learner, items, logits)
