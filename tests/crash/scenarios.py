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
from tests.robustness.files import small_model, write_safetensors

from magmax.checkpoints import open_checkpoint
from magmax.merging.adapters.adapter_merge import merge_adapters
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.merge_job import merge_job
from magmax.merging.output_options import OutputOptions
from magmax.merging.result import MergeResult
from magmax.merging.running.running_merge import Running
from magmax.merging.sweep import FactorSweep
from magmax.rules import CalibrateWeights, MagMax, Prune, Rule, Ties, Tunable, as_rule, chain

STATISTICS_RULES = Ties(density=0.4), chain(Prune(density=0.3), MagMax())
SHARD_BYTES = 300
"""Bytes a shard: less than the largest tensor, so that each small model lies in several."""


def write_inputs(folder: Path, out: str = "") -> None:
    """A base in a folder of its own with a config, and four models."""
    write_safetensors(folder / "base" / "model.safetensors", small_model(0), {"format": "pt"})
    (folder / "base" / "config.json").write_text(json.dumps({"dtype": "float32"}))
    for number in (1, 2, 3, 4):
        write_safetensors(folder / f"task{number}.safetensors", small_model(number))


def merge(
    folder: Path, out: str, tasks: Sequence[int] = (1, 2), restart: bool = False, rule: Rule | str = "magmax"
) -> tuple[MergeResult, list[str]]:
    """Merge some of the models; also what was noted."""
    notes: list[str] = []
    models = [open_checkpoint(folder / f"task{number}.safetensors") for number in tasks]
    base = open_checkpoint(folder / "base")
    job = merge_job(as_rule(rule), base, models, folder / out, OutputOptions(shard_bytes=SHARD_BYTES))
    return job.run(ExecutionOptions(threads=1, restart=restart, note=notes.append)), notes


def merge_whole_tensors(folder: Path, out: str) -> tuple[MergeResult, list[str]]:
    return merge(folder, out, rule="iso_c")


def merge_by_angles(folder: Path, out: str) -> tuple[MergeResult, list[str]]:
    return merge(folder, out, rule="model_stock")


def merge_by_preference(folder: Path, out: str) -> tuple[MergeResult, list[str]]:
    return merge(folder, out, rule=Tunable(preference=(1, 2)))


def merge_calibrated(folder: Path, out: str) -> tuple[MergeResult, list[str]]:
    return merge(folder, out, rule=chain(Ties(), CalibrateWeights(per="row")))


@dataclass(frozen=True)
class TupleDescribingRule(MagMax):
    """A rule that describes itself with what JSON gives back otherwise."""

    def describe(self) -> dict[str, Any]:
        return {"told": {"pair": (1, 2), "table": {1: "one"}}}


def merge_with_tuple_description(folder: Path, out: str) -> tuple[MergeResult, list[str]]:
    return merge(folder, out, rule=TupleDescribingRule())


def open_running(folder: Path) -> Running:
    return Running(folder / "state", "magmax", folder / "base", winners=True, execution=ExecutionOptions(threads=1))


def absorb_task(folder: Path, task: int) -> None:
    open_running(folder).absorb(folder / f"task{task}.safetensors")


def absorbed_names(folder: Path) -> list[str]:
    """The names of the tasks in the state, as a new process reads it."""
    return [task.name for task in open_running(folder).tasks]


def write_result(folder: Path, out: str) -> None:
    open_running(folder).result(out=folder / out)


def prepare_older_merge(folder: Path, out: str) -> None:
    """The inputs, and the output of another merge where the output goes."""
    write_inputs(folder)
    merge(folder, out, tasks=(3, 1))


def prepare_running_merge(folder: Path, out: str = "") -> None:
    """The inputs, and a running merge of two of them."""
    write_inputs(folder)
    absorb_task(folder, 1)
    absorb_task(folder, 2)


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
    Scenario("file", "out.safetensors", write_inputs, merge),
    Scenario("folder", "out", write_inputs, merge),
    Scenario("file-again", "out.safetensors", prepare_older_merge, merge),
    Scenario("folder-again", "out", prepare_older_merge, merge),
    Scenario("result", "result.safetensors", prepare_running_merge, write_result),
]


def merge_with_statistics(folder: Path, out: str, rule: Rule = STATISTICS_RULES[0]) -> None:
    """Merge by a rule that asks questions of all tensors before it writes the first."""
    models = [open_checkpoint(folder / f"task{number}.safetensors") for number in (1, 2, 3)]
    base = open_checkpoint(folder / "base")
    merge_job(rule, base, models, folder / out, OutputOptions(shard_bytes=SHARD_BYTES)).run(ExecutionOptions(threads=1))


def merge_chain_with_statistics(folder: Path, out: str) -> None:
    merge_with_statistics(folder, out, STATISTICS_RULES[1])


def write_mismatched_inputs(folder: Path, out: str) -> None:
    write_inputs(folder)
    write_safetensors(folder / "cut.safetensors", small_model(4) | {"weight": small_model(4)["weight"][:11]})


def merge_intersection(folder: Path, out: str) -> None:
    """Merge models of which one has fewer rows."""
    models = [open_checkpoint(folder / name) for name in ("task1.safetensors", "cut.safetensors")]
    options = OutputOptions(mismatch="intersect", shard_bytes=SHARD_BYTES)
    merge_job(MagMax(), open_checkpoint(folder / "base"), models, folder / out, options).run(
        ExecutionOptions(threads=1)
    )


def run_sweep(folder: Path, out: str) -> None:
    """Results at two scaling factors."""
    models = [open_checkpoint(folder / f"task{number}.safetensors") for number in (1, 2)]
    options, factors = OutputOptions(shard_bytes=SHARD_BYTES), [0.5, 1.0]
    place = folder / out.replace("-0.5", "")
    base = open_checkpoint(folder / "base")
    work = FactorSweep(MagMax(), base, models, ["1", "2"], place, options, factors, ExecutionOptions(threads=1))
    with work.merged() as scaler:
        for factor in factors:
            scaler.write(factor)


def write_adapters(folder: Path, out: str = "") -> None:
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
        write_safetensors(place / "adapter_model.safetensors", tensors)
        (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))


def prepare_older_adapter(folder: Path, out: str) -> None:
    write_adapters(folder)
    merge_adapters("average", [folder / "adapter1"], 1, folder / out, execution=ExecutionOptions(threads=1))


def merge_two_adapters(folder: Path, out: str) -> None:
    both = [folder / f"adapter{number}" for number in (1, 2)]
    merge_adapters("magmax", both, 2, folder / out, execution=ExecutionOptions(threads=1))


def prepare_labelled_merge(folder: Path, out: str = "") -> None:
    """A running merge of two, of which the first has a label."""
    write_inputs(folder)
    open_running(folder).absorb(folder / "task1.safetensors", label="one")
    absorb_task(folder, 2)


def label_version(folder: Path) -> None:
    open_running(folder).label("two")


def restore_version(folder: Path) -> None:
    open_running(folder).restore("one")


def names_and_labels(folder: Path) -> tuple[list[str], list[str | None]]:
    """The tasks and labels of the state, as a new process reads it."""
    status = open_running(folder).status()
    return absorbed_names(folder), [version.label for version in status.versions]


OTHER_SCENARIOS = [
    Scenario("ties", "out.safetensors", write_inputs, merge_with_statistics),
    Scenario("prune-chain", "out", write_inputs, merge_chain_with_statistics),
    Scenario("intersect", "out.safetensors", write_mismatched_inputs, merge_intersection),
    Scenario("sweep", "out-0.5.safetensors", write_inputs, run_sweep),
    Scenario("adapter", "out", write_adapters, merge_two_adapters),
    Scenario("adapter-again", "out", prepare_older_adapter, merge_two_adapters),
]
"""Outputs of other kinds, which are tried at fewer moments."""


def run_as_user(user: int, work: Callable[..., object], *args: object) -> object:
    """Do the work without root's right to write everywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    return work(*args)


def merge_command(folder: Path, out: str) -> tuple[int, str, str]:
    base, tasks = folder / "base", [folder / f"task{number}.safetensors" for number in (1, 2)]
    return run_cli("merge", "--base", base, *tasks, "--out", folder / out)


def absorb_command(folder: Path, task: int) -> tuple[int, str, str]:
    return run_cli("running", "absorb", folder / "state", folder / f"task{task}.safetensors", "--winners")


def run_cli(*arguments: object) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command line."""
    from magmax import cli

    sys.argv = ["magmax", *map(str, arguments)]
    code = 0
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()
