"""A sweep's files are the merges at each factor, and its numbers are read without binary noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import small_model

import magmax
from magmax import MagMaxError, open_checkpoint
from magmax.merging.execution.execution_options import ExecutionOptions
from magmax.merging.in_memory import InMemoryMerges
from magmax.merging.merge_job import merge_job
from magmax.merging.output_options import OutputOptions
from magmax.merging.sweep import FactorSweep, parse_factors
from magmax.rules import CalibrateWeights, MagMax, Rule, Ties, Tunable, as_rule, chain

CALIBRATED = chain(MagMax(), CalibrateWeights(form="ellipsoid"))


@pytest.mark.parametrize("rule", ["magmax", "average", CALIBRATED], ids=str)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_swept_file_is_the_merge_at_that_factor_byte_for_byte(rule, dtype, files, tmp_path):
    base, tasks = files
    opened = [open_checkpoint(t) for t in tasks]
    names = ["one", "two", "three", "four"]
    sweep = FactorSweep(
        as_rule(rule),
        open_checkpoint(base),
        opened,
        names,
        tmp_path / "out.safetensors",
        OutputOptions(dtype=dtype),
        [0.3, 1.0],
        ExecutionOptions(),
    )
    with sweep.merged() as scaler:
        swept = {factor: scaler.write(factor) for factor in (0.3, 1.0)}
    for factor, path in swept.items():
        merge_named(rule, base, tasks, names, factor, dtype, tmp_path / "single.safetensors")
        assert path.read_bytes() == (tmp_path / "single.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out-0.3.safetensors", "out-1.safetensors"]


def merge_named(
    rule: Rule | str, base: Path, tasks: list[Path], names: list[str], factor: float, dtype: str | None, out: Path
) -> None:
    opened = [open_checkpoint(t) for t in tasks]
    options = OutputOptions(factor, dtype)
    merge_job(as_rule(rule), open_checkpoint(base), opened, out, options, names).run()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.1:1.0:0.1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("0.5", [0.5]),
        ("0.3,0.55", [0.3, 0.55]),
        ("1:0:-0.5", [1.0, 0.5, 0.0]),
    ],
)
def test_a_range_includes_both_ends_exactly(text, numbers):
    assert parse_factors(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "0:1", "0:1:0", "1:0:0.1", "0:1:0.1:2", "nan:1:1"])
def test_what_is_no_range_is_an_error(text):
    with pytest.raises(MagMaxError, match=r"0\.1:1\.0:0\.1"):
        parse_factors(text)


def test_merges_that_are_held_read_the_models_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint(small_model(0), "base")
    models = [open_checkpoint(small_model(seed), f"model {seed}", base) for seed in (1, 2, 3)]
    read: list[str] = []
    monkeypatch.setattr(type(base), "read", _counted(type(base).read, read))
    merges = InMemoryMerges(MagMax(), base, models, OutputOptions(), ExecutionOptions(threads=1), hold=True)
    counts: list[int] = []
    for factor in (0.3, 1.0):
        read.clear()
        merges.merge_at(factor)
        counts.append(len([label for label in read if label != "base"]))
    carried = ("position_ids", "mask", "quantised")
    assert counts[1] <= len(carried) * len(models) < counts[0]


def _counted(read: Any, labels: list[str]) -> Any:
    def counted(self: Any, *given: Any) -> Any:
        labels.append(self.label)
        return read(self, *given)

    return counted


@pytest.mark.parametrize("rule", [MagMax(), Ties(density=0.3), Tunable(preference=(1, 2, 1)), CALIBRATED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_factors_in_memory_give_what_each_gives_alone(rule: Rule, dtype: torch.dtype) -> None:
    base = open_checkpoint(small_model(0, dtype), "base")
    models = [open_checkpoint(small_model(seed, dtype), f"model {seed}", base) for seed in (1, 2, 3)]
    factors = [0.3, 1.0, 0.3]
    together = InMemoryMerges(rule, base, models, OutputOptions(), ExecutionOptions(threads=2), hold=True)
    for factor in factors:
        found = together.merge_at(factor)
        alone = InMemoryMerges(rule, base, models, OutputOptions(), ExecutionOptions(threads=1)).merge_at(factor)
        assert found.keys() == alone.keys()
        assert all(found[key].tobytes() == alone[key].tobytes() for key in alone)


def test_two_sweeps_of_one_output_do_not_mix_and_a_users_file_stays(files, tmp_path):
    base, tasks = files
    (tmp_path / "out.task-vector.safetensors").write_bytes(b"mine")

    def sweep(out: Path) -> FactorSweep:
        models = [open_checkpoint(task) for task in tasks]
        names = [task.stem for task in tasks]
        return FactorSweep(
            MagMax(), open_checkpoint(base), models, names, out, OutputOptions(), [0.5], ExecutionOptions()
        )

    with sweep(tmp_path / "out").merged() as writer:
        with pytest.raises(MagMaxError, match="out: another magmax is writing this output; wait for it to end"):
            sweep(tmp_path / "out").merged().__enter__()
        path = writer.write(0.5)
    magmax.merge("magmax", base, tasks, 0.5, out=tmp_path / "single")
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "single" / "model.safetensors").read_bytes()
    assert (tmp_path / "out.task-vector.safetensors").read_bytes() == b"mine"
    assert not list(tmp_path.glob("*magmax*"))
