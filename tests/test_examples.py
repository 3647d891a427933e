"""The examples that need no download run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]


def test_your_own_module_and_loss(tmp_path: Path) -> None:
    path = ROOT / "examples" / "own_model.py"
    there = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # the second time as the first
        done = subprocess.run(
            [sys.executable, path], cwd=tmp_path, env=there, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("classes") == 5
        assert "merged: " in done.stdout
    assert not list(tmp_path.iterdir())
    assert len([line for line in path.read_text().splitlines() if line.strip()]) < 30
