"""The two jobs of a benchmark: train a training of checkpoints, and measure one rule on them."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from .._version import __version__
from ..calibration import FeatureOptions, calibrate_features, calibration_hooks
from ..checkpoints import open_checkpoint
from ..errors import MagMaxError
from ..merging.execution.execution_options import ExecutionOptions
from ..merging.in_memory import InMemoryMerges, restore_kind
from ..merging.output_options import OutputOptions
from ..rules import CalibrateWeights, Rule, StreamingRule, chain, rule_from
from .cell_store import CellStore, checkpoint_folder
from .context import ExperimentContext, build_context, context_lock, device
from .data.scenarios import Task
from .evaluation.accuracy import AccuracyRow
from .experiment import FROM_BASE, ZERO_SHOT, BenchmarkCell, Experiment, calibration_options, digest_of, rule_name
from .models.batch_norm import recalibrate
from .training.external import import_checkpoints
from .training.sequence import fine_tune, training_costs
from .training.weight_files import load_weights, write_bytes


def training_folder(out: Path, experiment: Experiment, seed: int, training: str) -> Path:
    """Return the folder of a training's checkpoints; another recipe has another folder."""
    return checkpoint_folder(out, training, seed, experiment.training_recipe(seed, training))


MEMORY_FILE = "memory.json"
"""Beside a training's checkpoints: the peak memory of its training."""


def run_training(experiment: Experiment, out: str, seed: int, training: str, threads: int = 1) -> str:
    """Train all checkpoints of a training, or find them there. Returns its name."""
    with context_lock:
        return _run_training(experiment, Path(out), seed, training, threads)


def _run_training(experiment: Experiment, out: Path, seed: int, training: str, threads: int) -> str:
    torch.set_num_threads(threads)
    context = build_context(experiment, seed)
    folder = training_folder(out, experiment, seed, training)
    reset_peak()
    if training == "external":
        models = experiment.training_choices[training]["models"]
        import_checkpoints(models, [task.name for task in context.tasks], context.base, folder)
    else:
        fine_tune(
            context.encoder,
            context.head,
            context.train,
            context.tasks_of(training),
            context.training_method(training),
            folder,
            seed=seed,
        )
    if not (folder / MEMORY_FILE).exists():
        write_bytes(json.dumps({"peak_memory": peak_memory()}).encode(), folder / MEMORY_FILE)
    return f"{training}, seed {seed}"


def run_cell(experiment: Experiment, out: str, cell: BenchmarkCell, threads: int = 1) -> str:
    """Measure a cell whose training is trained, and append its record. Returns its name."""
    with context_lock:
        return _run_cell(experiment, Path(out), cell, threads)


def _run_cell(experiment: Experiment, out: Path, cell: BenchmarkCell, threads: int) -> str:
    torch.set_num_threads(threads)
    context = build_context(experiment, cell.seed)
    paths: list[Path] = []
    if cell.rule != ZERO_SHOT:
        folder = training_folder(out, experiment, cell.seed, cell.training)
        paths = [folder / f"theta_{t}.safetensors" for t in range(1, len(context.tasks_of(cell.training)) + 1)]
        if missing := [str(path) for path in paths if not path.exists()]:
            raise MagMaxError(f"{missing[0]}: is missing; a Dask worker needs the folder --out on a shared file system")
    reset_peak()
    measured = _CellMeasurement(context, cell, paths).record()
    recipe_of_cell = experiment.cell_recipe(cell)
    record = {
        "seed": cell.seed,
        "method": cell.method,
        "training": cell.training,
        "rule": cell.rule if isinstance(cell.rule, str) else rule_name(cell.rule),
        **({} if cell.calibration is None else {"calibration": rule_name(cell.calibration)}),
        "digest": digest_of(recipe_of_cell),
        **measured,
        "peak_memory": max(peak_memory() or 0, training_peak_memory(paths)) or None,
        "stored_bytes": stored_bytes(context, cell),
        "models": {path.stem: digest_of_file(path) for path in paths},
        "recipe": recipe_of_cell,
        "environment": environment(threads),
    }
    CellStore(out).append(record)
    return f"{cell.method}, seed {cell.seed}"


def training_peak_memory(paths: Sequence[Path]) -> int:
    """The peak memory of the training that made these checkpoints; 0 where it is not known."""
    try:
        return json.loads((paths[0].parent / MEMORY_FILE).read_text())["peak_memory"] or 0
    except (IndexError, OSError, RecursionError, ValueError):
        return 0


class _CellMeasurement:
    """One cell's measurement: the rows of R at the rule's own scaling factor and at the one chosen."""

    def __init__(self, context: ExperimentContext, cell: BenchmarkCell, paths: Sequence[Path]) -> None:
        self.context, self.cell, self.paths = context, cell, paths
        self.rule: Rule | None = with_seed(cell) if cell.merges else None
        self.name, self.options = calibration_options(cell.calibration) if cell.calibration else ("", {})
        if self.rule is not None and self.name in ("wsc", "dsc"):
            options = self.options if self.name == "wsc" else {"per": self.options["per"]}
            self.rule = chain(self.rule, CalibrateWeights(**options))
        self.cached_merges: tuple[int, InMemoryMerges] | None = None
        self.correction: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.merging = self.evaluating = 0.0

    def record(self) -> dict[str, Any]:
        default = self.rule.default_scaling_factor if self.rule else None
        variants, search = [self.variant("default", default)], dict[str, float]()
        if self.cell.scaled:
            scores = {factor: self.validation_accuracy(factor) for factor in self.context.experiment.factors}
            search = {str(factor): score for factor, score in scores.items()}
            if scores:
                chosen = max(scores, key=lambda factor: scores[factor])
                same = chosen == default
                variants.append({**variants[0], "variant": "chosen"} if same else self.variant("chosen", chosen))
            variants += [self.variant(f"factor {factor:g}", factor) for factor in self.context.experiment.sweep]
        task_costs = {} if self.cell.rule == ZERO_SHOT else training_costs(self.paths[0].parent)
        training = sum(each["seconds"] for each in task_costs.values())
        seconds = {"training": training, "merging": self.merging, "evaluating": self.evaluating}
        return {"variants": variants, "search": search, "seconds": {k: round(v, 3) for k, v in seconds.items()}}

    def variant(self, name: str, factor: float | None) -> dict[str, Any]:
        tasks = len(self.context.tasks)
        whole = {"all": ("default", "chosen"), "default": ("default",), "last": ()}[self.context.experiment.rows]
        wanted = range(tasks + 1) if name in whole else [0, tasks]
        if self.cell.training == "joint":
            wanted = [tasks]
        if self.cell.rule != ZERO_SHOT:
            wanted = [i for i in wanted if i > 0]
        rows = {i: asdict(self.measure_row(i, factor)) for i in wanted if self.can_merge(i)}
        return {"variant": name, "scaling_factor": factor, "rows": rows}

    def can_merge(self, learned: int) -> bool:
        """Return whether the rule can merge so few (the third largest of two is none)."""
        try:
            if self.rule is not None:
                self.rule.check(learned)
        except MagMaxError:
            return learned == len(self.context.tasks)
        return True

    def measure_row(self, learned: int, factor: float | None) -> AccuracyRow:
        self.load(learned, factor)
        return self.timed(lambda: self.context.row(learned))

    def validation_accuracy(self, factor: float) -> float:
        """Average accuracy on the validation examples after the last task."""
        tasks = len(self.context.tasks)
        self.load(tasks, factor)
        accuracies = self.timed(lambda: self.context.row(tasks, self.context.validation)).tasks
        lacking = [task.name for task, share in zip(self.context.tasks, accuracies, strict=True) if math.isnan(share)]
        if lacking:
            raise MagMaxError(f"no validation example of {', '.join(lacking)}; hold out more of each class")
        return sum(accuracies) / len(accuracies)

    def load(self, learned: int, factor: float | None) -> None:
        """The model after so many tasks, into the encoder."""
        model = self.context.encoder.model
        if self.cell.rule == ZERO_SHOT:
            model.load_state_dict(self.context.base)
        elif self.rule is None:
            load_weights(model, self.paths[0 if self.cell.training == "joint" else learned - 1])
        else:
            began = time.perf_counter()
            model.load_state_dict(self.merged_weights(learned, factor))
            if self.name in ("fsc", "dsc"):
                self.calibrate(learned, factor)
            if self.context.experiment.batch_norm == "recalibrated":
                with self.correction():
                    recalibrate(self.context.encoder, self.context.some_training_items())
            self.merging += time.perf_counter() - began

    def merged_weights(self, learned: int, factor: float | None) -> dict[str, torch.Tensor]:
        """The merge after so many tasks; one before scaling serves all factors."""
        assert self.rule is not None
        options = OutputOptions(factor)
        base = open_checkpoint(self.context.base, "theta_0")
        if self.cached_merges is None or self.cached_merges[0] != learned:
            models = [open_checkpoint(path, base=base) for path in self.paths[:learned]]
            again = bool(self.context.experiment.factors or self.context.experiment.sweep or self.cell.calibration)
            hold = again and not isinstance(self.rule, StreamingRule)  # these are quick, and small
            self.cached_merges = (
                learned,
                InMemoryMerges(self.rule, base, models, options, ExecutionOptions(threads=1), hold=hold),
            )
        return restore_kind(
            self.context.base, base, self.cached_merges[1].merge_at(options.resolve_scaling_factor(self.rule)), options
        )

    def calibrate(self, learned: int, factor: float | None) -> None:
        """Calibrate what is in the encoder in feature space, on validation examples of each task learned so far."""
        encoder = self.context.encoder
        calibration = calibrate_features(
            encoder.model,
            self.context.base,
            self.paths[:learned],
            samples_of(self.context, self.context.tasks_of(self.cell.training)[:learned], self.options["n"]),
            lambda model, items: encoder(items),
            FeatureOptions(self.options["norm"], self.options["ratio"], self.options["inputs"]),
            execution=ExecutionOptions(threads=1),
        )
        if not self.options.get("folded", True):
            encoder.model.load_state_dict(self.merged_weights(learned, factor))
            self.correction = partial(calibration_hooks, encoder.model, self.context.base, calibration)

    def timed(self, work: Callable[[], AccuracyRow]) -> AccuracyRow:
        with self.correction():
            began = time.perf_counter()
            result = work()
        self.evaluating += time.perf_counter() - began
        return result


def samples_of(context: ExperimentContext, tasks: Sequence[Task], count: int) -> list[list[Any]]:
    """So many validation examples of each task, drawn by the seed: they are neither trained on nor scored."""
    data, random = context.validation, np.random.default_rng(context.seed)
    samples: list[list[Any]] = []
    for task in tasks:
        rows = random.permutation(task.rows(data.labels, data.domains))[:count]
        samples.append([data.items[int(row)] for row in rows])
    return samples


def with_seed(cell: BenchmarkCell) -> Rule:
    """The cell's rule; a random one by name alone is drawn from the cell's seed."""
    rule = rule_from(cell.rule)
    if isinstance(cell.rule, str) and hasattr(rule, "seed"):
        return rule_from({cell.rule: {"seed": cell.seed}})
    return rule


def stored_bytes(context: ExperimentContext, cell: BenchmarkCell) -> int:
    """Return what a method must keep from one task to the next: weights, what its rule remembers, what its penalty
    does.

    The pre-trained model itself is not counted; a training that goes on from its last weights keeps these, an
    independent one does not; a rule in constant memory keeps its slots, another one every checkpoint; EWC keeps F;
    replay its examples, and joint training all data (their items' bytes). A calibration needs every checkpoint.
    """
    model = sum(tensor.nbytes for tensor in context.base.values())
    trained = sum(p.numel() * p.element_size() for p in context.encoder.model.parameters() if p.requires_grad)
    if cell.rule == ZERO_SHOT:
        return 0
    if cell.training == "joint":
        return _estimate_bytes(context.train.items)
    total = 0 if cell.training in FROM_BASE else model
    total += trained if cell.training.startswith("ewc") else 0
    if cell.training == "replay":
        examples = context.experiment.training_choices["replay"]["per_class"] * len(
            {c for t in context.tasks for c in t.classes}
        )
        total += _estimate_bytes(context.train.items) * examples // max(1, len(context.train))
    if cell.merges:
        rule = rule_from(cell.rule)
        slots = rule.slots(len(context.tasks)) if isinstance(rule, StreamingRule) else len(context.tasks)
        total += model * (slots if cell.calibration is None else len(context.tasks))
    return total


def environment(threads: int) -> dict[str, Any]:
    """Return where a record was made."""
    return {
        "magmax": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device() == "cuda" else "cpu",
        "threads": threads,
    }


def digest_of_file(path: Path) -> str:
    """The xxh3 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # pyright: ignore[reportArgumentType]


def reset_peak() -> None:
    """Begin to count this process's peak memory anew (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int | None:
    """Bytes: the most resident memory since `reset_peak`, the accelerator's where there is one; None if unknown."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _estimate_bytes(items: Sequence[Any]) -> int:
    some = items[:: max(1, len(items) // 200)]
    return sum(np.asarray(item).nbytes for item in some) * len(items) // max(1, len(some))
