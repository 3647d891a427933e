"""Evaluation: one forward pass over the test examples gives their logits, and these a row of R."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import LabelledExamples
from ..data.scenarios import Task
from ..models.text_encoder import Encoder, training_mode
from ..progress import ProgressCallback, no_progress

Among = Literal["seen", "all"]
"""The classes that a test example is told apart from: those of the tasks learned so far, or those of all tasks."""


@torch.inference_mode()
def logits_of(
    encoder: Encoder, head: Tensor, items: Sequence[Any], batch: int = 64, progress: ProgressCallback = no_progress
) -> np.ndarray:
    """The logits of every item, float32, shape (n, classes)."""
    order = np.argsort([np.size(item) for item in items], kind="stable")  # little padding
    logits = np.empty((len(items), len(head)), dtype=np.float32)
    with training_mode(encoder.model, False):
        for start in range(0, len(items), batch):
            rows = order[start : start + batch]
            features = encoder([items[i] for i in rows])
            logits[rows] = (features @ head.to(features).T).float().cpu().numpy()
            progress(start + len(rows), len(items))
    return logits


def predict(
    encoder: Encoder, head: Tensor, items: Sequence[Any], batch: int = 64, progress: ProgressCallback = no_progress
) -> np.ndarray:
    """The class of every item, shape (n,): the row of the head with the largest logit."""
    return logits_of(encoder, head, items, batch, progress).argmax(1)


def likelihoods(encoder: Encoder, head: Tensor, items: Sequence[Any], labels: np.ndarray) -> np.ndarray:
    """The probability of each item's own class, float64, shape (n,), among all classes of the head."""
    probabilities = torch.as_tensor(logits_of(encoder, head, items), dtype=torch.float64).softmax(dim=1).numpy()
    return probabilities[np.arange(len(items)), labels]


def accuracy_by_task(predicted: np.ndarray, labels: np.ndarray, tasks: Sequence[Task]) -> list[float]:
    """For each task the share of its examples whose class was found among all classes."""
    right = predicted == labels
    return [float(right[task.rows(labels)].mean()) for task in tasks]


@dataclass(frozen=True)
class AccuracyRow:
    """The accuracies of one model: of each task, over all examples, and the mean over classes."""

    tasks: list[float]
    micro: float
    macro: float


def score(
    logits: np.ndarray, data: LabelledExamples, tasks: Sequence[Task], learned: int, among: Among = "seen"
) -> AccuracyRow:
    """The row of R after `learned` tasks: logits of shape (n, classes) against the data's labels.

    With "seen", the examples of a task learned so far are told apart among the classes of the tasks 1..learned, those
    of a later task among all classes (none of its own was seen); with "all", every example among the classes of all
    tasks. A task with classes of its own (`among`) is told apart among these, whatever was learned.
    """
    everything = sorted({c for task in tasks for c in task.classes})
    seen = sorted({c for task in tasks[:learned] for c in task.classes})
    right = np.zeros(len(data), dtype=bool)
    counted = np.zeros(len(data), dtype=bool)
    shares: list[float] = []
    for number, task in enumerate(tasks, start=1):
        rows = task.rows(data.labels, data.domains)
        candidates = np.array(task.among or (seen if among == "seen" and number <= learned else everything))
        right[rows] = candidates[logits[np.ix_(rows, candidates)].argmax(1)] == data.labels[rows]
        counted[rows] = True
        shares.append(float(right[rows].mean()))
    classes = np.unique(data.labels[counted])
    by_class = [right[counted & (data.labels == c)].mean() for c in classes]
    return AccuracyRow(shares, float(right[counted].mean()), float(np.mean(by_class)))
