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
from harness.agreement import tensor_locations
from harness.machine import load_average
from harness.methods import MAGMAX, child_command
from harness.places import OUTPUT
from harness.results import make_entry, publish_entry
from harness.rivals import MERGEKIT, install, package_versions
from harness.shapes import Llama
from harness.tables import MOMENT_COLUMNS, PARITY_COLUMNS
from harness.workloads import Workload, create_workload

SHAPE = Llama(hidden=96, layers=4, heads=6, key_heads=2, inner=256, vocabulary=500)
WORKLOADS = [Workload(f"parity-{dtype.lower()}", SHAPE, dtype, tasks=3) for dtype in ("F32", "BF16")]
LIMIT_S = 1800
app = App(help=__doc__)


@dataclass(frozen=True)
class Case:
    """A recipe: the parameters of each model, those of all, and the keys of `REASONS` that explain what differs.

    Without `uses_base`, the workload's base is no part of it. `is_random` methods can only be compared in the mean.
    """

    name: str
    method: str
    model_parameters: tuple[dict[str, Any], ...] = ({}, {}, {})
    shared_parameters: dict[str, Any] = field(default_factory=dict)
    reasons: str = ""
    uses_base: bool = True
    is_random: bool = False

    def recipe(self, w: Workload, dtype: str) -> dict[str, Any]:
        base, *models = [str(folder) for folder in w.model_folders()]
        listed = [{"model": m, "parameters": dict(p)} for m, p in zip(models, self.model_parameters, strict=False)]
        start = {"base_model": base} if self.uses_base else {}
        return {
            "merge_method": self.method,
            **start,
            "models": listed,
            "parameters": dict(self.shared_parameters),
            "dtype": dtype,
        }


def weight_parameters(*numbers: Any, **more: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"weight": n, **more} for n in numbers)


REASONS = {
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
    Case("linear", "linear", weight_parameters(0.3, 0.5, 0.4), reasons="a", uses_base=False),
    Case(
        "linear, not normalised", "linear", weight_parameters(0.3, 0.5, 0.4), {"normalize": False}, "a", uses_base=False
    ),
    Case("task_arithmetic", "task_arithmetic", weight_parameters(0.3, 0.5, -0.4), {"lambda": 1.2}, "b"),
    Case("task_arithmetic, normalised", "task_arithmetic", weight_parameters(0.3, 0.5, 0.4), {"normalize": True}, "b"),
    Case(
        "task_arithmetic, gradient and filters",
        "task_arithmetic",
        weight_parameters([0, 0.5, 1], [{"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}], 0.25),
        reasons="b",
    ),
    Case("ties", "ties", weight_parameters(0.3, 0.5, 0.4, density=0.5), reasons="bcf"),
    Case("ties, density 0.3, a sum", "ties", weight_parameters(1, 1, 1, density=0.3), {"normalize": False}, "bcd"),
    Case("dare_ties, kept whole", "dare_ties", weight_parameters(0.3, 0.5, 0.4), reasons="bf"),
    Case("breadcrumbs", "breadcrumbs", weight_parameters(0.3, 0.5, 0.4, density=0.75, gamma=0.125), reasons="bc"),
    Case(
        "breadcrumbs_ties",
        "breadcrumbs_ties",
        weight_parameters(0.3, 0.5, 0.4, density=0.75, gamma=0.125),
        reasons="bcf",
    ),
    Case("sce", "sce", reasons="be"),
    Case("sce, select_topk 0.5", "sce", shared_parameters={"select_topk": 0.5}, reasons="bcde"),
    Case("slerp", "slerp", ({},), {"t": 0.3}, "a"),
    Case(
        "slerp, gradient and filters", "slerp", ({},), {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}, "a"
    ),
    Case("nearswap", "nearswap", ({},), {"t": 0.0001}, "ab"),
    Case("model_stock", "model_stock", reasons="ab"),
    Case("karcher", "karcher", reasons="ab", uses_base=False),
    Case("passthrough, scaled", "passthrough", ({"scale": 0.5},), uses_base=False),
    Case("dare_linear", "dare_linear", weight_parameters(0.3, 0.5, 0.4, density=0.5), is_random=True),
    Case("dare_ties", "dare_ties", weight_parameters(0.3, 0.5, 0.4, density=0.5), is_random=True),
    Case(
        "dare_ties, not rescaled",
        "dare_ties",
        weight_parameters(0.3, 0.5, 0.4, density=0.5),
        {"rescale": False},
        is_random=True,
    ),
    Case("della", "della", weight_parameters(0.3, 0.5, 0.4, density=0.5, epsilon=0.2), is_random=True),
    Case("della_linear", "della_linear", weight_parameters(0.3, 0.5, 0.4, density=0.5, epsilon=0.2), is_random=True),
]


def tensor_bits(path: Path) -> dict[str, np.ndarray]:
    """Every tensor's bits: float32's as they are, bfloat16's as the upper half of a float32, float64's as numbers."""
    found = {}
    for name, (file, start, size, dtype) in tensor_locations(path).items():
        raw = np.fromfile(file, np.uint8, size, offset=start)
        found[name] = raw.view(np.uint16).astype(np.uint32) << 16 if dtype == "BF16" else raw.view(np.uint32)
        if dtype == "F64":
            found[name] = raw.view(np.float64)
    return found


def tensor_values(path: Path) -> dict[str, np.ndarray]:
    return {
        name: found if found.dtype == np.float64 else found.view(np.float32)
        for name, found in tensor_bits(path).items()
    }


def concatenate_values(found: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([found[name] for name in sorted(found)]).astype(np.float64)


def spacing(values: np.ndarray, w: Workload) -> np.ndarray:
    """The distance from one number to the next of the workload's type, at these magnitudes."""
    return np.spacing(np.abs(values).astype(np.float32)).astype(np.float64) * (1 if w.dtype == "F32" else 2**16)


def compare_values(case: Case, w: Workload, ours: Path, theirs: Path, exact: Path) -> dict[str, Any]:
    """Both against each other, and against mergekit's own arithmetic in float64."""
    a, b, c = (concatenate_values(tensor_values(path)) for path in (ours, theirs, exact))
    step = spacing(c, w)
    reasons = case.reasons if w.dtype == "BF16" else case.reasons.replace("b", "")
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


def compare_moments(case: Case, w: Workload, ours: Path, theirs: Path) -> dict[str, Any]:
    """How much of the base moved, how far in the mean, and how far at all."""
    base = concatenate_values(tensor_values(w.model_folders()[0]))
    record: dict[str, Any] = {"method": case.name, "dtype": w.dtype}
    for whose, path in (("ours", ours), ("theirs", theirs)):
        move = concatenate_values(tensor_values(path)) - base
        record |= {f"{whose}_moved": float((move != 0).mean()), f"{whose}_mean": float(np.abs(move).mean())}
        record |= {f"{whose}_rms": float(np.sqrt((move**2).mean()))}
    return record


def merge_both(w: Workload) -> list[tuple[Case, Path, Path, Path]]:
    """Every case, by mergekit in the workload's type and in float64, and by `magmax merge`."""
    made, merges = [], []
    for number, case in enumerate(CASES):
        folder = OUTPUT / w.name / str(number)
        folder.mkdir(parents=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(case.recipe(w, "float32" if w.dtype == "F32" else "bfloat16")))
        ours, theirs, exact = folder / "ours", folder / "theirs", folder / "exact"
        merges += [(str(recipe), str(theirs), None)]
        merges += [] if case.is_random else [(str(recipe), str(exact), "float64")]
        subprocess.run([MAGMAX, "merge", str(recipe), "--out", str(ours)], check=True, stdout=subprocess.DEVNULL)
        made.append((case, ours, theirs, exact))
    command = child_command(MERGEKIT.python, "mergekit_recipes.py", {"merges": merges})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"mergekit: {done.stderr[-2000:]}")
    return made


NOTES = [
    "Exact is mergekit's own arithmetic with dtype: float64; nearest to it means within half of the distance between "
    "two numbers of the type. Where a cut or a sign falls otherwise, the largest difference is an entry of a task "
    "vector.",
    *(f"{letter}: {reason}." for letter, reason in REASONS.items()),
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
    load = load_average()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    exact, chance = [], []
    for w in WORKLOADS:
        create_workload(w)
        for case, *paths in merge_both(w):
            (chance if case.is_random else exact).append(
                compare_moments(case, w, *paths[:2]) if case.is_random else compare_values(case, w, *paths)
            )
    elements = f"{WORKLOADS[0].parameters():,} elements, base + 3 models"
    columns = {"elementwise": PARITY_COLUMNS, "random": MOMENT_COLUMNS}
    for name, title, records, notes in (
        ("elementwise", f"mergekit's recipes in mergekit and here: {elements}", exact, NOTES),
        ("random", f"Methods that draw at random: {elements}", chance, RANDOM_NOTES),
    ):
        found = make_entry(title, records, load, notes=notes)
        found["versions"] |= {MERGEKIT.package: package_versions(MERGEKIT)}
        publish_entry("parity", name, found, columns, save)
    shutil.rmtree(OUTPUT, ignore_errors=True)


if __name__ == "__main__":
    app()
