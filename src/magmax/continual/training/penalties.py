"""Terms added to the loss of a task, so that earlier ones are not forgotten: LwF and EWC."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..data.datasets import LabelledExamples
from ..models.text_encoder import training_mode
from .losses import Classifier, ForgettingPenalty


@dataclass
class LwF:
    """Learning without forgetting: the old model's answers to the new items, over the classes of earlier tasks.

    weight * mean over the batch of  -sum_c softmax(old / temperature)_c * log softmax(new / temperature)_c,
    old and new being the logits of theta_{t-1} and of the model over the heads of all earlier tasks together; no
    factor temperature**2. Li and Hoiem, ECCV 2016, with the numbers of MagMax's comparison (0.3, temperature 2).
    MagMax's released code adds 1e-5 to the new probabilities; here their logarithm is taken directly.
    """

    weight: float = 0.3
    temperature: float = 2.0
    state: dict[str, Tensor] = field(default_factory=dict, init=False)
    _old: Classifier | None = field(default=None, init=False, repr=False)
    _seen: Sequence[int] = field(default=(), init=False, repr=False)

    def before_task(self, learner: Classifier, seen: Sequence[int]) -> None:
        self._seen = list(seen)
        self._old = copy.deepcopy(learner) if seen else None
        if self._old:
            self._old.model.eval().requires_grad_(False)

    def __call__(self, learner: Classifier, items: Sequence[Any], logits: Tensor) -> Tensor:
        if self._old is None:
            return logits.new_zeros(())
        with torch.no_grad():
            old = self._old(items)[:, self._seen]
        return self.weight * nn.functional.cross_entropy(
            logits[:, self._seen] / self.temperature, (old / self.temperature).softmax(1)
        )

    def after_task(self, learner: Classifier, data: LabelledExamples, classes: Sequence[int]) -> None:
        self._old = None


@dataclass
class QuadraticPenalty(ABC):
    """weight * sum_i F_i * (p_i - p_i_old)**2 from task 2 on; p_old are the weights after the last task.

    F, the importance of each weight, is a running mean over tasks; `state` holds it.
    """

    reads_weights: ClassVar[bool] = True
    weight: float = 5e5
    keep: float = 0.5
    state: dict[str, Tensor] = field(default_factory=dict, init=False)
    _old: Mapping[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def before_task(self, learner: Classifier, seen: Sequence[int]) -> None:
        self._old = {name: p.detach().clone() for name, p in _trained(learner.model)} if self.state else {}

    def __call__(self, learner: Classifier, items: Sequence[Any], logits: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for name, p in _trained(learner.model) if self._old else ():
            total = total + (self.state[name].to(p) * (p - self._old[name]) ** 2).sum()
        return self.weight * total

    @abstractmethod
    def after_task(self, learner: Classifier, data: LabelledExamples, classes: Sequence[int]) -> None:
        """Renew the importance."""


@dataclass
class EWC(QuadraticPenalty):
    """Elastic weight consolidation: weights that mattered to earlier tasks are held where they were.

    F is the diagonal of the Fisher information of the model's own prediction: the mean over up to `samples` items of
    the squared gradient of -log softmax(logits over the task's classes)[argmax], one item at a time. Over tasks
    F = keep * F + (1 - keep) * F_new, and F = F_new after the first. Kirkpatrick et al., PNAS 2017, with the
    numbers of MagMax's comparison (weight 1e6 / 2, keep 0.5); its released code differs: see `ReleasedEWC`.
    """

    samples: int = 256
    seed: int = 0

    def after_task(self, learner: Classifier, data: LabelledExamples, classes: Sequence[int]) -> None:
        chosen = np.random.default_rng(self.seed).permutation(len(data))[: self.samples]
        new = fisher(learner, [data.items[i] for i in np.sort(chosen)], classes)
        self.state = {n: self.keep * self.state[n] + (1 - self.keep) * f if self.state else f for n, f in new.items()}


@dataclass
class ReleasedEWC(QuadraticPenalty):
    """EWC as MagMax's released code computes it, mistakes included, to reproduce the published baseline.

    Gradients of batches are never set to zero, so that each adds to those before it; the square is of that sum of
    batch means, times the batch's size, over the number of items rounded up to whole batches; and the first task's F
    is halved, because the running mean starts at zero. Dropout is off, and no gradient is left over from training.
    """

    batch: int = 32

    def after_task(self, learner: Classifier, data: LabelledExamples, classes: Sequence[int]) -> None:
        grown = {name: torch.zeros_like(p) for name, p in _trained(learner.model)}
        new = {name: torch.zeros_like(p) for name, p in _trained(learner.model)}
        count = (len(data) // self.batch + 1) * self.batch
        for start in range(0, len(data), self.batch):
            items = data.items[start : start + self.batch]
            for name, gradient in _own_gradients(learner, items, classes):
                grown[name] += gradient
                new[name] += grown[name] ** 2 * len(items)
        old = self.state or {name: torch.zeros_like(f) for name, f in new.items()}
        self.state = {name: self.keep * old[name] + (1 - self.keep) * f / count for name, f in new.items()}


PENALTIES: Mapping[str, Callable[..., ForgettingPenalty]] = {
    "lwf": LwF,
    "ewc": EWC,
    "ewc_released": ReleasedEWC,
}


def fisher(learner: Classifier, items: Sequence[Any], classes: Sequence[int]) -> dict[str, Tensor]:
    """For each trained weight the mean over items of its squared gradient of -log p(own prediction | item).

    One item at a time: the square of a batch's mean gradient is something else, and smaller.
    """
    total = {name: torch.zeros_like(p) for name, p in _trained(learner.model)}
    for item in items:
        for name, gradient in _own_gradients(learner, [item], classes):
            total[name] += gradient**2
    return {name: t / len(items) for name, t in total.items()}


def _own_gradients(learner: Classifier, items: Sequence[Any], classes: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """The gradients of the mean cross-entropy against the model's own predictions among the classes.

    In evaluation mode: in training mode, batch normalisation would see single items, and keep their statistics.
    """
    named = _trained(learner.model)
    with training_mode(learner.model, False):
        logits = learner(items)[:, list(classes)]
        loss = nn.functional.cross_entropy(logits, logits.argmax(1))
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        if gradient is not None:
            yield name, gradient


def _trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
