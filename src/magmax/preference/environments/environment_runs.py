"""All records of the benchmark of preferences, measured by an executor's workers; what is there is read."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...continual.cells import chain_folder, digest_of_file, environment, run_chain
from ...continual.context import context
from ...continual.experiment import Experiment
from ...continual.progress import Tell, silent
from ...continual.training.weight_files import write_bytes
from .ablations import archives, curves, samples
from .environments_config import ARCHIVE, BASELINES, CURVES, SAMPLES, Part, Study
from .scores import Measure, baselines
from .trained_models import Learned

Record = dict[str, Any]
FOLDER = "environments"
GLANCE = 2.0
"""Seconds between two looks at what the workers have finished."""

_alone = threading.Lock()
"""A process has one encoder; the threads of a Dask worker take turns."""


@dataclass(frozen=True)
class Runs:
    """A study of the chains in `out`/chains, which are trained where they are not there.

    A finished part is one JSON file in `out`/environments/cells; one of the same recipe is not measured again.
    """

    study: Study
    experiment: Experiment
    out: Path
    executor: Executor
    threads: int = 1
    tell: Tell = silent

    def run(self) -> list[Record]:
        """Measure what is missing; the records of all parts. Raises what a job raised; finished parts stay."""
        parts = self.parts
        pairs = list(dict.fromkeys((part.seed, part.chain) for part in parts))
        words = self.study.model_dump_json(), self.experiment.model_dump_json(), str(self.out)
        missing = {part[:2] for part in parts if self.read(part) is None}
        jobs = [self.executor.submit(run_parts, *words, *pair, self.threads) for pair in pairs if pair in missing]
        waiting = set(jobs)
        try:
            while waiting:
                done, waiting = wait(waiting, GLANCE, FIRST_COMPLETED)
                for job in done:
                    job.result()
                self.tell(sum(self.read(part) is not None for part in parts), len(parts))
        finally:
            for job in jobs:
                job.cancel()
        return self.finished()

    @property
    def parts(self) -> list[Part]:
        """Everything that there is to measure."""
        tasks = len(context(self.experiment, self.study.seeds[0]).tasks)
        pairs = [(seed, chain) for seed in self.study.seeds for chain in self.study.chains]
        return [Part(*pair, name) for pair in pairs for name in self.study.parts(tasks)]

    def finished(self) -> list[Record]:
        """The records of all parts that are measured."""
        return [record for part in self.parts if (record := self.read(part)) is not None]

    def read(self, part: Part) -> Record | None:
        """The record of a part, if one of the same recipe is there."""
        return read(self.study, self.experiment, self.out, part)


def read(study: Study, experiment: Experiment, out: Path, part: Part) -> Record | None:
    """The record of a part, if one of the same recipe is there."""
    try:
        record = json.loads(part_file(study, experiment, out, part).read_text())
    except (OSError, ValueError):
        return None
    return record if record.get("digest") == study.digest(experiment, part) else None


def part_file(study: Study, experiment: Experiment, out: Path, part: Part) -> Path:
    """Where a record goes; another recipe has another file."""
    name = f"{part.name}-{part.chain}-seed{part.seed}-{study.digest(experiment, part)[:8]}.json"
    return out / FOLDER / "cells" / name


def run_parts(words: str, recipe: str, out: str, seed: int, chain: str, threads: int = 1) -> str:
    """Measure what is missing of one chain, trained or found; study and experiment are JSON. Returns its name."""
    study, experiment = Study.model_validate_json(words), Experiment.model_validate_json(recipe)
    run_chain(recipe, out, seed, chain, threads)
    with _alone:
        _Chain(study, experiment, Path(out), seed, chain, threads).run()
    return f"{chain}, seed {seed}"


class _Chain:
    """The records of one chain."""

    def __init__(self, study: Study, experiment: Experiment, out: Path, seed: int, chain: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.study, self.experiment, self.out, self.threads = study, experiment, out, threads
        here = context(experiment, seed)
        self.folder = chain_folder(out, experiment, seed, chain)
        self.paths = [self.folder / f"theta_{t}.safetensors" for t in range(1, len(here.tasks) + 1)]
        self.parts = [Part(seed, chain, name) for name in study.parts(len(here.tasks))]
        self.digests = {path.stem: digest_of_file(path) for path in self.paths}
        self.learned = Learned(here, self.paths)

    def run(self) -> None:
        base = read(self.study, self.experiment, self.out, self.parts[0])
        for part in self.parts:
            if read(self.study, self.experiment, self.out, part) is None:
                began, merges = time.perf_counter(), self.learned.merges
                content = self.measured(part, base)
                seconds = round(time.perf_counter() - began, 1)
                self.write(part, content, {"seconds": seconds, "merges": self.learned.merges - merges})
            if part.name == BASELINES:
                base = read(self.study, self.experiment, self.out, part)

    def measured(self, part: Part, base: Record | None) -> dict[str, Any]:
        if part.name == BASELINES:
            return baselines(self.study, self.learned)
        assert base is not None, "the baselines are measured first"
        measure = Measure(self.study, self.learned, base)
        if part.name == CURVES:
            return {"rows": curves(measure)}
        if part.name == SAMPLES:
            return {"rows": samples(measure)}
        if part.name == ARCHIVE:
            return {"rows": archives(measure, self.folder / "archive")}
        return {"rows": measure.environment(part)}

    def write(self, part: Part, content: dict[str, Any], took: dict[str, Any]) -> None:
        recipe = self.study.recipe(self.experiment, part)
        record = {
            "seed": part.seed,
            "chain": part.chain,
            "part": part.name,
            "digest": self.study.digest(self.experiment, part),
            **took,
            **content,
            "models": self.digests,
            "recipe": recipe,
            "environment": environment(self.threads),
        }
        file = part_file(self.study, self.experiment, self.out, part)
        write_bytes(json.dumps(record).encode() + b"\n", file)
