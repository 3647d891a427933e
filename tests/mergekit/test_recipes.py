"""mergekit recipes run as they are, and give what mergekit's documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.mergekit.naive import Definition
from tests.mergekit.recipes import RECIPES

from magmax import cli

RANDOM = ("dare_linear", "dare_ties", "della")


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["magmax", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def tensors(models) -> dict[str, dict[str, torch.Tensor]]:
    """Every model's tensors by its name; the adapted one's as B*A added to the base's."""
    found = {path.name: loaded(path) for path in models.iterdir() if (path / "model.safetensors").exists()}
    adapter, settings = load_file(models / "speaker/adapter_model.safetensors"), models / "speaker/adapter_config.json"
    scale = json.loads(settings.read_text())["lora_alpha"] / 2
    spoken = dict(found["base"])
    for name, left in adapter.items():
        if ".lora_A." in name:
            key = name.removeprefix("base_model.model.").replace(".lora_A", "")
            spoken[key] = spoken[key] + scale * adapter[name.replace("lora_A", "lora_B")] @ left
    return {**found, "base+speaker": spoken}


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in RANDOM])
def test_a_recipe_gives_what_mergekits_documentation_says(name, models, tensors, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPES[name])
    monkeypatch.chdir(models)
    recipe = str(tmp_path / "recipe.yaml")
    assert run(monkeypatch, "recipes", "check", recipe) == 0, capsys.readouterr().err
    assert run(monkeypatch, "merge", recipe, "--out", str(tmp_path / "out")) == 0, capsys.readouterr().err
    content = yaml.safe_load(RECIPES[name])
    definition, dtype = Definition(content, tensors), getattr(torch, content.get("out_dtype") or content["dtype"])
    ours = loaded(tmp_path / "out")
    assert ours.keys() == tensors["base"].keys()
    for key, tensor in ours.items():
        assert tensor.dtype == dtype
        wanted = definition(key).float()
        close = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 2e-7}
        torch.testing.assert_close(tensor.float(), wanted, **close, msg=lambda text, key=key: f"{key}: {text}")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def moves(name: str, tensors, models, tmp_path, monkeypatch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By tensor, what a recipe's result is from the base, and what its first model is."""
    (tmp_path / "recipe.yaml").write_text(RECIPES[name])
    monkeypatch.chdir(models)
    assert run(monkeypatch, "merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")) == 0
    base, poet = tensors["base"], tensors["poet"]
    return {
        key: (t.double() - base[key], (poet[key] - base[key]).double()) for key, t in loaded(tmp_path / "out").items()
    }


def test_dare_keeps_a_share_and_rescales_it(tensors, models, tmp_path, monkeypatch):
    found = moves("dare_linear", tensors, models, tmp_path, monkeypatch)
    move, delta = (torch.cat([pair[n].flatten() for pair in found.values()]) for n in (0, 1))
    kept = move.abs() > 1e-7
    assert abs(kept.double().mean().item() - 0.5) < 5 * (0.25 / len(kept)) ** 0.5
    torch.testing.assert_close(move[kept], 0.75 / 0.5 * delta[kept], rtol=1e-4, atol=1e-6)
