"""Accuracies as figures: methods with intervals, the matrix R, forgetting, and how accuracy depends on one thing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...continual.experiment import LAST_CHECKPOINT, ZERO_SHOT
from ..method_comparison import MethodResult, competing_methods
from ..records import SeedBand, Study, aggregate
from .charts import ChartAxis, dot_chart, format_number, format_percent, line_chart
from .figures import EMPTY_CELL, FigureTable, ReportFigure, TableCell, heat_table, render_options
from .svg import DASH_COUNT, Markup, SvgPoint, SvgSeries, colour

INITIAL_CURVES = 6
"""How many methods the curves show until others are chosen."""
TABLE_HEADER = (
    "method", "scaling factor", "average accuracy, %", "± std", "95 % interval", "after each task, %",
    "forgetting, points", "backward transfer", "forward transfer", "training, s", "peak memory, MB", "stored, MB",
)  # fmt: skip
SHARE_MEASURES = ("average incremental accuracy", "forgetting", "backward transfer", "forward transfer")
COST_MEASURES = (("training seconds", 1.0), ("peak memory bytes", 1e6), ("stored bytes", 1e6))


def methods_figure(methods: Sequence[MethodResult]) -> ReportFigure:
    """A row for each method, in order; filled with the rule's own factor, hollow with the one chosen."""
    names = list(dict.fromkeys(method.name for method in methods))
    variants = [method for method in methods if method.variant in ("default", "chosen")]
    twice = {method.name for method in variants if method.variant == "chosen"}
    series: list[SvgSeries] = []
    for method in variants:
        main = method.average_accuracy
        half = main.half if math.isfinite(main.half) else 0.0
        tip = f"{method.label}\n{100 * main.mean:.1f} %"
        tip += f", 95 % interval {100 * (main.mean - half):.1f} to {100 * (main.mean + half):.1f}" if half else ""
        tip += f"\n{main.n} seed{'s' * (main.n > 1)}"
        aside = (-0.16 if method.variant == "default" else 0.17) if method.name in twice else 0.0
        place = main.mean, names.index(method.name) + aside
        ends = max(0.0, main.mean - half), min(1.0, main.mean + half)
        point = SvgPoint(*place, tip, *ends, method.variant == "chosen")
        series.append(SvgSeries(method.label, [point], _rule_colour(methods, method)))
    axis = ChartAxis("average accuracy on all tasks after the last", format_percent)
    several = any(method.average_accuracy.n > 1 for method in methods)
    lead = (
        "Over all tasks after the last one, the best first"
        + ("; whiskers are 95 % confidence intervals of the mean over seeds." if several else "; one seed only.")
        + (" Hollow: the scaling factor was chosen on held-out data." if twice else "")
    )
    best, worst = methods[0], methods[-1]
    alt = (
        f"{len(methods)} methods, from {best.label} with {best.average_accuracy.mean:.1%} to {worst.label} with "
        f"{worst.average_accuracy.mean:.1%}. The table below has every number."
    )
    return ReportFigure("methods", "Average accuracy", lead, alt, dot_chart(names, series, axis))


def methods_table(methods: Sequence[MethodResult]) -> FigureTable:
    """Everything that was measured of each method, with the rule's own factor and the chosen one."""
    rows: list[list[TableCell]] = []
    for method in (method for method in methods if method.variant in ("default", "chosen")):
        main = method.average_accuracy
        between = (
            f"{100 * (main.mean - main.half):.1f} … {100 * (main.mean + main.half):.1f}" if main.n > 1 else EMPTY_CELL
        )
        factors = " ".join(f"{factor:.3g}" for factor in method.factors)
        cells = [
            TableCell(method.label),
            TableCell(factors or EMPTY_CELL, method.factors[0] if method.factors else None),
            TableCell.from_share(main.mean),
            TableCell.from_share(main.std),
            TableCell(between, main.half if main.n > 1 else None),
        ]
        for name in SHARE_MEASURES:
            band = method.means.get(name)
            cells.append(TableCell.from_share(band.mean) if band else TableCell(EMPTY_CELL))
        for name, unit in COST_MEASURES:
            cost = method.means.get(name)
            cells.append(TableCell(f"{cost.mean / unit:,.0f}", cost.mean) if cost else TableCell(EMPTY_CELL))
        rows.append(cells)
    return FigureTable(TABLE_HEADER, rows)


def matrix_figure(methods: Sequence[MethodResult]) -> ReportFigure:
    """R as a heat map, one method at a time."""
    shown = [method for method in methods if method.is_complete] or list(methods)
    tasks = shown[0].num_tasks
    everything = [method.accuracy(i, j).mean for method in shown for i in range(tasks + 1) for j in range(1, tasks + 1)]
    finite = [value for value in everything if math.isfinite(value)]
    low, high = min(finite), max(finite)
    parts: dict[str, Markup] = {}
    for method in shown:
        rows = []
        for i in range(tasks + 1):
            cells = [_accuracy_cell(method.accuracy(i, j), i, j) for j in range(1, tasks + 1)]
            if all(cell.sort_value is None for cell in cells):
                continue
            mean = SeedBand.from_values([float(r[i].mean()) for r in method.accuracy_matrices.values()])
            name = "before any" if i == 0 else f"after {i}"
            rows.append((name, [*cells, _accuracy_cell(mean, i, 0)]))
        faint = [(n, j) for n, (name, _) in enumerate(rows) for j in range(tasks) if j + 1 > _parse_num_learned(name)]
        columns = [*(f"task {j}" for j in range(1, tasks + 1)), "mean"]
        caption = f"Accuracy in % of {method.label}"
        drawn = heat_table("R, in %", columns, rows, low, high, caption, faint, separate_last=True)
        parts[method.label] = drawn
    lead = (
        "R[i, j]: the accuracy on task j after learning the tasks 1 to i, the mean over seeds. Outlined cells are of "
        "tasks that were still to come. Read down a column to see a task being forgotten."
    )
    best = shown[0]
    alt = f"{best.label}: {best.average_accuracy.mean:.1%} on average after the last of {tasks} tasks."
    return ReportFigure("matrix", "Every task after every task", lead, alt, render_options(parts), options=list(parts))


def curve_figures(methods: Sequence[MethodResult]) -> list[ReportFigure]:
    """The accuracy on what was learned so far, and on each task by itself, after every task."""
    shown = [method for method in competing_methods(methods) if method.is_complete]
    if not shown or shown[0].num_tasks < 2:
        return []
    tasks = shown[0].num_tasks
    first = _initial_labels(shown)

    def mark(band: SeedBand, x: int, what: str) -> SvgPoint:
        spread = f" ± {100 * band.std:.1f}" if band.n > 1 else ""
        return SvgPoint(x, band.mean, f"{what}: {100 * band.mean:.1f} %{spread}", *_clip_interval(band))

    def series(points: dict[str, list[SvgPoint]]) -> list[SvgSeries]:
        return [
            SvgSeries(
                m.label,
                points[m.label],
                _rule_colour(methods, m),
                _training_dash(methods, m.training),
                m.label not in first,
            )
            for m in shown
        ]

    seen = {
        m.label: [
            mark(m.accuracy_on_learned(i), i, f"{m.label}\nafter task {i}, on the tasks so far")
            for i in range(1, tasks + 1)
        ]
        for m in shown
    }
    drawn = series(seen)
    across, up = ChartAxis("tasks learned"), ChartAxis("accuracy on the tasks learned so far", format_percent)
    header = ["method", *(f"after task {i}, %" for i in range(1, tasks + 1))]
    rows = [
        [TableCell(m.label), *(TableCell.from_share(m.accuracy_on_learned(i).mean) for i in range(1, tasks + 1))]
        for m in shown
    ]
    ends = ", ".join(f"{m.label} {m.accuracy_on_learned(tasks).mean:.1%}" for m in shown[:INITIAL_CURVES])
    lead = "The mean accuracy on all tasks learned so far. Bands are one standard deviation over seeds."
    alt = f"Accuracy on the tasks learned so far after each of {tasks} tasks; after the last: {ends}."
    whole = ReportFigure(
        "learned", "As tasks come", lead, alt, line_chart(drawn, across, up), drawn, True, FigureTable(header, rows)
    )

    every = [m.accuracy(i, j) for m in shown for i in range(tasks + 1) for j in range(1, tasks + 1)]
    known = [end for band in every if band.n for end in _clip_interval(band)]
    up = ChartAxis("", format_percent, limits=(min(known), max(known)))
    panels = Markup("")
    for j in range(1, tasks + 1):
        points = {
            m.label: [mark(m.accuracy(i, j), i, f"{m.label}\ntask {j} after task {i}") for i in range(tasks + 1)]
            for m in shown
        }
        panel = line_chart(series(points), ChartAxis("", reference_values=[(j, "")]), up, is_small=True)
        panels += Markup('<div class="panel"><p class="panel-title">Task {}</p>{}</div>').format(j, panel)
    header = ["method", "task", *("before any, %", *(f"after task {i}, %" for i in range(1, tasks + 1)))]
    rows = [
        [
            TableCell(m.label),
            TableCell(str(j), j),
            *(TableCell.from_share(m.accuracy(i, j).mean) for i in range(tasks + 1)),
        ]
        for m in shown
        for j in range(1, tasks + 1)
    ]
    losses = ", ".join(
        f"{m.label} {100 * m.means['forgetting'].mean:.1f}" for m in shown[:INITIAL_CURVES] if "forgetting" in m.means
    )
    each = ReportFigure(
        "forgetting",
        "Task by task",
        "The accuracy on one task as the others are learned: it rises when its turn comes, at the broken line, and "
        "what it loses after that is forgotten. Across: tasks learned so far.",
        f"Points of accuracy forgotten, mean over the tasks: {losses}.",
        Markup('<div class="panels">{}</div>').format(panels),
        drawn,
        True,
        FigureTable(header, rows),
    )
    return [whole, each]


def sweep_figure(study: Study) -> ReportFigure:
    """Accuracy against one thing, with bands over seeds; against a way of training, a row for each rule."""
    others = (name for name in study.records[0] if name not in ("series", "training", "rule", "seed", "accuracy"))
    x = next(others, "training")  # where the way of training is what varies
    bands = aggregate(study.records, ["series", x], "accuracy")
    names = list(dict.fromkeys(key[0] for key in bands))
    values = list(dict.fromkeys(key[1] for key in bands))

    def tip(name: str, value: object, band: SeedBand) -> str:
        spread = f" ± {100 * band.std:.1f} over {band.n} seeds" if band.n > 1 else ""
        return f"{name}\n{x} {value}: {100 * band.mean:.1f} %{spread}"

    if study.kind == "penalties":
        series = [
            SvgSeries(
                str(value),
                [
                    SvgPoint(band.mean, names.index(name), tip(name, value, band), *_clip_interval(band))
                    for (name, other), band in bands.items()
                    if other == value
                ],
                colour(n),
            )
            for n, value in enumerate(values)
        ]
        body = dot_chart(
            names, series, ChartAxis("average accuracy after the last task", format_percent), connect_dots=True
        )
    else:
        kinds = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
        trainings = sorted({name.rpartition("/")[2] for name in names}, key=lambda name: (name != "sequential", name))
        peaks = {name: max(band.mean for (other, _), band in bands.items() if other == name) for name in names}
        first = sorted(names, key=lambda name: -peaks[name])[:INITIAL_CURVES]
        series = [
            SvgSeries(
                name,
                [
                    SvgPoint(float(value), band.mean, tip(name, value, band), *_clip_interval(band))
                    for (other, value), band in bands.items()
                    if other == name
                ],
                colour(kinds.index(name.rpartition("/")[0])),
                trainings.index(name.rpartition("/")[2]) % DASH_COUNT,
                name not in first,
            )
            for name in names
        ]
        written = format_percent if x == "density" else format_number
        label = {"density": "part kept of each task vector", "dropped": "task vectors left out"}.get(x, x)
        body = line_chart(
            series, ChartAxis(label.replace("_", " "), written), ChartAxis("average accuracy", format_percent)
        )
    rows = [
        [
            TableCell(name),
            TableCell(str(value), float(value) if isinstance(value, int | float) else None),
            TableCell.from_share(band.mean),
            TableCell.from_share(band.std),
            TableCell(str(band.n), band.n),
        ]
        for (name, value), band in bands.items()
    ]
    table = FigureTable(["series", x.replace("_", " "), "accuracy, %", "± std", "seeds"], rows)
    several = any(band.n > 1 for band in bands.values())
    drawn = "Whiskers" if study.kind == "penalties" else "Bands"
    lead = study.definition + (f" {drawn} are one standard deviation over seeds." if several else "")
    return ReportFigure(study.kind, study.title, lead, " ".join(study.findings), body, series, True, table)


def _initial_labels(methods: Sequence[MethodResult]) -> set[str]:
    """The methods that the curves begin with: the best, MagMax, the unmerged, zero-shot, and then by rank."""
    wanted = [m.label for m in methods if m.rule in ("magmax", LAST_CHECKPOINT, ZERO_SHOT)]
    return set(list(dict.fromkeys([methods[0].label, *wanted, *(m.label for m in methods)]))[:INITIAL_CURVES])


def _accuracy_cell(band: SeedBand, num_learned: int, task: int) -> TableCell:
    if not band.n:
        return TableCell(EMPTY_CELL)
    what = f"task {task}" if task else "mean of all tasks"
    when = f"after task {num_learned}" if num_learned else "before any"
    spread = f" ± {100 * band.std:.1f} over {band.n} seeds" if band.n > 1 else ""
    return TableCell(f"{100 * band.mean:.1f}", band.mean, f"{what}, {when}: {100 * band.mean:.1f} %{spread}")


def _parse_num_learned(name: str) -> int:
    return 0 if name == "before any" else int(name.removeprefix("after "))


def _clip_interval(band: SeedBand) -> tuple[float, float]:
    """The ends of a band of accuracies, which cannot be beyond 0 and 1."""
    return max(0.0, band.low), min(1.0, band.high)


def _rule_colour(methods: Sequence[MethodResult], method: MethodResult) -> Markup:
    """One for each rule, however the tasks were trained, in every figure of a page."""
    rules = sorted(
        {other.rule for other in methods}, key=lambda rule: (rule == ZERO_SHOT, rule == LAST_CHECKPOINT, rule)
    )
    return colour(rules.index(method.rule))


def _training_dash(methods: Sequence[MethodResult], training: str) -> int:
    """One for each way of training."""
    trainings = [other.training for other in methods if other.training != ZERO_SHOT]
    order = sorted(set(trainings), key=lambda name: (name != "sequential", trainings.index(name)))
    return order.index(training) % DASH_COUNT if training in order else 0
