"""The other questions to one training: control curves, how many samples a preference needs, what an archive loses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...checkpoints import open_checkpoint
from ...checkpoints.output_paths import delete_output
from ...merging.execution.execution_options import ExecutionOptions
from ...rules import Tunable
from ..archive import Archive
from ..archive_writer import write_archive
from ..estimators import geometric_weights, uniform_weights
from ..mixtures import TargetEnvironment
from .environments_config import mixture_shares
from .scores import EnvironmentScorer, ResultRow, accuracy_by_task
from .target_texts import VALIDATION, EnvironmentTarget
from .trained_models import TrainedModels


def measure_curves(measurer: EnvironmentScorer) -> list[ResultRow]:
    """The accuracy on every task under schedules, and under growing weights of one task."""
    words, learned = measurer.config.curves, measurer.evaluator
    assert words is not None
    everything = range(learned.num_tasks)
    preferences = [("schedule", 0, a, geometric_weights(a, learned.num_tasks)) for a in words.schedule]
    places = sorted({round(place) for place in np.linspace(0, learned.num_tasks - 1, words.tasks)})
    preferences += [
        ("weight", task + 1, weight, single_task_weights(weight, task, learned.num_tasks))
        for task in places
        for weight in words.weights
    ]
    rows: list[ResultRow] = []
    for curve, task, x, weights in preferences:
        rule = Tunable(preference=weights, seed=learned.context.seed)
        predictions = learned.predict(rule, list(measurer.factor_variants.values()), everything)
        for (variant, factor), classes in zip(measurer.factor_variants.items(), predictions, strict=True):
            shares = accuracy_by_task(classes == measurer.labels, learned.test_task_ids, everything)
            row = {"curve": curve, "task": task, "x": x, "variant": variant, "scaling_factor": factor}
            rows.append({**row, "weights": list(weights), "tasks": shares})
    return rows


def single_task_weights(weight: float, task: int, num_tasks: int) -> list[float]:
    """So much weight on one task (from 0), the rest shared evenly by the others."""
    if num_tasks == 1:
        return [1.0]
    return [weight if t == task else (1 - weight) / (num_tasks - 1) for t in range(num_tasks)]


def measure_sample_counts(measurer: EnvironmentScorer) -> list[ResultRow]:
    """Accuracy of preferences that were made of so many target samples a task."""
    words, study = measurer.config.samples, measurer.config
    assert words is not None
    rows: list[ResultRow] = []
    for number, name in enumerate(study.mixtures):
        for environment in (measurer.draw_environment(name, draw) for draw in range(words.draws)):
            drawn = np.random.default_rng([measurer.evaluator.context.seed, number, environment.draw])
            order = draw_validation_rows(measurer.evaluator, environment, mixture_shares(name), drawn)
            for per_task in words.per_task:
                target = EnvironmentTarget(measurer.evaluator, VALIDATION, order[: per_task * len(environment.tasks)])
                for source in words.sources:
                    if source == "auto" and len(target.rows) < 2:
                        continue
                    preference = measurer.compute_preference(source, target, environment.draw)
                    tried = measurer.tunable_results(source, preference, environment, ["optimal"])
                    told = {"per_task": per_task, "samples": len(target.rows)}
                    rows += [{**row, **told} for row in measurer.score_results(environment, tried)]
    return rows


def draw_validation_rows(
    evaluator: TrainedModels, environment: TargetEnvironment, shares: Sequence[float], random: np.random.Generator
) -> NDArray[np.int64]:
    """Held-out training examples in a random order, each drawn from a task of the mixture's chance, as long as it has.

    The first n are n samples of the mixture, so that a larger sample holds the smaller ones.
    """
    left = {
        task: random.permutation(np.flatnonzero(evaluator.validation_task_ids == task)).tolist()
        for task in environment.tasks
    }
    order: list[int] = []
    while all(left.values()):
        order.append(left[environment.tasks[int(random.choice(len(shares), p=np.asarray(shares)))]].pop())
    return np.array(order, dtype=np.int64)


def measure_archives(measurer: EnvironmentScorer, scratch: Path) -> list[ResultRow]:
    """Each archive against the models: bytes, seconds to make and to merge from, accuracy under some preferences."""
    words, learned = measurer.config.archive, measurer.evaluator
    assert words is not None
    base = open_checkpoint(learned.paths[0].with_name("theta_0.safetensors"))
    rows: list[ResultRow] = []
    for top in words.top:
        for bits in words.bits:
            delete_output(scratch)
            began = time.perf_counter()
            names = [f"task {t}" for t in range(1, learned.num_tasks + 1)]
            models = [open_checkpoint(path, base=base) for path in learned.paths]
            written = write_archive(
                base, models, names, scratch, top=top, bits=bits, execution=ExecutionOptions(threads=1)
            )
            making = time.perf_counter() - began
            size = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
            told = {"top": top, "bits": bits, "bytes": size, "model_bytes": base.nbytes, "making": round(making, 3)}
            rows += [{**told, **row} for row in _archive_results(measurer, written)]
            delete_output(scratch)
    return rows


def _archive_results(measurer: EnvironmentScorer, archive: Archive) -> Iterator[ResultRow]:
    """Accuracy over all test examples of merges from an archive and from the models themselves."""
    learned, tasks = measurer.evaluator, measurer.evaluator.num_tasks
    first_half = [1.0 if t < (tasks + 1) // 2 else 0.0 for t in range(tasks)]
    preferences = {"uniform": uniform_weights(tasks), "magmax": learned.magmax_shares, "first half": first_half}
    preferences |= {"mostly last": single_task_weights(0.6, tasks - 1, tasks)}
    for name, weights in preferences.items():
        rule = Tunable(preference=weights, seed=learned.context.seed)
        (exact,) = learned.predict(rule, [measurer.magmax_factor], range(tasks))
        began, seconds = time.perf_counter(), 0.0
        for _ in learned.load_merges(rule, [measurer.magmax_factor], archive.models(learned.base)):
            seconds = time.perf_counter() - began
        labels, some = measurer.labels, learned.test_task_ids >= 0
        base_predictions = learned.predict_rows(learned.context.test, some)
        yield {
            "preference": name,
            "weights": list(weights),
            "scaling_factor": measurer.magmax_factor,
            "seconds": round(seconds, 3),
            "accuracy": float((base_predictions == labels)[some].mean()),
            "exact": float((exact == labels)[some].mean()),
            "agreement": float((base_predictions == exact)[some].mean()),
        }
