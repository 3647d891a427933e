"""The verbs that learn: train, eval, bench."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import MagMaxError
from .common_options import AllowCode, DryRun, Jobs, Json, Models, Out, Restart, Scheduler, Threads
from .console import check_counts, print_line, progress_bars


def train(
    recipe: str,
    *assignments: str,
    out: Out,
    training: str = "sequential",
    rule: str = "magmax",
    seed: int | None = None,
    scaling_factor: float | None = None,
    threads: Threads = 0,
    restart: Restart = False,
    allow_code: AllowCode = False,
) -> None:
    """Learn the tasks of a recipe one after another; merge and evaluate after each.

    Several processes: torchrun --nproc-per-node 2 -m magmax.cli train RECIPE --out OUT, or accelerate launch; each has
    a part of the model with parallel=fsdp.

    Parameters
    ----------
    recipe
        An experiment (.yaml).
    assignments
        Changes to it, such as fit.steps=20.
    out
        The folder for the checkpoints, the running merge and the metrics. The same command again goes on.
    training
        One of the ways to train that the recipe names: sequential, independent, lwf, ewc, ...
    rule
        The merge rule that each task is absorbed into.
    seed
        Draws the tasks and the order of the examples; the recipe's first by default.
    scaling_factor
        Of the merge; the rule's own by default.
    """
    from ..continual.experiment_file import read_experiment

    experiment = read_experiment(recipe, assignments, allow_code)
    from ..continual.training.trainer import ContinualTraining
    from ..recipes.recipe import parse_rule

    parsed, own_factor = parse_rule(rule)
    factor = own_factor if scaling_factor is None else scaling_factor
    named = rule if rule.isidentifier() else parsed.describe()
    chosen = experiment.seeds[0] if seed is None else seed
    work = ContinualTraining(experiment, Path(out), training, named, chosen, factor, restart)
    _set_threads(threads)
    team = _make_accelerator()
    with progress_bars() as new_bar:
        metrics = work.run(new_bar, team)
    if team:
        team.end_training()
    for what, rows in metrics.items():
        last = rows[max(rows, key=int)]
        shares = " ".join(f"{100 * share:.1f}" for share in last["tasks"])
        print_line(
            f"{what:<7} accuracy on each task after the last, in %: {shares}; mean {_format_mean(last['tasks'])}"
        )
    if metrics:
        print_line(f"{Path(out) / 'metrics.json'} and the checkpoints are in {out}")


def evaluate(
    recipe: str,
    models: Models = (),
    *,
    seed: int | None = None,
    threads: Threads = 0,
    as_json: Json = False,
    allow_code: AllowCode = False,
) -> None:
    """Evaluate models on the test examples of a recipe, among the classes of all its tasks.

    Parameters
    ----------
    recipe
        An experiment (.yaml).
    models
        Safetensors files of the recipe's model: checkpoints, merges. Then assignments such as data.newsgroups.seed=1.
    seed
        Draws the tasks; the recipe's first by default.
    """
    from ..yaml_documents import is_assignment

    paths = [word for word in models if not is_assignment(word) or os.path.exists(word)]
    if not paths:
        raise MagMaxError("eval needs a recipe and at least one model")
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise MagMaxError(f"{missing[0]}: there is no such file")
    from ..continual.experiment_file import read_experiment

    experiment = read_experiment(recipe, [word for word in models if word not in paths], allow_code)
    from dataclasses import asdict

    from ..continual.training.trainer import evaluate as measure

    _set_threads(threads)
    with progress_bars() as new_bar:
        accuracies = measure(experiment, paths, experiment.seeds[0] if seed is None else seed, new_bar)
    if as_json:
        print(json.dumps({path: asdict(row) for path, row in accuracies.items()}, indent=2))
        return
    for path, row in accuracies.items():
        shares = " ".join(f"{100 * share:.1f}" for share in row.tasks)
        print_line(
            f"{path}: {shares}; mean {_format_mean(row.tasks)}, "
            f"macro {100 * row.macro:.1f}, micro {100 * row.micro:.1f}"
        )


def bench(
    recipe: str,
    *assignments: str,
    out: Out,
    jobs: Jobs = 1,
    threads: Threads = 0,
    scheduler: Scheduler = None,
    discard: Annotated[bool, Parameter(negative="", help="Delete checkpoints once every rule is measured.")] = False,
    dry_run: DryRun = False,
    allow_code: AllowCode = False,
) -> None:
    """Measure every method of a recipe over its seeds; write a table, CSV and JSON.

    Where it is stopped, or a cell fails, these hold the cells that are measured, and name those that are not.

    Parameters
    ----------
    recipe
        An experiment (.yaml).
    assignments
        Changes to it, such as fit.steps=20 or seeds=[0].
    out
        The folder for the checkpoints (trainings), the finished cells (cells.jsonl), results.csv, results.json and
        results.md. Cells of the same recipe that are there are not measured again.
    """
    from ..continual.experiment_file import read_experiment

    experiment = read_experiment(recipe, assignments, allow_code)
    from ..continual.benchmark import Benchmark, finished_records
    from ..continual.evaluation.result_files import print_results, write_results
    from ..merging.execution.executors import job_executor

    check_counts(jobs, threads)
    folder = Path(out).resolve()
    if dry_run:
        print_results(experiment, finished_records(experiment, folder))
        return
    try:
        with job_executor(jobs, scheduler) as executor, progress_bars() as new_bar:
            Benchmark(experiment, folder, executor, threads or 1, discard, new_bar("Benchmark")).run()
    finally:
        records = finished_records(experiment, folder)
        files = write_results(experiment, records, Path(out)) if records else []
    print_results(experiment, records)
    print_line(", ".join(map(str, files)))


def _make_accelerator() -> Any:
    """The processes of `accelerate launch` or torchrun; None where this is the only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs

    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # such as the pooler of a sentence encoder
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[unused])


def _set_threads(count: int) -> None:
    import torch

    if count:
        torch.set_num_threads(count)


def _format_mean(shares: list[float]) -> str:
    return f"{100 * sum(shares) / len(shares):.1f}"
