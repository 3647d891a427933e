"""The studies of weights, written as plainly as numpy allows: one element at a time."""

from __future__ import annotations

import numpy as np
import torch
from tests.models import Tensors

Vectors = dict[str, list[np.ndarray]]


def task_vectors(base: Tensors, models: list[Tensors]) -> Vectors:
    """Of every floating tensor of a kind that is merged, flat, in float64."""
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return {
        key: [(model[key].double() - tensor.double()).numpy().reshape(-1) for model in models]
        for key, tensor in base.items()
        if tensor.dtype in kinds and tensor.numel()
    }


def trim(vectors: Vectors, keep: float) -> Vectors:
    """The largest entries of each task vector over the whole model; equal ones by sorted name, then offset."""
    names = sorted(vectors)
    made: Vectors = {key: [] for key in vectors}
    for task in range(len(vectors[names[0]])):
        entries = [(-abs(v), key, i) for key in names for i, v in enumerate(vectors[key][task])]
        kept = {(key, i) for _, key, i in sorted(entries)[: round(keep * len(entries))]}
        for key in vectors:
            own = vectors[key][task]
            made[key].append(np.array([v if (key, i) in kept else 0.0 for i, v in enumerate(own)]))
    return made


def count_conflicts(columns: list[tuple[float, ...]]) -> tuple[int, int]:
    """(elements that at least two change, those of them changed both ways)."""
    shared = [column for column in columns if sum(v != 0 for v in column) >= 2]
    return len(shared), sum(min(column) < 0 < max(column) for column in shared)


def count_winners(columns: list[tuple[float, ...]]) -> list[int]:
    """Per task, the elements that MagMax takes from it."""
    counts = [0] * len(columns[0])
    for column in columns:
        if any(column):
            counts[max(range(len(column)), key=lambda t: (abs(column[t]), t))] += 1
    return counts


def group_by_agreement(columns: list[tuple[float, ...]]) -> dict[int, list[tuple[float, ...]]]:
    """The elements by how many tasks move them in the more common direction."""
    groups: dict[int, list[tuple[float, ...]]] = {}
    for column in columns:
        ups, downs = sum(v > 0 for v in column), sum(v < 0 for v in column)
        groups.setdefault(max(ups, downs), []).append(column)
    return groups


def element_columns(vectors: Vectors, keys: list[str]) -> list[tuple[float, ...]]:
    return [column for key in keys for column in zip(*(v.tolist() for v in vectors[key]), strict=True)]
