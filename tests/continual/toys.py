"""An experiment that trains in milliseconds: a linear encoder, blobs of numbers, and a recipe that names both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from magmax.continual.data.datasets import Dataset, LabelledExamples

WIDTH, CLASSES = 6, 6


@dataclass(frozen=True)
class ToyEncoder:
    """Two layers, and a third part that no loss depends on, as a BERT has a pooler."""

    model: nn.Module

    def prepare(self, items: Sequence[Any], tell: Any = None) -> Sequence[Any]:
        return items

    def __call__(self, items: Sequence[Any]) -> Tensor:
        weight = next(self.model.parameters())
        return nn.functional.normalize(self.model[:3](torch.from_numpy(np.stack(items)).to(weight)), dim=-1)


def encoder(seed: int = 0) -> ToyEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH), nn.Dropout(0.5), nn.Linear(3, 3)
        return ToyEncoder(nn.Sequential(*layers))


def batch_norm_encoder(seed: int = 0) -> ToyEncoder:
    """With batch normalisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ToyEncoder(nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.Linear(16, WIDTH)))


def blobs(per_class: int = 20, noise: float = 0.7, domains: int = 1) -> Dataset:
    """Class c lies around the axis c; domain d is a little elsewhere."""

    def drawn(seed: int) -> LabelledExamples:
        random = np.random.default_rng(seed)
        labels = np.arange(per_class * CLASSES) % CLASSES
        places = np.arange(len(labels)) % domains
        items = np.eye(CLASSES)[labels] * 2 + noise * random.normal(size=(len(labels), WIDTH)) + 0.3 * places[:, None]
        return LabelledExamples(list(items.astype(np.float32)), labels, places)

    return Dataset(drawn(1), drawn(2), [f"class {c}" for c in range(CLASSES)], [f"domain {d}" for d in range(domains)])


def head(encoder: ToyEncoder, dataset: Dataset, temperature: float = 8.0) -> Tensor:
    rows = torch.from_numpy(np.random.default_rng(3).normal(size=(len(dataset.classes), WIDTH))).float()
    return temperature * nn.functional.normalize(rows, dim=-1)


RECIPE: dict[str, Any] = {
    "data": "toy_blobs",
    "model": "toy_encoder",
    "head": "toy_head",
    "scenario": {"class_incremental": {"tasks": 3}},
    "fit": {"steps": 12, "batch": 8, "learning_rate": 0.02},
    "seeds": [0, 1],
    "training": ["sequential", "independent"],
    "rules": ["average", "magmax"],
}


def write_recipe(path: Path, **changes: Any) -> Path:
    """The recipe as a file, with changes."""
    import yaml

    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path
