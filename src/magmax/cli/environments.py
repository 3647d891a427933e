"""The verb that measures preferences: environments."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MagMaxError
from .common_options import AllowCode, Jobs, Out, Scheduler, Threads
from .console import check_counts, print_line, progress_bars

if TYPE_CHECKING:
    from ..continual.experiment import Experiment
    from ..preference.environments.environments_config import EnvironmentsConfig


def environments(
    recipe: str,
    *assignments: str,
    out: Out,
    jobs: Jobs = 1,
    threads: Threads = 0,
    scheduler: Scheduler = None,
    allow_code: AllowCode = False,
) -> None:
    """Measure what each preference is worth where tasks occur in other mixtures: the benchmark of the rule tunable.

    Where it is stopped, or a part fails, the tables hold what is measured.

    Parameters
    ----------
    recipe
        A study (.yaml): the recipe of magmax bench whose trainings are merged, environments, preferences.
    assignments
        Changes to it, such as draws=2 or seeds=[0].
    out
        The folder that magmax bench was given: its checkpoints (trainings) are used, and trained where they lack.
        Finished
        records (cells.jsonl), results.csv, results.json and results.md come into its subfolder environments; records of
        the same recipe that are there are not measured again.
    """

    check_counts(jobs, threads)
    study, experiment = read_study(recipe, assignments, allow_code)
    from ..merging.execution.executors import job_executor
    from ..preference.environments.environment_runs import EnvironmentRuns
    from ..preference.environments.environment_tables import write_report

    with job_executor(jobs, scheduler) as executor, progress_bars() as new_bar:
        work = EnvironmentRuns(study, experiment, Path(out).resolve(), executor, threads or 1, new_bar("Environments"))
        try:
            records = work.run()
        except BaseException:
            with suppress(MagMaxError, OSError, IndexError):  # of what is measured; why it stopped matters more
                write_report(study, experiment, work.read_finished(), Path(out))
            raise
    files = write_report(study, experiment, records, Path(out))
    print(files[-1].read_text("utf-8"), end="")
    print_line(", ".join(map(str, files)))


def read_study(
    recipe: str, assignments: Sequence[str] = (), allow_code: bool = False
) -> tuple[EnvironmentsConfig, Experiment]:
    """A study and the experiment that it names, with assignments such as draws=2 put in.

    Raises MagMaxError for YAML that cannot be read, unknown keys (with line and nearest key) and unfit values.
    """
    from ..continual.experiment_file import read_experiment
    from ..yaml_documents import assign, read_document, validate

    document = read_document(recipe)
    for word in assignments:
        document = document._replace(content=assign(document.content, word))
    named = document.content.get("experiment")
    if not isinstance(named, str):
        raise MagMaxError(
            f"{recipe}: experiment is the recipe of magmax bench whose trainings are merged, not {named!r}"
        )
    experiment = read_experiment(str(Path(recipe).parent / named), allow_code=allow_code)
    from ..preference.environments.environments_config import SECTION_CONFIGS, EnvironmentsConfig

    study = validate(
        EnvironmentsConfig,
        document,
        "a study of environments",
        lambda parts: list(SECTION_CONFIGS.get(parts[0], EnvironmentsConfig).model_fields),
    )
    return study.resolve(experiment), experiment
