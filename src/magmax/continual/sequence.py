"""Fine-tuning on task after task, keeping the weights after each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from magmax.continual.data import Labelled
from magmax.continual.encoder import Encoder
from magmax.continual.fit import FitSettings, fit
from magmax.continual.progress import NewBar, no_bars
from magmax.continual.scenario import Task
from magmax.continual.weights import load_weights, read_metadata, save_weights


def fine_tune(
    encoder: Encoder,
    head: Tensor,
    data: Labelled,
    tasks: Sequence[Task],
    settings: FitSettings,
    folder: Path,
    *,
    seed: int,
    start: Literal["previous", "base"] = "previous",
    new_bar: NewBar = no_bars,
) -> list[Path]:
    """Fine-tunes on each task in turn, under the head's rows of that task alone; returns theta_0 .. theta_T.

    Each theta_t is a safetensors file in the folder. Task t starts at theta_{t-1} ("previous": sequential
    fine-tuning) or at theta_0 ("base": independent). A file says what it was made from: weights, head, texts,
    tasks, settings and seed. Where all are the same it is used again: a killed run goes on after its last
    finished task, a changed one starts afresh. The encoder is left with some task's weights.
    """
    recipe = _recipe(encoder, head, settings, seed=seed, start=start)
    paths = [folder / f"theta_{t}.safetensors" for t in range(len(tasks) + 1)]
    if read_metadata(paths[0]) != _made(recipe):
        save_weights(encoder.model, paths[0], _made(recipe))
    for t, task in enumerate(tasks, start=1):
        part = data.pick(task.rows(data.labels))
        recipe[f"task {t}"] = [list(task.classes), _digest(part.labels, *map(np.asarray, part.items))]
        tell = new_bar(f"Fine-tuning on {task.name.lower()} of {len(tasks)}")
        if read_metadata(paths[t]) == _made(recipe):
            tell(settings.steps, settings.steps, "kept from an earlier run")
            continue
        load_weights(encoder.model, paths[t - 1] if start == "previous" else paths[0])
        own_head, targets = head[list(task.classes)], task.targets(part.labels)
        fit(encoder, own_head, part.items, targets, settings, [seed, t], tell)
        save_weights(encoder.model, paths[t], _made(recipe))
    return paths


def _recipe(encoder: Encoder, head: Tensor, settings: FitSettings, **choices: object) -> dict[str, object]:
    """Everything but the tasks that decides the weights; a digest where it is long."""
    weights = encoder.model.state_dict()
    return {
        "settings": asdict(settings),
        "trained": [key for key, weight in encoder.model.named_parameters() if weight.requires_grad],
        "base": _digest(*(weights[key].detach().cpu().float().numpy() for key in sorted(weights))),
        "head": _digest(head.detach().cpu().numpy()),
        **choices,
    }


def _digest(*arrays: np.ndarray) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _made(recipe: Mapping[str, object]) -> dict[str, str]:
    return {"made_from": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()}
