"""Merging with nothing in the page cache: is the disk the bound?"""

import mmap
import os
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from cyclopts import App
from harness.machine import load_average
from harness.measure import Measurement, measure_process
from harness.methods import TIME_LIMIT_S, floor_method, magmax_command
from harness.places import CHILDREN, OUTPUT
from harness.results import make_entry, publish_entry
from harness.rounds import clear_output, console
from harness.tables import COLD_COLUMNS
from harness.workloads import VIT_88M, Workload, create_workload, weight_files

app = App(help=__doc__)
SPARE_BYTES = 1_000_000_000
MEMORY_FACTOR = 2
"""Times the bytes that a run moves."""


def drop_page_cache(w: Workload) -> None:
    """Forgets the inputs' pages: they are on disk, so the kernel may let go of all of them."""
    for path in w.inputs():
        for file in weight_files(path):
            _drop_file(file)


def _drop_file(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _claim_memory(size: int) -> None:
    """Uses so much memory and gives it back, so that a virtual machine has it at hand: its host takes it away in
    seconds, and to get it back may take as long as reading."""
    with mmap.mmap(-1, size) as memory:
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


def measure_cold(w: Workload, command: list[str]) -> Measurement:
    clear_output()
    os.sync()  # what the run before wrote must not be on this one's bill
    drop_page_cache(w)
    _claim_memory(MEMORY_FACTOR * w.model_bytes() * (w.tasks + 2))
    run = measure_process(command, TIME_LIMIT_S, CHILDREN)
    if not run.ok or run.inner_s is None:
        raise SystemExit(f"{run.status}: {run.error}")
    return run


def measure_round(w: Workload, number: int, commands: dict[str, list[str]]) -> dict[str, Any]:
    """The floor and ours, in turns first and second."""
    order = ("floor", "ours") if number % 2 else ("ours", "floor")
    runs = {name: measure_cold(w, commands[name]) for name in order}
    seconds = {name: run.inner_s or 0.0 for name, run in runs.items()}
    moved = w.model_bytes() * (w.tasks + 2)
    console.print(f"cold {number}: floor {seconds['floor']:.2f} s, ours {seconds['ours']:.2f} s")
    return {
        "round": number,
        "floor_s": seconds["floor"],
        "floor_mb_s": moved / 1e6 / seconds["floor"],
        "ours_s": seconds["ours"],
        "times_floor": seconds["ours"] / seconds["floor"],
        "processor_s": runs["ours"].processor_s,
    }


@app.default
def main(*, runs: int = 6, models: int = 8, save: bool = True) -> None:
    """Merges workload (a) with its first so many models, caches dropped before each run; results/cold.json and .md.

    Parameters
    ----------
    runs
        Rounds of a floor (every input read, the output written and fsynced, nothing computed) and a merge.
    models
        Up to 8; 0.35 GB each.
    save
        --no-save prints only.
    """
    w = replace(VIT_88M, name=f"cold{models}", tasks=models)
    create_workload(w, SPARE_BYTES)
    load = load_average()
    commands = {
        "floor": floor_method(w, OUTPUT / "floor").inner,
        "ours": magmax_command(w, OUTPUT / w.output_name(), "magmax"),
    }
    records = [measure_round(w, number, commands) for number in range(1, runs + 1)]
    ratios = sorted(record["times_floor"] for record in records)
    ours, least = (median(record[name] for record in records) for name in ("ours_s", "floor_s"))
    told = (
        f"Times the floor: {ours / least:.2f} by the medians of seconds; by round {median(ratios):.2f} in the median, "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}."
    )
    title = f"Cold cache: 88 M float32 parameters, base + {models} models, rule magmax"
    found = make_entry(title, records, load, notes=[told])
    console.print(told)
    publish_entry("cold", "cold", found, {"cold": COLD_COLUMNS}, save)


if __name__ == "__main__":
    app()
