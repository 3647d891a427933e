"""The three kinds of chart: rows with marks, rows of stacked bars, and lines with bands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .svg import (
    LETTER,
    Markup,
    Scale,
    Series,
    box,
    dot,
    drawing,
    group,
    line,
    path,
    reach,
    shortened,
    stripe,
    text,
    ticks,
)

WIDE, NARROW = 760.0, 360.0
"""A drawing is made twice, so that its labels can be read on a desk and on a phone."""


def percent(value: float) -> str:
    """A share in %."""
    return f"{100 * value:.4g} %"


def number(value: float) -> str:
    """A plain number."""
    return f"{value:.4g}"


@dataclass(frozen=True)
class Axis:
    """What is measured: its name, how it is written, and whether it must begin at zero."""

    label: str
    written: Callable[[float], str] = number
    zero: bool = False
    marked: Sequence[tuple[float, str]] = field(default_factory=list)
    """Places of note: a value and its name, drawn as a broken line."""
    limits: tuple[float, float] | None = None
    """What it must have room for, beside the points: for charts side by side."""


def both(draw: Callable[[float], Markup]) -> Markup:
    """The drawing for wide windows and that for narrow ones; the style sheet shows one."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(WIDE), draw(NARROW))


def dots(names: Sequence[str], series: Sequence[Series], axis: Axis, joined: bool = False) -> Markup:
    """A row for each name; each series has a mark in a row, at (value, row number), with an interval if it has one.

    Joined, a line goes from the least to the greatest of a row; from zero, where there is but one and zero is shown.
    """

    def draw(width: float) -> Markup:
        aside = _aside(series) if joined else [0.0] * len(series)
        frame = _Rows(names, axis, _values(series) + [v for v, _ in axis.marked], width, 10 * len(series) * any(aside))
        inside = [frame.drawn()]
        if joined and not any(aside):
            for row in range(len(names)):
                spread = [p.x for s in series for p in s.points if p.y == row and p.known]
                spread += [0.0] * (axis.zero and len(series) == 1)
                if len(spread) > 1:
                    y = frame.y(row)
                    inside.append(line(frame.x(min(spread)), y, frame.x(max(spread)), y, "range"))
        for each, off in zip(series, aside, strict=True):
            marks: list[Markup] = []
            for p in (p for p in each.points if p.known):
                y = frame.y(p.y) + off
                if p.spread:
                    marks.append(line(frame.x(p.low), y, frame.x(p.high), y, "interval"))
                    marks += [line(frame.x(end), y - 3, frame.x(end), y + 3, "interval") for end in (p.low, p.high)]
                marks.append(dot(frame.x(p.x), y, p.tip, 4.8, p.hollow))
            inside.append(group(each, *marks))
        return drawing(width, frame.height, frame.kind, *inside)

    return both(draw)


def stacks(names: Sequence[str], series: Sequence[Series], axis: Axis) -> Markup:
    """A bar for each name, made of the series' points, each at (how long its part is, row number)."""

    def draw(width: float) -> Markup:
        frame = _Rows(names, axis, [0.0, 1.0], width)
        begun = [0.0] * len(names)
        inside = [frame.drawn()]
        for each in series:
            bars: list[Markup] = []
            for p in (p for p in each.points if p.known):
                start, row = begun[int(p.y)], int(p.y)
                left, right = frame.x(start), frame.x(start + p.x)
                bars.append(box(left + 0.6, frame.y(row) - 8, right - left - 1.2, 16, p.tip))
                begun[row] += p.x
            inside.append(group(each, *bars))
        return drawing(width, frame.height, frame.kind, *inside)

    return both(draw)


class _Rows:
    """The frame of a chart in rows: names beside their rows, or above them where there is little room."""

    def __init__(
        self, names: Sequence[str], axis: Axis, values: Sequence[float], width: float, room: float = 0
    ) -> None:
        self.names, self.axis, self.width = names, axis, width
        self.above = width < 500
        longest = max((len(name) for name in names), default=0)
        self.letters = 46 if self.above else 34
        left = 6.0 if self.above else 14 + LETTER * min(longest, self.letters)
        self.striped = room > 0
        self.step = max(room + 12, 28.0 if len(names) <= 24 else 20.0)
        self.step += 16.0 if self.above else 0.0
        self.top = 28.0 if axis.marked else 12.0
        self.bottom = self.top + self.step * len(names)
        self.height = self.bottom + 40
        self.kind = "rows tall" if self.height > 1200 else "rows"
        marked = [value for value, _ in axis.marked]
        self.marks = ticks(*reach([*values, *marked], axis.zero), 4 if self.above else 7)
        self.x = Scale(self.marks[0], self.marks[-1], left + 8, width - 22)

    def y(self, row: float) -> float:
        return self.top + self.step * (row + 0.5) + (8.0 if self.above else 0.0)

    def drawn(self) -> Markup:
        parts: list[Markup] = []
        for row in range(0, len(self.names), 2) if self.striped else ():
            parts.append(stripe(self.top + self.step * row, self.width, self.step))
        for mark in self.marks:
            x = self.x(mark)
            parts.append(line(x, self.top - 4, x, self.bottom, "grid"))
            parts.append(text(x, self.bottom + 16, self.axis.written(mark), "tick", "middle"))
        for value, name in self.axis.marked:
            x = self.x(value)
            parts.append(line(x, self.top - 4, x, self.bottom, "reference"))
            anchor = "end" if x > self.width * 0.6 else "start"
            parts.append(text(x + (4 if anchor == "start" else -4), self.top - 10, name, "note", anchor))
        middle = (self.x.start + self.x.end) / 2
        parts.append(text(middle, self.bottom + 34, self.axis.label, "axis", "middle"))
        for row, name in enumerate(self.names):
            words = shortened(name, self.letters)
            if self.above:
                parts.append(text(self.x.start - 8, self.top + self.step * row + 13, words, "name"))
            else:
                parts.append(text(self.x.start - 16, self.y(row) + 4, words, "name", "end"))
        return Markup("").join(parts)


def lines(series: Sequence[Series], across: Axis, up: Axis, small: bool = False) -> Markup:
    """Lines through points with a band of their intervals; small ones are for many side by side."""

    def draw(width: float) -> Markup:
        frame = _Plane(series, across, up, width, small)
        inside = [frame.drawn()]
        for each in series:
            known = sorted((p for p in each.points if p.known), key=lambda p: p.x)
            places = [(frame.x(p.x), frame.y(p.y)) for p in known]
            marks: list[Markup] = []
            if len(known) > 1 and any(p.spread for p in known):
                spread = [(p.low, p.high) if p.spread else (p.y, p.y) for p in known]
                there = [(frame.x(p.x), frame.y(high)) for p, (_, high) in zip(known, spread, strict=True)]
                back = [(frame.x(p.x), frame.y(low)) for p, (low, _) in zip(known, spread, strict=True)]
                marks.append(path(there + back[::-1], "band", closed=True))
            if len(places) > 1:
                marks.append(path(places, f"line d{each.dash}"))
            marks += [dot(*at, p.tip, 3 if small else 3.6) for at, p in zip(places, known, strict=True)]
            inside.append(group(each, *marks))
        return drawing(width, frame.height, "plane small" if small else "plane", *inside)

    return draw(300.0) if small else both(draw)


class _Plane:
    """The frame of a chart of lines: a grid, numbers along both sides, a name for each side."""

    def __init__(self, series: Sequence[Series], across: Axis, up: Axis, width: float, small: bool) -> None:
        self.across, self.up = across, up
        self.height = 172.0 if small else (360.0 if width > 500 else 300.0)
        self.labelled = not small
        values = [v for s in series for p in s.points for v in (p.low, p.y, p.high) if p.known]
        values += up.limits or ()
        self.rows = ticks(*reach([*values, *(v for v, _ in up.marked)], up.zero), 3 if small else 5)
        places = [p.x for s in series for p in s.points if p.known]
        low, high = reach(places, across.zero)
        self.columns = self._columns(places, low, high, 4 if width < 500 else 8)
        left = 12 + LETTER * max(len(up.written(row)) for row in self.rows)
        top, bottom = (34.0 if self.labelled else 10.0), self.height - (46.0 if self.labelled else 24.0)
        pad = (high - low) * 0.02
        self.x = Scale(low - pad, high + pad, left, width - 14)
        self.y = Scale(self.rows[0], self.rows[-1], bottom, top)

    def _columns(self, places: Sequence[float], low: float, high: float, about: int) -> list[float]:
        """Where the axis is labelled: at the points themselves if they are few, else at round numbers."""
        own = sorted(set(places))
        if len(own) <= about + 2 and all(b - a > (high - low) / 12 for a, b in pairwise(own)):
            return own
        return [tick for tick in ticks(low, high, about) if low - 1e-9 <= tick <= high + 1e-9]

    def drawn(self) -> Markup:
        left, right, top, bottom = self.x.start, self.x.end, self.y.end, self.y.start
        parts: list[Markup] = []
        for row in self.rows:
            parts.append(line(left, self.y(row), right, self.y(row), "grid"))
            parts.append(text(left - 7, self.y(row) + 4, self.up.written(row), "tick", "end"))
        for column in self.columns:
            parts.append(text(self.x(column), bottom + 18, self.across.written(column), "tick", "middle"))
        for value, name in self.across.marked:
            parts.append(line(self.x(value), top, self.x(value), bottom, "reference"))
            parts.append(text(self.x(value) + 4, top + 9, name, "note"))
        for value, name in self.up.marked:
            parts.append(line(left, self.y(value), right, self.y(value), "reference"))
            parts.append(text(right, self.y(value) - 5, name, "note", "end"))
        if self.labelled:
            parts.append(text((left + right) / 2, bottom + 38, self.across.label, "axis", "middle"))
            parts.append(text(6, top - 16, self.up.label, "axis"))
        return Markup("").join(parts)


def _aside(series: Sequence[Series]) -> list[float]:
    """How far each series is moved within its row, so that intervals do not lie on each other."""
    apart = 10.0 if len(series) > 1 and any(p.spread for s in series for p in s.points) else 0.0
    return [apart * (n - (len(series) - 1) / 2) for n in range(len(series))]


def _values(series: Sequence[Series]) -> list[float]:
    """Everything that the chart must have room for."""
    return [v for s in series for p in s.points for v in (p.low, p.x, p.high) if math.isfinite(v)]
