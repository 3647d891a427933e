"""The checkpoints of one training in memory: what merges of them predict, and the features that they see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from ...checkpoints import Checkpoint, open_checkpoint
from ...checkpoints.memory import to_tensor
from ...continual.context import ExperimentContext
from ...continual.data.datasets import LabelledExamples
from ...continual.evaluation.accuracy import likelihoods, predict
from ...merging.execution.execution_options import ExecutionOptions
from ...merging.in_memory import InMemoryMerges
from ...merging.output_options import OutputOptions
from ...rules import Average, MagMax, Rule, Tunable
from ..estimators import MAX_SAMPLES, Features
from ..natural_shares import natural_shares

ClassIds = NDArray[np.int64]
BATCH_SIZE = 64
CHANGED_TENSOR_RULES = (MagMax, Average, Tunable)
"""Rules that tensors which no task moved have no part in."""


class TrainedModels:
    """theta_0 .. theta_T, of which only the tensors that some task moved are held.

    The others decide no merge but of rules that count every entry, such as TIES, whose density is of the whole model:
    for these everything is read from the files.

    Attributes:
        test_task_ids: the task (from 0) of each test example; of held-out training examples `validation_task_ids`.
    """

    def __init__(self, context: ExperimentContext, paths: Sequence[Path]) -> None:
        self.context, self.paths = context, paths
        states = [load_file(path) for path in paths]
        self.changed_keys = sorted(
            k for k in context.base if any(not torch.equal(s[k], context.base[k]) for s in states)
        )
        self.base = open_checkpoint({key: context.base[key] for key in self.changed_keys}, "theta_0")
        self.models: list[Checkpoint] = [
            open_checkpoint({key: state[key] for key in self.changed_keys}, f"theta_{t}", self.base)
            for t, state in enumerate(states, start=1)
        ]
        self.test_task_ids = assign_tasks(context, context.test)
        self.validation_task_ids = assign_tasks(context, context.validation)
        self.merge_count = 0
        self._prediction_cache: dict[tuple[str, float], tuple[frozenset[int], ClassIds]] = {}
        self._likelihood_cache: dict[tuple[str, float], NDArray[np.float64]] = {}
        self._feature_cache: dict[int, tuple[Features, Features, Features]] = {}
        context.encoder.model.load_state_dict(context.base)

    @property
    def num_tasks(self) -> int:
        return len(self.models)

    @cached_property
    def magmax_shares(self) -> list[float]:
        """MagMax's own shares."""
        return natural_shares(self.base, self.models, ExecutionOptions(threads=1))

    def predict(self, rule: Rule, factors: Sequence[float], tasks: Sequence[int]) -> list[ClassIds]:
        """The class of each test example of these tasks, at least, under the merge, for each scaling factor."""
        asked = frozenset(tasks)
        keys = [(repr(rule), factor) for factor in dict.fromkeys(factors)]
        missing = [key for key in keys if not asked <= self._prediction_cache.get(key, (frozenset[int](),))[0]]
        for key, _ in zip(missing, self.load_merges(rule, [factor for _, factor in missing]), strict=True):
            self._prediction_cache[key] = (
                asked,
                self.predict_rows(self.context.test, np.isin(self.test_task_ids, list(asked))),
            )
        return [self._prediction_cache[repr(rule), factor][1] for factor in factors]

    def load_merges(
        self, rule: Rule, factors: Sequence[float], models: Sequence[Checkpoint] | None = None
    ) -> Iterator[None]:
        """Put the merge, of these models or of others, into the encoder, for one scaling factor after another."""
        if not factors:
            return
        self.merge_count += 1
        base, models = self.base, models or self.models
        if not isinstance(rule, CHANGED_TENSOR_RULES):
            base = open_checkpoint(self.context.base, "theta_0")
            models = [open_checkpoint(path, base=base) for path in self.paths]
        merges = InMemoryMerges(rule, base, models, OutputOptions(), ExecutionOptions(threads=1), hold=len(factors) > 1)
        for factor in factors:
            tensors, like = merges.merge_at(factor), self.context.base
            merged = {key: to_tensor(tensors[key], base.spec(key), like[key]) for key in self.changed_keys}
            self.context.encoder.model.load_state_dict(merged, strict=False)
            yield

    def load_checkpoint(self, task: int) -> None:
        """Put theta_task (from 0, the pre-trained model) into the encoder."""
        state = self.context.base if task == 0 else load_file(self.paths[task - 1])
        self.context.encoder.model.load_state_dict({key: state[key] for key in self.changed_keys}, strict=False)

    def predict_rows(self, data: LabelledExamples, rows: NDArray[np.bool_]) -> ClassIds:
        """The class that the encoder, as it is, finds for these rows among all; -1 for the others."""
        predictions = np.full(len(data), -1)
        some = np.flatnonzero(rows)
        if len(some):
            predictions[some] = predict(
                self.context.encoder, self.context.head, [data.items[row] for row in some.tolist()]
            )
        return predictions

    def likelihoods(self, data: LabelledExamples, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The probability that the encoder, as it is, gives to the right class of each of these rows."""
        return likelihoods(
            self.context.encoder, self.context.head, [data.items[row] for row in rows], data.labels[rows]
        )

    def test_likelihoods(self, rule: Rule, factor: float) -> NDArray[np.float64]:
        """The same of a merge, for all test examples; asked again, it is known."""
        key = repr(rule), factor
        if key not in self._likelihood_cache:
            everything = np.arange(len(self.context.test))
            (self._likelihood_cache[key],) = [
                self.likelihoods(self.context.test, everything) for _ in self.load_merges(rule, [factor])
            ]
        return self._likelihood_cache[key]

    def task_features(self, task: int) -> tuple[Features, Features, Features]:
        """Under theta_task's own encoder (tasks from 0): features of its training, of test and of held-out examples."""
        if task not in self._feature_cache:
            self.load_checkpoint(task + 1)
            train = self.context.train
            task_rows = self.context.tasks[task].rows(train.labels, train.domains)
            task_rows = np.random.default_rng([self.context.seed, task]).permutation(task_rows)[:MAX_SAMPLES]
            items = ([train.items[row] for row in task_rows], self.context.test.items, self.context.validation.items)
            self._feature_cache[task] = self._encode(items[0]), self._encode(items[1]), self._encode(items[2])
        return self._feature_cache[task]

    def _encode(self, items: Sequence[Any]) -> Features:
        encoder = self.context.encoder
        encoder.model.eval()
        order = np.argsort([np.size(item) for item in items], kind="stable")
        with torch.inference_mode():
            parts = [
                encoder([items[i] for i in order[at : at + BATCH_SIZE]]) for at in range(0, len(order), BATCH_SIZE)
            ]
        return torch.cat(parts).float().cpu().numpy()[np.argsort(order)]


def assign_tasks(context: ExperimentContext, data: LabelledExamples) -> NDArray[np.int64]:
    """The task (from 0) of each example; -1 for those of none."""
    task_ids = np.full(len(data), -1)
    for number, task in enumerate(context.tasks):
        task_ids[task.rows(data.labels, data.domains)] = number
    return task_ids
