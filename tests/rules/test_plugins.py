"""A rule from another package works from the command line without a change here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tests.models import load_tensors, save_tensors

TOY = '''
from dataclasses import dataclass
from typing import ClassVar

from magmax.rules import StreamingRule


@dataclass(frozen=True)
class Smallest(StreamingRule):
    """The smallest of the task vectors, times a number."""

    name: ClassVar[str] = "toy_smallest"
    scaling_factor: ClassVar[float] = 1.0
    selects_entries: ClassVar[bool] = False
    paper: ClassVar[str] = "none"

    times: float = 1.0

    def step(self, state, task_vector, task, at):
        return ((state[0] + task_vector - abs(state[0] - task_vector)) / 2,) if state else (task_vector,)

    def finish(self, state, tasks):
        return state[0] * self.times
'''


@pytest.fixture
def environment(tmp_path):
    """An environment in which a package with one rule is installed as pip lays packages out."""
    site = tmp_path / "site"
    (site / "toy-1.0.dist-info").mkdir(parents=True)
    (site / "toy.py").write_text(TOY)
    (site / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (site / "toy-1.0.dist-info" / "entry_points.txt").write_text("[magmax.rules]\ntoy_smallest = toy:Smallest\n")
    return {**os.environ, "PYTHONPATH": str(site)}


def run(environment, *words):
    command = [sys.executable, "-c", "from magmax.cli import main; main()", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_rule_of_another_package_merges_and_absorbs(environment, tmp_path):
    values = [torch.zeros(3), torch.tensor([1.0, -2, 3]), torch.tensor([2.0, -1, -3])]
    base, *tasks = [save_tensors({"w": v}, tmp_path / f"{n}.safetensors") for n, v in enumerate(values)]
    done = run(
        environment,
        "merge",
        "--base",
        base,
        *tasks,
        "--out",
        tmp_path / "o.safetensors",
        "--rule",
        "{toy_smallest: {times: 2}}",
    )
    assert done.returncode == 0, done.stderr
    assert load_tensors(tmp_path / "o.safetensors")["w"].tolist() == [2, -4, -6]
    for task in tasks:
        assert (
            run(
                environment, "running", "absorb", tmp_path / "state", task, "--base", base, "--rule", "toy_smallest"
            ).returncode
            == 0
        )
    run(environment, "running", "result", tmp_path / "state", "--out", tmp_path / "r.safetensors")
    assert load_tensors(tmp_path / "r.safetensors")["w"].tolist() == [1, -2, -3]
    assert "toy_smallest" in run(environment, "recipes", "rules").stdout


def test_a_misspelt_rule_is_told_the_nearest_of_another_package(environment, tmp_path):
    done = run(environment, "merge", "--base", "b", "m", "--out", "o", "--rule", "toy_smalest")
    assert done.returncode == 2
    assert "did you mean 'toy_smallest'?" in done.stderr
