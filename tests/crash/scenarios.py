"""The works that are killed: each with its inputs, what it does, and where its output goes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from tests.robustness.files import model, write

from magmax.checkpoints import open_checkpoint
from magmax.engine.job import Outcome, Settings
from magmax.engine.merge import Options, merge_job
from magmax.engine.running import Running
from magmax.rules import make_rule

SHARD = 300
"""Bytes a shard: less than the largest tensor, so that each small model lies in several."""


def inputs(folder: Path, out: str = "") -> None:
    """A base in a folder of its own with a config, and four models."""
    write(folder / "base" / "model.safetensors", model(0), {"format": "pt"})
    (folder / "base" / "config.json").write_text(json.dumps({"dtype": "float32"}))
    for number in (1, 2, 3, 4):
        write(folder / f"task{number}.safetensors", model(number))


def merge(
    folder: Path, out: str, tasks: Sequence[int] = (1, 2), restart: bool = False, rule: str = "magmax"
) -> tuple[Outcome, list[str]]:
    """Merge some of the models; also what was noted."""
    notes: list[str] = []
    models = [open_checkpoint(folder / f"task{number}.safetensors") for number in tasks]
    base = open_checkpoint(folder / "base")
    job = merge_job(make_rule(rule), base, models, folder / out, Options(shard_bytes=SHARD))
    return job.run(Settings(threads=1, restart=restart, note=notes.append)), notes


def merge_whole_tensors(folder: Path, out: str) -> tuple[Outcome, list[str]]:
    return merge(folder, out, rule="iso_c")


def merge_by_angles(folder: Path, out: str) -> tuple[Outcome, list[str]]:
    return merge(folder, out, rule="model_stock")


def running(folder: Path) -> Running:
    return Running(folder / "state", "magmax", folder / "base", winners=True, settings=Settings(threads=1))


def absorb(folder: Path, task: int) -> None:
    running(folder).absorb(folder / f"task{task}.safetensors")


def absorbed(folder: Path) -> list[str]:
    """The names of the tasks in the state, as a new process reads it."""
    return [task.name for task in running(folder).tasks]


def result(folder: Path, out: str) -> None:
    running(folder).result(out=folder / out)


def older_merge(folder: Path, out: str) -> None:
    """The inputs, and the output of another merge where the output goes."""
    inputs(folder)
    merge(folder, out, tasks=(3, 1))


def state_of_two(folder: Path, out: str = "") -> None:
    """The inputs, and a running merge of two of them."""
    inputs(folder)
    absorb(folder, 1)
    absorb(folder, 2)


@dataclass(frozen=True)
class Scenario:
    """Something with one output: the output's name, what must be there first, and the work."""

    name: str
    out: str
    prepare: Callable[[Path, str], None]
    work: Callable[[Path, str], object]

    def __str__(self) -> str:
        return self.name


SCENARIOS = [
    Scenario("file", "out.safetensors", inputs, merge),
    Scenario("folder", "out", inputs, merge),
    Scenario("file-again", "out.safetensors", older_merge, merge),
    Scenario("folder-again", "out", older_merge, merge),
    Scenario("result", "result.safetensors", state_of_two, result),
]


def as_nobody(user: int, work: Callable[..., object], *given: object) -> object:
    """Do the work without root's right to write everywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    return work(*given)


def merge_command(folder: Path, out: str) -> tuple[int, str, str]:
    base, tasks = folder / "base", [folder / f"task{number}.safetensors" for number in (1, 2)]
    return typed("merge", "--base", base, *tasks, "--out", folder / out)


def absorb_command(folder: Path, task: int) -> tuple[int, str, str]:
    return typed("absorb", folder / "state", folder / f"task{task}.safetensors", "--winners")


def typed(*words: object) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command line."""
    from magmax import cli

    sys.argv = ["magmax", *map(str, words)]
    code = 0
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()
