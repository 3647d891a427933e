"""The elements that charts are made of: SVG as text, escaped, coloured by classes that style sheets know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

LETTER_PIXELS = 7.2
"""How wide a letter of a label is, at most, on average."""


@dataclass(frozen=True)
class SvgPoint:
    """A mark of a chart: its place, interval and tooltip."""

    x: float
    y: float
    tooltip: str
    low: float = math.nan
    high: float = math.nan
    is_hollow: bool = False

    @property
    def is_known(self) -> bool:
        return math.isfinite(self.x) and math.isfinite(self.y)

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high) and self.high > self.low


@dataclass(frozen=True)
class SvgSeries:
    """Marks that belong together.

    Attributes:
        colour: a class, and a style where the class needs one: `colour(n)` or `shade(k)`.
        dash: how its line is broken, from 0 (whole) to 3, to tell two of one colour apart.
        is_hidden: whether it waits to be chosen.
    """

    name: str
    points: Sequence[SvgPoint]
    colour: Markup
    dash: int = 0
    is_hidden: bool = False

    @property
    def attributes(self) -> Markup:
        return Markup(' data-series="{}"').format(self.name) + (Markup(' hidden=""') if self.is_hidden else "")


COLOUR_COUNT, DASH_COUNT = 10, 4


def colour(number: int) -> Markup:
    """The class of one of ten colours that can be told apart."""
    return Markup('class="c{}"').format(number % COLOUR_COUNT)


def shade(share: float) -> Markup:
    """A colour from early (0) to late (1), for things that have an order."""
    return Markup('class="shade" style="--k:{}"').format(f"{share:.3f}")


def shades(count: int) -> list[Markup]:
    """So many shades in order."""
    return [shade(n / (count - 1) if count > 1 else 0.5) for n in range(count)]


@dataclass(frozen=True)
class LinearScale:
    """Numbers from `low` to `high` as places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        reach = self.high - self.low
        share = (value - self.low) / reach if reach else 0.5
        return self.start + (self.end - self.start) * min(1.02, max(-0.02, share))


def ticks(low: float, high: float, tick_count: int) -> list[float]:
    """Round numbers from `low` to `high`, some `about` of them.

    >>> ticks(0.12, 0.58, 5)
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    """
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(1, tick_count)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * n, 12) + 0.0 for n in range(first, last + 1)]


def finite_range(values: Sequence[float], include_zero: bool = False) -> tuple[float, float]:
    """The least and the greatest that is finite."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    return (min(0.0, *finite) if include_zero else min(finite)), (max(0.0, *finite) if include_zero else max(finite))


def draw_text(x: float, y: float, content: str, css_class: str = "", anchor: str = "start") -> Markup:
    """A label."""
    return Markup('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>').format(
        f"{x:.1f}", f"{y:.1f}", css_class, anchor, content
    )


def draw_line(x1: float, y1: float, x2: float, y2: float, css_class: str) -> Markup:
    """A straight line."""
    places = (f"{n:.1f}" for n in (x1, y1, x2, y2))
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(*places, css_class)


def draw_bar(x: float, y: float, width: float, height: float, tooltip: str) -> Markup:
    """A bar that tells something."""
    places = (f"{n:.1f}" for n in (x, y, max(0.0, width), height))
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="2" class="bar mark" data-tip="{}"/>').format(
        *places, tooltip
    )


def draw_stripe(y: float, width: float, height: float) -> Markup:
    """A row's ground."""
    return Markup('<rect x="0" y="{}" width="{}" height="{}" rx="6" class="stripe"/>').format(
        f"{y:.1f}", f"{width:g}", f"{height:.1f}"
    )


def draw_legend(series: Sequence[SvgSeries], width: float, top: float) -> tuple[Markup, float]:
    """The names of all series that are shown, in lines from `top` on, and where they end."""
    x, y, parts = 14.0, top + 14, Markup("")
    for each in (each for each in series if not each.is_hidden):
        wide = 46 + LETTER_PIXELS * len(each.name)
        if x > 14 and x + wide > width:
            x, y = 14.0, y + 22
        sign = draw_path([(x, y - 4), (x + 22, y - 4)], f"line d{each.dash}")
        parts += Markup("<g {}>{}</g>").format(each.colour, sign) + draw_text(x + 29, y, each.name, "name")
        x += wide
    return parts, y + 14


def draw_dot(x: float, y: float, tooltip: str, radius: float = 4, is_hollow: bool = False) -> Markup:
    """A mark that tells something."""
    return Markup('<circle cx="{}" cy="{}" r="{}" class="{}" data-tip="{}"/>').format(
        f"{x:.1f}", f"{y:.1f}", f"{radius:g}", "hollow dot mark" if is_hollow else "dot mark", tooltip
    )


def draw_path(points: Sequence[tuple[float, float]], css_class: str, is_closed: bool = False) -> Markup:
    """A line through places, or the area that they enclose."""
    drawn = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if is_closed else "")
    return Markup('<path d="{}" class="{}"/>').format(drawn, css_class)


def draw_group(series: SvgSeries, *inside: Markup) -> Markup:
    """The marks of one series."""
    return Markup("<g {}{}>{}</g>").format(series.colour, series.attributes, Markup("").join(inside))


def draw_svg(width: float, height: float, css_class: str, *inside: Markup) -> Markup:
    """The drawing, which keeps its proportions; it is hidden from screen readers, which get the words beside it."""
    return Markup('<svg viewBox="0 0 {} {}" class="{}" aria-hidden="true" focusable="false">{}</svg>').format(
        f"{width:g}", f"{height:g}", css_class, Markup("").join(inside)
    )


def shorten_start(words: str, max_letters: int) -> str:
    """The end of a name that is too long, which tells more than its beginning.

    >>> shorten_start("encoder.layer.3.attention", 12)
    '…3.attention'
    """
    return words if len(words) <= max_letters else "…" + words[len(words) - max_letters + 1 :]


__all__ = [
    "LETTER_PIXELS",
    "LinearScale",
    "Markup",
    "SvgPoint",
    "SvgSeries",
    "colour",
    "draw_bar",
    "draw_dot",
    "draw_group",
    "draw_legend",
    "draw_line",
    "draw_path",
    "draw_stripe",
    "draw_svg",
    "draw_text",
    "escape",
    "finite_range",
    "shade",
    "shades",
    "shorten_start",
    "ticks",
]  # fmt: skip
