"""Several processes: together they see what one sees, and end where one ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402
from tests.continual import toys  # noqa: E402

from magmax.continual.experiment import Experiment  # noqa: E402
from magmax.continual.training.fit import share_of  # noqa: E402
from magmax.continual.training.trainer import ContinualTraining  # noqa: E402


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_shares_of_a_batch_are_the_batch_and_their_mean_is_its_mean(world: int, size: int) -> None:
    rows, values = np.arange(size) + 10, np.random.default_rng(size).random(99)
    shares = [share_of(rows, rank, world) for rank in range(world)]
    seen = np.concatenate([own for own, weight in shares if weight])
    assert sorted(seen) == rows.tolist()
    assert all(len(own) for own, _ in shares)
    together = np.mean([values[own].mean() * weight for own, weight in shares])
    assert together == pytest.approx(values[rows].mean(), abs=1e-12)


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    """The order of float32 sums differs: weights agree within 1e-4, losses within 1e-5 of their size, and metrics
    within one example."""
    changes: dict[str, Any] = {
        "fit": {"steps": 8, "batch": 7, "learning_rate": 0.01},
        "training": [{"ewc": {"samples": 5}}],
    }
    alone = ContinualTraining(Experiment.model_validate({**toys.RECIPE, **changes}), tmp_path / "alone", "ewc").run()
    recipe = toys.write_recipe(tmp_path / "toy.yaml", **changes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "magmax.cli", "train", str(recipe), "--training", "ewc", "--out", str(tmp_path / "team")]
    there = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--threads", "1"], env=there, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("metrics.json") == 1
    for name in ("theta_1", "theta_2", "theta_3", "merged"):
        ours, theirs = (load_file(tmp_path / where / f"{name}.safetensors") for where in ("alone", "team"))
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-4)
    costs = [json.loads((tmp_path / where / "costs.json").read_text()) for where in ("alone", "team")]
    assert [costs[0][t]["loss"] for t in "123"] == pytest.approx([costs[1][t]["loss"] for t in "123"], rel=1e-5)
    found = json.loads((tmp_path / "team" / "metrics.json").read_text())
    for what, rows in alone.items():
        for i, row in rows.items():
            np.testing.assert_allclose(found[what][i]["tasks"], row["tasks"], atol=1 / 40 + 1e-9)
