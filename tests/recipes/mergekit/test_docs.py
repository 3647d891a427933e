"""docs/mergekit.md names every method, parameter, default and key, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from magmax.recipes.mergekit.methods import MERGE_METHODS, UNSUPPORTED_METHODS
from magmax.recipes.mergekit.schema import MergekitRecipe

PAGE = (Path(__file__).parents[3] / "docs/mergekit.md").read_text()


def rows(heading: str) -> dict[str, list[str]]:
    """The table under a heading, by its first cell."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def told(name: str, default: object, own: bool) -> str:
    value = str(default).lower() if isinstance(default, bool) else f"{default:g}" if default is not None else ""
    return f"`{name}{': ' * bool(value)}{value}`{' of each' * own}"


def test_every_method_stands_there_with_its_parameters_and_defaults():
    table = rows("Merge methods")
    assert [name.strip("`") for name in table] == list(MERGE_METHODS)
    for name, method in MERGE_METHODS.items():
        wanted = [told(p, d, True) for p, d in method.own.items()] + [
            told(p, d, False) for p, d in method.shared.items()
        ]
        assert table[f"`{name}`"][0] == ", ".join(wanted)


def test_every_method_that_is_not_supported_is_named():
    (sentence,) = re.findall(r"^Not supported: (.*?);", PAGE, re.MULTILINE | re.DOTALL)
    assert re.findall(r"`(\w+)`", sentence) == list(UNSUPPORTED_METHODS)


def test_every_key_stands_there():
    found = [key for cell in rows("Keys") for key in re.findall(r"`(\w+)`", cell)]
    assert sorted(found) == sorted(MergekitRecipe.model_fields)
