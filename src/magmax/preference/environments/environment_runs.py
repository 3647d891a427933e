"""All records of the benchmark of preferences, measured by an executor's workers; what is there is read."""

from __future__ import annotations

import threading
import time
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.journal import hold_folder
from ...continual.cell_store import CellStore, Record
from ...continual.cells import digest_of_file, environment, run_training, training_folder
from ...continual.context import build_context
from ...continual.experiment import Experiment
from ...continual.progress import ProgressCallback, no_progress
from .ablations import measure_archives, measure_curves, measure_sample_counts
from .environments_config import ARCHIVE, BASELINES, CURVES, SAMPLES, EnvironmentsConfig, RecordKey
from .scores import EnvironmentScorer, measure_baselines
from .trained_models import TrainedModels

FOLDER_NAME = "environments"
POLL_SECONDS = 2.0
"""Seconds between two looks at what the workers have finished."""

_encoder_lock = threading.Lock()
"""A process has one encoder; the threads of a Dask worker take turns."""


@dataclass(frozen=True)
class EnvironmentRuns:
    """A study of the trainings in `out`/training, which are trained where they are not there.

    A finished part is one line of `out`/environments/cells.jsonl; one of the same recipe is not measured again.
    """

    config: EnvironmentsConfig
    experiment: Experiment
    out: Path
    executor: Executor
    threads: int = 1
    progress: ProgressCallback = no_progress

    def run(self) -> list[Record]:
        """Measure what is missing; the records of all parts. Raises what a job raised; finished parts stay."""
        with hold_folder(self.out):
            return self._run()

    def _run(self) -> list[Record]:
        parts = self.cells
        pairs = list(dict.fromkeys((part.seed, part.training) for part in parts))
        common = self.config, self.experiment, str(self.out)
        missing = {cell[:2] for cell, record in self.read_cells() if record is None}
        jobs = [self.executor.submit(run_cells, *common, *pair, self.threads) for pair in pairs if pair in missing]
        waiting = set(jobs)
        try:
            while waiting:
                done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                for job in done:
                    job.result()
                self.progress(len(self.read_finished()), len(parts))
        finally:
            for job in jobs:
                job.cancel()
        return self.read_finished()

    @property
    def cells(self) -> list[RecordKey]:
        """Everything that there is to measure."""
        tasks = len(build_context(self.experiment, self.config.seeds[0]).tasks)
        pairs = [(seed, training) for seed in self.config.seeds for training in self.config.training]
        return [RecordKey(*pair, name) for pair in pairs for name in self.config.cell_names(tasks)]

    def read_finished(self) -> list[Record]:
        """The records of all parts that are measured."""
        return [record for _, record in self.read_cells() if record is not None]

    def read_cells(self) -> list[tuple[RecordKey, Record | None]]:
        """Return all cells, each with its record if one of the same recipe is there."""
        records = CellStore(self.out / FOLDER_NAME).by_digest()
        return [(cell, records.get(self.config.cell_digest(self.experiment, cell))) for cell in self.cells]


def run_cells(
    config: EnvironmentsConfig, experiment: Experiment, out: str, seed: int, training: str, threads: int = 1
) -> str:
    """Measure what is missing of one training, trained or found. Returns its name."""
    run_training(experiment, out, seed, training, threads)
    with _encoder_lock:
        _SequenceRunner(config, experiment, Path(out), seed, training, threads).run()
    return f"{training}, seed {seed}"


class _SequenceRunner:
    """The records of one training."""

    def __init__(
        self, config: EnvironmentsConfig, experiment: Experiment, out: Path, seed: int, training: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self.config, self.experiment, self.threads = config, experiment, threads
        self.store = CellStore(out / FOLDER_NAME)
        context = build_context(experiment, seed)
        self.folder = training_folder(out, experiment, seed, training)
        self.paths = [self.folder / f"theta_{t}.safetensors" for t in range(1, len(context.tasks) + 1)]
        self.cells = [RecordKey(seed, training, name) for name in config.cell_names(len(context.tasks))]
        self.model_digests = {path.stem: digest_of_file(path) for path in self.paths}
        self.evaluator = TrainedModels(context, self.paths)

    def run(self) -> None:
        records = self.store.by_digest()
        base = records.get(self.digest(self.cells[0]))
        for part in self.cells:
            if self.digest(part) not in records:
                began, merges = time.perf_counter(), self.evaluator.merge_count
                content = self.measure_cell(part, base)
                seconds = round(time.perf_counter() - began, 1)
                self.write_record(part, content, {"seconds": seconds, "merges": self.evaluator.merge_count - merges})
            if part.name == BASELINES:
                base = self.store.find(self.digest(part))

    def digest(self, cell: RecordKey) -> str:
        return self.config.cell_digest(self.experiment, cell)

    def measure_cell(self, cell: RecordKey, baselines: Record | None) -> dict[str, Any]:
        if cell.name == BASELINES:
            return measure_baselines(self.config, self.evaluator)
        assert baselines is not None, "the baselines are measured first"
        measure = EnvironmentScorer(self.config, self.evaluator, baselines)
        if cell.name == CURVES:
            return {"rows": measure_curves(measure)}
        if cell.name == SAMPLES:
            return {"rows": measure_sample_counts(measure)}
        if cell.name == ARCHIVE:
            return {"rows": measure_archives(measure, self.folder / "archive")}
        return {"rows": measure.measure_environment(cell)}

    def write_record(self, cell: RecordKey, content: dict[str, Any], cost: dict[str, Any]) -> None:
        recipe = self.config.cell_recipe(self.experiment, cell)
        record = {
            "seed": cell.seed,
            "training": cell.training,
            "part": cell.name,
            "digest": self.digest(cell),
            **cost,
            **content,
            "models": self.model_digests,
            "recipe": recipe,
            "environment": environment(self.threads),
        }
        self.store.append(record)
