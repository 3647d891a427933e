"""The checkpoints of one chain in memory: what merges of them predict, and the features that they see."""

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
from ...checkpoints.memory import as_tensor
from ...continual.context import Context
from ...continual.data.datasets import Labelled
from ...continual.evaluation.accuracy import likelihoods, predict
from ...merging.execution.execution_options import Settings
from ...merging.in_memory import MergesInMemory
from ...merging.output_options import Options
from ...rules import Average, MagMax, Rule, Tunable
from ..estimators import MOST_SAMPLES, Features
from ..natural_shares import own_shares

Classes = NDArray[np.int64]
BATCH = 64
MOVED_ALONE = (MagMax, Average, Tunable)
"""Rules that tensors which no task moved have no part in."""


class Learned:
    """theta_0 .. theta_T, of which only the tensors that some task moved are held.

    The others decide no merge but of rules that count every entry, such as TIES, whose density is of the whole model:
    for these everything is read from the files.

    Attributes:
        task_of: the task (from 0) of each test example; of held-out training examples `held_task_of`.
    """

    def __init__(self, here: Context, paths: Sequence[Path]) -> None:
        self.here, self.paths = here, paths
        states = [load_file(path) for path in paths]
        self.moved = sorted(k for k in here.base if any(not torch.equal(s[k], here.base[k]) for s in states))
        self.base = open_checkpoint({key: here.base[key] for key in self.moved}, "theta_0")
        self.models: list[Checkpoint] = [
            open_checkpoint({key: state[key] for key in self.moved}, f"theta_{t}", self.base)
            for t, state in enumerate(states, start=1)
        ]
        self.task_of = tasks_of(here, here.test)
        self.held_task_of = tasks_of(here, here.validation)
        self.merges = 0
        self._known: dict[tuple[str, float], tuple[frozenset[int], Classes]] = {}
        self._likely: dict[tuple[str, float], NDArray[np.float64]] = {}
        self._features: dict[int, tuple[Features, Features, Features]] = {}
        here.encoder.model.load_state_dict(here.base)

    @property
    def tasks(self) -> int:
        return len(self.models)

    @cached_property
    def own(self) -> list[float]:
        """MagMax's own shares."""
        return own_shares(self.base, self.models, Settings(threads=1))

    def predicted(self, rule: Rule, factors: Sequence[float], tasks: Sequence[int]) -> list[Classes]:
        """The class of each test example of these tasks, at least, under the merge, for each scaling factor."""
        asked = frozenset(tasks)
        keys = [(repr(rule), factor) for factor in dict.fromkeys(factors)]
        missing = [key for key in keys if not asked <= self._known.get(key, (frozenset[int](),))[0]]
        for key, _ in zip(missing, self.merged(rule, [factor for _, factor in missing]), strict=True):
            self._known[key] = asked, self.seen(self.here.test, np.isin(self.task_of, list(asked)))
        return [self._known[repr(rule), factor][1] for factor in factors]

    def merged(
        self, rule: Rule, factors: Sequence[float], models: Sequence[Checkpoint] | None = None
    ) -> Iterator[None]:
        """Put the merge, of these models or of others, into the encoder, for one scaling factor after another."""
        if not factors:
            return
        self.merges += 1
        base, models = self.base, models or self.models
        if not isinstance(rule, MOVED_ALONE):
            base = open_checkpoint(self.here.base, "theta_0")
            models = [open_checkpoint(path, base=base) for path in self.paths]
        merges = MergesInMemory(rule, base, models, Options(), Settings(threads=1), hold=len(factors) > 1)
        for factor in factors:
            tensors, like = merges.at(factor), self.here.base
            made = {key: as_tensor(tensors[key], base.spec(key), like[key]) for key in self.moved}
            self.here.encoder.model.load_state_dict(made, strict=False)
            yield

    def put(self, task: int) -> None:
        """Put theta_task (from 0, the pre-trained model) into the encoder."""
        state = self.here.base if task == 0 else load_file(self.paths[task - 1])
        self.here.encoder.model.load_state_dict({key: state[key] for key in self.moved}, strict=False)

    def seen(self, data: Labelled, rows: NDArray[np.bool_]) -> Classes:
        """The class that the encoder, as it is, finds for these rows among all; -1 for the others."""
        found = np.full(len(data), -1)
        some = np.flatnonzero(rows)
        if len(some):
            found[some] = predict(self.here.encoder, self.here.head, [data.items[row] for row in some.tolist()])
        return found

    def likelihoods(self, data: Labelled, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The probability that the encoder, as it is, gives to the right class of each of these rows."""
        return likelihoods(self.here.encoder, self.here.head, [data.items[row] for row in rows], data.labels[rows])

    def likelihoods_of_all(self, rule: Rule, factor: float) -> NDArray[np.float64]:
        """The same of a merge, for all test examples; asked again, it is known."""
        key = repr(rule), factor
        if key not in self._likely:
            everything = np.arange(len(self.here.test))
            (self._likely[key],) = [self.likelihoods(self.here.test, everything) for _ in self.merged(rule, [factor])]
        return self._likely[key]

    def features(self, task: int) -> tuple[Features, Features, Features]:
        """Under theta_task's own encoder (tasks from 0): features of its training, of test and of held-out examples."""
        if task not in self._features:
            self.put(task + 1)
            train = self.here.train
            own = self.here.tasks[task].rows(train.labels, train.domains)
            own = np.random.default_rng([self.here.seed, task]).permutation(own)[:MOST_SAMPLES]
            items = ([train.items[row] for row in own], self.here.test.items, self.here.validation.items)
            self._features[task] = self._seen_as(items[0]), self._seen_as(items[1]), self._seen_as(items[2])
        return self._features[task]

    def _seen_as(self, items: Sequence[Any]) -> Features:
        encoder = self.here.encoder
        encoder.model.eval()
        order = np.argsort([np.size(item) for item in items], kind="stable")
        with torch.inference_mode():
            parts = [encoder([items[i] for i in order[at : at + BATCH]]) for at in range(0, len(order), BATCH)]
        return torch.cat(parts).float().cpu().numpy()[np.argsort(order)]


def tasks_of(here: Context, data: Labelled) -> NDArray[np.int64]:
    """The task (from 0) of each example; -1 for those of none."""
    found = np.full(len(data), -1)
    for number, task in enumerate(here.tasks):
        found[task.rows(data.labels, data.domains)] = number
    return found
