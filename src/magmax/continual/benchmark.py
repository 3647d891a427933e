"""Every method over the seeds: trainings of checkpoints first, then every rule on them; cell by cell, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.journal import hold_folder
from .cell_store import CellStore, Record
from .cells import run_cell, run_training, training_folder
from .experiment import ZERO_SHOT, BenchmarkCell, Experiment, digest_of
from .progress import ProgressCallback, no_progress
from .training.weight_files import delete_training


@dataclass
class Benchmark:
    """All cells of an experiment, measured by an executor's workers.

    A finished cell is one line of `out`/cells.jsonl; one of the same recipe is read and not measured again. The
    checkpoints of a training, in `out`/training, serve every rule; with `discard` they are deleted once all are
    measured.

    Attributes:
        executor: any `concurrent.futures.Executor`, one of processes or a Dask cluster's; its workers must see `out`.
        threads: of torch, in each worker.
    """

    experiment: Experiment
    out: Path
    executor: Executor
    threads: int = 1
    discard: bool = False
    progress: ProgressCallback = no_progress
    _pending_jobs: dict[Future[str], Any] = field(default_factory=dict, init=False, repr=False)

    def run(self) -> list[Record]:
        """Measure what is missing; the records of all cells.

        Raises what a job raised; cells that were finished stay.
        """
        self.experiment.check()
        with hold_folder(self.out):
            return self._run()

    def _run(self) -> list[Record]:
        cells = read_cells(self.experiment, self.out)
        missing = [cell for cell, record in cells if record is None]
        done, total = 0, len(missing) + len(self.trainings_of(missing))
        self.progress(0, total, f"{len(cells) - len(missing)} of {len(cells)} cells from an earlier run")
        self.submit_trainings(missing)
        try:
            while self._pending_jobs:
                for future in wait(self._pending_jobs, return_when=FIRST_COMPLETED).done:
                    job, name = self._pending_jobs.pop(future), future.result()
                    self.handle_finished(job, missing)
                    done += 1
                    self.progress(done, total, name)
        finally:
            for future in self._pending_jobs:
                future.cancel()
        return finished_records(self.experiment, self.out)

    def trainings_of(self, cells: Sequence[BenchmarkCell]) -> list[tuple[int, str]]:
        """The seeds and names of the trainings that these cells need, in their order."""
        return list(dict.fromkeys((cell.seed, cell.training) for cell in cells if cell.training != ZERO_SHOT))

    def submit_trainings(self, missing: Sequence[BenchmarkCell]) -> None:
        """Submit all trainings, and the cells that need none."""
        for seed, training in self.trainings_of(missing):
            future = self.executor.submit(run_training, self.experiment, str(self.out), seed, training, self.threads)
            self._pending_jobs[future] = (seed, training)
        self.submit([cell for cell in missing if cell.training == ZERO_SHOT])

    def submit(self, cells: Sequence[BenchmarkCell]) -> None:
        for cell in cells:
            future = self.executor.submit(run_cell, self.experiment, str(self.out), cell, self.threads)
            self._pending_jobs[future] = cell

    def handle_finished(self, job: Any, missing: Sequence[BenchmarkCell]) -> None:
        """A finished training's cells can be measured; a measured training's checkpoints may go."""
        if not isinstance(job, BenchmarkCell):
            self.submit([cell for cell in missing if (cell.seed, cell.training) == job])
        elif self.discard and job.training != ZERO_SHOT:
            waiting = [other for other in self._pending_jobs.values() if isinstance(other, BenchmarkCell)]
            if not any((other.seed, other.training) == (job.seed, job.training) for other in waiting):
                delete_training(training_folder(self.out, self.experiment, job.seed, job.training))


def finished_records(experiment: Experiment, out: Path) -> list[Record]:
    """The records that are there, of all the experiment's cells."""
    return [record for _, record in read_cells(experiment, out) if record is not None]


def read_cells(experiment: Experiment, out: Path) -> list[tuple[BenchmarkCell, Record | None]]:
    """Return all cells of the experiment, each with its record if one of the same recipe is there."""
    records = CellStore(out).by_digest()
    return [(cell, records.get(digest_of(experiment.cell_recipe(cell)))) for cell in experiment.cells()]
