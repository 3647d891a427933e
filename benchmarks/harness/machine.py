"""What a number was measured on."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from harness.places import REPOSITORY


def git_commit() -> str:
    """The commit's short hash, "+" behind it where src or benchmarks hold changes that are in no commit."""
    found = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    return (found or "none yet") + ("+" if changed else "")


def hardware() -> dict[str, object]:
    return {
        "cpu": _read_field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(_read_field("/proc/meminfo", "MemTotal").split()[0]) * 1.024e-6, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": version("numpy"),
    }


def load_average() -> float:
    """Asked before the first run: well under 1 on a machine that does nothing else."""
    return round(os.getloadavg()[0], 2)


def our_versions() -> dict[str, str]:
    names = ("magmax", "numpy", "torch", "safetensors", "xxhash")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in names}


def _read_field(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return "0"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
