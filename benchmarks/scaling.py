"""Time and memory of merging over parameters, models and workers, beside what the model of the cost says."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cyclopts import App
from harness.machine import load_average
from harness.measure import Measurement, measure_process
from harness.methods import TIME_LIMIT_S, magmax_command
from harness.places import CHILDREN, DATA, REPOSITORY
from harness.results import make_entry, publish_entry
from harness.rounds import console
from harness.safetensors_stream import Shapes, StreamWriter
from harness.tables import SCALING_COLUMNS
from harness.workloads import LLAMA, LLAMA_LARGE, VIT_BASE, VIT_LARGE, VIT_SMALL, Workload, split_shards, write_indices
from matplotlib.figure import Figure

from magmax.merging.cost import ELEMENT_NS

SIZES = {"10m": VIT_SMALL, "88m": VIT_BASE, "300m": VIT_LARGE, "1100m": LLAMA, "2000m": LLAMA_LARGE}
MODELS = (2, 4, 8, 16, 32)
WORKERS = (1, 2)
SHARDS = 6
MIN_POOL = 2
"""LEAST_POOL ** SHARDS models can differ."""
CHUNK_ELEMENTS = 1 << 22
SPARE_BYTES = 2_000_000_000
FINITE_MASK = np.uint16(0xBFFF)
"""Clears the bit without which no bfloat16 is infinite or NaN."""
app = App(help=__doc__)


def create_models(w: Workload, folder: Path, pool: int) -> Workload:
    """A base and models of random finite bfloat16 in `folder`, no two alike, of `pool` files for each shard."""
    placed = PlacedWorkload(w, folder)
    for place in (folder / "pool", *placed.model_folders()):
        place.mkdir(parents=True)
    for shard, (name, shapes) in enumerate(split_shards(w).items()):
        files = [folder / "pool" / f"{shard}-{number}.safetensors" for number in range(pool)]
        for number, file in enumerate(files):
            _write_random(file, shapes, w.dtype, np.random.default_rng((number, shard)))
        for model, place in enumerate(placed.model_folders()):
            (place / name).hardlink_to(files[_pool_index(model, shard, pool)])
    write_indices(placed)
    return placed


def _write_random(path: Path, shapes: Shapes, dtype: str, draw: np.random.Generator) -> None:
    with StreamWriter(path, shapes, dtype) as writer:
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                count = min(CHUNK_ELEMENTS, left)
                writer.write(np.frombuffer(draw.bytes(2 * count), np.uint16) & FINITE_MASK)
                left -= count


def _pool_index(model: int, shard: int, pool: int) -> int:
    """Which file of the pool a model has for a shard: the model's own, where there are enough; no two models alike."""
    digit = model // pool**shard % pool
    return (digit + model) % pool if shard else digit


class PlacedWorkload(Workload):
    """A workload that lies in a folder of its own."""

    def __init__(self, w: Workload, folder: Path) -> None:
        super().__init__(w.name, w.architecture, w.dtype, w.tasks, w.shards)
        object.__setattr__(self, "_folder", folder / w.name)

    @property
    def folder(self) -> Path:
        return self._folder


def measure_point(w: Workload, models: int, workers: int, out: Path) -> dict[str, Any]:
    """One merge, its inputs in the page cache."""
    command = magmax_command(w, out, "magmax", models)
    command[-1] = json.dumps(json.loads(command[-1]) | {"threads": workers})
    shutil.rmtree(out, ignore_errors=True)
    run: Measurement = measure_process(command, TIME_LIMIT_S, CHILDREN)
    shutil.rmtree(out, ignore_errors=True)
    predicted = w.parameters() * (models + 2) * ELEMENT_NS * 1e-9
    console.print(f"{w.name}, {models} models, {workers} workers: {run.inner_s} s {run.error}")
    return {
        "parameters": w.parameters(),
        "models": models,
        "workers": workers,
        "failure": "" if run.ok else f"{run.status}: {run.error}",
        "inner_s": run.inner_s,
        "processor_s": run.processor_s,
        "predicted_s": predicted,
        "over_predicted": run.processor_s / predicted if run.processor_s else None,
        "wall_over_predicted": run.inner_s / (predicted / workers) if run.inner_s else None,
        "peak_rss_mb": run.peak_rss_mb,
        "above_imports_mb": run.above_imports_mb,
    }


def plot_results(records: list[dict[str, Any]], path: Path) -> None:
    """Wall seconds and memory over the elements moved; a line for what the model says of each number of workers."""
    matplotlib.rcParams["svg.hashsalt"] = "magmax"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for workers, mark, style in zip(WORKERS, "os", ("--", ":"), strict=True):
        mine = [r for r in records if r["workers"] == workers and not r["failure"]]
        moved = [r["parameters"] * (r["models"] + 2) for r in mine]
        words = f"{workers} worker" + "s" * (workers > 1)
        (points,) = time.plot(moved, [r["inner_s"] for r in mine], mark, label=words, alpha=0.8)
        line = sorted(moved)
        model = [n * ELEMENT_NS * 1e-9 / workers for n in line]
        time.plot(line, model, style, color=points.get_color(), lw=1, label=f"model, {words}")
        memory.plot(moved, [r["above_imports_mb"] for r in mine], mark, label=words)
    time.set(xscale="log", yscale="log", ylabel="wall seconds", xlabel="elements read and written")
    memory.set(xscale="log", ylim=(0, None), ylabel="MB above imports", xlabel="elements read and written")
    time.legend(fontsize=7)
    memory.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


@app.default
def main(*, folder: Path = DATA / "scaling", gigabytes: float = 8.0, save: bool = True) -> None:
    """Merges 2 to 32 models of 10 M to 2 B bfloat16 parameters by magnitude, with 1 and 2 workers.

    Where there is no room for all models, they share files, no two of them all: as many bytes are read.
    Writes results/scaling.json and .md, and docs/scaling.svg.

    Parameters
    ----------
    folder
        Where models are made; a folder in memory (tmpfs) leaves the disk out.
    gigabytes
        The most that models and an output may take at once.
    save
        --no-save prints only.
    """
    load = load_average()
    records: list[dict[str, Any]] = []
    told: list[str] = []
    for name, architecture in SIZES.items():
        w = Workload(name, architecture, "BF16", tasks=MODELS[-1], shards=SHARDS)
        room = min(gigabytes * 1e9, _free_bytes(folder) - SPARE_BYTES)
        pool = min(MODELS[-1] + 1, int(room // w.model_bytes()) - 1)
        if pool < MIN_POOL:
            told.append(f"none of {name}")
            continue
        if pool <= MODELS[-1]:
            told.append(f"{pool} of {name}")
        try:
            made = create_models(w, folder, pool)
            out = folder / made.output_name()
            records += [measure_point(made, models, workers, out) for models in MODELS for workers in WORKERS]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    shared = f"Room for {gigabytes:g} GB, so that models share files: {', '.join(told)} differ in all. " if told else ""
    words = f"{shared}Models in {_storage_name(folder)}."
    found = make_entry("Scaling: rule magmax, bfloat16, base and models in 6 files each", records, load, notes=[words])
    publish_entry("scaling", "scaling", found, {"scaling": SCALING_COLUMNS}, save)
    if save:
        plot_results(records, REPOSITORY / "docs" / "scaling.svg")


def _free_bytes(folder: Path) -> int:
    """Bytes to be had on the disk of a folder, or of memory where it lies there."""
    there = next(path for path in [folder, *folder.parents] if path.exists())
    free = shutil.disk_usage(there).free
    if not _in_memory(folder):
        return free
    lines = Path("/proc/meminfo").read_text().splitlines()
    return min(free, *(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))


def _in_memory(folder: Path) -> bool:
    return os.fspath(folder).startswith("/dev/shm")


def _storage_name(folder: Path) -> str:
    return "memory (tmpfs)" if _in_memory(folder) else "a folder on disk, page cache warm"


if __name__ == "__main__":
    app()
