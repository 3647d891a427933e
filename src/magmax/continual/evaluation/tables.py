"""From a benchmark's records to tidy rows, statistics over seeds, and tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..experiment import REFERENCES, ZERO_SHOT
from .measures import MEASURES, matrix

Row = dict[str, Any]
MAIN_MEASURE = "average accuracy"
OUR_METHOD = "magmax/sequential"
MAX_EXACT_PAIRS = 16


def tidy(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each seed, method, variant (scaling factor by default or chosen) and measure.

    The measures are those of `measures`, "accuracy on task j", "macro accuracy" and "micro accuracy" after the last
    task, and what the method cost: seconds, bytes. A measure that needs a row of R that was not taken is left out.
    """
    zero = {r["seed"]: r["variants"][0]["rows"]["0"]["tasks"] for r in records if r["method"] == ZERO_SHOT}
    return [row for record in records for variant in record["variants"] for row in _variant_rows(record, variant, zero)]


def _variant_rows(
    record: Mapping[str, Any], variant: Mapping[str, Any], zero: Mapping[int, Sequence[float]]
) -> list[Row]:
    rows = {int(i): row for i, row in variant["rows"].items()}
    last = rows[max(rows)]
    tasks = len(last["tasks"])
    first = {0: zero[record["seed"]]} if record["seed"] in zero else {}
    r = matrix({**first, **{i: row["tasks"] for i, row in rows.items()}}, tasks)
    values = {name: measure(r) for name, measure in MEASURES.items()}
    values |= {"macro accuracy": last["macro"], "micro accuracy": last["micro"]}
    values |= {f"accuracy on task {j}": share for j, share in enumerate(last["tasks"], start=1)}
    values |= {f"{what} seconds": seconds for what, seconds in record["seconds"].items()}
    values |= {"peak memory bytes": record["peak_memory"], "stored bytes": record["stored_bytes"]}
    about = {key: record[key] for key in ("seed", "method", "training", "rule")}
    about |= {"variant": variant["variant"], "scaling_factor": variant["scaling_factor"]}
    return [
        {**about, "measure": name, "value": value}
        for name, value in values.items()
        if value is not None and not math.isnan(value)
    ]


def as_csv(rows: Sequence[Row]) -> str:
    """Tidy rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["seed"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class SeedMean:
    """Over seeds: the mean, the standard deviation (n - 1) and the half width of the 95 % confidence interval (t)."""

    mean: float
    std: float
    half: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> SeedMean:
        """NaN for what a single seed cannot tell."""
        from scipy.stats import t

        n = len(values)
        std = float(np.std(values, ddof=1)) if n > 1 else math.nan
        half = float(t.ppf(0.975, n - 1)) * std / math.sqrt(n) if n > 1 else math.nan
        return cls(float(np.mean(values)), std, half, n)


def summary(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, SeedMean]]:
    """For each (method, variant) the mean of each measure over seeds."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["variant"]), {}).setdefault(row["measure"], []).append(row["value"])
    return {
        key: {name: SeedMean.of(values) for name, values in values_by_name.items()}
        for key, values_by_name in groups.items()
    }


@dataclass(frozen=True)
class PairedComparison:
    """Two methods on the same seeds: the mean difference of a measure, its interval, and what two tests say.

    `p_t`: the two-sided paired t-test; `p_wilcoxon`: the exact two-sided signed-rank test, whose smallest possible
    value for n pairs is 2**(1 - n) (0.25 for 3 seeds, so that it cannot reach 0.05 below 6); `wins`: seeds on which
    the first is better.
    """

    ours: str
    other: str
    variant: str
    difference: SeedMean
    p_t: float
    p_wilcoxon: float
    wins: int


def against_best(
    rows: Sequence[Row], variant: str, ours: str = OUR_METHOD, measure: str = MAIN_MEASURE
) -> PairedComparison | None:
    """`ours` against the best other method by the mean of a measure; references (joint, replay) do not compete.

    Methods without a scaling factor compete in both variants. None where there is nothing to compare.
    """
    by_method: dict[str, dict[int, float]] = {}
    for row in rows:
        competes = row["variant"] == variant or row["scaling_factor"] is None
        if row["measure"] == measure and competes and row["training"] not in REFERENCES:
            by_method.setdefault(row["method"], {})[row["seed"]] = row["value"]
    mine = by_method.pop(ours, {})
    whole = {m: v for m, v in by_method.items() if v.keys() == mine.keys()}
    if not mine or not whole:
        return None
    best = max(whole, key=lambda m: float(np.mean(list(whole[m].values()))))
    return compare_paired(ours, best, variant, [mine[s] for s in sorted(mine)], [whole[best][s] for s in sorted(mine)])


def compare_paired(
    ours: str, other: str, variant: str, mine: Sequence[float], theirs: Sequence[float]
) -> PairedComparison:
    """The comparison of two methods' values, seed by seed."""
    from scipy.stats import t

    differences = np.round(np.subtract(mine, theirs), 12)
    mean = SeedMean.of(list(differences))
    if mean.n < 2 or not differences.any():
        p_t, p_w = math.nan if mean.n < 2 else 1.0, 1.0
    else:
        p_w = signed_rank(differences)
        p_t = 0.0 if mean.std < 1e-12 else float(2 * t.sf(abs(mean.mean) / (mean.std / math.sqrt(mean.n)), mean.n - 1))
    return PairedComparison(ours, other, variant, mean, p_t, p_w, int((differences > 0).sum()))


def signed_rank(differences: np.ndarray) -> float:
    """The two-sided p of Wilcoxon's signed-rank test: the share of all signs that would give as large a sum of ranks.

    Zeros are left out, equal magnitudes share their mean rank; every one of the 2^n signs is tried, for n up to 16, and
    beyond that the normal approximation stands for them.
    """
    from scipy.stats import rankdata, wilcoxon

    some = differences[differences != 0]
    if len(some) > MAX_EXACT_PAIRS:
        tested: Any = wilcoxon(some, method="asymptotic")
        return float(tested.pvalue)
    ranks = rankdata(abs(some))
    sums = np.zeros(1)
    for rank in ranks:
        sums = np.concatenate([sums + rank, sums - rank])
    return float(np.mean(abs(sums) >= abs(np.sum(np.sign(some) * ranks)) - 1e-9))


MEASURE_COLUMNS = (MAIN_MEASURE, "average incremental accuracy", "forgetting", "backward transfer", "forward transfer")
COST_COLUMNS = ("training seconds", "peak memory bytes", "stored bytes")
TABLE_HEADER = (
    "method", "factor", "average accuracy", "95 % interval", "incremental", "forgetting", "backward", "forward",
    "training", "peak memory", "stored",
)  # fmt: skip


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line for each method and variant, best average accuracy first; accuracies in %, mean +- std over seeds.

    A measure that was not taken on every seed (a chosen factor's, where only some are the default one) is "-".
    """
    factors: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["measure"] == MAIN_MEASURE and row["scaling_factor"] is not None:
            factors.setdefault((row["method"], row["variant"]), []).append(row["scaling_factor"])
    found = summary(rows)
    lines: list[tuple[str, ...]] = []
    measured = [key for key in found if MAIN_MEASURE in found[key]]
    for key in sorted(measured, key=lambda key: -found[key][MAIN_MEASURE].mean):
        means, used = found[key], sorted(set(factors.get(key, [])))
        told = " ".join(f"{factor:.3g}" for factor in used) + (" (chosen)" if key[1] == "chosen" else "")
        main = means[MAIN_MEASURE]
        interval = f"{100 * (main.mean - main.half):.1f} .. {100 * (main.mean + main.half):.1f}" if main.n > 1 else "-"
        others = (
            _format_percent(means.get(name) if means.get(name, main).n == main.n else None)
            for name in MEASURE_COLUMNS[1:]
        )
        taken = (_format_cost(name, means.get(name)) for name in COST_COLUMNS)
        lines.append((key[0], told or "-", _format_percent(main), interval, *others, *taken))
    return lines


def markdown(rows: Sequence[Row], about: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The table with what it is about above, and the comparisons with the best other method and notes below."""
    lines = [*about, "", "| " + " | ".join(TABLE_HEADER) + " |", "|---|---|" + "---:|" * (len(TABLE_HEADER) - 2)]
    lines += ["| " + " | ".join(line) + " |" for line in table(rows)]
    return "\n".join([*lines, "", *comparisons(rows), *(line for note in notes for line in ("", note))]) + "\n"


def comparisons(rows: Sequence[Row]) -> list[str]:
    """Return what the paired tests say, in words."""
    pairs = [against_best(rows, variant) for variant in ("default", "chosen")]
    return [_pair_in_words(each) for each in pairs if each is not None] or [
        f"{OUR_METHOD} was not compared: one of two is missing."
    ]


def _pair_in_words(pair: PairedComparison) -> str:
    difference = pair.difference
    factor = "the rules' own scaling factors" if pair.variant == "default" else "factors chosen on validation examples"
    words = f"With {factor}, {pair.ours} minus the best other method, {pair.other}: {100 * difference.mean:+.1f} points"
    if difference.n < 2:
        return f"{words} on one seed, which proves nothing."
    low, high = 100 * (difference.mean - difference.half), 100 * (difference.mean + difference.half)
    return (
        f"{words} (95 % interval {low:+.1f} .. {high:+.1f}), better on {pair.wins} of {difference.n} seeds; paired "
        f"t-test p = {pair.p_t:.3g}, signed-rank test p = {pair.p_wilcoxon:.3g} "
        f"(at least {2.0 ** (1 - difference.n):.3g} for n = {difference.n})."
    )


def _format_percent(mean: SeedMean | None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean.mean:.1f}" + ("" if mean.n == 1 else f" ± {100 * mean.std:.1f}")


def _format_cost(name: str, mean: SeedMean | None) -> str:
    if mean is None:
        return "-"
    return f"{mean.mean:.0f} s" if name.endswith("seconds") else f"{mean.mean / 1e6:,.0f} MB"
