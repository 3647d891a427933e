"""What absorbing one more model costs: bytes read against base + state + model, written against the state."""

import shutil
import sys
from pathlib import Path
from typing import Any

from cyclopts import App
from harness.machine import load_of_the_last_minute
from harness.measure import measure
from harness.methods import LIMIT_S, MAGMAX
from harness.places import CHILDREN, OUTPUT
from harness.results import entry, publish
from harness.rounds import console, fresh_output, warm
from harness.tables import ABSORB
from harness.workloads import A, make

app = App(help=__doc__)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def absorb(model: Path, state: Path, imports: tuple[int, int]) -> dict[str, Any]:
    """One `magmax absorb`, less the bytes that starting the command reads and writes."""
    base = A.inputs()[0]
    before = folder_bytes(state) if state.exists() else 0
    run = measure(
        [MAGMAX, "absorb", str(state), str(model), "--base", str(base), "--name", model.parent.name], LIMIT_S, CHILDREN
    )
    read, written = run.bytes_read - imports[0], run.bytes_written - imports[1]
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
        "writes": written / A.model_bytes(),
        "anonymous_mb": run.peak_anonymous_mb,
    }


@app.default
def main(*, models: int = 3) -> None:
    """Absorbs so many models of workload (a), one after the other, and writes results/absorb.json and .md."""
    make(A)
    load = load_of_the_last_minute()
    fresh_output()
    warm(A)
    start = measure([sys.executable, "-c", "import magmax.cli, magmax.merging"], LIMIT_S, CHILDREN)
    imports = (start.bytes_read, start.bytes_written)
    records = [absorb(model, OUTPUT / "state", imports) for model in A.inputs()[1 : models + 1]]
    title = f"magmax absorb, {A.parameters() / 1e6:.0f} M float32 parameters, model after model"
    found = entry(title, records, load)
    publish("absorb", "absorb", found, {"absorb": ABSORB}, save=True)
    shutil.rmtree(OUTPUT, ignore_errors=True)


if __name__ == "__main__":
    app()
