"""How time, memory and disk grow with the number of tasks: a running MagMax, and rules that need every model again."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App
from harness.machine import load_average
from harness.measure import measure_process
from harness.methods import MAGMAX, TIME_LIMIT_S
from harness.places import CHILDREN, OUTPUT
from harness.results import make_entry, publish_entry
from harness.rounds import clear_output, console
from harness.tables import GROWTH_COLUMNS
from safetensors.numpy import save_file

app = App(help=__doc__)
REMERGING_RULES = ("ties", "magmax", "tunable")
"""Merged anew from every checkpoint after each task; `tunable` with even preferences."""


def write_model(path: Path, parameters: int, seed: int) -> Path:
    """A model of four tensors; the base has the seed 0, another one is the base plus noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for number in range(4):
        base = np.random.default_rng([0, number]).standard_normal(parameters // 4, np.float32)
        noise = np.random.default_rng([seed, number]).standard_normal(parameters // 4, np.float32)
        tensors[f"layer.{number}.weight"] = (base + 0.025 * noise * (seed > 0)).reshape(-1, 1000)
    save_file(tensors, path)
    return path


def measure_command(method: str, task: int, command: list[str], kept_paths: list[Path]) -> dict[str, Any]:
    """One command, and the bytes that must be kept for the next task beside the base."""
    run = measure_process(command, TIME_LIMIT_S, CHILDREN)
    console.print(f"{method}, task {task}: {run.status} {run.error}")
    files = [file for path in kept_paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return {
        "method": method,
        "tasks": task,
        "failure": "" if run.ok else f"{run.status}: {run.error}",
        "whole_s": run.whole_s,
        "anonymous_mb": run.peak_anonymous_mb,
        "read_mb": run.bytes_read / 1e6,
        "kept_mb": sum(file.stat().st_size for file in files) / 1e6,
    }


@app.default
def main(*, parameters: int = 20_000_000, tasks: list[int] | None = None) -> None:
    """Learns one task after another (20 by default) and writes results/growth.json and .md."""
    wanted, load = sorted(tasks or [2, 5, 10, 20]), load_average()
    clear_output()
    base = write_model(OUTPUT / "base.safetensors", parameters, 0)
    models: list[Path] = []
    records: list[dict[str, Any]] = []
    for task in range(1, wanted[-1] + 1):
        models.append(write_model(OUTPUT / f"task-{task}.safetensors", parameters, task))
        state, names = OUTPUT / "state", [str(model) for model in models]
        step = measure_command(
            "running magmax", task, [MAGMAX, "running", "absorb", str(state), names[-1], "--base", str(base)], [state]
        )
        if task not in wanted:
            continue
        records.append(step)
        for rule in REMERGING_RULES:
            prefer = [word for name in models for word in ("--prefer", f"{name.stem}=1")]
            verb = ["tune", *names, *prefer] if rule == "tunable" else ["merge", *names, "--rule", rule]
            out = OUTPUT / "merged.safetensors"
            records.append(measure_command(rule, task, [MAGMAX, *verb, "--base", str(base), "--out", str(out)], models))
            out.unlink(missing_ok=True)
    records.sort(key=lambda one: one["method"])
    title = f"One more task, {parameters / 1e6:.0f} M float32 parameters, T tasks in all"
    publish_entry("growth", "growth", make_entry(title, records, load), {"growth": GROWTH_COLUMNS}, save=True)
    shutil.rmtree(OUTPUT, ignore_errors=True)


if __name__ == "__main__":
    app()
