"""Each rival in a virtual environment of its own, installed once under `.work`."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from harness.places import BENCHMARKS, WORK

TORCH = "torch==2.13.0"
INSTALL_LIMIT_S = 1800
LIST_VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({d.name: d.version for d in importlib.metadata.distributions() if d.name in sys.argv}))
"""


@dataclass(frozen=True)
class Rival:
    """A package and the version that is measured."""

    package: str
    version: str

    @property
    def folder(self) -> Path:
        return WORK / f"venv-{self.package}"

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")


MERGEKIT = Rival("mergekit", "0.1.5")
FUSION_BENCH = Rival("fusion-bench", "0.2.33")


def install(rival: Rival) -> str:
    """Installs the rival unless it is there; returns "" or the line that says why it could not be."""
    marker = rival.folder / "installed"
    wanted = f"{rival.package}=={rival.version}"
    if marker.exists() and marker.read_text() == wanted:
        return ""
    print(f"installing {wanted} under {rival.folder.relative_to(BENCHMARKS)}", file=sys.stderr)
    WORK.mkdir(exist_ok=True)
    constraints = WORK / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    pip = [rival.python, "-m", "pip", "install", "--quiet"]
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(rival.folder)],
        [*pip, TORCH],
        [*pip, "--constraint", str(constraints), wanted],
    ]
    for step in steps:
        error = _run_step(step)
        if error:
            return error
    marker.write_text(wanted)
    return ""


def _run_step(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"not installed after {INSTALL_LIMIT_S} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines or ["exited without a word"])[-1]


def package_versions(rival: Rival) -> dict[str, str]:
    """The rival's version and those of the libraries that carry its speed."""
    names = [rival.package, "torch", "safetensors", "transformers", "numpy"]
    command = [rival.python, "-c", LIST_VERSIONS, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}
