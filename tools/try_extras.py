"""Try every command in environments that hold magmax with one extra alone: `make test-extras`.

An environment is made for each extra and removed again. In it every command explains itself; the commands that need
nothing else run; and the others name, in one error, the extra that they need. COMMANDS is also the list of what works
without torch, which the tests run with the other packages blocked.
"""

from __future__ import annotations

import argparse
import importlib.abc
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
TORCH_FREE = ("", "cluster", "data", "report", "sweep", "hub", "remote")
"""Extras without torch; "" is none."""
WITH_TORCH = ("torch", "train")
"""preference and ui add little to train, and take as long: try them by name."""

MODELS = "a.safetensors b.safetensors"
COMMANDS: dict[str, tuple[str, ...]] = {
    "": (
        f"merge --base base.safetensors {MODELS} --out merged.safetensors",
        "merge recipe.yaml",
        "search sweep recipe.yaml scaling_factor=0.5,1 --out swept.safetensors",
        f"tune --base base.safetensors {MODELS} --prefer a=1 --prefer b=2 --out tuned.safetensors",
        f"archive create {MODELS} --base base.safetensors --out archive",
        "tune --archive archive --prefer a=1 --save mine --out from-archive.safetensors",
        "archive presets archive",
        f"calibrate merged.safetensors --base base.safetensors --models {MODELS} --space weight --out c.safetensors",
        "running absorb state a.safetensors --base base.safetensors --label first",
        "running absorb state b.safetensors",
        "running status state",
        "running label state second",
        "running result state --out result.safetensors",
        "running restore state first",
        "checkpoint inspect merged.safetensors",
        "checkpoint diff base.safetensors a.safetensors",
        "checkpoint convert a.safetensors --out converted.safetensors",
        f"study conflicts {MODELS} --base base.safetensors",
        "study norms --from trained",
        "recipes list",
        "recipes copy magmax",
        "recipes check recipe.yaml",
        "recipes rules",
    ),
    "report": (
        f"report {MODELS} --base base.safetensors --out models.html",
        "report results --out results.html",
        "study curves --from results",
        "report trained --out trained.html",
        f"study cosine {MODELS} --base base.safetensors --out studied",
        f"calibrate merged.safetensors --base base.safetensors --models {MODELS} --space weight --out d.safetensors "
        "--plot plot.png",
    ),
    "sweep": ("search run search.yaml --out searched --allow-code",),
}
"""By the extra that they need: commands that run without torch."""

NEEDY: dict[str, tuple[str, ...]] = {
    "report": COMMANDS["report"][:1],
    "sweep": COMMANDS["sweep"],
    "cluster": (f"merge --base base.safetensors {MODELS} --out x.safetensors --scheduler tcp://127.0.0.1:9",),
    "hub": ("merge --base nobody/nothing a.safetensors --out x.safetensors",),
    "remote": ("merge --base http://127.0.0.1:9/base.safetensors a.safetensors --out x.safetensors",),
    "torch": (f"merge --base base.safetensors {MODELS} --out x.safetensors --device cuda",),
    "train": (
        "train experiment.yaml --out learned",
        "eval experiment.yaml base.safetensors",
        "bench experiment.yaml --out measured",
        "study environments study.yaml --out studied",
        f"calibrate merged.safetensors --base base.safetensors --models {MODELS} --samples texts --model . "
        "--out x.safetensors",
        f"tune --base base.safetensors {MODELS} --target texts/a.csv --samples texts --encoder . --out x.safetensors",
    ),
    "ui": ("ui results --no-browser --port 0",),
}
"""By the extra that they must name where it is missing."""
IMPLIED = {
    "cluster": ("report",),  # jinja2
    "data": ("hub", "remote"),
    "torch": ("report",),
    "train": ("torch", "hub", "report"),
    "preference": ("torch", "train", "hub", "report"),
    "ui": ("torch", "train", "hub", "remote", "report"),
}
"""Extras of which at least a part comes along."""
PACKAGES: dict[str, tuple[str, ...]] = {
    "cluster": ("distributed", "dask"),
    "data": ("datasets", "PIL"),
    "report": ("jinja2", "markupsafe", "matplotlib", "PIL", "scipy"),
    "sweep": ("optuna",),
    "hub": ("huggingface_hub",),
    "remote": ("aiohttp", "fsspec", "s3fs"),
    "torch": ("torch",),
    "train": ("accelerate", "safetensors", "scipy", "tokenizers", "transformers"),
    "preference": ("ot",),
    "ui": ("fastapi", "nicegui", "starlette", "uvicorn"),
}
"""What each extra installs, by the names that are imported."""

YAML = {
    "recipe.yaml": "base: base.safetensors\nmodels: [a.safetensors, b.safetensors]\nout: by-recipe.safetensors\n"
    "rule: magmax\n",
    "search.yaml": "merge: recipe.yaml\nspace: {scaling_factor: {low: 0, high: 1}}\nscore: my_scores:size\ntrials: 2\n",
    "my_scores.py": "def size(path):\n    return path.stat().st_size\n",
    "experiment.yaml": "data: newsgroups\nmodel: minilm\nhead: zero_shot\nscenario: {class_incremental: {tasks: 2}}\n"
    "fit: {steps: 1}\n",
    "study.yaml": "experiment: experiment.yaml\n",
    "texts/a.csv": "text,label\nred,x\nblue,y\n",
    "texts/b.csv": "text,label\ngreen,x\ngrey,y\n",
}


def write_inputs(folder: Path) -> None:
    """Write tiny checkpoints, recipes, and the results of a benchmark and a training, without any other package."""
    for name, text in YAML.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "trained").mkdir()
    for number, name in enumerate(("base", "a", "b")):
        write_checkpoint(folder / f"{name}.safetensors", number)
        write_checkpoint(folder / "trained" / f"theta_{number}.safetensors", number)
    parts = {
        "data": "d",
        "model": "m",
        "head": "h",
        "scenario": "s",
        "fit": {"steps": 1, "learning_rate": 0.1},
        "among": "all",
    }
    recipe = {**parts, "seed": 0, "training": {"sequential": {}}, "rule": "magmax", "scaling_factor": None}
    rows = {str(t): {"tasks": [0.5, 0.25 * t], "micro": 0.5, "macro": 0.5} for t in (1, 2)}
    (folder / "trained" / "recipe.json").write_text(json.dumps(recipe))
    (folder / "trained" / "metrics.json").write_text(json.dumps({"model": rows, "merged": rows}))
    records = [
        {
            "seed": seed, "method": f"{rule}/sequential", "training": "sequential", "rule": rule, "digest": "0" * 32,
            "variants": [{"variant": "default", "scaling_factor": 0.5, "rows": rows}], "search": {}, "seconds": {},
            "peak_memory": None, "stored_bytes": None, "recipe": {**recipe, "seed": seed, "rule": rule},
        }
        for seed in (0, 1) for rule in ("magmax", "average", "last")
    ]  # fmt: skip
    (folder / "results").mkdir()
    (folder / "results" / "results.json").write_text(json.dumps({"recipe": parts, "records": records}))


def write_checkpoint(path: Path, number: int) -> None:
    """Write a checkpoint in safetensors format: one matrix."""
    import numpy as np

    values = np.random.default_rng(number).normal(size=(8, 4)).astype("<f4").tobytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, len(values)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)


class Blocker(importlib.abc.MetaPathFinder):
    """Packages that cannot be imported, as if they were not installed."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Refuse a package of the names."""
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def run_inside(extras: Sequence[str], block: bool, folder: Path) -> list[str]:
    """Run all commands in this process, in a folder; return what went wrong.

    With `block`, the packages of other extras cannot be imported, as if they were not installed.
    """
    there = {*extras, *(one for extra in extras for one in IMPLIED.get(extra, ()))}
    if block:
        kept = {name for extra in extras for name in PACKAGES[extra]}
        sys.meta_path.insert(0, Blocker({name for names in PACKAGES.values() for name in names} - kept))
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    write_inputs(folder)
    os.chdir(folder)
    problems = [f"{words}: {text}" for words in help_requests() if (text := failure(words, 0, ""))]
    for extra in ("", *extras):
        problems += [f"{words}: {text}" for words in COMMANDS.get(extra, ()) if (text := failure(words, 0, ""))]
    for extra, commands in NEEDY.items():
        if extra not in there:
            named = f"pip install '.[{extra}]'"
            problems += [f"{words}: {text}" for words in commands if (text := failure(words, 2, named))]
    return problems


def help_requests() -> list[str]:
    """`--help` of every command."""
    from magmax.cli import app

    def walk(commands: Any, name: str) -> list[str]:
        names = [each for each in commands if not each.startswith("-")]
        return [f"{name}--help", *(words for each in names for words in walk(commands[each], f"{name}{each} "))]

    return walk(app, "")


def failure(words: str, code: int, needed: str) -> str:
    """Return how a command did not end as it should: with this exit code, and these words on stderr."""
    import contextlib
    import io

    from magmax import cli

    sys.argv = ["magmax", *shlex.split(words)]
    out, err, ended = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            ended = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
    if ended == code and needed in err.getvalue():
        return ""
    return f"exit code {ended} instead of {code}; {needed}; {err.getvalue().strip()[-400:]}"


def try_extra(extra: str, wheel: Path) -> list[str]:
    """Make an environment with an extra alone, and run all commands in it; return what went wrong."""
    with tempfile.TemporaryDirectory(prefix="magmax-extras-") as scratch:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", f"{scratch}/venv"], check=True)
        python = f"{scratch}/venv/bin/python"
        target = f"magmax[{extra}] @ {wheel.as_uri()}" if extra else str(wheel)
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
        subprocess.run(
            [*install, "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"), target], check=True
        )
        Path(scratch, "work").mkdir()
        command = [python, str(Path(__file__).resolve()), "--inside", f"{scratch}/work", extra]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=scratch)
        return done.stdout.splitlines() or [f"exit code {done.returncode}"] * (done.returncode != 0)


def main() -> int:
    """Try the extras that are named, or all; print what went wrong, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", default=None, help='such as report, or "" for none; all by default')
    parser.add_argument("--inside", metavar="FOLDER", help="run the commands in this environment, in an empty folder")
    parser.add_argument("--block", action="store_true", help="with --inside: block the packages of other extras")
    given = parser.parse_args()
    if given.inside:
        problems = run_inside([e for e in given.extras if e], given.block, Path(given.inside))
        print(*problems, sep="\n", end="\n" * bool(problems))
        return bool(problems)
    failed = False
    with tempfile.TemporaryDirectory(prefix="magmax-wheel-") as place:
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, str(ROOT)]
        subprocess.run(build, check=True)
        (wheel,) = Path(place).glob("*.whl")
        extras = given.extras or [*TORCH_FREE, *WITH_TORCH]
        with ThreadPoolExecutor(2) as pool:  # one installs while another runs
            for extra, problems in zip(extras, pool.map(try_extra, extras, [wheel] * len(extras)), strict=True):
                print(f"{extra or 'no extra'}: {'failed' if problems else 'passed'}")
                print(*(f"  {problem}" for problem in problems), sep="\n", end="\n" * bool(problems), flush=True)
                failed |= bool(problems)
    return failed


if __name__ == "__main__":
    sys.exit(main())
