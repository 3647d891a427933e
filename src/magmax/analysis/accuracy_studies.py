"""The studies that need accuracies: read from the records of benchmarks whose rules or factors vary one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..continual.experiment import REFERENCES, ZERO_SHOT, rule_name
from ..errors import MagMaxError
from .method_comparison import Records, curves_study
from .records import Record, SeedBand, Study, aggregate

RuleSpec = str | Mapping[str, Any] | Sequence[Any]
RuleParts = list[tuple[str, dict[str, Any]]]


class AccuracyPoint(NamedTuple):
    """A series' name, where on its x-axis, and the one task whose accuracy it is; by default their mean."""

    series: str
    x: float | str
    task: int | None = None


PointFinder = Iterator[AccuracyPoint]


@dataclass(frozen=True)
class SweepDefinition:
    """A study of how the accuracy depends on one thing.

    Attributes:
        x_name: what varies, the name of its column.
        extract_points: (the cell's rule in parts, its training, the variant) -> its points, if any. Where each is of
        one task, the
            mean over tasks is taken.
        recipe: the benchmark's recipe that gives such records.
    """

    title: str
    definition: str
    x_name: str
    extract_points: Callable[[RuleParts, str, Mapping[str, Any]], PointFinder]
    recipe: str


def _retention_points(parts: RuleParts, training: str, variant: Mapping[str, Any]) -> PointFinder:
    (first, options), rest = parts[0], parts[1:]
    if variant["variant"] == "default" and first == "prune" and isinstance(options.get("density", 0.2), int | float):
        task = _single_model_index(rest)
        left = "each model on its own task" if task is not None else _format_rule(rest)
        yield AccuracyPoint(
            f"{options.get('which', 'top')}, {left}/{training}", float(options.get("density", 0.2)), task
        )


def _single_model_index(parts: RuleParts) -> int | None:
    """The only model (from 0) that an average takes from, if it is one."""
    weights: Any = parts[0][1].get("weights") if [name for name, _ in parts] == ["average"] else None
    alone = isinstance(weights, list) and weights.count(1) == 1 and weights.count(0) == len(weights) - 1
    return weights.index(1) if alone else None


def _kth_points(parts: RuleParts, training: str, variant: Mapping[str, Any]) -> PointFinder:
    (last, options) = parts[-1]
    before = "".join(f"{name}+" for name, _ in parts[:-1])
    if variant["variant"] == "default" and last == "kth_magnitude":
        yield AccuracyPoint(f"{before}{training}", options.get("k", 1))
    elif variant["variant"] == "default" and last == "magmax":
        yield AccuracyPoint(f"{before}{training}", 1)


def _scaling_points(parts: RuleParts, training: str, variant: Mapping[str, Any]) -> PointFinder:
    if variant["scaling_factor"] is not None and variant["variant"] != "chosen":
        yield AccuracyPoint(f"{_format_rule(parts)}/{training}", float(variant["scaling_factor"]))


def _drop_points(parts: RuleParts, training: str, variant: Mapping[str, Any]) -> PointFinder:
    keeps = parts[0][1].get("density")
    if variant["variant"] != "default":
        return
    if parts[0][0] == "prune" and isinstance(keeps, list) and set(keeps) <= {0, 1}:
        dropped = len(keeps) - sum(keeps)
        if keeps == [0] * int(dropped) + [1] * int(sum(keeps)):
            yield AccuracyPoint(f"{_format_rule(parts[1:])}/{training}", int(dropped))
    elif parts[0][0] != "prune":
        yield AccuracyPoint(f"{_format_rule(parts)}/{training}", 0)


def _penalty_points(parts: RuleParts, training: str, variant: Mapping[str, Any]) -> PointFinder:
    if variant["variant"] == "default" and training not in REFERENCES:
        yield AccuracyPoint(_format_rule(parts), training)


ACCURACY_SWEEPS: Mapping[str, SweepDefinition] = {
    "retention": SweepDefinition(
        "How much of a task vector is needed",
        "Average accuracy when only a part of each task vector is kept, its largest, smallest or random entries over "
        "the whole model, and the rest is zero: of the merge on all tasks, or of each model on its own task.",
        "density",
        _retention_points,
        "retention.yaml",
    ),
    "kth": SweepDefinition(
        "The k-th largest magnitude",
        "Average accuracy after the last task when each element is the k-th largest change instead of the largest; "
        "k = 1 is MagMax.",
        "k",
        _kth_points,
        "kth.yaml",
    ),
    "scaling": SweepDefinition(
        "The scaling factor",
        "Average accuracy after the last task against the factor that multiplies the merged task vector.",
        "scaling_factor",
        _scaling_points,
        "scaling.yaml",
    ),
    "drop": SweepDefinition(
        "Without the first task vectors",
        "Average accuracy over all tasks when the first n task vectors are left out of the merge.",
        "dropped",
        _drop_points,
        "drop.yaml",
    ),
    "penalties": SweepDefinition(
        "Merging on top of other training",
        "Average accuracy after the last task of each rule, and of the unmerged last model, by how the tasks were "
        "trained: sequential, independent, with LwF or with EWC.",
        "training",
        _penalty_points,
        "penalties.yaml",
    ),
}
ACCURACY_STUDIES = (*ACCURACY_SWEEPS, "curves")


def run_accuracy_study(kind: str, records: Records) -> Study:
    """A study of a benchmark's records. Raises MagMaxError where the records have nothing for it to show."""
    if kind == "curves":
        return curves_study(records)
    sweep = ACCURACY_SWEEPS[kind]
    values_by_point: dict[tuple[Any, ...], list[tuple[str, float]]] = {}
    for record in records:
        if record["method"] == ZERO_SHOT or "calibration" in record:
            continue
        parts = rule_parts(record["recipe"]["rule"])
        for variant in record["variants"]:
            accuracies = variant["rows"][max(variant["rows"], key=int)]["tasks"]
            for series, x, task in sweep.extract_points(parts, record["training"], variant):
                value = float(sum(accuracies) / len(accuracies)) if task is None else float(accuracies[task])
                values_by_point.setdefault((series, record["training"], record["seed"], x), []).append(
                    (_format_rule(parts), value)
                )
    values: dict[str, set[Any]] = {}
    for series, _, _, x in values_by_point:
        values.setdefault(series, set()).add(x)
    most = max(map(len, values.values()), default=2)
    fewest = max(2, most - 1) if kind == "penalties" else 2  # the unmerged model has no independent training
    rows: list[Record] = [
        {
            "series": series,
            "training": training,
            "rule": rule_values[0][0] if len(rule_values) == 1 else f"{len(rule_values)} models, each alone",
            "seed": seed,
            sweep.x_name: x,
            "accuracy": float(np.mean([value for _, value in rule_values])),
        }
        for (series, training, seed, x), rule_values in values_by_point.items()
        if len(values[series]) >= fewest
    ]
    if not rows:
        raise MagMaxError(
            f"{kind} needs a rule that was measured with at least two values of {sweep.x_name}, and there is none; run "
            f"magmax bench benchmarks/continual/study/{sweep.recipe}"
        )
    if kind != "penalties":
        rows.sort(key=lambda row: (row["series"], row[sweep.x_name], row["seed"]))
    return Study(kind, sweep.title, sweep.definition, rows, _input_digests(records), _findings(kind, sweep, rows))


def has_records(kind: str, records: Records) -> bool:
    """Return whether there is something for a study to show."""
    try:
        return bool(run_accuracy_study(kind, records).records)
    except MagMaxError:
        return False


def rule_parts(rule: RuleSpec) -> RuleParts:
    """A rule as recipes write it, as names with their options, in order.

    >>> rule_parts([{"prune": {"density": 0.1}}, "magmax"])
    [('prune', {'density': 0.1}), ('magmax', {})]
    """
    if isinstance(rule, str):
        return [(rule, {})]
    if isinstance(rule, Mapping):
        return [(name, dict(options or {})) for name, options in rule.items()]
    return [part for each in rule for part in rule_parts(each)]


def _format_rule(parts: RuleParts) -> str:
    return rule_name([{name: options} if options else name for name, options in parts])


def _findings(kind: str, sweep: SweepDefinition, rows: Sequence[Record]) -> list[str]:
    bands = aggregate(rows, ["series", sweep.x_name], "accuracy")
    findings: list[str] = []
    for series in dict.fromkeys(key[0] for key in bands):
        bands_by_x: dict[Any, SeedBand] = {x: band for (name, x), band in bands.items() if name == series}
        best = max(bands_by_x, key=lambda x: bands_by_x[x].mean)
        seeds = bands_by_x[best].n
        within = [
            x for x in bands_by_x if bands_by_x[x].mean >= bands_by_x[best].mean - bands_by_x[best].std and x != best
        ]
        spread = f" ± {100 * bands_by_x[best].std:.1f} over {seeds} seeds" if seeds > 1 else ", on one seed"
        more = f"; within one standard deviation: {', '.join(f'{x}' for x in within)}" if within and seeds > 1 else ""
        what = f"{sweep.x_name} {best}" if kind != "penalties" else f"{best} training"
        findings.append(f"{series}: best with {what}, {bands_by_x[best].mean:.1%}{spread}{more}.")
    return findings


def _input_digests(records: Records) -> dict[str, str]:
    return {
        f"{record['training']}, seed {record['seed']}: {name}": digest
        for record in records
        for name, digest in (record.get("models") or {}).items()
    }
