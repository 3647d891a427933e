"""What searches in the tests score with: functions of the one number that a result of the toy merges holds."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import magmax


def read_number(path: Path) -> float:
    return float(magmax.open_checkpoint(path).read("w", 0, 1)[0])


def peak(path: Path) -> float:
    """Best at 0.7."""
    return -((read_number(path) - 0.7) ** 2)


def two_tasks(path: Path) -> dict[str, float]:
    """Best at 0 and at 1: what lies between them is the Pareto front."""
    x = read_number(path)
    return {"zero": -(x**2), "one": -((x - 1) ** 2)}


def slow_peak(path: Path) -> float:
    """Waits where a test wants time to kill."""
    time.sleep(float(os.environ.get("SCORE_SECONDS", "0")))
    return peak(path)


def nan_score(path: Path) -> float:
    return float("nan")


def moody(path: Path) -> object:
    """Fail in another way in each fifth of the range from 0 to 1; from 0.8 on, score."""
    x = read_number(path)
    if x < 0.2:
        return float("nan")
    if x < 0.4:
        raise ValueError("no such\nbatch")
    if x < 0.6:
        sys.exit(3)
    return ["not a number", {}][x < 0.7] if x < 0.8 else {"one": x}
