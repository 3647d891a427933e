"""What the page does, without the page: a preview of any preference, and the exact merge."""

from __future__ import annotations

import math
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
from ..continual.context import ExperimentContext, build_context
from ..continual.data.datasets import LabelledExamples
from ..continual.models.text_encoder import Bfloat16Encoder, TextEncoder
from ..continual.progress import BarFactory, no_bars
from ..errors import MagMaxError, list_problems, nearest_hint
from ..merging.execution.execution_options import ExecutionOptions
from ..merging.execution.executors import available_cores
from ..merging.result import MergeResult
from ..preference import geometric_weights, uniform_weights
from ..rules import Tunable
from ..rules.statistics import Address
from .preview import PreviewMerges
from .sources import RunSource

MAGMAX_PRESET = "MagMax"
DEFAULT_FACTOR = Tunable.scaling_factor
"""The scaling factor to begin with."""
Z_95 = 1.959963984540054
"""The normal quantile of 95 % intervals."""
Weights = Sequence[float]
"""One for each task, in their order."""


@dataclass(frozen=True)
class Preview:
    """The accuracy of a merge on the sample: of each task, out of how many examples; and the seconds that it took."""

    task_accuracies: Sequence[float]
    example_counts: Sequence[int]
    seconds: float

    @property
    def mean(self) -> float:
        return self.weighted_mean([1.0] * len(self.task_accuracies))

    def weighted_mean(self, weights: Weights) -> float:
        """The mean over tasks, each as much as it is preferred."""
        return sum(share * weight for share, weight in zip(self.task_accuracies, weights, strict=True)) / sum(weights)

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """The 95 % interval of each task's accuracy, for other examples of the same kind."""
        return [wilson_interval(*pair) for pair in zip(self.task_accuracies, self.example_counts, strict=True)]

    def mean_interval(self, weights: Weights) -> tuple[float, float]:
        """The 95 % interval of the weighted mean: the distances of the tasks' limits, added as those of sums are.

        From Zou and Donner, "Construction of confidence limits about effect measures" (2008).
        """
        mean, total = self.weighted_mean(weights), sum(weights)
        below = above = 0.0
        for share, weight, (low, high) in zip(self.task_accuracies, weights, self.intervals, strict=True):
            below += (weight * (share - low)) ** 2
            above += (weight * (high - share)) ** 2
        return mean - math.sqrt(below) / total, mean + math.sqrt(above) / total


@dataclass(frozen=True)
class TunerModel:
    """A run held in memory, with its encoder and a sample of examples.

    Attributes:
        examples: the examples that previews are evaluated on; `examples_source` says where they are from.
        reference_previews: previews to compare with: theta_0, theta_T, and MagMax with its own factor.
    """

    source: RunSource
    context: ExperimentContext
    merges: PreviewMerges
    examples: LabelledExamples
    examples_source: str
    reference_previews: Mapping[str, Preview]
    _encoder_lock: Lock

    @classmethod
    def open(
        cls, source: RunSource, num_examples: int = 120, samples: Path | None = None, new_bar: BarFactory = no_bars
    ) -> TunerModel:
        """Read everything, once. `samples` is a CSV with the columns text and label, instead of validation examples.

        Raises MagMaxError where there is nothing to choose a preference on: test examples are for reporting, and what
        is chosen on them looks better than it is.
        """
        if samples is None and not source.experiment.validation:
            raise MagMaxError(
                f"{source.folder}: its recipe holds out no validation examples, and a preference is not chosen on test "
                "examples; give texts of your own with --samples FILE.csv, or train with validation=10"
            )
        context = build_context(source.experiment, source.seed, new_bar)
        if len(context.tasks) != len(source.task_names):
            raise MagMaxError(
                f"{source.folder}: has models of {len(source.task_names)} tasks, and the recipe has "
                f"{len(context.tasks)}; "
                "finish the training with magmax train, or name the recipe that belongs to it"
            )
        examples = user_samples(context, samples) if samples else balanced_examples(context, num_examples)
        merges = PreviewMerges.read(source.base, source.open_models(), progress=new_bar("Reading task vectors"))
        origin = str(samples) if samples else "validation examples, which nothing was trained on"
        tuner, tell, marks = cls(source, context, merges, examples, origin, {}, Lock()), new_bar("Evaluating"), {}
        last = [0.0] * (len(context.tasks) - 1) + [1.0]
        asked = {
            "Zero-shot": (tuner.natural_counts, 0.0),
            "Last model": (last, 1.0),
            MAGMAX_PRESET: (tuner.natural_counts, DEFAULT_FACTOR),
        }
        for name, (weights, factor) in asked.items():
            marks[name] = tuner.preview(weights, factor)
            tell(len(marks), len(asked))
        return replace(tuner, reference_previews=marks)

    @property
    def natural_counts(self) -> list[float]:
        """MagMax's own preference: how many elements it takes from each task."""
        return [float(count) for count in self.merges.natural_counts]

    @property
    def task_titles(self) -> list[tuple[str, str]]:
        """Each task's name and what is in it: its classes, if it has its own."""
        apart = len({task.classes for task in self.context.tasks}) > 1
        return [
            (task.name, ", ".join(str(self.context.classes[c]) for c in task.classes) if apart else "all classes")
            for task in self.context.tasks
        ]

    def preview(self, weights: Weights, scaling_factor: float) -> Preview:
        """The accuracy on the sample, under prices that fit a sample of the elements. One at a time."""
        began = time.perf_counter()
        if len(weights) != len(self.source.task_names) or not sum(weights) > 0:
            raise MagMaxError(
                f"a preference has one weight for each of {len(self.source.task_names)} tasks, some above 0"
            )
        with self._encoder_lock:
            state = self.context.encoder.model.state_dict()

            def put(at: Address, values: NDArray[Any]) -> None:
                state[at.key].view(-1)[at.offset : at.offset + len(values)].copy_(torch.from_numpy(values))

            self.merges.merge(weights, scaling_factor, put, available_cores())
            row = self.context.row(len(self.context.tasks), self.examples)
        counts = [len(task.rows(self.examples.labels, self.examples.domains)) for task in self.context.tasks]
        return Preview(row.tasks, counts, time.perf_counter() - began)

    def write_merge(
        self, weights: Weights, scaling_factor: float, out: Path, progress: Callable[[float], None]
    ) -> MergeResult:
        """The exact merge as a file, the bytes of `magmax tune`; `tell` hears the share that is done."""
        total = 5 * (self.source.base.nbytes + sum(model.nbytes for model in self.source.open_models()))
        done = 0

        def count_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress(min(1.0, done / total))

        return self.source.build_job(self.weights_by_task(weights), scaling_factor, out).run(
            ExecutionOptions(progress=count_bytes)
        )

    def recipe(self, weights: Weights, scaling_factor: float) -> str:
        """The merge in words: a recipe for `magmax merge`; of an archive, the command."""
        recipe = self.source.build_recipe(self.weights_by_task(weights), scaling_factor)
        if recipe is None:
            return self.command(weights, scaling_factor) + "\n"
        return yaml.safe_dump(recipe, sort_keys=False, width=200)

    def command(self, weights: Weights, scaling_factor: float) -> str:
        """The command that writes the same bytes."""
        return shlex.join(self.source.cli_arguments(self.weights_by_task(weights), scaling_factor))

    def weights_by_task(self, weights: Weights) -> dict[str, float]:
        return dict(zip(self.source.task_names, map(float, weights), strict=True))

    @property
    def presets(self) -> dict[str, list[float]]:
        """Preferences by name: the usual ones, and those stored in the archive."""
        tasks = len(self.source.task_names)
        usual = {
            MAGMAX_PRESET: self.natural_counts,
            "Equal": uniform_weights(tasks),
            "Early tasks": geometric_weights(0.5, tasks),
            "Late tasks": geometric_weights(2.0, tasks),
        }
        stored = self.source.archive.presets if self.source.archive else {}
        return usual | {
            k: [weights_by_task.get(name, 0.0) for name in self.source.task_names]
            for k, weights_by_task in stored.items()
        }

    def store_preset(self, name: str, weights: Weights) -> str:
        """Remember a preference in the archive. Raises MagMaxError without one, and for a name that is taken."""
        if self.source.archive is None:
            raise MagMaxError(f"{self.source.folder}: presets are kept in archives; magmax archive create makes one")
        name = name.strip()
        if not name or name in self.presets:
            raise MagMaxError(f"a preset needs a name of its own; {name!r} is {'taken' if name else 'none'}")
        self.source.archive.save_preset(name, self.weights_by_task(weights))
        return name


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion that was `share` in `count` examples, after Wilson.

    >>> [round(limit, 3) for limit in wilson_interval(0.5, 24)]
    [0.314, 0.686]
    """
    square = Z_95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def balanced_examples(context: ExperimentContext, num_examples: int) -> LabelledExamples:
    """Validation examples, as many of each task as of every other where there are enough; the same each time.

    Raises MagMaxError for a task that has none.
    """
    random, held = np.random.default_rng(0), context.validation
    share = max(1, num_examples // len(context.tasks))
    rows = [random.permutation(task.rows(held.labels, held.domains))[:share] for task in context.tasks]
    if lacking := [task.name for task, chosen in zip(context.tasks, rows, strict=True) if not len(chosen)]:
        raise MagMaxError(f"no validation example of {', '.join(lacking)}; train with a larger validation")
    return held.pick(np.unique(np.concatenate(rows)))


def user_samples(context: ExperimentContext, path: Path) -> LabelledExamples:
    """A deployer's own texts, labelled with the names or the numbers of classes.

    Raises MagMaxError for labels that are no class, tasks without a sample, and experiments without texts.
    """
    encoder = context.encoder.encoder if isinstance(context.encoder, Bfloat16Encoder) else context.encoder
    if not isinstance(encoder, TextEncoder):
        raise MagMaxError(f"{path}: samples are texts, and the recipe's model takes none; leave out --samples")
    if any(task.domain is not None for task in context.tasks):
        raise MagMaxError(f"{path}: samples have no domain, and the tasks are domains; leave out --samples")
    samples = read_samples(path)
    names = [str(name) for name in context.classes]
    numbers = {str(c): c for c in range(len(names))} | {name: c for c, name in enumerate(names)}
    strange = [
        f"{label!r} is no class; {nearest_hint(label, names)}" for label in set(samples.labels) if label not in numbers
    ]
    if strange:
        raise list_problems(f"{path}: labels are the names of the recipe's classes", sorted(strange))
    labels = np.array([numbers[label] for label in samples.labels])
    if lacking := [task.name for task in context.tasks if not len(task.rows(labels))]:
        raise MagMaxError(f"{path}: has no sample of {', '.join(lacking)}; a preview shows every task's accuracy")
    return LabelledExamples(encoder.prepare(samples.texts), labels)
