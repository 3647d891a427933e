"""Rounds: every method in turn, a floor before each, inputs in the page cache, the last output gone."""

import os
import shutil
from dataclasses import asdict, dataclass, field
from statistics import median

from rich.console import Console

from harness.agreement import differing_share, incompleteness
from harness.measure import Measured, measure
from harness.methods import LIMIT_S, Method, floor
from harness.places import CHILDREN, OUTPUT, WORK
from harness.rivals import install
from harness.workloads import Workload, weight_files

REFERENCE = WORK / "reference"
console = Console(stderr=True)


@dataclass
class Row:
    """All runs of one method; `differing` is the share of elements whose bits are not those of our merge."""

    method: Method
    whole: list[Measured] = field(default_factory=list)
    inner: list[Measured] = field(default_factory=list)
    differing: float | str | None = None
    not_run: str = ""
    incomplete: str = ""

    @property
    def failure(self) -> str:
        if self.not_run or self.incomplete:
            return self.not_run or self.incomplete
        failed = next((run for run in [*self.whole, *self.inner] if not run.ok), None)
        return f"{failed.status}: {failed.error}".removesuffix(": ") if failed else ""

    def summary(self, floor_s: float, ours: "Row | None") -> dict[str, object]:
        """Medians of the times, maxima of the memory, and the ratios."""
        whole, inner = _middle(self.whole, "whole_s"), _middle(self.inner, "inner_s")
        above = [run.above_imports_mb for run in self.inner if run.above_imports_mb is not None]
        return {
            "method": self.method.name,
            "failure": self.failure,
            "runs": len(self.whole),
            "whole_s": whole,
            "inner_s": inner,
            "times_floor": _ratio(inner, floor_s),
            "passes": self.method.passes,
            "whole_over_ours": _ratio(whole, _middle(ours.whole, "whole_s")) if ours else None,
            "inner_over_ours": _ratio(inner, _middle(ours.inner, "inner_s")) if ours else None,
            "peak_rss_mb": max((run.peak_rss_mb for run in self.whole), default=None),
            "peak_anonymous_mb": max((run.peak_anonymous_mb for run in self.whole), default=None),
            "anonymous_above_imports_mb": max(above, default=None),
            "differing": self.differing,
            "all_whole": [asdict(run) for run in self.whole],
            "all_inner": [asdict(run) for run in self.inner],
        }


def _middle(runs: list[Measured], name: str) -> float | None:
    values = [getattr(run, name) for run in runs if run.ok and getattr(run, name) is not None]
    return median(values) if values else None


def _ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value is not None and unit else None


def warm(w: Workload) -> None:
    """Reads every input once, so that the page cache holds it."""
    for path in w.inputs():
        for file in weight_files(path):
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 20):
                    pass


def fresh_output() -> None:
    """Deletes the last output and waits until the disk is idle of it."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    os.sync()


def timed_once(w: Workload, command: list[str], limit_s: float = LIMIT_S) -> Measured:
    fresh_output()
    warm(w)
    return measure(command, limit_s, CHILDREN)


def run_rounds(w: Workload, methods: list[Method], runs: int, rival_runs: int, limit_s: float) -> list[Row]:
    """The floor's row first. A method that failed once, or took too long, is not tried again."""
    lowest = Row(floor(w, OUTPUT / "floor"))
    rows = [Row(method) for method in methods]
    for row in rows:
        error = install(row.method.rival) if row.method.rival else ""
        row.not_run = f"cannot be installed: {error}" if error else ""
    for number in range(max(runs, rival_runs)):
        for row in rows:
            if row.failure or number >= (rival_runs if row.method.kind == "rival" else runs):
                continue
            floor_run = timed_once(w, lowest.method.inner)
            lowest.whole.append(floor_run)
            lowest.inner.append(floor_run)
            _one_run(w, row, number, limit_s)
    shutil.rmtree(REFERENCE, ignore_errors=True)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    return [lowest, *rows]


def _one_run(w: Workload, row: Row, number: int, limit_s: float) -> None:
    whole = timed_once(w, row.method.whole, limit_s)
    row.whole.append(whole)
    if whole.ok:
        row.incomplete = incompleteness(w.inputs()[0], row.method.out)
    if whole.ok and number == 0 and row.method.comparable:
        row.differing = _compare(row.method)
    if row.method.whole == row.method.inner:
        row.inner.append(whole)
    elif whole.ok:
        row.inner.append(timed_once(w, row.method.inner, limit_s))
    last = row.inner[-1] if row.inner else whole
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
