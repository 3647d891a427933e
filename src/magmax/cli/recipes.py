"""The recipes that come with magmax: ls, cp, and a check of your own."""

from __future__ import annotations

from ..errors import MagMaxError
from .console import print_notes, print_preview, print_table


def list_recipes() -> None:
    """List the shipped recipes."""
    from ..recipes.recipe import shipped_recipes

    rows = [(path.stem, path.read_text().splitlines()[0].removeprefix("# ")) for path in shipped_recipes()]
    print_table(["recipe", "what it does"], rows)


def copy_recipe(name: str, to: str | None = None) -> None:
    """Copy a shipped recipe here, to be edited.

    Parameters
    ----------
    name
        A recipe's name, as in ls.
    to
        The new file; NAME.yaml in this folder by default. An existing file is never overwritten.
    """
    from pathlib import Path

    from ..recipes.recipe import shipped_recipes
    from ..rules import nearest_hint

    known = {path.stem: path for path in shipped_recipes()}
    if name not in known:
        raise MagMaxError(f"there is no recipe {name!r}; {nearest_hint(name, list(known))}")
    target = Path(to or f"{name}.yaml")
    try:
        with target.open("x") as file:
            file.write(known[name].read_text())
    except FileExistsError as error:
        raise MagMaxError(f"{target}: exists already; name another file") from error
    except OSError as error:
        raise MagMaxError(f"{target}: cannot be written: {error.strerror}") from error
    print(f"copied {name} to {target}; put in your paths, then: magmax merge {target}")


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
