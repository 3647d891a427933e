"""Your own module and your own loss: tasks learned one after another, each absorbed into a running merge."""

import copy
import tempfile

import numpy as np
import torch

import magmax
from magmax.continual.data.datasets import LabelledExamples
from magmax.continual.data.scenarios import class_incremental
from magmax.continual.training.fit import FitSettings, fit

random = np.random.default_rng(0)
labels = random.integers(0, 10, 2000)
points = np.eye(10)[labels] + 0.3 * random.normal(size=(2000, 10))
data = LabelledExamples(list(points.astype(np.float32)), labels)
model = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))


def loss(items: list[np.ndarray], targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(torch.from_numpy(np.stack(items))), targets)


settings = FitSettings(steps=30, learning_rate=1e-2)
with tempfile.TemporaryDirectory() as folder:  # name a folder of your own to go on another day
    running = magmax.Running(f"{folder}/state", "magmax", base=copy.deepcopy(model))
    for number, task in enumerate(class_incremental(range(10), 5)):
        losses = fit(model, data.pick(task.rows(labels)), loss, settings, seed=[0, number])
        running.absorb(model)
        print(f"{task.name}, classes {task.classes}: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    merged = running.result(scaling_factor=0.5)
for name, found in {"last": model, "merged": merged}.items():
    right = found(torch.from_numpy(np.stack(data.items))).argmax(1).numpy() == labels
    print(f"{name}: {right.mean():.1%} of all tasks right, {right[labels < 2].mean():.1%} of the first")
