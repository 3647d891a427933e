"""What is run on a workload: the floor, ours, the rivals."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.places import CHILDREN
from harness.rivals import FUSION_BENCH, MERGEKIT, Rival
from harness.workloads import Workload, weight_files
from magmax.rules import make_rule

MAGMAX = str(Path(sys.executable).parent / "magmax")
RULES = ("magmax", "average", "task_arithmetic", "ties")
TIME_LIMIT_S = 300.0


@dataclass(frozen=True)
class Method:
    """One line of the table: a process timed whole, and one that times itself without its imports.

    They may be the same. `rival` is the environment it needs; `comparable` says that it computes MagMax; `passes` is
    how often it reads the inputs, at the usual most, where that is known.
    """

    name: str
    kind: Literal["floor", "ours", "rival"]
    whole: list[str]
    inner: list[str]
    out: Path
    rival: Rival | None = None
    comparable: bool = False
    passes: int | None = None


def child_command(python: str, child: str, job: dict[str, object]) -> list[str]:
    return [python, str(CHILDREN / child), json.dumps(job)]


def child_job(w: Workload, out: Path, **more: object) -> dict[str, object]:
    base, *tuned = [str(path) for path in w.inputs()]
    return {"base": base, "models": tuned, "out": str(out), **more}


def floor_method(w: Workload, out: Path) -> Method:
    base, *tuned = w.inputs()
    job = {
        "base_files": [str(file) for file in weight_files(base)],
        "model_files": [str(file) for model in tuned for file in weight_files(model)],
        "out": str(out),
    }
    command = child_command(sys.executable, "floor.py", job)
    return Method("floor", "floor", command, command, out, passes=1)


def magmax_command(w: Workload, out: Path, rule: str, models: int | None = None) -> list[str]:
    """With the first so many `models`, or all."""
    job = child_job(w, out, rule=rule)
    job["models"] = [str(path) for path in w.inputs()[1:][:models]]
    return child_command(sys.executable, "ours.py", job)


def magmax_methods(w: Workload, out: Path) -> list[Method]:
    base, *tuned = [str(path) for path in w.inputs()]
    start = [MAGMAX, "merge", "--base", base, *tuned, "--out", str(out), "--rule"]
    return [
        Method(
            f"ours: {rule}",
            "ours",
            [*start, rule],
            magmax_command(w, out, rule),
            out,
            comparable=rule == "magmax",
            passes=1 + make_rule(rule).passes,
        )
        for rule in RULES
    ]


def rival_methods(w: Workload, out: Path) -> list[Method]:
    """On (b) without magmax_merge: it holds every model and every task vector, 20 GB."""
    job = child_job(w, out)
    found = [
        _rival_method("in memory: torch.where", None, "in_memory.py", job),
        _rival_method("FusionBench MagMaxAlgorithm", FUSION_BENCH, "fusion_bench_magmax.py", job),
    ]
    if w.name == "a":
        found.append(_rival_method("FusionBench magmax_merge", FUSION_BENCH, "fusion_bench_function.py", job))
    dtype = "float32" if w.dtype == "F32" else "bfloat16"
    parameters: dict[str, dict[str, object]] = {"linear": {}, "task_arithmetic": {}, "ties": {"density": 0.2}}
    for name, more in parameters.items():
        job = child_job(w, out.with_suffix(""), **more, rule=name, dtype=dtype)
        found.append(_rival_method(f"mergekit {name}", MERGEKIT, "mergekit_recipe.py", job))
    return found


def _rival_method(name: str, rival: Rival | None, child: str, job: dict[str, object]) -> Method:
    command = child_command(rival.python if rival else sys.executable, child, job)
    out = Path(str(job["out"]))
    return Method(name, "rival", command, command, out, rival=rival, comparable=rival is not MERGEKIT)
