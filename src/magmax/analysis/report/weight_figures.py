"""The studies of weights as figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ..records import Record, SeedBand, Study, aggregate
from ..weight_statistics import WHOLE_MODEL
from .charts import ChartAxis, dot_chart, format_number, format_percent, line_chart, stacked_bar_chart
from .figures import EMPTY_CELL, FigureTable, ReportFigure, TableCell, heat_table, render_options
from .svg import Markup, SvgPoint, SvgSeries, colour, shades


def conflicts_figures(study: Study) -> list[ReportFigure]:
    """Share of conflicts by layer, a colour for each way of training."""
    layers, trainings = _unique_values(study.records, "layer"), _unique_values(study.records, "training")
    shares = aggregate(study.records, ["training", "layer"], "share")
    series = [
        SvgSeries(
            training,
            [
                _mean_point(shares[training, layer], row, f"{layer}\n{_training_label(training)}", format_percent)
                for row, layer in enumerate(layers)
            ],
            colour(n),
        )
        for n, training in enumerate(trainings)
    ]
    expected = aggregate(study.records, ["training", "layer"], "expected")
    marks = [
        (expected[training, WHOLE_MODEL].mean, f"chance{'' if training == 'given' else f', {training}'}")
        for training in trainings
        if expected[training, WHOLE_MODEL].n
    ]
    axis = ChartAxis("share of elements pulled both ways", format_percent, True, marks)
    header = ["layer", *(f"{_training_label(training)} conflicts, %" for training in trainings), "elements"]
    sizes = {r["layer"]: r["elements"] for r in study.records}
    rows = [
        [
            TableCell(layer),
            *(_share_cell(shares[training, layer]) for training in trainings),
            TableCell(f"{sizes[layer]:,}", sizes[layer]),
        ]
        for layer in layers
    ]
    body = dot_chart(layers, series, axis, connect_dots=True)
    return [_study_figure(study, "", study.title, study.definition, body, series, FigureTable(header, rows))]


def consistency_figures(study: Study) -> list[ReportFigure]:
    """Return how large changes are against how many tasks agree on their direction."""
    trainings = _unique_values(study.records, "training")
    groups = [group for group in _unique_values(study.records, "agreeing") if group > 0]
    largest = aggregate(study.records, ["training", "agreeing"], "largest")
    average = aggregate(study.records, ["training", "agreeing"], "average")
    share = aggregate(study.records, ["training", "agreeing"], "share")

    def mark(training: str, group: int) -> SvgPoint:
        band = largest[training, group]
        tip = f"{group} tasks agree\n{_training_label(training)}: max |τ| {_format_mean(band, format_number)}\n"
        return SvgPoint(
            group, band.mean, tip + f"{share[training, group].mean:.2%} of the elements", band.low, band.high
        )

    series = [
        SvgSeries(training, [mark(training, g) for g in groups], colour(n)) for n, training in enumerate(trainings)
    ]
    header, rows = ["training", "tasks that agree", "elements, %", "mean max |τ|", "mean |τ|"], []
    for training in trainings:
        for group in _unique_values(study.records, "agreeing"):
            key = training, group
            cells = [
                TableCell.from_share(share[key].mean, 2),
                TableCell.from_number(largest[key].mean),
                TableCell.from_number(average[key].mean),
            ]
            rows.append([TableCell(_training_label(training)), TableCell(str(group), group), *cells])
    body = line_chart(
        series,
        ChartAxis("tasks that move an element the same way"),
        ChartAxis("mean of the largest |τ|", format_number, True),
    )
    return [_study_figure(study, "", study.title, study.definition, body, series, FigureTable(header, rows))]


def contribution_figures(study: Study) -> list[ReportFigure]:
    """Who wins under MagMax: a bar for each layer; before it, if there are several ways of training, one for each."""
    by = ["training", "layer", "task"]
    shares, weight = aggregate(study.records, by, "share"), aggregate(study.records, by, "magnitude")
    trainings, layers, tasks = (_unique_values(study.records, name) for name in by)
    axis = ChartAxis("share of the elements that changed", format_percent)

    def part(names: Sequence[str], keys: Sequence[tuple[str, str]]) -> tuple[Markup, list[SvgSeries]]:
        """A bar for each (training, layer)."""
        series: list[SvgSeries] = []
        for task, shade in zip(tasks, shades(len(tasks)), strict=True):
            points: list[SvgPoint] = []
            for row, (name, (training, layer)) in enumerate(zip(names, keys, strict=True)):
                share, amount = shares[training, layer, task], weight[training, layer, task]
                tip = f"{name}\n{task}: {_format_mean(share, format_percent)} of the elements\n"
                points.append(
                    SvgPoint(share.mean, row, f"{tip}{_format_mean(amount, format_percent)} of the magnitude")
                )
            series.append(SvgSeries(task, points, shade))
        return stacked_bar_chart(names, series, axis), series

    figures: list[ReportFigure] = []
    if len(trainings) > 1:
        body, key = part(trainings, [(training, WHOLE_MODEL) for training in trainings])
        figures.append(_study_figure(study, "overview", study.title, study.definition, body, key, None))
    drawn = {training: part(layers, [(training, layer) for layer in layers]) for training in trainings}
    rows = [
        [*_row_cells(training, layer, trainings), *(_share_cell(shares[training, layer, task]) for task in tasks)]
        for training in trainings
        for layer in layers
    ]
    table = FigureTable([*_row_header(trainings), *(f"{task}, %" for task in tasks)], rows)
    title = "The same, layer by layer" if figures else study.title
    bodies = {training: body for training, (body, _) in drawn.items()}
    figures.append(_study_figure(study, "", title, study.definition, bodies, drawn[trainings[0]][1], table))
    return figures


def cosine_figures(study: Study) -> list[ReportFigure]:
    """A table of angles, and their mean by layer."""
    trainings, tasks = _unique_values(study.records, "training"), _unique_values(study.records, "task")
    cosines = aggregate(
        [r for r in study.records if r["layer"] == WHOLE_MODEL], ["training", "task", "other"], "cosine"
    )
    low = min(0.0, *(band.mean for band in cosines.values() if band.n))
    bodies: dict[str, Markup] = {}
    for training in trainings:
        rows = [
            (task, [_cosine_cell(cosines[training, task, other], task, other) for other in tasks]) for task in tasks
        ]
        bodies[training] = heat_table(
            "cosine", tasks, rows, low, 1.0, f"Cosine of each two task vectors{_training_suffix(training)}"
        )
    figures = [_study_figure(study, "", study.title, study.definition, bodies, [], None)]
    pairs = [r for r in study.records if r["task"] != r["other"]]
    layers, means = _unique_values(pairs, "layer"), aggregate(pairs, ["training", "layer"], "cosine")
    if len(layers) > 1:
        series: list[SvgSeries] = []
        for n, training in enumerate(trainings):
            layer_means = [means[training, layer].mean for layer in layers]
            marks = [
                SvgPoint(v, row, f"{layers[row]}\n{_training_label(training)}: {v:.3f}")
                for row, v in enumerate(layer_means)
            ]
            series.append(SvgSeries(training, marks, colour(n)))
        body = dot_chart(
            layers, series, ChartAxis("mean cosine of two task vectors", format_number, True), connect_dots=True
        )
        cells = [
            [TableCell(layer), *(TableCell.from_number(means[training, layer].mean) for training in trainings)]
            for layer in layers
        ]
        table = FigureTable(["layer", *(f"{_training_label(training)} mean cosine" for training in trainings)], cells)
        lead = "The mean over all pairs of tasks, layer by layer."
        figures.append(_study_figure(study, "layers", "Likeness by layer", lead, body, series, table))
    return figures


def norms_figures(study: Study) -> list[ReportFigure]:
    """Return how far each task moved each layer."""
    by = ["training", "layer", "task"]
    relative, norm = aggregate(study.records, by, "relative"), aggregate(study.records, by, "norm")
    trainings, layers, tasks = (_unique_values(study.records, name) for name in by)
    axis = ChartAxis("norm of the task vector, in % of the base's", format_percent, True)
    bodies: dict[str, Markup] = {}
    series: list[SvgSeries] = []
    for training in trainings:
        series = []
        for task, shade in zip(tasks, shades(len(tasks)), strict=True):
            points: list[SvgPoint] = []
            for row, layer in enumerate(layers):
                share, length = relative[training, layer, task], norm[training, layer, task]
                tip = f"{layer}\n{task}: {_format_mean(share, format_percent)} of the base's norm\n"
                points.append(SvgPoint(share.mean, row, f"{tip}L2 norm {_format_mean(length, format_number)}"))
            series.append(SvgSeries(task, points, shade))
        bodies[training] = dot_chart(layers, series, axis, connect_dots=True)
    rows = [
        [
            *_row_cells(training, layer, trainings),
            *(TableCell.from_share(relative[training, layer, task].mean, 3) for task in tasks),
            *(TableCell.from_number(norm[training, layer, task].mean) for task in tasks),
        ]
        for training in trainings
        for layer in layers
    ]
    units = [f"{task}, {unit}" for unit in ("% of the base", "L2 norm") for task in tasks]
    table = FigureTable([*_row_header(trainings), *units], rows)
    return [_study_figure(study, "", study.title, study.definition, bodies, series, table)]


FIGURE_BUILDERS: Mapping[str, Callable[[Study], list[ReportFigure]]] = {
    "conflicts": conflicts_figures,
    "consistency": consistency_figures,
    "contribution": contribution_figures,
    "cosine": cosine_figures,
    "norms": norms_figures,
}


def _study_figure(
    study: Study,
    suffix: str,
    title: str,
    lead: str,
    body: Markup | Mapping[str, Markup],
    legend: Sequence[SvgSeries],
    table: FigureTable | None,
) -> ReportFigure:
    """A figure of a study, or a part of one; a body for each way of training is shown one at a time."""
    ident = f"{study.kind}-{suffix}" if suffix else study.kind
    alt = " ".join(study.findings) or lead
    several = {} if isinstance(body, Markup) else body
    drawn = body if isinstance(body, Markup) else render_options(body)
    choices = [training for training in several if len(several) > 1]
    shown = legend if len(legend) > 1 else ()
    return ReportFigure(ident, title, lead, alt, drawn, shown, table=table, options=choices, option_label="Training")


def _mean_point(band: SeedBand, row: int, label: str, format_value: Callable[[float], str]) -> SvgPoint:
    return SvgPoint(band.mean, row, f"{label}: {_format_mean(band, format_value)}", band.low, band.high)


def _format_mean(band: SeedBand, format_value: Callable[[float], str]) -> str:
    """A mean, and its standard deviation where there are seeds."""
    if not band.n:
        return "unknown"
    return format_value(band.mean) + (f" ± {format_value(band.std)} over {band.n} seeds" if band.n > 1 else "")


def _share_cell(band: SeedBand) -> TableCell:
    cell = TableCell.from_share(band.mean)
    return TableCell(f"{cell.text} ± {100 * band.std:.1f}", cell.sort_value) if band.n > 1 else cell


def _cosine_cell(band: SeedBand, task: str, other: str) -> TableCell:
    words = f"{band.mean:.2f}" if math.isfinite(band.mean) else EMPTY_CELL
    return TableCell(words, band.mean, f"{task} and {other}: {_format_mean(band, format_number)}")


def _unique_values(records: Sequence[Record], name: str) -> list:
    """The values of a column, in the order they come."""
    return list(dict.fromkeys(record[name] for record in records))


def _row_header(trainings: Sequence[str]) -> list[str]:
    """The columns that say what a row is of."""
    return ["training", "layer"] if len(trainings) > 1 else ["layer"]


def _row_cells(training: str, layer: str, trainings: Sequence[str]) -> list[TableCell]:
    return [TableCell(training), TableCell(layer)] if len(trainings) > 1 else [TableCell(layer)]


def _training_label(training: str) -> str:
    return "these models" if training == "given" else training


def _training_suffix(training: str) -> str:
    return "" if training == "given" else f", {training}"
