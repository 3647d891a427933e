"""The same recipes, word for word, in mergekit and here: how many numbers are equal, how far the others are apart."""

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cyclopts import App
from harness.agreement import tensors
from harness.machine import load_of_the_last_minute
from harness.methods import MAGMAX, script
from harness.places import OUTPUT
from harness.results import entry, publish
from harness.rivals import MERGEKIT, install, versions
from harness.shapes import Llama
from harness.tables import MOMENTS, PARITY
from harness.workloads import Workload, make

SHAPE = Llama(hidden=192, layers=4, heads=6, key_heads=2, inner=512, vocabulary=1000)
WORKLOADS = [Workload(f"parity-{dtype.lower()}", SHAPE, dtype, tasks=3) for dtype in ("F32", "BF16")]
LIMIT_S = 1800
app = App(help=__doc__)


@dataclass(frozen=True)
class Case:
    """A recipe; `own` are the parameters of each model, one map a model. The first model is the base if `base`."""

    name: str
    method: str
    own: tuple[dict[str, Any], ...] = ({}, {}, {})
    shared: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    base: bool = True
    random: bool = False

    def recipe(self, w: Workload, dtype: str) -> dict[str, Any]:
        base, *models = [str(folder) for folder in w.model_folders()]
        listed = [{"model": m, "parameters": dict(p)} for m, p in zip(models, self.own, strict=False)]
        start = {"base_model": base} if self.base else {}
        return {"merge_method": self.method, **start, "models": listed, "parameters": dict(self.shared), "dtype": dtype}


def weights(*numbers: Any, **more: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"weight": n, **more} for n in numbers)


CASES = [
    Case("linear", "linear", weights(0.3, 0.5, 0.4), base=False),
    Case("linear, not normalised", "linear", weights(0.3, 0.5, 0.4), {"normalize": False}, base=False),
    Case("task_arithmetic", "task_arithmetic", weights(0.3, 0.5, -0.4), {"lambda": 1.2}),
    Case("task_arithmetic, normalised", "task_arithmetic", weights(0.3, 0.5, 0.4), {"normalize": True}),
    Case(
        "task_arithmetic, gradient and filters",
        "task_arithmetic",
        weights([0, 0.5, 1], [{"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}], 0.25),
    ),
    Case("ties", "ties", weights(0.3, 0.5, 0.4, density=0.5)),
    Case("ties, density 0.2, a sum", "ties", weights(1, 1, 1, density=0.2), {"normalize": False}),
    Case("dare_ties, kept whole", "dare_ties", weights(0.3, 0.5, 0.4)),
    Case("breadcrumbs", "breadcrumbs", weights(0.3, 0.5, 0.4, density=0.75, gamma=0.125)),
    Case("breadcrumbs_ties", "breadcrumbs_ties", weights(0.3, 0.5, 0.4, density=0.75, gamma=0.125)),
    Case("sce", "sce"),
    Case("sce, select_topk 0.5", "sce", shared={"select_topk": 0.5}),
    Case("slerp", "slerp", ({},), {"t": 0.3}),
    Case("slerp, gradient and filters", "slerp", ({},), {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}),
    Case("nearswap", "nearswap", ({},), {"t": 0.0001}),
    Case("model_stock", "model_stock"),
    Case("karcher", "karcher", base=False),
    Case("passthrough, scaled", "passthrough", ({"scale": 0.5},), base=False),
    Case("dare_linear", "dare_linear", weights(0.3, 0.5, 0.4, density=0.5), random=True),
    Case("dare_ties", "dare_ties", weights(0.3, 0.5, 0.4, density=0.5), random=True),
    Case("dare_ties, not rescaled", "dare_ties", weights(0.3, 0.5, 0.4, density=0.5), {"rescale": False}, random=True),
    Case("della", "della", weights(0.3, 0.5, 0.4, density=0.5, epsilon=0.2), random=True),
    Case("della_linear", "della_linear", weights(0.3, 0.5, 0.4, density=0.5, epsilon=0.2), random=True),
]


def bits(path: Path) -> dict[str, np.ndarray]:
    """Every tensor's bits: float32's as they are, bfloat16's as the upper half of a float32, float64's as numbers."""
    found = {}
    for name, (file, start, size, dtype) in tensors(path).items():
        raw = np.fromfile(file, np.uint8, size, offset=start)
        found[name] = raw.view(np.uint16).astype(np.uint32) << 16 if dtype == "BF16" else raw.view(np.uint32)
        if dtype == "F64":
            found[name] = raw.view(np.float64)
    return found


def numbers(path: Path) -> dict[str, np.ndarray]:
    return {name: found if found.dtype == np.float64 else found.view(np.float32) for name, found in bits(path).items()}


def joined(found: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([found[name] for name in sorted(found)]).astype(np.float64)


def spacing(values: np.ndarray, w: Workload) -> np.ndarray:
    """The distance from one number to the next of the workload's type, at these magnitudes."""
    return np.spacing(np.abs(values).astype(np.float32)).astype(np.float64) * (1 if w.dtype == "F32" else 2**16)


def parity(case: Case, w: Workload, ours: Path, theirs: Path, exact: Path) -> dict[str, Any]:
    """Both against each other, and against mergekit's own arithmetic in float64."""
    a, b, c = (joined(numbers(path)) for path in (ours, theirs, exact))
    step = spacing(c, w)
    return {
        "method": case.name,
        "dtype": w.dtype,
        "equal": float((a == b).mean()),
        "apart": float(np.abs(a - b).max()),
        "ours_nearest": float((np.abs(a - c) <= 0.5000001 * step).mean()),
        "theirs_nearest": float((np.abs(b - c) <= 0.5000001 * step).mean()),
        "ours_error": float(np.abs(a - c).max()),
        "theirs_error": float(np.abs(b - c).max()),
        "why": case.why.get(w.dtype, case.why.get("", "")),
    }


def moments(case: Case, w: Workload, ours: Path, theirs: Path) -> dict[str, Any]:
    """How much of the base moved, how far in the mean, and how far at all."""
    base = joined(numbers(w.model_folders()[0]))
    record: dict[str, Any] = {"method": case.name, "dtype": w.dtype}
    for whose, path in (("ours", ours), ("theirs", theirs)):
        move = joined(numbers(path)) - base
        record |= {f"{whose}_moved": float((move != 0).mean()), f"{whose}_mean": float(np.abs(move).mean())}
        record |= {f"{whose}_rms": float(np.sqrt((move**2).mean()))}
    return record


def run_both(w: Workload) -> list[tuple[Case, Path, Path, Path]]:
    """Every case, by mergekit in the workload's type and in float64, and by `magmax merge`."""
    made, merges = [], []
    for number, case in enumerate(CASES):
        folder = OUTPUT / w.name / str(number)
        folder.mkdir(parents=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(case.recipe(w, "float32" if w.dtype == "F32" else "bfloat16")))
        ours, theirs, exact = folder / "ours", folder / "theirs", folder / "exact"
        merges += [(str(recipe), str(theirs), None)]
        merges += [] if case.random else [(str(recipe), str(exact), "float64")]
        subprocess.run([MAGMAX, "merge", str(recipe), "--out", str(ours)], check=True, stdout=subprocess.DEVNULL)
        made.append((case, ours, theirs, exact))
    command = script(MERGEKIT.python, "mergekit_recipes.py", {"merges": merges})
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise SystemExit(f"mergekit: {done.stderr[-2000:]}")
    return made


@app.default
def main(*, save: bool = True) -> None:
    """Merges by every recipe with both, prints the tables, and writes results/parity.json and results/parity.md.

    Parameters
    ----------
    save
        --no-save prints only.
    """
    if problem := install(MERGEKIT):
        raise SystemExit(f"mergekit cannot be installed: {problem}")
    load = load_of_the_last_minute()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    exact, chance = [], []
    for w in WORKLOADS:
        make(w)
        for case, *paths in run_both(w):
            (chance if case.random else exact).append(
                moments(case, w, *paths[:2]) if case.random else parity(case, w, *paths)
            )
    elements = f"{SHAPE_ELEMENTS:,} elements, base + 3 models"
    columns = {"elementwise": PARITY, "random": MOMENTS}
    for name, title, records in (
        ("elementwise", f"mergekit's recipes in mergekit and here: {elements}", exact),
        ("random", f"Methods that draw at random: {elements}", chance),
    ):
        found = entry(title, records, load)
        found["versions"] |= {MERGEKIT.package: versions(MERGEKIT)}
        publish("parity", name, found, columns, save)
    shutil.rmtree(OUTPUT, ignore_errors=True)


SHAPE_ELEMENTS = WORKLOADS[0].parameters()

if __name__ == "__main__":
    app()
