"""What every part of an experiment needs: data, encoder, head and tasks, built once in a process."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import registry
from .data.datasets import Dataset, LabelledExamples
from .data.scenarios import Task
from .evaluation.accuracy import AccuracyRow, logits_of, score
from .experiment import Experiment
from .models.text_encoder import Bfloat16Encoder, Encoder
from .progress import BarFactory, no_bars
from .training.fit import FitSettings
from .training.penalties import PENALTIES
from .training.sequence import TrainingMethod


@dataclass(frozen=True)
class ExperimentContext:
    """One seed of an experiment. The encoder has the weights of whoever used it last; `base` are theta_0's.

    `classes` are the names of the classes.
    """

    experiment: Experiment
    seed: int
    encoder: Encoder
    head: Tensor
    base: dict[str, Tensor]
    train: LabelledExamples
    validation: LabelledExamples
    test: LabelledExamples
    tasks: tuple[Task, ...]
    classes: Sequence[str]

    def row(self, learned: int, data: LabelledExamples | None = None) -> AccuracyRow:
        """The row of R of the encoder as it is, after so many tasks; on the data that the recipe says, or on others."""
        data = data or (self.test if self.experiment.measure_on == "test" else self.validation)
        logits = logits_of(self.encoder, self.head, data.items)
        return score(logits, data, self.tasks, learned, self.experiment.among)

    def some_training_items(self, count: int = 256) -> list[Any]:
        """Training examples of all tasks, drawn from the seed."""
        order = np.random.default_rng(self.seed).permutation(len(self.train))
        return [self.train.items[row] for row in order[:count].tolist()]

    def tasks_of(self, training: str) -> tuple[Task, ...]:
        """The tasks that a training trains on: all in one for "joint"."""
        if training != "joint":
            return self.tasks
        classes = tuple(dict.fromkeys(c for task in self.tasks for c in task.classes))
        return (Task("All tasks", classes),)

    def training_method(self, training: str) -> TrainingMethod:
        """How a training trains."""
        options = self.experiment.training_choices[training]
        settings = FitSettings(**self.experiment.fit.model_dump())
        shared = {"save_every": self.experiment.save_every, "parallel": self.experiment.parallel}
        if training == "joint":
            steps = options["steps"] or settings.steps * len(self.tasks)
            return TrainingMethod(replace(settings, steps=steps), **shared)
        return TrainingMethod(
            settings,
            start="base" if training == "independent" else "previous",
            penalty=(lambda: PENALTIES[training](**options)) if training in PENALTIES else None,
            replay=options.get("per_class", 0),
            balanced=options.get("balanced", True),
            **shared,
        )


def build_context(experiment: Experiment, seed: int, new_bar: BarFactory = no_bars) -> ExperimentContext:
    """Build what the recipe names; data, encoder and heads are kept for the next call with the same names.

    The head is made without the validation examples.
    """
    with registry.code_from(experiment.code_folder):
        return _build_context(experiment, seed, new_bar)


def _build_context(experiment: Experiment, seed: int, new_bar: BarFactory) -> ExperimentContext:
    raw, dataset, encoder, base, heads = _build_parts(
        json.dumps([experiment.data, experiment.model, str(experiment.code_folder)], sort_keys=True), new_bar
    )
    encoder.model.load_state_dict(base)
    of_head = json.dumps([experiment.head, experiment.validation, seed], sort_keys=True)
    if of_head not in heads:
        rest = replace(raw, train=hold_out(raw.train, experiment.validation, seed)[0])
        heads[of_head] = registry.build("head", experiment.head, encoder, rest)
    tasks = tuple(registry.build("scenario", experiment.scenario, dataset, seed))
    train, validation = hold_out(dataset.train, experiment.validation, seed)
    used = Bfloat16Encoder(encoder) if experiment.precision == "bfloat16" else encoder
    head, classes = heads[of_head], raw.classes
    return ExperimentContext(experiment, seed, used, head, base, train, validation, dataset.test, tasks, classes)


def hold_out(data: LabelledExamples, per_class: int, seed: int) -> tuple[LabelledExamples, LabelledExamples]:
    """The data without, and only, so many random examples of each class (in each domain), at most half of them."""
    random = np.random.default_rng(seed)
    held = np.zeros(len(data), dtype=bool)
    domains = np.zeros(len(data), dtype=int) if data.domains is None else data.domains
    for c, domain in np.unique(np.stack([data.labels, domains]), axis=1).T:
        candidates = random.permutation(np.flatnonzero((data.labels == c) & (domains == domain)))
        held[candidates[: min(per_class, len(candidates) // 2)]] = True
    return data.pick(np.flatnonzero(~held)), data.pick(np.flatnonzero(held))


def device() -> str:
    """Return where models run: the accelerator, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


context_lock = threading.Lock()
"""A process has one encoder, whose weights a job changes; the threads of a Dask worker take turns."""

_cache: dict[str, Any] = {}


def _build_parts(
    parts: str, new_bar: BarFactory
) -> tuple[Dataset, Dataset, Encoder, dict[str, Tensor], dict[str, Tensor]]:
    """The data as they come, as the encoder takes them, the encoder, theta_0, and the heads made so far."""
    if parts not in _cache:
        data, model, _ = json.loads(parts)
        dataset: Dataset = registry.build("data", data)
        encoder: Encoder = registry.build("model", model)
        encoder.model.to(device())
        ready = replace(
            dataset,
            train=replace(dataset.train, items=encoder.prepare(dataset.train.items, new_bar("Reading training data"))),
            test=replace(dataset.test, items=encoder.prepare(dataset.test.items, new_bar("Reading test data"))),
        )
        base = {key: tensor.detach().cpu().clone() for key, tensor in encoder.model.state_dict().items()}
        _cache.clear()
        _cache[parts] = dataset, ready, encoder, base, {}
    return _cache[parts]
