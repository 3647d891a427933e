"""A figure: a drawing, what it shows in words, its key, and its numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .svg import Markup, SvgSeries

EMPTY_CELL = "\N{EM DASH}"
"""What stands where there is no number."""


INK_THRESHOLDS = {"deep": 0.758, "bright": 0.603}
"""From where on a cell needs the other ink, on the light page and on the dark one: black and white are then read
equally well, with a contrast above 4.5."""


@dataclass(frozen=True)
class TableCell:
    """A cell of a table: text, value to sort by, and tooltip."""

    text: str
    sort_value: float | None = None
    tooltip: str = ""

    @classmethod
    def from_share(cls, value: float, digits: int = 1) -> TableCell:
        """A share in %, without the sign."""
        return cls(f"{100 * value:.{digits}f}", value) if math.isfinite(value) else cls(EMPTY_CELL)

    @classmethod
    def from_number(cls, value: float) -> TableCell:
        return cls(f"{value:.4g}", value) if math.isfinite(value) else cls(EMPTY_CELL)


@dataclass(frozen=True)
class FigureTable:
    """Numbers in rows; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[TableCell]]


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a report: drawing, title, legend and table of its numbers.

    Attributes:
        html_id: its name within a page.
        lead: how to read it.
        alt_text: what is to be seen, for those who cannot see it.
        body: the drawing, or coloured tables.
        legend: the series, to be chosen among if `is_selectable`.
        table: its numbers; None where the body is a table itself.
        options: names of parts of the body of which one is shown at a time; `option_label` is what they are.
    """

    html_id: str
    title: str
    lead: str
    alt_text: str
    body: Markup
    legend: Sequence[SvgSeries] = ()
    is_selectable: bool = False
    table: FigureTable | None = None
    options: Sequence[str] = field(default_factory=list[str])
    option_label: str = "Method"


def render_options(parts: Mapping[str, Markup]) -> Markup:
    """Parts of a figure's body, by the names of its `choices`."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    inside = (Markup('<div data-choice="{}">{}</div>').format(name, part) for name, part in parts.items())
    return Markup("").join(inside)


def heat_table(
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[TableCell]]],
    low: float,
    high: float,
    caption: str,
    outlined_cells: Sequence[tuple[int, int]] = (),
    separate_last: bool = False,
) -> Markup:
    """A table whose cells are coloured by value from `low` to `high`; `faint` cells are outlined."""
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in columns)
    body = Markup("")
    for r, (name, cells) in enumerate(rows):
        drawn = Markup("")
        for c, cell in enumerate(cells):
            apart = separate_last and c == len(cells) - 1
            drawn += _heat_cell(cell, low, high, (r, c) in outlined_cells, apart)
        body += Markup('<tr><th scope="row">{}</th>{}</tr>').format(name, drawn)
    return Markup(
        '<div class="scroll" role="region" aria-label="{}" tabindex="0"><table class="heat"><caption>{}</caption>'
        '<thead><tr><th scope="col">{}</th>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(caption, caption, corner, head, body)


def _heat_cell(cell: TableCell, low: float, high: float, is_outlined: bool, is_separate: bool) -> Markup:
    if cell.sort_value is None or not math.isfinite(cell.sort_value):
        return Markup('<td class="none">{}</td>').format(cell.text)
    share = (cell.sort_value - low) / (high - low) if high > low else 0.5
    inks = [name for name, turn in INK_THRESHOLDS.items() if share > turn]
    kinds = " ".join(["mark", *inks, *["faint"] * is_outlined, *["apart"] * is_separate])
    return Markup('<td class="{}" style="--v:{}" data-tip="{}">{}</td>').format(
        kinds, f"{min(1, max(0, share)):.3f}", cell.tooltip or cell.text, cell.text
    )
