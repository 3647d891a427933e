"""A figure: a drawing, what it shows in words, its key, and its numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .svg import Markup, Series

NONE = "\N{EM DASH}"
"""What stands where there is no number."""


TURNS = {"deep": 0.758, "bright": 0.603}
"""From where on a cell needs the other ink, on the light page and on the dark one: black and white are then read
equally well, with a contrast above 4.5."""


@dataclass(frozen=True)
class Cell:
    """A table's cell: what is read, what it is sorted by, and what is told when it is pointed at."""

    words: str
    value: float | None = None
    tip: str = ""

    @classmethod
    def share(cls, value: float, digits: int = 1) -> Cell:
        """A share in %, without the sign."""
        return cls(f"{100 * value:.{digits}f}", value) if math.isfinite(value) else cls(NONE)

    @classmethod
    def number(cls, value: float) -> Cell:
        return cls(f"{value:.4g}", value) if math.isfinite(value) else cls(NONE)


@dataclass(frozen=True)
class Table:
    """Numbers in rows; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """What a page shows.

    Attributes:
        ident: its name within a page.
        lead: how to read it.
        alt: what is to be seen, for those who cannot see it.
        body: the drawing, or coloured tables.
        key: the series, to be chosen among if `chosen`.
        table: its numbers; None where the body is a table itself.
        choices: names of parts of the body of which one is shown at a time; `choice` is what they are.
    """

    ident: str
    title: str
    lead: str
    alt: str
    body: Markup
    key: Sequence[Series] = ()
    chosen: bool = False
    table: Table | None = None
    choices: Sequence[str] = field(default_factory=list[str])
    choice: str = "Method"


def alternatives(parts: Mapping[str, Markup]) -> Markup:
    """Parts of a figure's body, by the names of its `choices`."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    inside = (Markup('<div data-choice="{}">{}</div>').format(name, part) for name, part in parts.items())
    return Markup("").join(inside)


def heat(
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Cell]]],
    low: float,
    high: float,
    caption: str,
    faint: Sequence[tuple[int, int]] = (),
    last_apart: bool = False,
) -> Markup:
    """A table whose cells are coloured by value from `low` to `high`; `faint` cells are outlined."""
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in columns)
    body = Markup("")
    for r, (name, cells) in enumerate(rows):
        drawn = Markup("")
        for c, cell in enumerate(cells):
            apart = last_apart and c == len(cells) - 1
            drawn += _heat_cell(cell, low, high, (r, c) in faint, apart)
        body += Markup('<tr><th scope="row">{}</th>{}</tr>').format(name, drawn)
    return Markup(
        '<div class="scroll" role="region" aria-label="{}" tabindex="0"><table class="heat"><caption>{}</caption>'
        '<thead><tr><th scope="col">{}</th>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(caption, caption, corner, head, body)


def _heat_cell(cell: Cell, low: float, high: float, faint: bool, apart: bool) -> Markup:
    if cell.value is None or not math.isfinite(cell.value):
        return Markup('<td class="none">{}</td>').format(cell.words)
    share = (cell.value - low) / (high - low) if high > low else 0.5
    inks = [name for name, turn in TURNS.items() if share > turn]
    kinds = " ".join(["mark", *inks, *["faint"] * faint, *["apart"] * apart])
    return Markup('<td class="{}" style="--v:{}" data-tip="{}">{}</td>').format(
        kinds, f"{min(1, max(0, share)):.3f}", cell.tip or cell.words, cell.words
    )
