"""Rounds: every method in turn, a floor before each, inputs in the page cache, the last output gone."""

import os
import shutil
from dataclasses import asdict, dataclass, field
from statistics import median

from rich.console import Console

from harness.agreement import describe_missing, differing_share
from harness.measure import Measurement, measure_process
from harness.methods import TIME_LIMIT_S, Method, floor_method
from harness.places import CHILDREN, OUTPUT, WORK
from harness.rivals import install
from harness.workloads import Workload, weight_files

REFERENCE = WORK / "reference"
console = Console(stderr=True)


@dataclass
class MethodRuns:
    """All runs of one method; `differing_share` is the share of elements whose bits are not those of our merge."""

    method: Method
    whole_runs: list[Measurement] = field(default_factory=list)
    inner_runs: list[Measurement] = field(default_factory=list)
    differing_share: float | str | None = None
    skip_reason: str = ""
    incomplete_reason: str = ""

    @property
    def failure(self) -> str:
        if self.skip_reason or self.incomplete_reason:
            return self.skip_reason or self.incomplete_reason
        failed = next((run for run in [*self.whole_runs, *self.inner_runs] if not run.ok), None)
        return f"{failed.status}: {failed.error}".removesuffix(": ") if failed else ""

    def summary(self, floor_s: float, ours: "MethodRuns | None") -> dict[str, object]:
        """Medians of the times, maxima of the memory, and the ratios."""
        whole, inner = _median(self.whole_runs, "whole_s"), _median(self.inner_runs, "inner_s")
        above = [run.above_imports_mb for run in self.inner_runs if run.above_imports_mb is not None]
        return {
            "method": self.method.name,
            "failure": self.failure,
            "runs": len(self.whole_runs),
            "whole_s": whole,
            "inner_s": inner,
            "times_floor": _ratio(inner, floor_s),
            "passes": self.method.passes,
            "whole_over_ours": _ratio(whole, _median(ours.whole_runs, "whole_s")) if ours else None,
            "inner_over_ours": _ratio(inner, _median(ours.inner_runs, "inner_s")) if ours else None,
            "peak_rss_mb": max((run.peak_rss_mb for run in self.whole_runs), default=None),
            "peak_anonymous_mb": max((run.peak_anonymous_mb for run in self.whole_runs), default=None),
            "anonymous_above_imports_mb": max(above, default=None),
            "differing": self.differing_share,
            "all_whole": [asdict(run) for run in self.whole_runs],
            "all_inner": [asdict(run) for run in self.inner_runs],
        }


def _median(runs: list[Measurement], name: str) -> float | None:
    values = [getattr(run, name) for run in runs if run.ok and getattr(run, name) is not None]
    return median(values) if values else None


def _ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value is not None and unit else None


def warm_page_cache(w: Workload) -> None:
    """Reads every input once, so that the page cache holds it."""
    for path in w.inputs():
        for file in weight_files(path):
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 20):
                    pass


def clear_output() -> None:
    """Deletes the last output and waits until the disk is idle of it."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    os.sync()


def measure_warm(w: Workload, command: list[str], limit_s: float = TIME_LIMIT_S) -> Measurement:
    clear_output()
    warm_page_cache(w)
    return measure_process(command, limit_s, CHILDREN)


def run_rounds(w: Workload, methods: list[Method], runs: int, rival_runs: int, limit_s: float) -> list[MethodRuns]:
    """The floor's row first. A method that failed once, or took too long, is not tried again."""
    lowest = MethodRuns(floor_method(w, OUTPUT / "floor"))
    rows = [MethodRuns(method) for method in methods]
    for row in rows:
        error = install(row.method.rival) if row.method.rival else ""
        row.skip_reason = f"cannot be installed: {error}" if error else ""
    for number in range(max(runs, rival_runs)):
        for row in rows:
            if row.failure or number >= (rival_runs if row.method.kind == "rival" else runs):
                continue
            floor_run = measure_warm(w, lowest.method.inner)
            lowest.whole_runs.append(floor_run)
            lowest.inner_runs.append(floor_run)
            _measure_round(w, row, number, limit_s)
    shutil.rmtree(REFERENCE, ignore_errors=True)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    return [lowest, *rows]


def _measure_round(w: Workload, row: MethodRuns, number: int, limit_s: float) -> None:
    whole = measure_warm(w, row.method.whole, limit_s)
    row.whole_runs.append(whole)
    if whole.ok:
        row.incomplete_reason = describe_missing(w.inputs()[0], row.method.out)
    if whole.ok and number == 0 and row.method.comparable:
        row.differing_share = _compare(row.method)
    if row.method.whole == row.method.inner:
        row.inner_runs.append(whole)
    elif whole.ok:
        row.inner_runs.append(measure_warm(w, row.method.inner, limit_s))
    last = row.inner_runs[-1] if row.inner_runs else whole
    inner = f", inner {last.inner_s:.2f} s" if last.inner_s else ""
    console.print(f"{w.name} {number + 1}: {row.method.name}: {whole.whole_s:.2f} s{inner} {row.failure}")


def _compare(method: Method) -> float | str | None:
    """Keeps our merge as the reference; compares the others with it."""
    kept = REFERENCE / method.out.name
    if method.kind == "ours":
        shutil.rmtree(REFERENCE, ignore_errors=True)
        REFERENCE.mkdir(parents=True)
        shutil.move(method.out, kept)
        return None
    return differing_share(kept, method.out) if kept.exists() else None
