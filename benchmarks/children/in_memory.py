"""The plain in-memory way: load every state dict, fold them with torch.where, save."""

from pathlib import Path

import torch
from child import read_job, run_timed
from safetensors.torch import load_file, save_file

SCALING_FACTOR = 0.5


def files(path: str) -> list[Path]:
    return [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*.safetensors"))


def load(path: str) -> dict[str, torch.Tensor]:
    return {name: tensor for file in files(path) for name, tensor in load_file(file).items()}


def merge(base: dict[str, torch.Tensor], models: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    merged = {}
    for name, start in base.items():
        best = models[0][name] - start
        for model in models[1:]:
            vector = model[name] - start
            best = torch.where(vector.abs() >= best.abs(), vector, best)
        merged[name] = start + SCALING_FACTOR * best
    return merged


def save(merged: dict[str, torch.Tensor], base: str, out: Path) -> None:
    """One file for a one-file base; for a folder the same shards as the base has."""
    if Path(base).is_file():
        save_file(merged, out)
        return
    out.mkdir()
    for file in files(base):
        save_file({name: merged[name] for name in load_file(file)}, out / file.name)


def run(base: str, models: list[str], out: Path) -> None:
    save(merge(load(base), [load(model) for model in models]), base, out)


if __name__ == "__main__":
    task = read_job()
    run_timed(lambda: run(task["base"], task["models"], Path(task["out"])))
