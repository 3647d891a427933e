"""The same recipes, word for word, in mergekit and here: how many numbers are equal, how far the others are apart."""

import os
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

SHAPE = Llama(hidden=96, layers=4, heads=6, key_heads=2, inner=256, vocabulary=500)
WORKLOADS = [Workload(f"parity-{dtype.lower()}", SHAPE, dtype, tasks=3) for dtype in ("F32", "BF16")]
LIMIT_S = 1800
app = App(help=__doc__)


@dataclass(frozen=True)
class Case:
    """A recipe: the parameters of each model, those of all, and the keys of `WHY` that explain what differs.

    Without `base`, the workload's base is no part of it. `random` methods can only be compared in the mean.
    """

    name: str
    method: str
    own: tuple[dict[str, Any], ...] = ({}, {}, {})
    shared: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    base: bool = True
    random: bool = False

    def recipe(self, w: Workload, dtype: str) -> dict[str, Any]:
        base, *models = [str(folder) for folder in w.model_folders()]
        listed = [{"model": m, "parameters": dict(p)} for m, p in zip(models, self.own, strict=False)]
        start = {"base_model": base} if self.base else {}
        return {"merge_method": self.method, **start, "models": listed, "parameters": dict(self.shared), "dtype": dtype}


def weights(*numbers: Any, **more: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"weight": n, **more} for n in numbers)


WHY = {
    "a": "both compute in float32 or wider, and round elsewhere: mergekit's linear multiplies and adds in one "
    "rounding, here every product and sum is rounded, on every machine alike; slerp, model_stock and karcher measure "
    "in float64 here; nearswap clips where mergekit divides and multiplies",
    "b": "in bfloat16 recipes mergekit computes in bfloat16, here in float32, rounded once",
    "c": "of equal magnitudes at the cut mergekit keeps those that its sort puts first, here those of lowest offset; "
    "both keep the same number; in bfloat16 many are equal",
    "d": "mergekit keeps int(density * n) entries, here round(density * n): one more in some tensors",
    "e": "mergekit weighs all models alike where the mean squares of the task vectors sum to less than 1e-6, as they "
    "do here, which its documentation does not say; the rule elect, which weighs alike, gives mergekit's numbers",
    "f": "weighted sums that are zero but for rounding elect one sign or the other",
}

CASES = [
    Case("linear", "linear", weights(0.3, 0.5, 0.4), why="a", base=False),
    Case("linear, not normalised", "linear", weights(0.3, 0.5, 0.4), {"normalize": False}, "a", base=False),
    Case("task_arithmetic", "task_arithmetic", weights(0.3, 0.5, -0.4), {"lambda": 1.2}, "b"),
    Case("task_arithmetic, normalised", "task_arithmetic", weights(0.3, 0.5, 0.4), {"normalize": True}, "b"),
    Case(
        "task_arithmetic, gradient and filters",
        "task_arithmetic",
        weights([0, 0.5, 1], [{"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}], 0.25),
        why="b",
    ),
    Case("ties", "ties", weights(0.3, 0.5, 0.4, density=0.5), why="bcf"),
    Case("ties, density 0.3, a sum", "ties", weights(1, 1, 1, density=0.3), {"normalize": False}, "bcd"),
    Case("dare_ties, kept whole", "dare_ties", weights(0.3, 0.5, 0.4), why="bf"),
    Case("breadcrumbs", "breadcrumbs", weights(0.3, 0.5, 0.4, density=0.75, gamma=0.125), why="bc"),
    Case("breadcrumbs_ties", "breadcrumbs_ties", weights(0.3, 0.5, 0.4, density=0.75, gamma=0.125), why="bcf"),
    Case("sce", "sce", why="be"),
    Case("sce, select_topk 0.5", "sce", shared={"select_topk": 0.5}, why="bcde"),
    Case("slerp", "slerp", ({},), {"t": 0.3}, "a"),
    Case(
        "slerp, gradient and filters", "slerp", ({},), {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}, "a"
    ),
    Case("nearswap", "nearswap", ({},), {"t": 0.0001}, "ab"),
    Case("model_stock", "model_stock", why="ab"),
    Case("karcher", "karcher", why="ab", base=False),
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
    reasons = case.why if w.dtype == "BF16" else case.why.replace("b", "")
    return {
        "method": case.name,
        "dtype": w.dtype,
        "equal": float((a == b).mean()),
        "apart": float(np.abs(a - b).max()),
        "ours_nearest": float((np.abs(a - c) <= 0.5000001 * step).mean()),
        "theirs_nearest": float((np.abs(b - c) <= 0.5000001 * step).mean()),
        "ours_error": float(np.abs(a - c).max()),
        "theirs_error": float(np.abs(b - c).max()),
        "why": ", ".join(reasons) if (a != b).any() else "",
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
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"mergekit: {done.stderr[-2000:]}")
    return made


NOTES = [
    "Exact is mergekit's own arithmetic with dtype: float64; nearest to it means within half of the distance between "
    "two numbers of the type. Where a cut or a sign falls otherwise, the largest difference is an entry of a task "
    "vector.",
    *(f"{letter}: {reason}." for letter, reason in WHY.items()),
]
RANDOM_NOTES = [
    "Moved is the share of elements that differ from the base; the moves are over all elements. The draws differ, so "
    "only these can be compared. mergekit scales what is kept so that a tensor's L1 norm is as before; here every "
    "entry is divided by the probability to keep it. In dare the two are the same in the mean. In della mergekit's "
    "factor is the same for all entries, though the larger are kept more often, so that its result moves further."
]


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
    elements = f"{WORKLOADS[0].parameters():,} elements, base + 3 models"
    columns = {"elementwise": PARITY, "random": MOMENTS}
    for name, title, records, notes in (
        ("elementwise", f"mergekit's recipes in mergekit and here: {elements}", exact, NOTES),
        ("random", f"Methods that draw at random: {elements}", chance, RANDOM_NOTES),
    ):
        found = entry(title, records, load, notes=notes)
        found["versions"] |= {MERGEKIT.package: versions(MERGEKIT)}
        publish("parity", name, found, columns, save)
    shutil.rmtree(OUTPUT, ignore_errors=True)


if __name__ == "__main__":
    app()
