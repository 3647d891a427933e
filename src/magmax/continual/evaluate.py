"""Task-agnostic evaluation: every example is classified among all classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magmax.continual.encoder import Encoder
from magmax.continual.progress import Tell, silent
from magmax.continual.scenario import Task


@torch.inference_mode()
def predict(encoder: Encoder, head: Tensor, items: Sequence[Any], batch: int = 64, tell: Tell = silent) -> np.ndarray:
    """The class of every item, shape (n,): the row of the head with the largest logit."""
    encoder.model.eval()
    order = np.argsort([np.size(item) for item in items], kind="stable")  # little padding
    found = np.empty(len(items), dtype=np.int64)
    for start in range(0, len(items), batch):
        rows = order[start : start + batch]
        found[rows] = (encoder([items[i] for i in rows]) @ head.T).argmax(1).cpu().numpy()
        tell(start + len(rows), len(items))
    return found


def accuracy_by_task(predicted: np.ndarray, labels: np.ndarray, tasks: Sequence[Task]) -> list[float]:
    """For each task the share of its examples whose class was found among all classes."""
    right = predicted == labels
    return [float(right[task.rows(labels)].mean()) for task in tasks]
