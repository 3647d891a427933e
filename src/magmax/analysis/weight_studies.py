"""The studies that need no forward pass: what the task vectors have in common, and where they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import MagMaxError, nearest_hint
from .records import Record, Study, aggregate
from .weight_statistics import WHOLE_MODEL, WeightStatistics

MIN_GROUP_SHARE = 0.001
"""A group of elements that is smaller than this share of the model is not compared with others."""


@dataclass(frozen=True)
class ModelsOrigin:
    """The training and seed that models come from; "given" and 0 for files that a user names."""

    training: str = "given"
    seed: int = 0


StatisticsByOrigin = Mapping[ModelsOrigin, WeightStatistics]


def conflicts_study(statistics: StatisticsByOrigin, top: float | None = None) -> Study:
    """The share of elements on which task vectors disagree in sign, by layer.

    share = #{some tau_t > 0 and some tau_u < 0} / #{at least two of tau_1..tau_T are not zero}

    `expected` is what chance would give: see `WeightStatistics.expected_conflicts`.
    """
    records: list[Record] = []
    kinds: dict[str, str] = {}
    for origin, tallies in statistics.items():
        expected, kinds[origin.training] = tallies.expected_conflicts(top)
        for layer, counts in tallies.by_layer().items():
            share = counts.conflicts / counts.shared if counts.shared else math.nan
            numbers: Record = {"elements": counts.elements, "shared": counts.shared, "conflicts": counts.conflicts}
            numbers |= {"share": share, "expected": expected[layer]}
            records.append({**_origin_columns(origin), "layer": layer, **numbers})
    trimmed = f" Only the largest {top:.3g} of each task vector counts; the rest is taken as zero." if top else ""
    definition = (
        "The share of the elements that at least two task vectors change, which some of them raise and others lower."
        + trimmed
    )
    expected = aggregate(records, ["training", "layer"], "expected")
    findings = [
        f"{_training_prefix(training)}{band.mean:.1%} of the elements that two tasks or more change are pulled both "
        f"ways ({kinds[training]}: {expected[training, layer].mean:.1%})."
        for (training, layer), band in aggregate(records, ["training", "layer"], "share").items()
        if layer == WHOLE_MODEL and band.n
    ]
    return Study(
        "conflicts", "Where the tasks disagree in sign", definition, records, _input_digests(statistics), findings
    )


def consistency_study(statistics: StatisticsByOrigin) -> Study:
    """Elements grouped by how many task vectors move them the same way, and how far they move.

    group = max(#{tau_t > 0}, #{tau_t < 0}); `largest` is the mean of max_t |tau_t|, `average` of mean_t |tau_t|.
    """
    records: list[Record] = []
    for origin, tallies in statistics.items():
        whole = tallies.by_layer()[WHOLE_MODEL]
        for group, count in enumerate(whole.agreement_counts.tolist()):
            record = {**_origin_columns(origin), "agreeing": group, "elements": count, "share": count / whole.elements}
            record["largest"] = float(whole.largest_sums[group]) / count if count else math.nan
            record["average"] = float(whole.average_sums[group]) / count if count else math.nan
            records.append(record)
    definition = (
        "Elements by how many task vectors move them in one direction, the more common one; and the mean of the "
        "largest magnitude among the task vectors, max |tau|, in each group."
    )
    largest, shares = (
        aggregate(records, ["training", "agreeing"], "largest"),
        aggregate(records, ["training", "agreeing"], "share"),
    )
    findings: list[str] = []
    for training in dict.fromkeys(record["training"] for record in records):
        groups = [
            (group, band.mean)
            for (name, group), band in largest.items()
            if name == training and band.n and group and shares[name, group].mean >= MIN_GROUP_SHARE
        ]
        if len(groups) > 1 and groups[0][1] > 0:
            (few, low), (many, high) = groups[0], groups[-1]
            findings.append(
                f"{_training_prefix(training)}elements that {many} tasks move the same way have {high / low:.2g} times "
                f"the largest "
                f"magnitude of those where only {few} do."
            )
    return Study(
        "consistency",
        "The larger a change, the more tasks agree?",
        definition,
        records,
        _input_digests(statistics),
        findings,
    )


def contribution_study(statistics: StatisticsByOrigin) -> Study:
    """The share of the merged elements that MagMax takes from each task, by layer.

    Task t supplies an element where |tau_t| is largest (the latest of equal ones) and not zero. `magnitude` is t's
    share of sum |m|.
    """
    records: list[Record] = []
    for origin, tallies in statistics.items():
        for layer, counts in tallies.by_layer().items():
            moved, total = int(counts.winner_counts.sum()), float(counts.winner_magnitudes.sum())
            for t, task in enumerate(tallies.task_names):
                record = {
                    **_origin_columns(origin),
                    "layer": layer,
                    "task": task,
                    "elements": int(counts.winner_counts[t]),
                }
                record["share"] = int(counts.winner_counts[t]) / moved if moved else math.nan
                record["magnitude"] = float(counts.winner_magnitudes[t]) / total if total else math.nan
                records.append(record)
    definition = (
        "Of the elements that any task changes, the share that MagMax takes from each task, which is the one with the "
        "largest change."
    )
    findings: list[str] = []
    shares_by_key = {
        key: b.mean
        for key, b in aggregate(records, ["training", "layer", "task"], "share").items()
        if key[1] == WHOLE_MODEL
    }
    for training in dict.fromkeys(record["training"] for record in records):
        shares = {
            task: share for (name, _, task), share in shares_by_key.items() if name == training and math.isfinite(share)
        }
        if len(shares) > 1:
            most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
            findings.append(
                f"{_training_prefix(training)}{most} supplies most, {shares[most]:.1%}; {least} least, "
                f"{shares[least]:.1%} "
                f"(even shares: {1 / len(shares):.1%})."
            )
    return Study(
        "contribution", "Who supplies the merged elements", definition, records, _input_digests(statistics), findings
    )


def cosine_study(statistics: StatisticsByOrigin) -> Study:
    """The cosine <tau_t, tau_u> / (||tau_t|| ||tau_u||) of each pair of task vectors, by layer."""
    records: list[Record] = []
    for origin, tallies in statistics.items():
        for layer, counts in tallies.by_layer().items():
            angles = counts.cosines
            for t, task in enumerate(tallies.task_names):
                for u, other in enumerate(tallies.task_names):
                    about = {**_origin_columns(origin), "layer": layer, "task": task, "other": other}
                    records.append({**about, "cosine": float(angles[t, u])})
    definition = "The cosine of the angle between each two task vectors: 1 for one direction, 0 for unrelated ones."
    pairs = [r for r in records if r["layer"] == WHOLE_MODEL and r["task"] != r["other"]]
    findings = [
        f"{_training_prefix(training)}the mean cosine of two task vectors is {band.mean:.3f}."
        for (training,), band in aggregate(pairs, ["training"], "cosine").items()
        if band.n
    ]
    return Study("cosine", "How alike the task vectors are", definition, records, _input_digests(statistics), findings)


def norms_study(statistics: StatisticsByOrigin) -> Study:
    """The L2 norm of each task vector, in itself and in units of the base's, by layer."""
    records: list[Record] = []
    for origin, tallies in statistics.items():
        for layer, counts in tallies.by_layer().items():
            base = math.sqrt(counts.base_squared_norm)
            for task, norm in zip(tallies.task_names, counts.norms.tolist(), strict=True):
                relative = norm / base if base else math.nan
                about = {**_origin_columns(origin), "layer": layer, "task": task}
                records.append({**about, "norm": norm, "base_norm": base, "relative": relative})
    definition = "How far each task moved each layer: the L2 norm of the task vector over that of the base."
    findings: list[str] = []
    norms_by_key = {
        key: b.mean
        for key, b in aggregate(records, ["training", "layer", "task"], "norm").items()
        if key[1] == WHOLE_MODEL
    }
    for training in dict.fromkeys(record["training"] for record in records):
        sizes = {task: norm for (name, _, task), norm in norms_by_key.items() if name == training}
        most, least = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
        if sizes[least] > 0:
            findings.append(
                f"{_training_prefix(training)}{most} moved farthest, {sizes[most] / sizes[least]:.3g} times as far as "
                f"{least}."
            )
    return Study("norms", "How far each task moved", definition, records, _input_digests(statistics), findings)


WEIGHT_STUDIES: Mapping[str, Callable[[StatisticsByOrigin], Study]] = {
    "conflicts": conflicts_study,
    "consistency": consistency_study,
    "contribution": contribution_study,
    "cosine": cosine_study,
    "norms": norms_study,
}


def run_weight_studies(statistics: StatisticsByOrigin) -> list[Study]:
    """Every study of these, except agreement for a single model, which has nothing to agree with."""
    alone = all(len(tallies.task_names) < 2 for tallies in statistics.values())
    return [study(statistics) for name, study in WEIGHT_STUDIES.items() if not alone or name == "norms"]


def run_weight_study(kind: str, statistics: StatisticsByOrigin, top: float | None = None) -> Study:
    """The study of that name. Raises MagMaxError for a name that is none, or a single model where two are needed."""
    if kind not in WEIGHT_STUDIES:
        raise MagMaxError(f"there is no study {kind!r}; {nearest_hint(kind, list(WEIGHT_STUDIES))}")
    if kind != "norms" and all(len(tallies.task_names) < 2 for tallies in statistics.values()):
        raise MagMaxError(f"{kind} compares task vectors; give at least two fine-tuned models")
    return conflicts_study(statistics, top) if kind == "conflicts" else WEIGHT_STUDIES[kind](statistics)


def _origin_columns(origin: ModelsOrigin) -> Record:
    return {"training": origin.training, "seed": origin.seed}


def _training_prefix(training: str) -> str:
    return "" if training == "given" else f"{training}: "


def _input_digests(statistics: StatisticsByOrigin) -> dict[str, str]:
    return {
        name if origin == ModelsOrigin() else f"{origin.training}, seed {origin.seed}: {name}": digest
        for origin, tallies in statistics.items()
        for name, digest in tallies.input_digests.items()
    }
