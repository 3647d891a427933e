"""What the page does, without the page: a preview of any preference, and the exact merge."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from ..calibration.samples import read_samples
from ..continual.context import Context, context
from ..continual.data.datasets import Labelled
from ..continual.models.text_encoder import InBfloat16, TextEncoder
from ..continual.progress import NewBar, no_bars
from ..errors import MagMaxError, listed, nearest
from ..merging.execution.execution_options import Settings
from ..merging.execution.executors import cores
from ..merging.result import Outcome
from ..preference import schedule, uniform
from ..rules import Tunable
from ..rules.statistics import Address
from .preview import Held
from .sources import Source

MAGMAX = "MagMax"
FACTOR = Tunable.scaling_factor
"""The scaling factor to begin with."""
Weights = Sequence[float]
"""One for each task, in their order."""


@dataclass(frozen=True)
class Preview:
    """The accuracy of a merge on the sample: of each task, out of how many examples; and the seconds that it took."""

    tasks: Sequence[float]
    counts: Sequence[int]
    seconds: float

    @property
    def mean(self) -> float:
        return sum(self.tasks) / len(self.tasks)

    def weighed(self, weights: Weights) -> float:
        """The mean over tasks, each as much as it is preferred."""
        return sum(share * weight for share, weight in zip(self.tasks, weights, strict=True)) / sum(weights)


@dataclass(frozen=True)
class Tuner:
    """A run held in memory, with its encoder and a sample of examples.

    Attributes:
        sample: the examples that previews are evaluated on; `samples_from` says where they are from.
        marks: previews to compare with: theta_0, theta_T, and MagMax with its own factor.
    """

    source: Source
    here: Context
    held: Held
    sample: Labelled
    samples_from: str
    marks: Mapping[str, Preview]
    _busy: Lock

    @classmethod
    def open(cls, source: Source, examples: int = 120, samples: Path | None = None, new_bar: NewBar = no_bars) -> Tuner:
        """Read everything, once. `samples` is a CSV with the columns text and label, instead of test examples."""
        here = context(source.experiment, source.seed, new_bar)
        if len(here.tasks) != len(source.names):
            raise MagMaxError(
                f"{source.folder}: has models of {len(source.names)} tasks, and the recipe has {len(here.tasks)}; "
                "finish the training with magmax train, or name the recipe that belongs to it"
            )
        found = own_samples(here, samples) if samples else balanced(here, examples)
        held = Held.read(source.base, source.opened(), tell=new_bar("Reading task vectors"))
        told = str(samples) if samples else "the recipe's test examples"
        tuner, tell, marks = cls(source, here, held, found, told, {}, Lock()), new_bar("Evaluating"), {}
        last = [0.0] * (len(here.tasks) - 1) + [1.0]
        asked = {
            "Zero-shot": (tuner.own, 0.0),
            "Last model": (last, 1.0),
            MAGMAX: (tuner.own, FACTOR),
        }
        for name, (weights, factor) in asked.items():
            marks[name] = tuner.preview(weights, factor)
            tell(len(marks), len(asked))
        return replace(tuner, marks=marks)

    @property
    def own(self) -> list[float]:
        """MagMax's own preference: how many elements it takes from each task."""
        return [float(count) for count in self.held.own]

    @property
    def titles(self) -> list[tuple[str, str]]:
        """Each task's name and what is in it: its classes, if it has its own."""
        apart = len({task.classes for task in self.here.tasks}) > 1
        return [
            (task.name, ", ".join(str(self.here.classes[c]) for c in task.classes) if apart else "all classes")
            for task in self.here.tasks
        ]

    def preview(self, weights: Weights, scaling_factor: float) -> Preview:
        """The accuracy on the sample, under prices that fit a sample of the elements. One at a time."""
        began = time.perf_counter()
        if len(weights) != len(self.source.names) or not sum(weights) > 0:
            raise MagMaxError(f"a preference has one weight for each of {len(self.source.names)} tasks, some above 0")
        with self._busy:
            state = self.here.encoder.model.state_dict()

            def put(at: Address, values: NDArray[Any]) -> None:
                state[at.key].view(-1)[at.offset : at.offset + len(values)].copy_(torch.from_numpy(values))

            self.held.merge(weights, scaling_factor, put, cores())
            row = self.here.row(len(self.here.tasks), self.sample)
        counts = [len(task.rows(self.sample.labels, self.sample.domains)) for task in self.here.tasks]
        return Preview(row.tasks, counts, time.perf_counter() - began)

    def write(self, weights: Weights, scaling_factor: float, out: Path, tell: Callable[[float], None]) -> Outcome:
        """The exact merge as a file, the bytes of `magmax tune`; `tell` hears the share that is done."""
        total = 5 * (self.source.base.nbytes + sum(model.nbytes for model in self.source.opened()))
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            tell(min(1.0, done / total))

        return self.source.job(self.named(weights), scaling_factor, out).run(Settings(progress=progress))

    def recipe(self, weights: Weights, scaling_factor: float) -> str:
        """The merge in words: a recipe for `magmax merge`; of an archive, the command."""
        told = self.source.recipe(self.named(weights), scaling_factor)
        if told is None:
            return self.command(weights, scaling_factor) + "\n"
        return yaml.safe_dump(told, sort_keys=False, width=200)

    def command(self, weights: Weights, scaling_factor: float) -> str:
        """The command that writes the same bytes."""
        return shlex.join(self.source.command(self.named(weights), scaling_factor))

    def named(self, weights: Weights) -> dict[str, float]:
        return dict(zip(self.source.names, map(float, weights), strict=True))

    @property
    def presets(self) -> dict[str, list[float]]:
        """Preferences by name: the usual ones, and those stored in the archive."""
        tasks = len(self.source.names)
        usual = {
            MAGMAX: self.own,
            "Equal": uniform(tasks),
            "Early tasks": schedule(0.5, tasks),
            "Late tasks": schedule(2.0, tasks),
        }
        stored = self.source.archive.presets if self.source.archive else {}
        return usual | {k: [given.get(name, 0.0) for name in self.source.names] for k, given in stored.items()}

    def store(self, name: str, weights: Weights) -> str:
        """Remember a preference in the archive. Raises MagMaxError without one, and for a name that is taken."""
        if self.source.archive is None:
            raise MagMaxError(f"{self.source.folder}: presets are kept in archives; magmax archive makes one")
        name = name.strip()
        if not name or name in self.presets:
            raise MagMaxError(f"a preset needs a name of its own; {name!r} is {'taken' if name else 'none'}")
        self.source.archive.store(name, self.named(weights))
        return name


def balanced(here: Context, examples: int) -> Labelled:
    """Test examples, as many of each task as of every other where there are enough; the same each time."""
    random = np.random.default_rng(0)
    share = max(1, examples // len(here.tasks))
    rows = [random.permutation(task.rows(here.test.labels, here.test.domains))[:share] for task in here.tasks]
    return here.test.pick(np.unique(np.concatenate(rows)))


def own_samples(here: Context, path: Path) -> Labelled:
    """A deployer's own texts, labelled with the names or the numbers of classes.

    Raises MagMaxError for labels that are no class, tasks without a sample, and experiments without texts.
    """
    encoder = here.encoder.encoder if isinstance(here.encoder, InBfloat16) else here.encoder
    if not isinstance(encoder, TextEncoder):
        raise MagMaxError(f"{path}: samples are texts, and the recipe's model takes none; leave out --samples")
    if any(task.domain is not None for task in here.tasks):
        raise MagMaxError(f"{path}: samples have no domain, and the tasks are domains; leave out --samples")
    found = read_samples(path)
    names = [str(name) for name in here.classes]
    numbers = {str(c): c for c in range(len(names))} | {name: c for c, name in enumerate(names)}
    strange = [f"{label!r} is no class; {nearest(label, names)}" for label in set(found.labels) if label not in numbers]
    if strange:
        raise listed(f"{path}: labels are the names of the recipe's classes", sorted(strange))
    labels = np.array([numbers[label] for label in found.labels])
    if lacking := [task.name for task in here.tasks if not len(task.rows(labels))]:
        raise MagMaxError(f"{path}: has no sample of {', '.join(lacking)}; a preview shows every task's accuracy")
    return Labelled(encoder.prepare(found.texts), labels)
