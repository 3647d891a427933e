"""What `magmax bench` and `magmax train` left in a folder: records of accuracies, the recipe, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import open_checkpoint
from ..checkpoints.base import read_small
from ..continual.cell_store import CELLS_FILE, CellStore, checkpoint_folder
from ..continual.experiment import LAST_CHECKPOINT, REFERENCES, ZERO_SHOT, rule_name
from ..errors import MagMaxError
from ..legacy import modern_experiment, modern_record
from ..merging.pipeline import Progress
from ..rules import rule_from
from .weight_statistics import WeightStatistics, collect_weight_statistics
from .weight_studies import ModelsOrigin

CHECKPOINT_KEYS = ("data", "model", "head", "scenario", "validation", "precision", "fit", "seed", "training")
"""What of a cell's recipe decides the checkpoints."""
SETTING_KEYS = ("data", "model", "head", "scenario", "validation", "precision", "fit", "among", "measure_on", "on")
"""What must be the same in cells that are shown together."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        made_by: "bench" or "train".
        records: of the last recipe's cells; of a training, one for the models as they came and one for their merge.
        cells: also of other recipes in the same folder that differ in rules, factors and trainings alone.
        recipe: the experiment.
        checkpoints: the checkpoints that are still there, theta_0 first.
    """

    made_by: str
    folder: Path
    records: Sequence[Mapping[str, Any]]
    cells: Sequence[Mapping[str, Any]]
    recipe: Mapping[str, Any]
    checkpoints: Mapping[ModelsOrigin, Sequence[Path]]

    def weight_statistics(
        self, top: float | None = None, threads: int = 0, progress: Progress = lambda _: None
    ) -> StatisticsByOrigin:
        """The counts over each training's checkpoints."""
        statistics: dict[ModelsOrigin, WeightStatistics] = {}
        for origin, paths in self.checkpoints.items():
            base, *models = [open_checkpoint(path) for path in paths]
            names = [f"task {t}" for t in range(1, len(models) + 1)]
            statistics[origin] = collect_weight_statistics(base, models, names, top, threads, progress)
        return statistics


StatisticsByOrigin = dict[ModelsOrigin, WeightStatistics]


def load_results(folder: Path) -> FinishedRun:
    """Read the output folder of `magmax bench` or `magmax train`.

    Raises MagMaxError for another folder, and for files that are none of theirs.
    """
    if not folder.is_dir():
        raise MagMaxError(f"{folder}: there is no such folder")
    if (folder / "results.json").is_file() or CellStore(folder).exists():
        return _load_benchmark(folder)
    if (folder / "metrics.json").is_file() and (folder / "recipe.json").is_file():
        return _load_training(folder)
    raise MagMaxError(
        f"{folder}: has no results.json or {CELLS_FILE} (of magmax bench) and no metrics.json (of magmax train); for "
        "checkpoints, give --base BASE and the models"
    )


def _load_benchmark(folder: Path) -> FinishedRun:
    """Of a benchmark that is still running, the cells that are finished."""
    whole = folder / "results.json"
    if whole.is_file():
        content = _read_json(whole)
        if not isinstance(content, dict) or not _is_record_list(content.get("records")):
            raise MagMaxError(f"{whole}: is not what magmax bench writes; run the benchmark again")
        records = [modern_record(record) for record in content["records"]]
        recipe = modern_experiment(content.get("recipe") or records[0]["recipe"])
    else:
        records = CellStore(folder).records()
        if not _is_record_list(records):
            raise MagMaxError(f"{folder}: has no finished cell of magmax bench yet")
        recipe = {key: value for key, value in records[0]["recipe"].items() if key not in ("rule", "training", "seed")}
    cells = [*records, *_related_cells(folder, records)]
    trainings: dict[ModelsOrigin, Sequence[Path]] = {}
    for record in cells:
        if record["training"] in (ZERO_SHOT, *REFERENCES):
            continue
        made_of = {key: record["recipe"][key] for key in CHECKPOINT_KEYS if key in record["recipe"]}
        made_in = checkpoint_folder(folder, record["training"], record["seed"], made_of)
        if paths := _checkpoint_paths(made_in):
            trainings[ModelsOrigin(record["training"], record["seed"])] = paths
    return FinishedRun(
        "bench", folder, records, cells, recipe, dict(sorted(trainings.items(), key=lambda item: item[0].seed))
    )


def _related_cells(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The other cells in the folder that were trained and measured alike; of another learning rate, say, none."""

    def setting(record: Mapping[str, Any]) -> dict[str, Any]:
        return {key: record["recipe"].get(key) for key in SETTING_KEYS}

    digests = {record.get("digest") for record in records}
    return [
        record
        for record in CellStore(folder).records()
        if _is_record_list([record]) and record.get("digest") not in digests and setting(record) == setting(records[0])
    ]


def _load_training(folder: Path) -> FinishedRun:
    recipe, metrics = _read_json(folder / "recipe.json"), _read_json(folder / "metrics.json")
    try:
        recipe = modern_experiment(recipe)
        ((training, _),) = recipe["training"].items()
        rule, seed = _rule_name(recipe["rule"]), recipe["seed"]
        rows = {what: dict(metrics[what]) for what in ("model", "merged") if what in metrics}
        assert all(row["tasks"] for each in rows.values() for row in each.values())
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise MagMaxError(f"{folder}: recipe.json and metrics.json are not what magmax train writes") from error
    records = [
        {
            "seed": seed,
            "method": f"{LAST_CHECKPOINT if what == 'model' else rule}/{training}",
            "training": training,
            "rule": LAST_CHECKPOINT if what == "model" else rule,
            "variants": [{"variant": "default", "scaling_factor": _scaling_factor(recipe, what), "rows": rows[what]}],
            "search": {},
            "seconds": {},
            "peak_memory": None,
            "stored_bytes": None,
            "recipe": recipe,
        }
        for what in rows
    ]
    if not records:
        raise MagMaxError(f"{folder / 'metrics.json'}: has no accuracies yet; let magmax train finish a task")
    paths = _checkpoint_paths(folder)
    return FinishedRun(
        "train", folder, records, records, recipe, {ModelsOrigin(training, seed): paths} if paths else {}
    )


def _scaling_factor(recipe: Mapping[str, Any], row_kind: str) -> float | None:
    """The scaling factor of the merge; None for the unmerged models."""
    if row_kind == "model":
        return None
    factor = recipe.get("scaling_factor")
    return float(rule_from(recipe["rule"]).default_scaling_factor if factor is None else factor)


def _rule_name(rule: Any) -> str:
    """The name of a rule as a training describes it."""
    return rule_name(rule["chain"] if isinstance(rule, dict) and "chain" in rule else rule)


def _checkpoint_paths(folder: Path) -> list[Path]:
    """theta_0 .. theta_T, if at least theta_1 is there."""
    paths = [folder / "theta_0.safetensors"]
    while (more := folder / f"theta_{len(paths)}.safetensors").is_file():
        paths.append(more)
    return paths if len(paths) > 1 and paths[0].is_file() else []


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        raise MagMaxError(f"{path}: cannot be read: {error}") from error


def _is_record_list(content: Any) -> bool:
    needed = {"seed", "method", "training", "rule", "variants", "recipe"}
    return (
        isinstance(content, list) and bool(content) and all(isinstance(r, dict) and needed <= r.keys() for r in content)
    )
