"""The reference: rules, and the recipes that come with magmax: list, copy, check, rules."""

from __future__ import annotations

from ..errors import MagMaxError
from .common_options import Json, OptionalOut
from .console import print_json, print_line, print_notes, print_preview, print_table


def list_recipes(*, as_json: Json = False) -> None:
    """List the shipped recipes."""
    from ..recipes.recipe import shipped_recipes

    rows = [(path.stem, path.read_text().splitlines()[0].removeprefix("# ")) for path in shipped_recipes()]
    if as_json:
        print_json(dict(rows))
        return
    print_table(["recipe", "what it does"], rows)


def copy_recipe(name: str, *, out: OptionalOut = None) -> None:
    """Copy a shipped recipe here, to be edited.

    Parameters
    ----------
    name
        A recipe's name, as magmax recipes list shows it.
    out
        The new file; NAME.yaml in this folder by default. An existing file is never overwritten.
    """
    from pathlib import Path

    from ..recipes.recipe import shipped_recipes
    from ..rules import nearest_hint

    paths = {path.stem: path for path in shipped_recipes()}
    if name not in paths:
        raise MagMaxError(f"there is no recipe {name!r}; {nearest_hint(name, list(paths))}")
    target = Path(out or f"{name}.yaml")
    try:
        with target.open("x") as file:
            file.write(paths[name].read_text())
    except FileExistsError as error:
        raise MagMaxError(f"{target}: exists already; name another file") from error
    except OSError as error:
        raise MagMaxError(f"{target}: cannot be written: {error.strerror}") from error
    print_line(f"copied {name} to {target}; put in your paths, then: magmax merge {target}")


def check(recipe: str, *assignments: str) -> None:
    """Check a recipe and all that it names, without doing anything.

    Parameters
    ----------
    recipe
        The recipe (.yaml).
    assignments
        As in merge: scaling_factor=0.7, rule.k=2.
    """
    from ..recipes.recipe import load_recipe

    plan = load_recipe(recipe, assignments)
    print_notes(plan)
    print_preview(plan.job(plan.out or f"{recipe}-merged"), 0)


def rules(*, as_json: Json = False) -> None:
    """List the merge rules and the transforms that can stand before or after them in a chain."""
    import dataclasses

    from ..rules import MergedTransform, Rule, StreamingRule, TaskVectorTransform, all_components
    from ..rules.schedules import ACCEPTED_FORMS

    rows: list[tuple[str, ...]] = []
    for name, kind in all_components().items():
        part = kind()
        options = ", ".join(f"{f.name}={getattr(part, f.name)}" for f in dataclasses.fields(kind)) or "-"
        place = "(after)" if isinstance(part, MergedTransform) else "(transform)"
        factor = f"{part.scaling_factor:g}" if isinstance(part, Rule) else place
        memory = "a block" if isinstance(part, TaskVectorTransform | StreamingRule) else "a block a model"
        memory = "a tensor a model" if isinstance(part, Rule) and part.whole_tensor else memory
        passes = part.passes_in_words if isinstance(part, Rule) else str(part.passes)
        rows.append((name, options, factor, passes, memory, kind.paper))
    header = ["name", "options", "scaling_factor", "extra passes", "memory", "paper"]
    if as_json:
        print_json([dict(zip(header, row, strict=True)) for row in rows])
        return
    print_table(header, rows)
    print_line(f"Options that are fractions or weights, and scaling_factor, can be {ACCEPTED_FORMS}")
    print_line(
        "Those of transforms, and weights, also a list of these, one for each model, or a map from model to number."
    )
