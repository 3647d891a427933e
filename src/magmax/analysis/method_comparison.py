"""A run's methods side by side: the accuracies R of each over its seeds, and the measures made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..continual.evaluation.measures import matrix
from ..continual.evaluation.tables import MAIN_MEASURE, PairedComparison, SeedMean, compare_paired, summary, tidy
from ..continual.experiment import LAST_CHECKPOINT, REFERENCES, ZERO_SHOT
from ..errors import missing_extra
from .records import Record, SeedBand, Study

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MethodResult:
    """A method with one way to choose its scaling factor, over its seeds.

    Attributes:
        factors: the scaling factors used, without repetition; none where nothing is scaled.
        accuracy_matrices: by seed R, shape (T + 1, T): R[i, j - 1] is the accuracy on task j after i tasks; NaN if
        not measured. means: each measure over the seeds.
    """

    name: str
    variant: str
    training: str
    rule: str
    factors: Sequence[float]
    accuracy_matrices: Mapping[int, NDArray[np.float64]]
    means: Mapping[str, SeedMean]

    @property
    def label(self) -> str:
        """Return what tells it from the others: the name, and how its factor was found if not by default."""
        return self.name if self.variant == "default" else f"{self.name}, {self.variant}"

    @property
    def average_accuracy(self) -> SeedMean:
        """The average accuracy after the last task."""
        return self.means[MAIN_MEASURE]

    @property
    def is_continual(self) -> bool:
        """Return whether it keeps to the rules of continual learning: no old data, no joint training."""
        return self.training not in REFERENCES

    def accuracy(self, num_learned: int, task: int) -> SeedBand:
        """On a task (from 1) after so many tasks, over the seeds."""
        return SeedBand.from_values([float(r[num_learned, task - 1]) for r in self.accuracy_matrices.values()])

    def accuracy_on_learned(self, num_learned: int) -> SeedBand:
        """The mean accuracy on the tasks learned so far, over the seeds."""
        return SeedBand.from_values(
            [float(r[num_learned, :num_learned].mean()) for r in self.accuracy_matrices.values()]
        )

    @property
    def num_tasks(self) -> int:
        return next(iter(self.accuracy_matrices.values())).shape[1]

    @property
    def is_complete(self) -> bool:
        """Return whether there is something to see after every task, not after the last alone."""
        return all(self.accuracy_on_learned(i).n for i in range(1, self.num_tasks + 1))


def summarise_methods(records: Records) -> list[MethodResult]:
    """All methods, the best average accuracy first. Raises MagMaxError where statistics cannot be taken."""
    zero = {r["seed"]: r["variants"][0]["rows"]["0"]["tasks"] for r in records if r["method"] == ZERO_SHOT}
    matrices: dict[tuple[str, str], dict[int, NDArray[np.float64]]] = {}
    factors: dict[tuple[str, str], set[float]] = {}
    about: dict[tuple[str, str], tuple[str, str]] = {}
    for record in records:
        for variant in record["variants"]:
            key = record["method"], variant["variant"]
            rows = {int(i): row["tasks"] for i, row in variant["rows"].items()}
            first = {0: zero[record["seed"]]} if record["seed"] in zero else {}
            r = matrix({**first, **rows}, len(rows[max(rows)]))
            if record["training"] == "joint":
                r[1:-1] = np.nan
            matrices.setdefault(key, {})[record["seed"]] = r
            factors.setdefault(key, set()).update({variant["scaling_factor"]} - {None})
            about[key] = record["training"], record["rule"]
    try:
        means = summary(tidy(records))
    except ImportError as error:
        raise missing_extra(f"statistics need {error.name}", "report") from error
    summaries = [
        MethodResult(*key, *about[key], sorted(factors[key]), matrices[key], means[key])
        for key in matrices
        if MAIN_MEASURE in means.get(key, {})
    ]
    return sorted(summaries, key=lambda method: -method.average_accuracy.mean)


def competing_methods(methods: Sequence[MethodResult]) -> Sequence[MethodResult]:
    """The methods to be compared: with the rules' own factors, and keeping to the rules."""
    return [method for method in methods if method.variant == "default" and method.is_continual]


def compare_best_two(methods: Sequence[MethodResult]) -> PairedComparison | None:
    """The best of the rivals against the next best on the same seeds; None where there are no two."""
    ours = competing_methods(methods)
    same = [other for other in ours[1:] if other.accuracy_matrices.keys() == ours[0].accuracy_matrices.keys()]
    if not same:
        return None
    best = ours[0]
    values = [
        [float(method.accuracy_matrices[seed][-1].mean()) for seed in sorted(best.accuracy_matrices)]
        for method in (best, same[0])
    ]
    return compare_paired(best.name, same[0].name, "default", *values)


def curves_study(records: Records) -> Study:
    """The accuracy on each task after each task, of every method and seed: R itself."""
    rows: list[Record] = []
    for method in summarise_methods(records):
        for seed, r in method.accuracy_matrices.items():
            about = {"method": method.name, "variant": method.variant, "training": method.training, "rule": method.rule}
            for (learned, task), accuracy in np.ndenumerate(r):
                if np.isfinite(accuracy):
                    rows.append({**about, "seed": seed, "learned": learned, "task": task + 1, "accuracy": accuracy})
    findings: list[str] = []
    for method in competing_methods(summarise_methods(records)):
        if "forgetting" in method.means and method.rule != ZERO_SHOT:
            lost = method.means["forgetting"].mean
            what = "the unmerged model" if method.rule == LAST_CHECKPOINT else method.rule
            findings.append(
                f"{method.training}, {what}: {method.average_accuracy.mean:.1%} on average at the end, "
                f"{100 * lost:.1f} points below "
                "the best each earlier task had."
            )
    definition = "R[i, j], the accuracy on task j after learning the tasks 1 to i; row 0 is the pre-trained model."
    return Study("curves", "Accuracy after every task", definition, rows, {}, findings)
