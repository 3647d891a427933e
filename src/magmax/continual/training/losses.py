"""A classifier with a frozen head, and the loss of one task with what a penalty on forgetting adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..data.datasets import LabelledExamples
from ..models.text_encoder import Encoder


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


class ForgettingPenalty(Protocol):
    """A term of the loss with a memory. `state` is that memory: it is saved beside theta_t, and put back on resuming.

    A penalty is made anew for every sequence of tasks; on resuming, `state` is set before `before_task` is called.
    """

    state: dict[str, Tensor]

    def before_task(self, learner: Classifier, seen: Sequence[int]) -> None:
        """The learner has the weights that the task starts from; `seen` are the classes of all earlier tasks."""
        ...

    def __call__(self, learner: Classifier, items: Sequence[Any], logits: Tensor) -> Tensor:
        """The scalar to add for a batch; logits of shape (n, all classes)."""
        ...

    def after_task(self, learner: Classifier, data: LabelledExamples, classes: Sequence[int]) -> None:
        """The task's own data and classes, the learner as it came out of training."""
        ...


@dataclass(frozen=True)
class TaskLoss:
    """The cross-entropy among a task's own classes, and a penalty, if there is one.

    Labels are places in `classes`, of shape (n,).
    """

    learner: Classifier
    classes: Sequence[int]
    penalty: ForgettingPenalty | None = None

    @property
    def reads_weights(self) -> bool:
        """Return whether the penalty computes with the model's weights."""
        return getattr(self.penalty, "reads_weights", False)

    def __call__(self, items: Sequence[Any], labels: Tensor) -> Tensor:
        logits = self.learner(items)
        loss = nn.functional.cross_entropy(logits[:, list(self.classes)], labels)
        return loss if self.penalty is None else loss + self.penalty(self.learner, items, logits)
