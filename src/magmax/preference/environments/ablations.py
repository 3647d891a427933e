"""The other questions to one chain: control curves, how many samples a preference needs, what an archive loses."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...checkpoints import open_checkpoint
from ...merging.execution.execution_options import Settings
from ...rules import Tunable
from ..archive import Archive
from ..archive_writer import write_archive
from ..estimators import schedule, uniform
from ..mixtures import Environment
from .environments_config import shares_of
from .scores import Measure, Row, by_task
from .target_texts import HELD_OUT, Target
from .trained_models import Learned


def curves(measure: Measure) -> list[Row]:
    """The accuracy on every task under schedules, and under growing weights of one task."""
    words, learned = measure.study.curves, measure.learned
    assert words is not None
    everything = range(learned.tasks)
    preferences = [("schedule", 0, a, schedule(a, learned.tasks)) for a in words.schedule]
    places = sorted({round(place) for place in np.linspace(0, learned.tasks - 1, words.tasks)})
    preferences += [
        ("weight", task + 1, weight, alone(weight, task, learned.tasks)) for task in places for weight in words.weights
    ]
    rows: list[Row] = []
    for curve, task, x, weights in preferences:
        rule = Tunable(preference=weights, seed=learned.here.seed)
        found = learned.predicted(rule, list(measure.variants.values()), everything)
        for (variant, factor), classes in zip(measure.variants.items(), found, strict=True):
            shares = by_task(classes == measure.labels, learned.task_of, everything)
            told = {"curve": curve, "task": task, "x": x, "variant": variant, "scaling_factor": factor}
            rows.append({**told, "weights": list(weights), "tasks": shares})
    return rows


def alone(weight: float, task: int, tasks: int) -> list[float]:
    """So much weight on one task (from 0), the rest shared evenly by the others."""
    if tasks == 1:
        return [1.0]
    return [weight if t == task else (1 - weight) / (tasks - 1) for t in range(tasks)]


def samples(measure: Measure) -> list[Row]:
    """Accuracy of preferences that were made of so many target samples a task."""
    words, study = measure.study.samples, measure.study
    assert words is not None
    rows: list[Row] = []
    for number, name in enumerate(study.mixtures):
        for environment in (measure.drawn(name, draw) for draw in range(words.draws)):
            drawn = np.random.default_rng([measure.learned.here.seed, number, environment.draw])
            order = held_out_order(measure.learned, environment, shares_of(name), drawn)
            for per_task in words.per_task:
                target = Target(measure.learned, HELD_OUT, order[: per_task * len(environment.tasks)])
                for source in words.sources:
                    if source == "auto" and len(target.rows) < 2:
                        continue
                    found = measure.preference(source, target, environment.draw)
                    tried = measure.selected(source, found, environment, ["optimal"])
                    told = {"per_task": per_task, "samples": len(target.rows)}
                    rows += [{**row, **told} for row in measure.scored(environment, tried)]
    return rows


def held_out_order(
    learned: Learned, environment: Environment, shares: Sequence[float], random: np.random.Generator
) -> NDArray[np.int64]:
    """Held-out training examples in a random order, each drawn from a task of the mixture's chance, as long as it has.

    The first n are n samples of the mixture, so that a larger sample holds the smaller ones.
    """
    left = {
        task: random.permutation(np.flatnonzero(learned.held_task_of == task)).tolist() for task in environment.tasks
    }
    order: list[int] = []
    while all(left.values()):
        order.append(left[environment.tasks[int(random.choice(len(shares), p=np.asarray(shares)))]].pop())
    return np.array(order, dtype=np.int64)


def archives(measure: Measure, scratch: Path) -> list[Row]:
    """Each archive against the models: bytes, seconds to make and to merge from, accuracy under some preferences."""
    words, learned = measure.study.archive, measure.learned
    assert words is not None
    base = open_checkpoint(learned.paths[0].with_name("theta_0.safetensors"))
    rows: list[Row] = []
    for top in words.top:
        for bits in words.bits:
            shutil.rmtree(scratch, ignore_errors=True)
            began = time.perf_counter()
            names = [f"task {t}" for t in range(1, learned.tasks + 1)]
            models = [open_checkpoint(path, base=base) for path in learned.paths]
            made = write_archive(base, models, names, scratch, top=top, bits=bits, settings=Settings(threads=1))
            making = time.perf_counter() - began
            size = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
            told = {"top": top, "bits": bits, "bytes": size, "model_bytes": base.nbytes, "making": round(making, 3)}
            rows += [{**told, **row} for row in _retuned(measure, made)]
            shutil.rmtree(scratch)
    return rows


def _retuned(measure: Measure, made: Archive) -> Iterator[Row]:
    """Accuracy over all test examples of merges from an archive and from the models themselves."""
    learned, tasks = measure.learned, measure.learned.tasks
    first_half = [1.0 if t < (tasks + 1) // 2 else 0.0 for t in range(tasks)]
    preferences = {"uniform": uniform(tasks), "magmax": learned.own, "first half": first_half}
    preferences |= {"mostly last": alone(0.6, tasks - 1, tasks)}
    for name, weights in preferences.items():
        rule = Tunable(preference=weights, seed=learned.here.seed)
        (exact,) = learned.predicted(rule, [measure.factor], range(tasks))
        began, seconds = time.perf_counter(), 0.0
        for _ in learned.merged(rule, [measure.factor], made.models(learned.base)):
            seconds = time.perf_counter() - began
        labels, some = measure.labels, learned.task_of >= 0
        kept = learned.seen(learned.here.test, some)
        yield {
            "preference": name,
            "weights": list(weights),
            "scaling_factor": measure.factor,
            "seconds": round(seconds, 3),
            "accuracy": float((kept == labels)[some].mean()),
            "exact": float((exact == labels)[some].mean()),
            "agreement": float((kept == exact)[some].mean()),
        }
