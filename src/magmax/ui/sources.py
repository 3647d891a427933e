"""What a page is opened on: the folder of a training, or a training or an archive and the recipe of its experiment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import Checkpoint, open_checkpoint
from ..checkpoints.base import read_small
from ..continual.experiment import Experiment
from ..continual.training.trainer import RECIPE_FILE
from ..errors import MagMaxError
from ..legacy import modern_experiment
from ..merging.job import Job
from ..merging.merge_job import merge_job
from ..merging.model_names import default_names
from ..merging.output_options import OutputOptions
from ..preference.archive import ARCHIVE_FILE, Archive
from ..rules import Tunable

EXPERIMENT_KEYS = ("data", "model", "head", "scenario", "validation", "fit", "precision", "among")
"""What the recipe of a training has of its experiment."""

OUTPUT_NAME = "tuned.safetensors"


@dataclass(frozen=True)
class RunSource:
    """The base and the tasks' models as `magmax tune` would be given them, and the experiment that they are from.

    Attributes:
        folder: as it was given.
        model_paths: the paths of the models; empty for an archive.
        task_names: what preferences call the tasks.
    """

    folder: Path
    experiment: Experiment
    seed: int
    base: Checkpoint
    model_paths: list[str]
    task_names: list[str]
    archive: Archive | None = None

    def open_models(self) -> list[Checkpoint]:
        """The tasks' models."""
        if self.archive:
            return [*self.archive.models(self.base)]
        return [open_checkpoint(model, base=self.base) for model in self.model_paths]

    def build_job(self, weights: dict[str, float], scaling_factor: float, out: Path) -> Job:
        """The work that `magmax tune` would do."""
        rule, options = Tunable(preference=weights).for_models(self.task_names), OutputOptions(scaling_factor)
        if self.archive:
            return self.archive.job(rule, out, options)
        return merge_job(rule, self.base, self.open_models(), out, options, self.task_names)

    def build_recipe(self, weights: dict[str, float], scaling_factor: float) -> dict[str, Any] | None:
        """The recipe that makes the same bytes with `magmax merge`; None for an archive, which recipes cannot name."""
        if self.archive:
            return None
        return {
            "base": str(self.base.path),
            "models": [
                {"path": path, "name": name} for path, name in zip(self.model_paths, self.task_names, strict=True)
            ],
            "rule": {"tunable": {"preference": {name: simplify_number(weight) for name, weight in weights.items()}}},
            "scaling_factor": scaling_factor,
            "out": OUTPUT_NAME,
        }

    def cli_arguments(self, weights: dict[str, float], scaling_factor: float) -> list[str]:
        """The words of the command that makes the same bytes."""
        arguments = (
            ["--archive", str(self.folder)] if self.archive else [*self.model_paths, "--base", str(self.base.path)]
        )
        prefer = [
            word
            for name, weight in weights.items()
            if weight
            for word in ("--prefer", f"{name}={simplify_number(weight)!r}")
        ]
        rest = ["--scaling-factor", repr(simplify_number(scaling_factor)), "--out", OUTPUT_NAME]
        return ["magmax", "tune", *arguments, *prefer, *rest]


def open_source(
    folder: Path, recipe: Experiment | Path | None = None, seed: int | None = None, allow_code: bool = False
) -> RunSource:
    """A training's folder; or a training of a benchmark or an archive, with its experiment: a recipe, or a recipe.json.

    With `allow_code`, the names of a recipe.json may mean functions in Python files beside it.
    Raises MagMaxError for a folder that is none of these, and where checkpoints lack.
    """
    archived, is_training = (folder / ARCHIVE_FILE).exists(), (folder / RECIPE_FILE).exists()
    if not (archived or is_training or (folder / "theta_0.safetensors").exists()):
        raise MagMaxError(
            f"{folder}: is neither the folder of a training ({RECIPE_FILE} and theta_0.safetensors, "
            f"made by magmax train) nor an archive ({ARCHIVE_FILE}, made by magmax archive create)"
        )
    if is_training and not archived:
        if recipe is not None or seed is not None:
            raise MagMaxError(
                f"{folder}: is a training, which knows its recipe and seed; leave out --recipe and --seed"
            )
        recipe = folder / RECIPE_FILE
    if recipe is None:
        raise MagMaxError(
            f"{folder}: knows nothing of data and classes; name the experiment with --recipe RECIPE.yaml, or with "
            f"--recipe RUN/{RECIPE_FILE} of a training"
        )
    experiment = read_training_recipe(recipe, allow_code) if isinstance(recipe, Path) else recipe
    chosen = experiment.seeds[0] if seed is None else seed
    if archived:
        archive = Archive(folder)
        return RunSource(folder, experiment, chosen, archive.base(), [], archive.tasks, archive)
    base, *models = map(str, _checkpoint_paths(folder.resolve()))
    return RunSource(folder, experiment, chosen, open_checkpoint(base), models, default_names(models))


def read_training_recipe(file: Path, allow_code: bool = False) -> Experiment:
    """The experiment of a training, with its own seed alone, from its recipe.json."""
    try:
        recipe = modern_experiment(json.loads(read_small(file)))
        fields = {key: recipe[key] for key in EXPERIMENT_KEYS if key in recipe}
        experiment = Experiment(**fields, seeds=[recipe["seed"]], training=[recipe["training"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MagMaxError(f"{file}: is not the {RECIPE_FILE} of a training: {error!r}") from error
    if allow_code:
        experiment = experiment.allow_code(file.parent)
    return experiment.check()


def simplify_number(value: float) -> float | int:
    """The number, without a fraction that is 0."""
    return int(value) if value == int(value) else value


def _checkpoint_paths(folder: Path) -> list[Path]:
    """theta_0 .. theta_T, as many as there are without a gap."""
    paths: list[Path] = []
    while (path := folder / f"theta_{len(paths)}.safetensors").exists():
        paths.append(path)
    if len(paths) < 3:
        raise MagMaxError(
            f"{folder}: has {max(0, len(paths) - 1)} trained checkpoints (theta_1.safetensors, ...); a preference is "
            "between two tasks or more"
        )
    return paths
