"""A benchmark's results made up: accuracies that a formula gives, in the files that magmax bench writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

TASKS = 3


def make_rows(offset: float, learned: list[int]) -> dict[str, Any]:
    made = {}
    for i in learned:
        tasks = [round(0.5 + offset + 0.1 * (j < i) - 0.02 * (i - j) * (j < i), 6) for j in range(TASKS)]
        made[str(i)] = {"tasks": tasks, "micro": float(np.mean(tasks)), "macro": float(np.mean(tasks))}
    return made


def make_record(rule: Any, name: str, training: str, seed: int, offset: float, factors: tuple[float, ...] = ()) -> dict:
    alone = rule == "zero_shot"
    variants = [
        {
            "variant": "default",
            "scaling_factor": None if rule in ("last", "zero_shot") else 0.5,
            "rows": make_rows(offset + 0.01 * seed, list(range(0 if alone else 1, TASKS + 1))),
        }
    ]
    variants += [
        {"variant": f"factor {f:g}", "scaling_factor": f, "rows": make_rows(offset - abs(f - 0.6) / 10, [TASKS])}
        for f in factors
    ]
    return {
        "seed": seed,
        "method": "zero_shot" if alone else f"{name}/{training}",
        "training": training,
        "rule": name,
        "digest": "0" * 32,
        "variants": variants,
        "search": {str(f): 0.6 + f / 100 for f in factors},
        "seconds": {"training": 12.0, "merging": 1.0, "evaluating": 2.0},
        "peak_memory": 2_000_000,
        "stored_bytes": 1_000_000,
        "models": {} if alone else {"theta_1": f"{seed:032x}"},
        "recipe": {"rule": rule, "training": {training: {}}, "seed": seed, "data": "toys", "model": "tiny"},
        "environment": {"magmax": "0", "device": "cpu"},
    }


def write_results(folder: Path, seeds: tuple[int, ...] = (0, 1, 2), few: bool = False) -> Path:
    """A folder with results.json: every kind of sweep that a study can be made of, or only a few methods."""
    records = []
    for seed in seeds:
        records.append(make_record("zero_shot", "zero_shot", "zero_shot", seed, 0.0))
        for c, training in enumerate(("sequential", "independent")):
            records.append(make_record("magmax", "magmax", training, seed, 0.12 - 0.05 * c, (0.2, 0.6, 1.0)))
            records.append(make_record("average", "average", training, seed, 0.1 - 0.05 * c))
            if few:
                continue
            for k in (2, 3):
                rule = {"kth_magnitude": {"k": k}}
                records.append(make_record(rule, f"kth_magnitude(k={k})", training, seed, 0.1 - 0.02 * k))
            for which in ("top", "bottom", "random"):
                for keep in (0.1, 0.5):
                    rule = [{"prune": {"density": keep, "which": which}}, "magmax"]
                    name = f"prune(density={keep},which={which})+magmax"
                    records.append(make_record(rule, name, training, seed, 0.05 + keep / 10))
            for n in (1, 2):
                keeps = [0] * n + [1] * (TASKS - n)
                rule = [{"prune": {"density": keeps}}, "magmax"]
                records.append(make_record(rule, f"prune(density={keeps})+magmax", training, seed, 0.12 - 0.03 * n))
        records.append(make_record("last", "last", "sequential", seed, 0.03))
    recipe = {
        "data": "toys",
        "model": "tiny",
        "scenario": {"class_incremental": {"tasks": TASKS}},
        "fit": {"steps": 5, "learning_rate": 0.01},
        "among": "all",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"recipe": recipe, "records": records}))
    return folder
