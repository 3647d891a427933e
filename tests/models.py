"""Small models for the tests, and the definitions of the rules written as plainly as torch allows."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def small_model(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Every kind of tensor a merge can meet; small integers make ties of magnitude common."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randint(-4, 5, (130, 24), generator=draw).to(dtype),
        "layer.weight": torch.randn(48, 33, generator=draw).to(dtype),
        "layer.bias": torch.randn(48, generator=draw).to(dtype),
        "wide.weight": torch.randn(2, 300_000, generator=draw).to(dtype),
        "scale": torch.randn((), generator=draw).to(dtype),
        "nothing": torch.zeros(0, 7, dtype=dtype),
        "position_ids": torch.randint(0, 99, (1, 16), generator=draw),
        "mask": torch.rand(9, generator=draw) > 0.5,
        "quantised": torch.randn(6, generator=draw).to(torch.float8_e4m3fn),
    }


def save_tensors(tensors: Tensors, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def load_tensors(path: Path) -> Tensors:
    return load_file(path)


def same_bytes(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype
        and ours[k].shape == theirs[k].shape
        and tensor_bytes(ours[k]) == tensor_bytes(theirs[k])
        for k in ours
    )


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def task_vectors(base: torch.Tensor, models: list[torch.Tensor]) -> list[torch.Tensor]:
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    return [model.to(wide) - base.to(wide) for model in models]


def magmax(vectors: list[torch.Tensor]) -> torch.Tensor:
    winner = vectors[0]
    for vector in vectors[1:]:
        winner = torch.where(vector.abs() >= winner.abs(), vector, winner)
    return winner


def average(vectors: list[torch.Tensor]) -> torch.Tensor:
    return task_arithmetic(vectors) / len(vectors)


def task_arithmetic(vectors: list[torch.Tensor]) -> torch.Tensor:
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total = total + vector
    return total


def kth_magnitude(vectors: list[torch.Tensor], k: int) -> torch.Tensor:
    """Sort by (|tau_t|, t), largest and latest first, one element at a time."""
    columns = zip(*(vector.reshape(-1).tolist() for vector in vectors), strict=True)
    chosen = [sorted(((abs(v), t, v) for t, v in enumerate(column)), reverse=True)[k - 1][2] for column in columns]
    return torch.tensor(chosen, dtype=vectors[0].dtype).reshape(vectors[0].shape)


def add_scaled(base: torch.Tensor, merged: torch.Tensor, factor: float) -> torch.Tensor:
    product = torch.tensor(factor, dtype=merged.dtype) * merged
    return (base.to(merged.dtype) + product).to(base.dtype)


def reference_merge(rule, base: Tensors, models: list[Tensors], factor: float) -> Tensors:
    """The whole definition: floating tensors merged, every other one the base's."""
    mergeable = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return {
        key: add_scaled(tensor, rule(task_vectors(tensor, [m[key] for m in models])), factor)
        if tensor.dtype in mergeable
        else tensor
        for key, tensor in base.items()
    }
