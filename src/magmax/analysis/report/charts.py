"""The three kinds of chart: rows with marks, rows of stacked bars, and lines with bands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .svg import (
    LETTER_PIXELS,
    LinearScale,
    Markup,
    SvgSeries,
    draw_bar,
    draw_dot,
    draw_group,
    draw_line,
    draw_path,
    draw_stripe,
    draw_svg,
    draw_text,
    finite_range,
    shorten_start,
    ticks,
)

WIDE_PIXELS, NARROW_PIXELS = 760.0, 360.0
"""A drawing is made twice, so that its labels can be read on a desk and on a phone."""


def format_percent(value: float) -> str:
    """A share in %."""
    return f"{100 * value:.4g} %"


def format_number(value: float) -> str:
    """A plain number."""
    return f"{value:.4g}"


@dataclass(frozen=True)
class ChartAxis:
    """An axis of a chart: its label, number format, and whether it begins at zero."""

    label: str
    format_value: Callable[[float], str] = format_number
    include_zero: bool = False
    reference_values: Sequence[tuple[float, str]] = field(default_factory=list)
    """Places of note: a value and its name, drawn as a broken line."""
    limits: tuple[float, float] | None = None
    """What it must have room for, beside the points: for charts side by side."""


def render_both_widths(draw: Callable[[float], Markup]) -> Markup:
    """The drawing for wide windows and that for narrow ones; the style sheet shows one."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
        draw(WIDE_PIXELS), draw(NARROW_PIXELS)
    )


def dot_chart(names: Sequence[str], series: Sequence[SvgSeries], axis: ChartAxis, connect_dots: bool = False) -> Markup:
    """A row for each name; each series has a mark in a row, at (value, row number), with an interval if it has one.

    Joined, a line goes from the least to the greatest of a row; from zero, where there is but one and zero is shown.
    """

    def draw(width: float) -> Markup:
        aside = _row_offsets(series) if connect_dots else [0.0] * len(series)
        frame = _RowFrame(
            names,
            axis,
            _finite_values(series) + [v for v, _ in axis.reference_values],
            width,
            10 * len(series) * any(aside),
        )
        inside = [frame.render()]
        if connect_dots and not any(aside):
            for row in range(len(names)):
                spread = [p.x for s in series for p in s.points if p.y == row and p.is_known]
                spread += [0.0] * (axis.include_zero and len(series) == 1)
                if len(spread) > 1:
                    y = frame.row_y(row)
                    inside.append(draw_line(frame.x_scale(min(spread)), y, frame.x_scale(max(spread)), y, "range"))
        for each, off in zip(series, aside, strict=True):
            marks: list[Markup] = []
            for p in (p for p in each.points if p.is_known):
                y = frame.row_y(p.y) + off
                if p.has_interval:
                    marks.append(draw_line(frame.x_scale(p.low), y, frame.x_scale(p.high), y, "interval"))
                    marks += [
                        draw_line(frame.x_scale(end), y - 3, frame.x_scale(end), y + 3, "interval")
                        for end in (p.low, p.high)
                    ]
                marks.append(draw_dot(frame.x_scale(p.x), y, p.tooltip, 4.8, p.is_hollow))
            inside.append(draw_group(each, *marks))
        return draw_svg(width, frame.height, frame.css_class, *inside)

    return render_both_widths(draw)


def stacked_bar_chart(names: Sequence[str], series: Sequence[SvgSeries], axis: ChartAxis) -> Markup:
    """A bar for each name, made of the series' points, each at (how long its part is, row number)."""

    def draw(width: float) -> Markup:
        frame = _RowFrame(names, axis, [0.0, 1.0], width)
        begun = [0.0] * len(names)
        inside = [frame.render()]
        for each in series:
            bars: list[Markup] = []
            for p in (p for p in each.points if p.is_known):
                start, row = begun[int(p.y)], int(p.y)
                left, right = frame.x_scale(start), frame.x_scale(start + p.x)
                bars.append(draw_bar(left + 0.6, frame.row_y(row) - 8, right - left - 1.2, 16, p.tooltip))
                begun[row] += p.x
            inside.append(draw_group(each, *bars))
        return draw_svg(width, frame.height, frame.css_class, *inside)

    return render_both_widths(draw)


class _RowFrame:
    """The frame of a chart in rows: names beside their rows, or above them where there is little room."""

    def __init__(
        self, names: Sequence[str], axis: ChartAxis, values: Sequence[float], width: float, extra_height: float = 0
    ) -> None:
        self.names, self.axis, self.width = names, axis, width
        self.labels_above = width < 500
        longest = max((len(name) for name in names), default=0)
        self.max_letters = 46 if self.labels_above else 34
        left = 6.0 if self.labels_above else 14 + LETTER_PIXELS * min(longest, self.max_letters)
        self.has_stripes = extra_height > 0
        self.row_height = max(extra_height + 12, 28.0 if len(names) <= 24 else 20.0)
        self.row_height += 16.0 if self.labels_above else 0.0
        self.top = 28.0 if axis.reference_values else 12.0
        self.bottom = self.top + self.row_height * len(names)
        self.height = self.bottom + 40
        self.css_class = "rows tall" if self.height > 1200 else "rows"
        marked = [value for value, _ in axis.reference_values]
        self.ticks = ticks(*finite_range([*values, *marked], axis.include_zero), 4 if self.labels_above else 7)
        self.x_scale = LinearScale(self.ticks[0], self.ticks[-1], left + 8, width - 22)

    def row_y(self, row: float) -> float:
        return self.top + self.row_height * (row + 0.5) + (8.0 if self.labels_above else 0.0)

    def render(self) -> Markup:
        parts: list[Markup] = []
        for row in range(0, len(self.names), 2) if self.has_stripes else ():
            parts.append(draw_stripe(self.top + self.row_height * row, self.width, self.row_height))
        for mark in self.ticks:
            x = self.x_scale(mark)
            parts.append(draw_line(x, self.top - 4, x, self.bottom, "grid"))
            parts.append(draw_text(x, self.bottom + 16, self.axis.format_value(mark), "tick", "middle"))
        for value, name in self.axis.reference_values:
            x = self.x_scale(value)
            parts.append(draw_line(x, self.top - 4, x, self.bottom, "reference"))
            anchor = "end" if x > self.width * 0.6 else "start"
            parts.append(draw_text(x + (4 if anchor == "start" else -4), self.top - 10, name, "note", anchor))
        middle = (self.x_scale.start + self.x_scale.end) / 2
        parts.append(draw_text(middle, self.bottom + 34, self.axis.label, "axis", "middle"))
        for row, name in enumerate(self.names):
            words = shorten_start(name, self.max_letters)
            if self.labels_above:
                parts.append(draw_text(self.x_scale.start - 8, self.top + self.row_height * row + 13, words, "name"))
            else:
                parts.append(draw_text(self.x_scale.start - 16, self.row_y(row) + 4, words, "name", "end"))
        return Markup("").join(parts)


def line_chart(series: Sequence[SvgSeries], x_axis: ChartAxis, y_axis: ChartAxis, is_small: bool = False) -> Markup:
    """Lines through points with a band of their intervals; small ones are for many side by side."""

    def draw(width: float) -> Markup:
        frame = _XYFrame(series, x_axis, y_axis, width, is_small)
        inside = [frame.render()]
        for each in series:
            points = sorted((p for p in each.points if p.is_known), key=lambda p: p.x)
            places = [(frame.x_scale(p.x), frame.y_scale(p.y)) for p in points]
            marks: list[Markup] = []
            if len(points) > 1 and any(p.has_interval for p in points):
                spread = [(p.low, p.high) if p.has_interval else (p.y, p.y) for p in points]
                there = [(frame.x_scale(p.x), frame.y_scale(high)) for p, (_, high) in zip(points, spread, strict=True)]
                back = [(frame.x_scale(p.x), frame.y_scale(low)) for p, (low, _) in zip(points, spread, strict=True)]
                marks.append(draw_path(there + back[::-1], "band", is_closed=True))
            if len(places) > 1:
                marks.append(draw_path(places, f"line d{each.dash}"))
            marks += [draw_dot(*at, p.tooltip, 3 if is_small else 3.6) for at, p in zip(places, points, strict=True)]
            inside.append(draw_group(each, *marks))
        return draw_svg(width, frame.height, "plane small" if is_small else "plane", *inside)

    return draw(300.0) if is_small else render_both_widths(draw)


class _XYFrame:
    """The frame of a chart of lines: a grid, numbers along both sides, a name for each side."""

    def __init__(
        self, series: Sequence[SvgSeries], x_axis: ChartAxis, y_axis: ChartAxis, width: float, is_small: bool
    ) -> None:
        self.x_axis, self.y_axis = x_axis, y_axis
        self.height = 172.0 if is_small else (360.0 if width > 500 else 300.0)
        self.has_labels = not is_small
        values = [v for s in series for p in s.points for v in (p.low, p.y, p.high) if p.is_known]
        values += y_axis.limits or ()
        self.y_ticks = ticks(
            *finite_range([*values, *(v for v, _ in y_axis.reference_values)], y_axis.include_zero),
            3 if is_small else 5,
        )
        places = [p.x for s in series for p in s.points if p.is_known]
        low, high = finite_range(places, x_axis.include_zero)
        self.x_ticks = self._choose_x_ticks(places, low, high, 4 if width < 500 else 8)
        left = 12 + LETTER_PIXELS * max(len(y_axis.format_value(row)) for row in self.y_ticks)
        top, bottom = (34.0 if self.has_labels else 10.0), self.height - (46.0 if self.has_labels else 24.0)
        pad = (high - low) * 0.02
        self.x_scale = LinearScale(low - pad, high + pad, left, width - 14)
        self.y_scale = LinearScale(self.y_ticks[0], self.y_ticks[-1], bottom, top)

    def _choose_x_ticks(self, values: Sequence[float], low: float, high: float, tick_count: int) -> list[float]:
        """Return where the axis is labelled: at the points themselves if they are few, else at round numbers."""
        distinct = sorted(set(values))
        if len(distinct) <= tick_count + 2 and all(b - a > (high - low) / 12 for a, b in pairwise(distinct)):
            return distinct
        return [tick for tick in ticks(low, high, tick_count) if low - 1e-9 <= tick <= high + 1e-9]

    def render(self) -> Markup:
        left, right, top, bottom = self.x_scale.start, self.x_scale.end, self.y_scale.end, self.y_scale.start
        parts: list[Markup] = []
        for row in self.y_ticks:
            parts.append(draw_line(left, self.y_scale(row), right, self.y_scale(row), "grid"))
            parts.append(draw_text(left - 7, self.y_scale(row) + 4, self.y_axis.format_value(row), "tick", "end"))
        for column in self.x_ticks:
            parts.append(
                draw_text(self.x_scale(column), bottom + 18, self.x_axis.format_value(column), "tick", "middle")
            )
        for value, name in self.x_axis.reference_values:
            parts.append(draw_line(self.x_scale(value), top, self.x_scale(value), bottom, "reference"))
            parts.append(draw_text(self.x_scale(value) + 4, top + 9, name, "note"))
        for value, name in self.y_axis.reference_values:
            parts.append(draw_line(left, self.y_scale(value), right, self.y_scale(value), "reference"))
            parts.append(draw_text(right, self.y_scale(value) - 5, name, "note", "end"))
        if self.has_labels:
            parts.append(draw_text((left + right) / 2, bottom + 38, self.x_axis.label, "axis", "middle"))
            parts.append(draw_text(6, top - 16, self.y_axis.label, "axis"))
        return Markup("").join(parts)


def _row_offsets(series: Sequence[SvgSeries]) -> list[float]:
    """Return how far each series is moved within its row, so that intervals do not lie on each other."""
    apart = 10.0 if len(series) > 1 and any(p.has_interval for s in series for p in s.points) else 0.0
    return [apart * (n - (len(series) - 1) / 2) for n in range(len(series))]


def _finite_values(series: Sequence[SvgSeries]) -> list[float]:
    """Everything that the chart must have room for."""
    return [v for s in series for p in s.points for v in (p.low, p.x, p.high) if math.isfinite(v)]
