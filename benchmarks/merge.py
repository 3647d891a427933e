"""How fast, and in how much memory, models are merged from disk to disk: against a floor, against rivals."""

from typing import Any, Literal

from cyclopts import App
from harness.machine import load_average
from harness.methods import TIME_LIMIT_S, magmax_command, magmax_methods, rival_methods
from harness.places import OUTPUT
from harness.results import make_entry, publish_entry
from harness.rivals import FUSION_BENCH, MERGEKIT, package_versions
from harness.rounds import MethodRuns, console, measure_warm, run_rounds
from harness.tables import MEMORY_COLUMNS, METHOD_COLUMNS
from harness.workloads import LLAMA_1100M, MEMORY_SERIES, VIT_88M, Workload, create_workload

RESULTS_NAME = "merge"
COLUMNS = {"a": METHOD_COLUMNS, "b": METHOD_COLUMNS, "memory": MEMORY_COLUMNS}
app = App(help=__doc__)


def workload_title(w: Workload) -> str:
    dtype = {"F32": "float32", "BF16": "bfloat16"}[w.dtype]
    files = f"{w.shards} shards" if w.shards > 1 else "1 file"
    return f"({w.name}) {w.parameters() / 1e6:,.0f} M {dtype} parameters in {files}, base + {w.tasks} models"


def describe_floor(floor: dict[str, Any], row: MethodRuns) -> str:
    times = [run.inner_s for run in row.inner_runs if run.inner_s]
    if not times:
        return f"The floor could not be measured: {row.failure}."
    low, high = min(times), max(times)
    return f"Floor: {len(times)} runs, {low:.2f} to {high:.2f} s, median {floor['inner_s']:.2f} s."


def measure_workload(w: Workload, runs: int, with_ours: bool, with_rivals: bool, limit_s: float) -> dict[str, Any]:
    """One workload: every method's summary. Rivals run once on (b)."""
    create_workload(w)
    load = load_average()
    out = OUTPUT / w.output_name()
    methods = [*(magmax_methods(w, out) if with_ours else []), *(rival_methods(w, out) if with_rivals else [])]
    floor, *rows = run_rounds(w, methods, runs, runs if w.name == "a" else 1, limit_s)
    lowest = floor.summary(1.0, None)
    floor_s = lowest["inner_s"]
    assert isinstance(floor_s, float), floor.failure
    reference = next((row for row in rows if row.method.kind == "ours"), None)
    records = [row.summary(floor_s, reference) for row in [floor, *rows]]
    for record in records:
        record["ns_per_element"] = 1e9 * record["inner_s"] / w.parameters() if record["inner_s"] else None
    environments = {rival.package: package_versions(rival) for rival in (MERGEKIT, FUSION_BENCH)} if with_rivals else {}
    found = make_entry(workload_title(w), records, load, notes=[describe_floor(lowest, floor)])
    found["versions"] |= environments
    return found


def measure_memory_point(w: Workload, models: int) -> dict[str, Any]:
    """One merge by magnitude, its anonymous memory above what the imports had taken."""
    create_workload(w)
    run = measure_warm(w, magmax_command(w, OUTPUT / w.output_name(), "magmax", models))
    console.print(f"memory: {w.name}, {models} models: {run.status} {run.error}")
    return {
        "parameters": w.parameters(),
        "dtype": w.dtype,
        "models": models,
        "failure": "" if run.ok else f"{run.status}: {run.error}",
        "inner_s": run.inner_s,
        "peak_rss_mb": run.peak_rss_mb,
        "peak_anonymous_mb": run.peak_anonymous_mb,
        "anonymous_above_imports_mb": run.above_imports_mb,
    }


def measure_memory() -> dict[str, Any]:
    load = load_average()
    records = [measure_memory_point(w, models) for w, counts in MEMORY_SERIES for models in counts]
    return make_entry("Memory of magmax.merge over the size of the model and the number of models", records, load)


@app.default
def main(
    *,
    workload: Literal["a", "b", "memory", "all"] = "all",
    runs: int = 3,
    rivals: bool = True,
    rivals_only: bool = False,
    limit: float = TIME_LIMIT_S,
) -> None:
    """Makes what is missing, measures, prints the tables, and writes results/merge.json and results/merge.md.

    Parameters
    ----------
    workload
        (a) 88 M float32 parameters and 8 models, (b) 1.1 B bfloat16 parameters and 4, memory, or all.
    runs
        Rounds; rivals run once on (b).
    rivals
        --no-rivals leaves them out; then nothing is written to results.
    rivals_only
        The floor and the rivals alone; nothing is written to results.
    limit
        Seconds that one process may take.
    """
    complete = rivals and not rivals_only
    for w in (VIT_88M, LLAMA_1100M):
        if workload in (w.name, "all"):
            publish_entry(
                RESULTS_NAME,
                w.name,
                measure_workload(w, runs, not rivals_only, rivals or rivals_only, limit),
                COLUMNS,
                complete,
            )
    if workload in ("memory", "all") and not rivals_only:
        publish_entry(RESULTS_NAME, "memory", measure_memory(), COLUMNS, True)


if __name__ == "__main__":
    app()
