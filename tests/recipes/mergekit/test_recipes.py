"""mergekit recipes run as they are, and give what mergekit's documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.recipes.mergekit.naive import ReferenceMerge
from tests.recipes.mergekit.recipes import RECIPES

from magmax import MagMaxError, cli
from magmax.recipes.recipe import load_recipe

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
    definition, dtype = ReferenceMerge(content, tensors), getattr(torch, content.get("out_dtype") or content["dtype"])
    ours = loaded(tmp_path / "out")
    assert ours.keys() == tensors["base"].keys()
    for key, tensor in ours.items():
        assert tensor.dtype == dtype
        wanted = definition(key).float()
        close = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 2e-7}
        torch.testing.assert_close(tensor.float(), wanted, **close, msg=lambda text, key=key: f"{key}: {text}")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.fixture
def moved(models, tensors, tmp_path, monkeypatch):
    """Gives, for a recipe's name, how far its result is from the base, by tensor; and how far two of the models are."""

    def find(name: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        (tmp_path / "recipe.yaml").write_text(RECIPES[name])
        monkeypatch.chdir(models)
        assert run(monkeypatch, "merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")) == 0
        all_of = [loaded(tmp_path / "out"), tensors["poet"], tensors["coder"]]
        return [tuple((model[key] - base).double() for model in all_of) for key, base in tensors["base"].items()]

    return find


def near(share: float, wanted: float, draws: int) -> bool:
    """Within five standard deviations of so many draws."""
    return abs(share - wanted) < 5 * (wanted * (1 - wanted) / draws) ** 0.5


def test_dare_keeps_a_share_and_divides_it_by_that_share(moved):
    move, delta, _ = (torch.cat([t.flatten() for t in column]) for column in zip(*moved("dare_linear"), strict=True))
    kept = move.abs() > 1e-8
    assert near(kept.double().mean().item(), 0.5, len(kept))
    torch.testing.assert_close(move[kept], 0.75 / 0.5 * delta[kept], rtol=1e-4, atol=1e-6)


def test_dare_ties_adds_up_what_has_the_sign_of_the_sum(moved):
    move, poet, coder = (torch.cat([t.flatten() for t in column]) for column in zip(*moved("dare_ties"), strict=True))
    first, second = 0.5 / 0.75 * poet, 0.5 / 0.25 * coder
    both = torch.where(
        first.sign() == second.sign(), first + second, torch.where(first.abs() > second.abs(), first, second)
    )
    nearest = torch.stack([(move - outcome).abs() for outcome in (torch.zeros_like(move), first, second, both)]).min(0)
    assert nearest.values.max() < 2e-7
    assert near((move.abs() > 1e-8).double().mean().item(), 1 - 0.25 * 0.75, len(move))


def test_della_keeps_the_larger_of_a_row_more_often_and_divides_by_the_chance(moved):
    chances, ratios, all_kept = [], [], []
    for move, delta, _ in moved("della"):
        rows = delta.reshape(1, -1) if delta.dim() == 1 else delta
        ranks = rows.abs().argsort(1).argsort(1) / (rows.shape[1] - 1)
        chance = (0.3 + 0.4 * ranks).reshape(delta.shape)
        kept = move.abs() > 1e-8
        chances.append(chance.flatten())
        all_kept.append(kept.flatten())
        ratios.append((move * chance / delta)[kept & (delta.abs() > 1e-3)])
    chance, kept = torch.cat(chances), torch.cat(all_kept)
    torch.testing.assert_close(torch.cat(ratios), torch.full_like(torch.cat(ratios), 1.1), rtol=1e-3, atol=0)
    for low in (0.3, 0.4, 0.5, 0.6):
        band = (chance >= low) & (chance < low + 0.1)
        assert near(kept[band].double().mean().item(), chance[band].double().mean().item(), int(band.sum()))


def test_random_methods_give_the_same_bytes_again(models, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(RECIPES["della"])
    monkeypatch.chdir(models)
    for name, threads in (("one", "1"), ("two", "2")):
        words = ("merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / name), "--threads", threads)
        assert run(monkeypatch, *words) == 0
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.parametrize("false", ['"false"', "no", "0", '"off"'])
def test_truth_values_are_what_mergekit_takes_for_them(false, models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    recipe = RECIPES["ties, a density above one and a filter that fits everything"]
    for number, value in enumerate(["false", false]):
        (tmp_path / f"{number}.yaml").write_text(recipe + f"parameters: {{normalize: {value}}}\n")
    plans = [load_recipe(str(tmp_path / f"{number}.yaml")) for number in range(2)]
    assert plans[0].rule == plans[1].rule


def test_a_slice_has_the_base_among_its_sources(models, tmp_path, monkeypatch):
    text = """\
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: poet, layer_range: [0, 4], parameters: {weight: 1}}
      - {model: coder, layer_range: [0, 4], parameters: {weight: 1}}
dtype: float32
"""
    monkeypatch.chdir(models)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(MagMaxError, match="line 4: the base model base is not among the sources"):
        load_recipe(str(tmp_path / "recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text(text.replace("dtype", "      - {model: base, layer_range: [0, 4]}\ndtype"))
    assert len(load_recipe(str(tmp_path / "recipe.yaml")).models) == 2


def test_the_home_folder_is_where_a_shell_has_it(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(models))
    text = (
        "{merge_method: ties, base_model: ~/base, models: [{model: ~/poet, parameters: {weight: 1}}], dtype: float32}"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    plan = load_recipe(str(tmp_path / "recipe.yaml"), ["out=~/merged"])
    assert [plan.base, *plan.models, plan.out] == [str(models / name) for name in ("base", "poet", "merged")]
