"""Every shipped recipe is found, copied, checked and merged."""

from __future__ import annotations

import re

import pytest
from tests.models import load_tensors, save_tensors, small_model

from magmax import cli
from magmax.recipes.recipe import load_recipe, shipped_recipes
from magmax.rules import BUILT_IN


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the models that the recipes name."""
    for seed, name in enumerate(("base", "cars", "mnist", "eurosat")):
        save_tensors(small_model(seed), tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["magmax", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("name", [path.stem for path in shipped_recipes()])
def test_a_shipped_recipe_merges(name, workplace, monkeypatch):
    assert run(monkeypatch, "recipes", "copy", name) == 0
    assert run(monkeypatch, "recipes", "check", f"{name}.yaml") == 0
    assert run(monkeypatch, "merge", f"{name}.yaml") == 0
    out = load_recipe(f"{name}.yaml").out
    written = workplace / (out or "")
    tensors = load_tensors(written / "model.safetensors" if written.is_dir() else written)
    assert tensors.keys() == small_model(0).keys()


def test_every_rule_and_transform_has_a_recipe():
    words = set(re.findall(r"\w+", " ".join(path.read_text().split("rule:")[1] for path in shipped_recipes())))
    assert set(BUILT_IN) <= words


def test_they_are_listed_with_what_they_do(capsys, monkeypatch):
    assert run(monkeypatch, "recipes", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(shipped_recipes()) >= 13
    assert all(len(line.split()) > 4 for line in lines[1:])


def test_a_copy_overwrites_nothing_and_an_unknown_name_is_told_the_nearest(workplace, capsys, monkeypatch):
    (workplace / "magmax.yaml").write_text("mine")
    assert run(monkeypatch, "recipes", "copy", "magmax") == 2
    assert (workplace / "magmax.yaml").read_text() == "mine"
    assert run(monkeypatch, "recipes", "copy", "magmx") == 2
    assert "did you mean 'magmax'?" in capsys.readouterr().err
