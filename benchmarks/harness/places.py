"""Where everything lies."""

from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
REPOSITORY = BENCHMARKS.parent
CHILDREN = BENCHMARKS / "children"
RESULTS = BENCHMARKS / "results"
WORK = BENCHMARKS / ".work"
DATA = WORK / "data"
OUTPUT = WORK / "output"
