"""The README's commands and Python run as they are written."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.documents import ROOT, code_blocks, commands, run_command
from tests.models import save_tensors, small_model

README = ROOT / "README.md"
SLOW = ("make ", "git clone", "pip install", "cd ")
TASKS = ("cars", "mnist", "eurosat")
THEIRS = """\
merge_method: ties
base_model: base.safetensors
models:
  - {model: cars.safetensors, parameters: {weight: 0.5, density: 0.5}}
  - {model: mnist.safetensors, parameters: {weight: [0, 1], density: 0.5}}
dtype: bfloat16
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the models that the README speaks of."""
    save_tensors(small_model(0), tmp_path / "base.safetensors")
    for number, name in enumerate(TASKS, start=1):
        save_tensors(small_model(number), tmp_path / f"{name}.safetensors")
    for name, text in zip(("recipe.yaml",), code_blocks(README, "yaml"), strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "theirs.yaml").write_text(THEIRS)
    torch.save(torch.nn.Linear(2, 3), tmp_path / "old-research.pt")
    for name in TASKS[:2]:
        lora = LoraConfig(r=2, target_modules=["0"])
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), lora).save_pretrained(tmp_path / "adapters" / name)
    (tmp_path / "score.py").write_text("print(0.5)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs(workplace):
    found = commands(README, SLOW)
    assert len(found) >= 10
    for command in found:
        run_command(command)


def test_the_python_runs(workplace):
    for block in code_blocks(README, "python") * 2:  # the second time as the first
        exec(compile(block, str(README), "exec"), {})


def test_slow_commands_are_targets_of_the_makefile():
    text = (README.parent / "Makefile").read_text()
    named = re.findall(r"^\$ make (\w+)", README.read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(named)
    assert all(re.search(rf"^{name}:", text, re.MULTILINE) for name in named)
    assert shutil.which("make")
