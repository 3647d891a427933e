"""The counts of the layout: each finds its offenders, and the tree keeps its limits."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def layout() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_layout", ROOT / "tools" / "measure_layout.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder: Path, **sources: str) -> list[Path]:
    paths = [folder / f"{name}.py" for name in sources]
    for path, text in zip(paths, sources.values(), strict=True):
        path.write_text(text)
    return paths


def test_names_that_a_shell_must_quote_are_odd(layout):
    paths = ["src/a_b-c.1.py", "results/ties(density=1).json", "a b.md", "ü.md"]
    assert layout.odd_names(paths) == paths[1:]


def test_public_classes_count_once_a_package_and_private_or_inner_ones_never(layout, tmp_path):
    paths = written(
        tmp_path, a="class Part: ...\nclass _Own: ...", b="class Part:\n    class Inner: ...", c="class Inner: ..."
    )
    assert layout.repeated_classes(paths) == ["Part"]


def test_modules_share_no_file_name_but_those_that_may(layout):
    paths = [
        Path("a/__init__.py"),
        Path("b/__init__.py"),
        Path("a/base.py"),
        Path("b/base.py"),
        Path("a/x.py"),
        Path("b/x.py"),
    ]
    assert layout.repeated_files(paths) == ["x.py"]


def test_an_import_from_a_lower_level_is_upward_and_one_beside_is_not(layout):
    layers = [["m.cli"], ["m.merging", "m.rules"], ["m.errors"]]
    imports = {
        "m.rules.base": ["m.cli.main", "m.merging", "m.errors"],
        "m.cli.main": ["m.rules.base"],
        "m.errors": ["m.rulesets", "m.rules.base"],
    }
    assert layout.upward_imports(imports, layers) == ["m.rules.base -> m.cli.main", "m.errors -> m.rules.base"]


def test_a_cycle_of_imports_is_named(layout):
    assert layout.import_cycles({"a": ["b"], "b": ["c"], "c": []}) == []
    assert layout.import_cycles({"a": ["b"], "b": ["c"], "c": ["a"]}) == [" -> ".join("acba")]


def test_the_levels_are_those_of_the_contract(layout):
    layers = layout.layers_of(ROOT)
    assert layers[0] == ["magmax.cli"]
    assert "magmax.errors" in layers[-1]


def test_the_tree_keeps_its_limits(layout, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measure_layout.py"])
    assert layout.main() == 0, capsys.readouterr().out
    assert len(capsys.readouterr().out.splitlines()) == len(layout.LIMITS)
