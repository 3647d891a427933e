"""The trials of a search, chosen by Optuna, done by an executor's workers, and kept in a file that it goes on from."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.journal import WorkingFolder, hold_folder
from ..checkpoints.output_paths import is_working_name
from ..errors import MagMaxError, missing_extra
from ..merging.execution.pool import submit, wait_for_result
from .config import SearchConfig
from .trials import TrialResult, TrialSettings, to_optuna

STORE_FILE = "study.log"
RECIPE_ATTRIBUTE, SCORES_ATTRIBUTE, REFUSED_ATTRIBUTE = "recipe", "scores", "refused"
"""What a study and its trials are noted with."""
NAME = "magmax"


@dataclass(frozen=True)
class TrialRecord:
    """A trial that is done: its number, what was chosen, and the scores by task, or why it has none."""

    number: int
    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    refused: str = ""


@dataclass
class Search:
    """A search in a folder.

    Trial n is chosen knowing the scores of the trials up to n - jobs, and with random numbers drawn from (seed, n), so
    that a search with as many jobs tries the same, whether or not it is interrupted, and whichever worker is faster.

    Attributes:
        jobs: how many trials are under way at once.
        threads: of each merge.
        progress: told of each trial that is done.
    """

    recipe: SearchConfig
    settings: TrialSettings
    out: Path
    executor: Executor
    jobs: int = 1
    threads: int = 1
    progress: Callable[[TrialRecord], None] = lambda _: None

    def run(self) -> list[TrialRecord]:
        """Try what is not tried yet; all trials.

        Raises:
            MagMaxError: a folder that holds another search; what a trial raises. What was tried is kept.
            UnfinishedError: the workers are lost.
        """
        begun = not self.out.exists() or (self.out / STORE_FILE).exists()
        if not begun and not all(is_working_name(path.name) for path in self.out.iterdir()):
            raise MagMaxError(f"{self.out}: is not empty, and holds no search; name another --out")
        with hold_folder(self.out), WorkingFolder(self.out / "trials") as work:
            work.clear()
            store = TrialStore(self.out / STORE_FILE, self.recipe, self.settings)
            self._run(store, work.path.absolute())
            return store.tried[: self.recipe.trials]

    def _run(self, store: TrialStore, folder: Path) -> None:
        """Run what is not tried, in files of new names: a worker of a killed search may still be at work."""
        begun: list[Mapping[str, Any]] = [tried.settings for tried in store.tried]
        waiting: list[Future[TrialResult]] = []
        try:
            while len(store.tried) < self.recipe.trials:
                while len(begun) < min(self.recipe.trials, len(store.tried) + self.jobs):
                    number = len(begun)
                    begun.append(store.choose(number, number - self.jobs, begun))
                    path = folder / f"trial-{number}-{secrets.token_hex(4)}.safetensors"
                    work = self.settings.run_trial
                    waiting.append(submit(self.executor, work, begun[number], path, self.threads))
                number = len(store.tried)
                self.progress(store.add(number, begun[number], wait_for_result(waiting.pop(0))))
        finally:
            for future in waiting:
                future.cancel()


class TrialStore:
    """The finished trials of a search, as a study of Optuna in a file; and the choice of the next."""

    def __init__(self, file: Path, recipe: SearchConfig, trials: TrialSettings) -> None:
        try:
            import optuna
        except ImportError as error:
            raise missing_extra("a search needs Optuna", "sweep") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna: Any = optuna
        self._recipe = recipe
        self._space = distributions(optuna, trials.space)
        cut_torn_end(file)
        self._study = self._opened(file)
        ours = {**recipe.model_dump(exclude={"trials"}), "merge": dict(trials.merge), "score": trials.score}
        before = self._study.user_attrs.get(RECIPE_ATTRIBUTE)
        if before is None:
            self._study.set_user_attr(RECIPE_ATTRIBUTE, ours)
        elif changed := [key for key in ours if before.get(key) != _json_round_trip(ours[key])]:
            raise MagMaxError(
                f"{file.parent}: holds a search with another recipe ({', '.join(changed)}); name another --out"
            )
        self._finished: list[Any] = list(self._study.trials)
        self.tried = [self._to_record(trial) for trial in self._finished]

    def choose(self, number: int, known_trials: int, begun: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what trial `number` tries, knowing the scores up to trial `known` and what the others before it
        try.
        """
        optuna = self._optuna
        seed = int.from_bytes(f"{self._recipe.seed} {number}".encode(), "little") % (2**32 - 5)
        kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        study = self._study_of(sampler=kinds[self._recipe.sampler](seed=seed))
        study.add_trials(self._finished[: known_trials + 1])
        running = optuna.trial.TrialState.RUNNING
        for chosen in begun[max(0, known_trials + 1) :]:
            study.add_trial(optuna.trial.create_trial(state=running, params=chosen, distributions=self._space))
        params = study.ask(self._space).params
        return {name: params[name] for name in self._space}

    def add(self, number: int, chosen: Mapping[str, Any], result: TrialResult) -> TrialRecord:
        """Keep a finished trial. Raises MagMaxError where an objective has no score in the first that is scored."""
        optuna, states = self._optuna, self._optuna.trial.TrialState
        if not result.refused and (problem := self._missing_objective(result.scores)):
            if not any(trial.scores for trial in self.tried):
                raise MagMaxError(problem)  # the recipe names a task that there is not
            result = TrialResult({}, problem)
        notes = {REFUSED_ATTRIBUTE: result.refused} if result.refused else {SCORES_ATTRIBUTE: result.scores}
        values = None if result.refused else self._values(result.scores)
        state = states.FAIL if result.refused else states.COMPLETE
        trial = optuna.trial.create_trial(
            state=state, params=dict(chosen), distributions=self._space, values=values, user_attrs=notes
        )
        self._study.add_trial(trial)
        self._finished.append(trial)
        self.tried.append(TrialRecord(number, chosen, result.scores, result.refused))
        return self.tried[-1]

    def _to_record(self, trial: Any) -> TrialRecord:
        chosen, notes = {name: trial.params[name] for name in self._space}, trial.user_attrs
        return TrialRecord(trial.number, chosen, notes.get(SCORES_ATTRIBUTE, {}), notes.get(REFUSED_ATTRIBUTE, ""))

    def _missing_objective(self, scores: Mapping[str, float]) -> str:
        missing = [task for task in self._recipe.objectives if task not in scores]
        there = ", ".join(scores)
        return f"objectives: there is no score of {', '.join(missing)}; there are {there}" if missing else ""

    def _values(self, scores: Mapping[str, float]) -> list[float]:
        wanted = self._recipe.objectives
        return [scores[task] for task in wanted] or [sum(scores.values()) / len(scores)]

    def _study_of(self, **options: Any) -> Any:
        directions = [self._recipe.direction] * max(1, len(self._recipe.objectives))
        return self._optuna.create_study(directions=directions, **options)

    def _opened(self, file: Path) -> Any:
        backend = self._optuna.storages.journal.JournalFileBackend(str(file), _NoLock())
        storage = self._optuna.storages.JournalStorage(backend)
        return self._study_of(storage=storage, study_name=NAME, load_if_exists=True)


class _NoLock:
    """No lock of Optuna's: the folder is locked already, in a way that a kill undoes."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        """Nothing is held."""


def distributions(optuna: Any, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The space as Optuna has it: by NAME, or by NAME[MODEL] where each model has its own."""
    result: dict[str, Any] = {}
    for name, parts in space.items():
        for part, span in parts.items():
            result[f"{name}[{part}]" if part else name] = _make_distribution(optuna.distributions, span)
    return result


def _make_distribution(kinds: Any, span: Any) -> Any:
    if isinstance(span, list):
        return kinds.CategoricalDistribution([to_optuna(choice) for choice in span])
    low, high, step, log = span["low"], span["high"], span["step"], span["log"]
    if span["whole"]:
        return kinds.IntDistribution(int(low), int(high), log=log, step=int(step or 1))
    return kinds.FloatDistribution(low, high, log=log, step=step)


def cut_torn_end(file: Path) -> None:
    """Drop the part of a line that a kill can leave at the end of a file."""
    if file.exists():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with file.open("rb+") as opened:
                opened.truncate(whole)


def _json_round_trip(content: Any) -> Any:
    return json.loads(json.dumps(content))
