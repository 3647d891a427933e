"""The verb that searches: search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .common_options import AllowCode, Out, Scheduler, Threads
from .console import check_counts, print_line, print_note, print_table

if TYPE_CHECKING:
    from ..search.runner import TrialRecord


def search(
    recipe: str,
    *assignments: str,
    out: Out,
    jobs: int | None = None,
    threads: Threads = 0,
    scheduler: Scheduler = None,
    allow_code: AllowCode = False,
) -> None:
    """Search for the scaling factor, the options of a rule or the preference whose merge scores best.

    Parameters
    ----------
    recipe
        A search (.yaml): the merge, the space of settings, the score.
    assignments
        Changes to it, such as trials=100.
    out
        The folder for the trials, trials.csv and best.yaml. The same command again goes on; more trials add to it.
    jobs
        Trials that are under way at once, each in a process of its own; one, or with a scheduler one for each thread of
        its workers. The choice of a trial knows the scores of all but this many before it.
    """
    from pathlib import Path

    from ..merging.execution.executors import job_executor
    from ..merging.execution.pool import worker_slots
    from ..search.config import load_search
    from ..search.runner import Search
    from ..search.trial_results import best_of, pareto_front, tasks_of, write_search

    check_counts(1 if jobs is None else jobs, threads)
    config, trials = load_search(recipe, assignments, allow_code)
    if not isinstance(trials.score, str) and trials.score[2] == "test":
        print_note("note: scores are those on the test examples; what is chosen by them must not be reported on them")
    with job_executor(jobs or 1, scheduler) as executor:
        tried = Search(
            config, trials, Path(out), executor, jobs or worker_slots(executor), threads or 1, _print_trial
        ).run()
    files = write_search(config, trials, tried, Path(out))
    tasks = tasks_of(config, tried)
    shown = pareto_front(tried, tasks, config.direction) if len(tasks) > 1 else [best_of(config, tried)]
    rows = [
        (str(t.number), *map(_format_value, t.settings.values()), *(f"{t.scores[task]:.6g}" for task in tasks))
        for t in shown
    ]
    if len(tasks) > 1:
        print_line(
            f"the Pareto front: {len(shown)} of {len(tried)} trials, each with what no other has on all tasks at once"
        )
    print_table(["trial", *shown[0].settings, *tasks], rows)
    print_line(f"best: trial {best_of(config, tried).number}; magmax merge {files[0]}; all trials: {files[1]}")


def _print_trial(trial: TrialRecord) -> None:
    chosen = ", ".join(f"{name} {_format_value(value)}" for name, value in trial.settings.items())
    scores = ", ".join(f"{task} {score:.6g}" for task, score in trial.scores.items())
    print_note(f"trial {trial.number}: {chosen}: {scores or trial.refused}")


def _format_value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
