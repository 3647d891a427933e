"""What absorbing one more model costs: bytes read against base + state + model, written against the state."""

import shutil
import sys
from pathlib import Path
from typing import Any

from cyclopts import App
from harness.machine import load_average
from harness.measure import measure_process
from harness.methods import MAGMAX, TIME_LIMIT_S
from harness.places import CHILDREN, OUTPUT
from harness.results import make_entry, publish_entry
from harness.rounds import clear_output, console, warm_page_cache
from harness.tables import ABSORB_COLUMNS
from harness.workloads import VIT_88M, create_workload

app = App(help=__doc__)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure_absorb(model: Path, state: Path, import_bytes: tuple[int, int]) -> dict[str, Any]:
    """One `magmax running absorb`, less the bytes that starting the command reads and writes."""
    base = VIT_88M.inputs()[0]
    before = folder_bytes(state) if state.exists() else 0
    run = measure_process(
        [MAGMAX, "running", "absorb", str(state), str(model), "--base", str(base), "--name", model.parent.name],
        TIME_LIMIT_S,
        CHILDREN,
    )
    read, written = run.bytes_read - import_bytes[0], run.bytes_written - import_bytes[1]
    after = folder_bytes(state) if state.exists() else 0
    console.print(f"absorb {model.parent.name}: {run.status} {run.error}")
    inputs = base.stat().st_size + model.stat().st_size + before
    return {
        "model": model.parent.name,
        "failure": "" if run.ok else f"{run.status}: {run.error}",
        "whole_s": run.whole_s,
        "read_mb": read / 1e6,
        "written_mb": written / 1e6,
        "state_before_mb": before / 1e6,
        "state_after_mb": after / 1e6,
        "reads": read / inputs,
        "writes": written / VIT_88M.model_bytes(),
        "anonymous_mb": run.peak_anonymous_mb,
    }


@app.default
def main(*, models: int = 3) -> None:
    """Absorbs so many models of workload (a), one after the other, and writes results/absorb.json and .md."""
    create_workload(VIT_88M)
    load = load_average()
    clear_output()
    warm_page_cache(VIT_88M)
    start = measure_process([sys.executable, "-c", "import magmax.cli, magmax.merging"], TIME_LIMIT_S, CHILDREN)
    imports = (start.bytes_read, start.bytes_written)
    records = [measure_absorb(model, OUTPUT / "state", imports) for model in VIT_88M.inputs()[1 : models + 1]]
    title = f"magmax running absorb, {VIT_88M.parameters() / 1e6:.0f} M float32 parameters, model after model"
    found = make_entry(title, records, load)
    publish_entry("absorb", "absorb", found, {"absorb": ABSORB_COLUMNS}, save=True)
    shutil.rmtree(OUTPUT, ignore_errors=True)


if __name__ == "__main__":
    app()
