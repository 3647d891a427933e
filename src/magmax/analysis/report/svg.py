"""The elements that charts are made of: SVG as text, escaped, coloured by classes that style sheets know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

LETTER = 7.2
"""How wide a letter of a label is, at most, on average."""


@dataclass(frozen=True)
class Point:
    """One mark: its place, the ends of its interval if it has one, and what is told when it is pointed at."""

    x: float
    y: float
    tip: str
    low: float = math.nan
    high: float = math.nan
    hollow: bool = False

    @property
    def known(self) -> bool:
        return math.isfinite(self.x) and math.isfinite(self.y)

    @property
    def spread(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high) and self.high > self.low


@dataclass(frozen=True)
class Series:
    """Marks that belong together.

    Attributes:
        colour: a class, and a style where the class needs one: `colour(n)` or `shade(k)`.
        dash: how its line is broken, from 0 (whole) to 3, to tell two of one colour apart.
        hidden: whether it waits to be chosen.
    """

    name: str
    points: Sequence[Point]
    colour: Markup
    dash: int = 0
    hidden: bool = False

    @property
    def attributes(self) -> Markup:
        return Markup(' data-series="{}"').format(self.name) + (Markup(' hidden=""') if self.hidden else "")


COLOURS, DASHES = 10, 4


def colour(number: int) -> Markup:
    """The class of one of ten colours that can be told apart."""
    return Markup('class="c{}"').format(number % COLOURS)


def shade(share: float) -> Markup:
    """A colour from early (0) to late (1), for things that have an order."""
    return Markup('class="shade" style="--k:{}"').format(f"{share:.3f}")


def shades(count: int) -> list[Markup]:
    """So many shades in order."""
    return [shade(n / (count - 1) if count > 1 else 0.5) for n in range(count)]


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` as places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        reach = self.high - self.low
        share = (value - self.low) / reach if reach else 0.5
        return self.start + (self.end - self.start) * min(1.02, max(-0.02, share))


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, some `about` of them.

    >>> ticks(0.12, 0.58, 5)
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    """
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(1, about)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * n, 12) + 0.0 for n in range(first, last + 1)]


def reach(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    """The least and the greatest that is finite."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    return (min(0.0, *known) if zero else min(known)), (max(0.0, *known) if zero else max(known))


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> Markup:
    """A label."""
    return Markup('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>').format(
        f"{x:.1f}", f"{y:.1f}", kind, anchor, words
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    places = (f"{n:.1f}" for n in (x1, y1, x2, y2))
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(*places, kind)


def box(x: float, y: float, width: float, height: float, tip: str) -> Markup:
    """A bar that tells something."""
    places = (f"{n:.1f}" for n in (x, y, max(0.0, width), height))
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="2" class="bar mark" data-tip="{}"/>').format(
        *places, tip
    )


def stripe(y: float, width: float, height: float) -> Markup:
    """A row's ground."""
    return Markup('<rect x="0" y="{}" width="{}" height="{}" rx="6" class="stripe"/>').format(
        f"{y:.1f}", f"{width:g}", f"{height:.1f}"
    )


def legend(series: Sequence[Series], width: float, top: float) -> tuple[Markup, float]:
    """The names of all series that are shown, in lines from `top` on, and where they end."""
    x, y, parts = 14.0, top + 14, Markup("")
    for each in (each for each in series if not each.hidden):
        wide = 46 + LETTER * len(each.name)
        if x > 14 and x + wide > width:
            x, y = 14.0, y + 22
        sign = path([(x, y - 4), (x + 22, y - 4)], f"line d{each.dash}")
        parts += Markup("<g {}>{}</g>").format(each.colour, sign) + text(x + 29, y, each.name, "name")
        x += wide
    return parts, y + 14


def dot(x: float, y: float, tip: str, radius: float = 4, hollow: bool = False) -> Markup:
    """A mark that tells something."""
    return Markup('<circle cx="{}" cy="{}" r="{}" class="{}" data-tip="{}"/>').format(
        f"{x:.1f}", f"{y:.1f}", f"{radius:g}", "hollow dot mark" if hollow else "dot mark", tip
    )


def path(places: Sequence[tuple[float, float]], kind: str, closed: bool = False) -> Markup:
    """A line through places, or the area that they enclose."""
    drawn = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) + ("Z" if closed else "")
    return Markup('<path d="{}" class="{}"/>').format(drawn, kind)


def group(series: Series, *inside: Markup) -> Markup:
    """The marks of one series."""
    return Markup("<g {}{}>{}</g>").format(series.colour, series.attributes, Markup("").join(inside))


def drawing(width: float, height: float, kind: str, *inside: Markup) -> Markup:
    """The drawing, which keeps its proportions; it is hidden from screen readers, which get the words beside it."""
    return Markup('<svg viewBox="0 0 {} {}" class="{}" aria-hidden="true" focusable="false">{}</svg>').format(
        f"{width:g}", f"{height:g}", kind, Markup("").join(inside)
    )


def shortened(words: str, letters: int) -> str:
    """The end of a name that is too long, which tells more than its beginning.

    >>> shortened("encoder.layer.3.attention", 12)
    '…3.attention'
    """
    return words if len(words) <= letters else "…" + words[len(words) - letters + 1 :]


__all__ = [
    "LETTER", "Markup", "Point", "Scale", "Series", "box", "colour", "dot", "drawing", "escape", "group", "legend",
    "line", "path", "reach", "shade", "shades", "shortened", "stripe", "text", "ticks",
]  # fmt: skip
