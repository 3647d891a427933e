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
from typing import Any

import numpy as np
from tests.robustness.files import model, write

from magmax.checkpoints import open_checkpoint
from magmax.merging.adapters.adapter_merge import merge_adapters
from magmax.merging.execution.execution_options import Settings
from magmax.merging.merge_job import merge_job
from magmax.merging.output_options import Options
from magmax.merging.result import Outcome
from magmax.merging.running.running_merge import Running
from magmax.merging.sweep import Sweep
from magmax.rules import CalibrateWeights, MagMax, Prune, Rule, Ties, Tunable, as_rule, chain

RULES_THAT_ASK = Ties(density=0.4), chain(Prune(keep=0.3), MagMax())
SHARD = 300
"""Bytes a shard: less than the largest tensor, so that each small model lies in several."""


def inputs(folder: Path, out: str = "") -> None:
    """A base in a folder of its own with a config, and four models."""
    write(folder / "base" / "model.safetensors", model(0), {"format": "pt"})
    (folder / "base" / "config.json").write_text(json.dumps({"dtype": "float32"}))
    for number in (1, 2, 3, 4):
        write(folder / f"task{number}.safetensors", model(number))


def merge(
    folder: Path, out: str, tasks: Sequence[int] = (1, 2), restart: bool = False, rule: Rule | str = "magmax"
) -> tuple[Outcome, list[str]]:
    """Merge some of the models; also what was noted."""
    notes: list[str] = []
    models = [open_checkpoint(folder / f"task{number}.safetensors") for number in tasks]
    base = open_checkpoint(folder / "base")
    job = merge_job(as_rule(rule), base, models, folder / out, Options(shard_bytes=SHARD))
    return job.run(Settings(threads=1, restart=restart, note=notes.append)), notes


def merge_whole_tensors(folder: Path, out: str) -> tuple[Outcome, list[str]]:
    return merge(folder, out, rule="iso_c")


def merge_by_angles(folder: Path, out: str) -> tuple[Outcome, list[str]]:
    return merge(folder, out, rule="model_stock")


def merge_by_preference(folder: Path, out: str) -> tuple[Outcome, list[str]]:
    return merge(folder, out, rule=Tunable(preference=(1, 2)))


def merge_calibrated(folder: Path, out: str) -> tuple[Outcome, list[str]]:
    return merge(folder, out, rule=chain(Ties(), CalibrateWeights(per="row")))


@dataclass(frozen=True)
class Told(MagMax):
    """A rule that describes itself with what JSON gives back otherwise."""

    def describe(self) -> dict[str, Any]:
        return {"told": {"pair": (1, 2), "table": {1: "one"}}}


def merge_by_a_rule_that_tells_a_tuple(folder: Path, out: str) -> tuple[Outcome, list[str]]:
    return merge(folder, out, rule=Told())


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


def asking(folder: Path, out: str, rule: Rule = RULES_THAT_ASK[0]) -> None:
    """Merge by a rule that asks questions of all tensors before it writes the first."""
    models = [open_checkpoint(folder / f"task{number}.safetensors") for number in (1, 2, 3)]
    base = open_checkpoint(folder / "base")
    merge_job(rule, base, models, folder / out, Options(shard_bytes=SHARD)).run(Settings(threads=1))


def asking_in_a_chain(folder: Path, out: str) -> None:
    asking(folder, out, RULES_THAT_ASK[1])


def intersected_inputs(folder: Path, out: str) -> None:
    inputs(folder)
    write(folder / "cut.safetensors", model(4) | {"weight": model(4)["weight"][:11]})


def intersecting(folder: Path, out: str) -> None:
    """Merge models of which one has fewer rows."""
    models = [open_checkpoint(folder / name) for name in ("task1.safetensors", "cut.safetensors")]
    options = Options(mismatch="intersect", shard_bytes=SHARD)
    merge_job(MagMax(), open_checkpoint(folder / "base"), models, folder / out, options).run(Settings(threads=1))


def sweep(folder: Path, out: str) -> None:
    """Results at two scaling factors."""
    models = [open_checkpoint(folder / f"task{number}.safetensors") for number in (1, 2)]
    options, factors = Options(shard_bytes=SHARD), [0.5, 1.0]
    place = folder / out.replace("-0.5", "")
    base = open_checkpoint(folder / "base")
    work = Sweep(MagMax(), base, models, ["1", "2"], place, options, factors, Settings(threads=1))
    with work.merged() as scaler:
        for factor in factors:
            scaler.write(factor)


def adapters(folder: Path, out: str = "") -> None:
    """Two adapters of two layers, of which they share one."""
    for number in (1, 2):
        draw = np.random.default_rng(number)
        shapes = {"q": (6, 5), "k": (4, 5)} if number == 1 else {"q": (6, 5), "v": (3, 7)}
        factors = {(m, "A"): (2, columns) for m, (_, columns) in shapes.items()}
        factors |= {(m, "B"): (rows, 2) for m, (rows, _) in shapes.items()}
        place = folder / f"adapter{number}"
        tensors = {
            f"base_model.model.{m}.lora_{letter}.weight": draw.normal(size=shape).astype("f4")
            for (m, letter), shape in factors.items()
        }
        write(place / "adapter_model.safetensors", tensors)
        (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))


def older_adapter(folder: Path, out: str) -> None:
    adapters(folder)
    merge_adapters("average", [folder / "adapter1"], 1, folder / out, settings=Settings(threads=1))


def merged_adapters(folder: Path, out: str) -> None:
    both = [folder / f"adapter{number}" for number in (1, 2)]
    merge_adapters("magmax", both, 2, folder / out, settings=Settings(threads=1))


def labelled_state(folder: Path, out: str = "") -> None:
    """A running merge of two, of which the first has a label."""
    inputs(folder)
    running(folder).absorb(folder / "task1.safetensors", label="one")
    absorb(folder, 2)


def label(folder: Path) -> None:
    running(folder).label("two")


def restore(folder: Path) -> None:
    running(folder).restore("one")


def standing(folder: Path) -> tuple[list[str], list[str | None]]:
    """The tasks and labels of the state, as a new process reads it."""
    status = running(folder).status()
    return absorbed(folder), [generation.label for generation in status.generations]


OTHERS = [
    Scenario("ties", "out.safetensors", inputs, asking),
    Scenario("prune-chain", "out", inputs, asking_in_a_chain),
    Scenario("intersect", "out.safetensors", intersected_inputs, intersecting),
    Scenario("sweep", "out-0.5.safetensors", inputs, sweep),
    Scenario("adapter", "out", adapters, merged_adapters),
    Scenario("adapter-again", "out", older_adapter, merged_adapters),
]
"""Outputs of other kinds, which are tried at fewer moments."""


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
