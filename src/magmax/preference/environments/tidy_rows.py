"""From records to tidy rows, and means over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...continual.evaluation.tables import PairedComparison, compare_paired
from .environment_runs import Record
from .environments_config import ARCHIVE, BASELINES, CURVES, SAMPLES, mixture_shares

TidyRow = dict[str, Any]
COLUMNS = (
    "seed", "training", "part", "mixture", "draw", "method", "variant", "scaling_factor", "x", "measure", "value",
)  # fmt: skip


def tidy_rows(records: Sequence[Record]) -> list[TidyRow]:
    """One row for each number, whatever it was measured in; what does not apply is empty.

    `x` is the curve's a or weight, the number of target samples a task, or the archive's fraction. The measure
    "distance" is half the sum of |w - w_oracle|: the share of elements that would have to change hands.
    """
    rows_out: list[TidyRow] = []
    for record in records:
        if record["part"] != BASELINES:
            for row in record["rows"]:
                about = {key: record[key] for key in ("seed", "training", "part")}
                about |= {key: row.get(key, "") for key in ("mixture", "draw", "method", "variant", "scaling_factor")}
                rows_out += [
                    {**dict.fromkeys(COLUMNS, ""), **about, **expanded} for expanded in _expand_row(record["part"], row)
                ]
    return rows_out


def _expand_row(part: str, row: TidyRow) -> list[TidyRow]:
    if part == CURVES:
        method = "schedule" if row["curve"] == "schedule" else f"weight of task {row['task']}"
        shares = enumerate(row["tasks"], start=1)
        return [{"method": method, "x": row["x"], "measure": f"accuracy on task {j}", "value": v} for j, v in shares]
    if part == ARCHIVE:
        method = f"{row['bits']} bits/{row['preference']}"
        measures = ("bytes", "model_bytes", "making", "seconds", "accuracy", "exact", "agreement")
        return [{"method": method, "x": row["top"], "measure": name, "value": row[name]} for name in measures]
    x = {"x": row["per_task"]} if part == SAMPLES else {}
    rows: list[TidyRow] = [{**x, "measure": "accuracy", "value": row["accuracy"]}]
    if row["weights"]:
        oracle = np.zeros(len(row["weights"]))
        oracle[row["tasks"]] = mixture_shares(row["mixture"])
        rows.append({**x, "measure": "distance", "value": float(abs(oracle - row["weights"]).sum() / 2)})
    return rows


class ScoreTable:
    """The values of one measure on one training, by method, variant, kind of environment, seed and draw."""

    def __init__(self, rows: Sequence[TidyRow], measure: str = "accuracy") -> None:
        self.values: dict[tuple[str, str], dict[tuple[str, int, int], float]] = {}
        for row in rows:
            if row["measure"] == measure and row["part"] == f"{row['mixture']}-{row['draw']}":
                key = row["mixture"], row["seed"], row["draw"]
                self.values.setdefault((row["method"], row["variant"]), {})[key] = row["value"]

    def seed_means(self, method: str, variant: str, mixtures: Sequence[str], draws: int | None = None) -> list[float]:
        """For each seed that has all these kinds of environments the mean over them and their (first) draws."""
        values = self.values.get((method, variant)) or self.values.get((method, ""), {})
        some = {k: v for k, v in values.items() if k[0] in mixtures and (draws is None or k[2] < draws)}
        by_seed = {seed: {k: v for k, v in some.items() if k[1] == seed} for seed in sorted({k[1] for k in some})}
        whole = [values for values in by_seed.values() if {k[0] for k in values} == set(mixtures)]
        return [float(np.mean(list(values.values()))) for values in whole]

    @property
    def mixtures(self) -> list[str]:
        return list(dict.fromkeys(key[0] for values_by_key in self.values.values() for key in values_by_key))

    def compare(
        self, ours: str, other: str, variant: str, mixtures: Sequence[str], draws: int | None
    ) -> PairedComparison | None:
        """Two methods seed by seed; None where they were not both measured on the same seeds."""
        mine, theirs = (self.seed_means(method, variant, mixtures, draws) for method in (ours, other))
        return compare_paired(ours, other, variant, mine, theirs) if mine and len(mine) == len(theirs) else None
