"""`magmax train`: one training of tasks, each absorbed into a running merge and evaluated as it is learned."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints.journal import WorkingFolder, hold_folder
from ...checkpoints.output_paths import WORK_SUFFIX, delete_output, is_working_name, kind_of
from ...errors import MagMaxError
from ...legacy import modern_experiment
from ...merging.running.running_merge import Running
from ...merging.running.versions import delete_running_merge
from ..cells import with_seed
from ..context import ExperimentContext, build_context
from ..evaluation.accuracy import AccuracyRow
from ..experiment import REFERENCES, BenchmarkCell, Experiment
from ..progress import BarFactory, no_bars
from .parallel import check_team
from .sequence import fine_tune
from .weight_files import MADE_FROM, delete_training, load_weights, read_metadata, write_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

RECIPE_FILE, METRICS_FILE, MERGE_FOLDER, MERGED_FILE = "recipe.json", "metrics.json", "merge", "merged.safetensors"
OWN_FILES = re.compile(r"recipe\.json|metrics\.json|merged(-after-\d+)?\.safetensors")
"""The names of what is written beside the checkpoints."""


@dataclass(frozen=True)
class ContinualTraining:
    """A training to be trained in a folder.

    In `out`: theta_0 .. theta_T, the running merge in `merge`, `merged.safetensors` at the end, `metrics.json` with
    R of the model and of the merge after every task, and `recipe.json`. The same command again goes on where a kill
    left it; with another recipe it is an error, unless `restart` clears the folder.
    """

    experiment: Experiment
    out: Path
    training: str = "sequential"
    rule: Any = "magmax"
    seed: int = 0
    scaling_factor: float | None = None
    restart: bool = False

    def recipe(self) -> dict[str, Any]:
        """All that decides what comes out."""
        content = self.experiment.training_recipe(self.seed, self.training)
        content |= {"rule": self.rule, "scaling_factor": self.scaling_factor, "among": self.experiment.among}
        return json.loads(json.dumps(content))

    def run(self, new_bar: BarFactory = no_bars, team: Accelerator | None = None) -> dict[str, Any]:
        """Train, absorb, evaluate; returns the metrics."""
        if self.training not in self.experiment.training_choices:
            names = ", ".join(self.experiment.training_choices)
            raise MagMaxError(f"the ways to train in the experiment are {names}; {self.training!r} is none of them")
        if self.training == "external":
            raise MagMaxError("external trains nothing; magmax bench merges and evaluates its models")
        check_team(team, self.experiment.parallel)
        first = team is None or team.is_main_process
        if first:
            self.refuse_foreign_folder()
        with hold_folder(self.out) if first else nullcontext():
            return self._run(new_bar, team, first)

    def _run(self, new_bar: BarFactory, team: Accelerator | None, first: bool) -> dict[str, Any]:
        if first:
            self.prepare()
        with team.main_process_first() if team else nullcontext():  # one process downloads what is missing
            context = build_context(self.experiment, self.seed, new_bar if first else no_bars)
        if team:
            context.encoder.model.to(team.device)
        work = _TaskFollowUp(self, context, new_bar if first else no_bars)
        fine_tune(
            context.encoder,
            context.head,
            context.train,
            context.tasks_of(self.training),
            context.training_method(self.training),
            self.out,
            seed=self.seed,
            new_bar=new_bar if first else no_bars,
            done=work.after_task if first else None,
            team=team,
        )
        if team:
            team.wait_for_everyone()
        return work.finish() if first else {}

    def clear(self) -> None:
        """Delete what a training made, and nothing else."""
        try:
            ours = modern_experiment(json.loads((self.out / RECIPE_FILE).read_text())).keys() >= {
                "training",
                "seed",
                "fit",
            }
        except (ValueError, AttributeError, RecursionError):
            ours = False
        if not ours:
            raise MagMaxError(
                f"{self.out}: its {RECIPE_FILE} is none of a training, so nothing is deleted; name another --out"
            )
        ours = [path for path in self.out.iterdir() if OWN_FILES.fullmatch(path.name)]
        if strange := [path for path in ours if kind_of(path) != "file"]:
            raise MagMaxError(f"{strange[0]}: is a {kind_of(strange[0])}, which magmax did not make; move it")
        delete_running_merge(self.out / MERGE_FOLDER)
        delete_training(self.out)
        for folder in self.out.glob(f"merged*.safetensors{WORK_SUFFIX}"):
            with WorkingFolder(folder.with_name(folder.name.removesuffix(WORK_SUFFIX))) as work:
                work.clear()
        for path in sorted(ours, key=lambda path: path.name == RECIPE_FILE):  # the recipe last: it says what this is
            delete_output(path)

    def refuse_foreign_folder(self) -> None:
        """Raise MagMaxError for a folder with something in it that is not a training."""
        begun = not self.out.exists() or (self.out / RECIPE_FILE).exists()
        if not begun and not all(is_working_name(path.name) for path in self.out.iterdir()):
            raise MagMaxError(f"{self.out}: is not empty, and no training's folder; name another --out")

    def prepare(self) -> None:
        """The folder cleared, begun, or found to be of the same recipe."""
        file = self.out / RECIPE_FILE
        if self.restart and file.exists():
            self.clear()
        if not file.exists():
            write_bytes(json.dumps(self.recipe(), indent=2).encode() + b"\n", file)
            return
        try:
            before = modern_experiment(json.loads(file.read_text()))
        except (ValueError, AttributeError, RecursionError) as error:
            raise MagMaxError(f"{file}: cannot be read: {error}; begin again with --restart") from error
        if changed := recipe_differences(before, self.recipe()):
            raise MagMaxError(
                f"{self.out}: was begun with another recipe: {'; '.join(changed)}; name another --out, or begin again "
                "with --restart"
            )


class _TaskFollowUp:
    """The steps after each task: absorb the model, evaluate it and the merge, write the metrics."""

    def __init__(self, training: ContinualTraining, context: ExperimentContext, new_bar: BarFactory) -> None:
        self.training, self.context, self.new_bar = training, context, new_bar
        self.file = training.out / METRICS_FILE
        self.metrics: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.running = self.begin()

    def begin(self) -> Running | None:
        """The running merge, as it was left or new; None for a training that nothing is merged from."""
        training = self.training
        if training.training in REFERENCES:
            return None
        rule = with_seed(BenchmarkCell(seed=training.seed, training=training.training, rule=training.rule))
        return Running(training.out / MERGE_FOLDER, rule, self.theta(0))

    def theta(self, t: int) -> Path:
        return self.training.out / f"theta_{t}.safetensors"

    def absorb(self, t: int) -> None:
        """Absorb the tasks up to t that are not; all of them anew where task t was trained again, on other data."""
        assert self.running is not None
        names = [f"task {i} {read_metadata(self.theta(i)).get(MADE_FROM, '')[:8]}" for i in range(1, t + 1)]
        if [task.name for task in self.running.tasks][:t] != names[: len(self.running.tasks)]:
            delete_running_merge(self.training.out / MERGE_FOLDER)
            self.metrics = {what: {i: r for i, r in rows.items() if int(i) < t} for what, rows in self.metrics.items()}
            self.running = self.begin()
            assert self.running is not None
        for i in range(len(self.running.tasks), t):
            self.running.absorb(self.theta(i + 1), names[i])

    def after_task(self, t: int, path: Path) -> None:
        """Return what is called when theta_t is there."""
        if self.running is not None:
            self.absorb(t)
        learned = len(self.context.tasks) if self.training.training == "joint" else t
        key = str(learned)
        if key in self.metrics.get("model", {}) and key in self.metrics.get("merged", {key: None}):
            return
        tell = self.new_bar(f"Evaluating after task {t}")
        load_weights(self.context.encoder.model, path)
        self.write_metrics("model", key, self.context.row(learned))
        tell(1, 2)
        if self.running is not None and len(self.running.tasks) == t:
            merged = self.training.out / f"merged-after-{t}.safetensors"
            self.running.result(self.training.scaling_factor, merged)
            load_weights(self.context.encoder.model, merged)
            self.write_metrics("merged", key, self.context.row(learned))
            merged.unlink()
        write_bytes(json.dumps(self.metrics, indent=2).encode() + b"\n", self.file)
        tell(2, 2)

    def write_metrics(self, what: str, key: str, row: AccuracyRow) -> None:
        self.metrics.setdefault(what, {})[key] = asdict(row)

    def finish(self) -> dict[str, Any]:
        if self.running is not None:
            self.running.result(self.training.scaling_factor, self.training.out / MERGED_FILE)
        return self.metrics


def evaluate(
    experiment: Experiment, models: list[str], seed: int, new_bar: BarFactory = no_bars
) -> dict[str, AccuracyRow]:
    """The accuracies of models (safetensors files of the recipe's model) after all tasks, by their paths."""
    context = build_context(experiment, seed, new_bar)
    rows: dict[str, AccuracyRow] = {}
    for path in models:
        load_weights(context.encoder.model, Path(path))
        rows[path] = context.row(len(context.tasks))
    return rows


def recipe_differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return where two recipes differ: "fit.steps was 60 and is 50"."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [d for k in keys for d in recipe_differences(before.get(k), now.get(k), f"{name}.{k}" if name else k)]
    return [] if before == now else [f"{name} was {json.dumps(before)} and is {json.dumps(now)}"]
