"""Accuracies as figures: methods with intervals, the matrix R, forgetting, and how accuracy depends on one thing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...continual.experiment import LAST, ZERO_SHOT
from ..method_comparison import Method, rivals
from ..records import Band, Study, bands
from .charts import Axis, dots, lines, number, percent
from .figures import NONE, Cell, Figure, Table, alternatives, heat
from .svg import DASHES, Markup, Point, Series, colour

SHOWN = 6
"""How many methods the curves show until others are chosen."""
HEADER = (
    "method", "scaling factor", "average accuracy, %", "± std", "95 % interval", "after each task, %",
    "forgetting, points", "backward transfer", "forward transfer", "training, s", "peak memory, MB", "stored, MB",
)  # fmt: skip
SHARES = ("average incremental accuracy", "forgetting", "backward transfer", "forward transfer")
COSTS = (("training seconds", 1.0), ("peak memory bytes", 1e6), ("stored bytes", 1e6))


def methods_figure(found: Sequence[Method]) -> Figure:
    """A row for each method, in order; filled with the rule's own factor, hollow with the one chosen."""
    names = list(dict.fromkeys(method.name for method in found))
    variants = [method for method in found if method.variant in ("default", "chosen")]
    twice = {method.name for method in variants if method.variant == "chosen"}
    series: list[Series] = []
    for method in variants:
        main = method.main
        half = main.half if math.isfinite(main.half) else 0.0
        tip = f"{method.label}\n{100 * main.mean:.1f} %"
        tip += f", 95 % interval {100 * (main.mean - half):.1f} to {100 * (main.mean + half):.1f}" if half else ""
        tip += f"\n{main.n} seed{'s' * (main.n > 1)}"
        aside = (-0.16 if method.variant == "default" else 0.17) if method.name in twice else 0.0
        place = main.mean, names.index(method.name) + aside
        ends = max(0.0, main.mean - half), min(1.0, main.mean + half)
        point = Point(*place, tip, *ends, method.variant == "chosen")
        series.append(Series(method.label, [point], _colour(found, method)))
    axis = Axis("average accuracy on all tasks after the last", percent)
    several = any(method.main.n > 1 for method in found)
    lead = (
        "Over all tasks after the last one, the best first"
        + ("; whiskers are 95 % confidence intervals of the mean over seeds." if several else "; one seed only.")
        + (" Hollow: the scaling factor was chosen on held-out data." if twice else "")
    )
    best, worst = found[0], found[-1]
    alt = (
        f"{len(found)} methods, from {best.label} with {best.main.mean:.1%} to {worst.label} with "
        f"{worst.main.mean:.1%}. The table below has every number."
    )
    return Figure("methods", "Average accuracy", lead, alt, dots(names, series, axis))


def methods_table(found: Sequence[Method]) -> Table:
    """Everything that was measured of each method, with the rule's own factor and the chosen one."""
    rows: list[list[Cell]] = []
    for method in (method for method in found if method.variant in ("default", "chosen")):
        main = method.main
        between = f"{100 * (main.mean - main.half):.1f} … {100 * (main.mean + main.half):.1f}" if main.n > 1 else NONE
        factors = " ".join(f"{factor:.3g}" for factor in method.factors)
        cells = [
            Cell(method.label),
            Cell(factors or NONE, method.factors[0] if method.factors else None),
            Cell.share(main.mean),
            Cell.share(main.std),
            Cell(between, main.half if main.n > 1 else None),
        ]
        for name in SHARES:
            known = method.means.get(name)
            cells.append(Cell.share(known.mean) if known else Cell(NONE))
        for name, unit in COSTS:
            cost = method.means.get(name)
            cells.append(Cell(f"{cost.mean / unit:,.0f}", cost.mean) if cost else Cell(NONE))
        rows.append(cells)
    return Table(HEADER, rows)


def matrix_figure(found: Sequence[Method]) -> Figure:
    """R as a heat map, one method at a time."""
    shown = [method for method in found if method.complete] or list(found)
    tasks = shown[0].tasks
    everything = [method.accuracy(i, j).mean for method in shown for i in range(tasks + 1) for j in range(1, tasks + 1)]
    known = [value for value in everything if math.isfinite(value)]
    low, high = min(known), max(known)
    parts: dict[str, Markup] = {}
    for method in shown:
        rows = []
        for i in range(tasks + 1):
            cells = [_accuracy(method.accuracy(i, j), i, j) for j in range(1, tasks + 1)]
            if all(cell.value is None for cell in cells):
                continue
            mean = Band.of([float(r[i].mean()) for r in method.matrices.values()])
            name = "before any" if i == 0 else f"after {i}"
            rows.append((name, [*cells, _accuracy(mean, i, 0)]))
        faint = [(n, j) for n, (name, _) in enumerate(rows) for j in range(tasks) if j + 1 > _learned(name)]
        columns = [*(f"task {j}" for j in range(1, tasks + 1)), "mean"]
        caption = f"Accuracy in % of {method.label}"
        drawn = heat("R, in %", columns, rows, low, high, caption, faint, last_apart=True)
        parts[method.label] = drawn
    lead = (
        "R[i, j]: the accuracy on task j after learning the tasks 1 to i, the mean over seeds. Outlined cells are of "
        "tasks that were still to come. Read down a column to see a task being forgotten."
    )
    best = shown[0]
    alt = f"{best.label}: {best.main.mean:.1%} on average after the last of {tasks} tasks."
    return Figure("matrix", "Every task after every task", lead, alt, alternatives(parts), choices=list(parts))


def curve_figures(found: Sequence[Method]) -> list[Figure]:
    """The accuracy on what was learned so far, and on each task by itself, after every task."""
    shown = [method for method in rivals(found) if method.complete]
    if not shown or shown[0].tasks < 2:
        return []
    tasks = shown[0].tasks
    first = _first(shown)

    def mark(band: Band, x: int, what: str) -> Point:
        spread = f" ± {100 * band.std:.1f}" if band.n > 1 else ""
        return Point(x, band.mean, f"{what}: {100 * band.mean:.1f} %{spread}", *_within(band))

    def series(points: dict[str, list[Point]]) -> list[Series]:
        return [
            Series(m.label, points[m.label], _colour(found, m), _dash(found, m.chain), m.label not in first)
            for m in shown
        ]

    seen = {
        m.label: [mark(m.on_seen(i), i, f"{m.label}\nafter task {i}, on the tasks so far") for i in range(1, tasks + 1)]
        for m in shown
    }
    drawn = series(seen)
    across, up = Axis("tasks learned"), Axis("accuracy on the tasks learned so far", percent)
    header = ["method", *(f"after task {i}, %" for i in range(1, tasks + 1))]
    rows = [[Cell(m.label), *(Cell.share(m.on_seen(i).mean) for i in range(1, tasks + 1))] for m in shown]
    ends = ", ".join(f"{m.label} {m.on_seen(tasks).mean:.1%}" for m in shown[:SHOWN])
    lead = "The mean accuracy on all tasks learned so far. Bands are one standard deviation over seeds."
    alt = f"Accuracy on the tasks learned so far after each of {tasks} tasks; after the last: {ends}."
    whole = Figure("learned", "As tasks come", lead, alt, lines(drawn, across, up), drawn, True, Table(header, rows))

    every = [m.accuracy(i, j) for m in shown for i in range(tasks + 1) for j in range(1, tasks + 1)]
    known = [end for band in every if band.n for end in _within(band)]
    up = Axis("", percent, limits=(min(known), max(known)))
    panels = Markup("")
    for j in range(1, tasks + 1):
        points = {
            m.label: [mark(m.accuracy(i, j), i, f"{m.label}\ntask {j} after task {i}") for i in range(tasks + 1)]
            for m in shown
        }
        panel = lines(series(points), Axis("", marked=[(j, "")]), up, small=True)
        panels += Markup('<div class="panel"><p class="panel-title">Task {}</p>{}</div>').format(j, panel)
    header = ["method", "task", *("before any, %", *(f"after task {i}, %" for i in range(1, tasks + 1)))]
    rows = [
        [Cell(m.label), Cell(str(j), j), *(Cell.share(m.accuracy(i, j).mean) for i in range(tasks + 1))]
        for m in shown
        for j in range(1, tasks + 1)
    ]
    losses = ", ".join(
        f"{m.label} {100 * m.means['forgetting'].mean:.1f}" for m in shown[:SHOWN] if "forgetting" in m.means
    )
    each = Figure(
        "forgetting",
        "Task by task",
        "The accuracy on one task as the others are learned: it rises when its turn comes, at the broken line, and "
        "what it loses after that is forgotten. Across: tasks learned so far.",
        f"Points of accuracy forgotten, mean over the tasks: {losses}.",
        Markup('<div class="panels">{}</div>').format(panels),
        drawn,
        True,
        Table(header, rows),
    )
    return [whole, each]


def sweep_figure(study: Study) -> Figure:
    """Accuracy against one thing, with bands over seeds; against a way of training, a row for each rule."""
    x = next(name for name in study.records[0] if name not in ("series", "chain", "rule", "seed", "accuracy"))
    told = bands(study.records, ["series", x], "accuracy")
    names = list(dict.fromkeys(key[0] for key in told))
    values = list(dict.fromkeys(key[1] for key in told))

    def tip(name: str, value: object, band: Band) -> str:
        spread = f" ± {100 * band.std:.1f} over {band.n} seeds" if band.n > 1 else ""
        return f"{name}\n{x} {value}: {100 * band.mean:.1f} %{spread}"

    if study.kind == "penalties":
        series = [
            Series(
                str(value),
                [
                    Point(band.mean, names.index(name), tip(name, value, band), *_within(band))
                    for (name, other), band in told.items()
                    if other == value
                ],
                colour(n),
            )
            for n, value in enumerate(values)
        ]
        body = dots(names, series, Axis("average accuracy after the last task", percent), joined=True)
    else:
        kinds = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
        chains = sorted({name.rpartition("/")[2] for name in names}, key=lambda name: (name != "sequential", name))
        peaks = {name: max(band.mean for (other, _), band in told.items() if other == name) for name in names}
        first = sorted(names, key=lambda name: -peaks[name])[:SHOWN]
        series = [
            Series(
                name,
                [
                    Point(float(value), band.mean, tip(name, value, band), *_within(band))
                    for (other, value), band in told.items()
                    if other == name
                ],
                colour(kinds.index(name.rpartition("/")[0])),
                chains.index(name.rpartition("/")[2]) % DASHES,
                name not in first,
            )
            for name in names
        ]
        written = percent if x == "keep" else number
        label = {"keep": "part kept of each task vector", "dropped": "task vectors left out"}.get(x, x)
        body = lines(series, Axis(label.replace("_", " "), written), Axis("average accuracy", percent))
    rows = [
        [
            Cell(name),
            Cell(str(value), float(value) if isinstance(value, int | float) else None),
            Cell.share(band.mean),
            Cell.share(band.std),
            Cell(str(band.n), band.n),
        ]
        for (name, value), band in told.items()
    ]
    table = Table(["series", x.replace("_", " "), "accuracy, %", "± std", "seeds"], rows)
    several = any(band.n > 1 for band in told.values())
    drawn = "Whiskers" if study.kind == "penalties" else "Bands"
    lead = study.definition + (f" {drawn} are one standard deviation over seeds." if several else "")
    return Figure(study.kind, study.title, lead, " ".join(study.findings), body, series, True, table)


def _first(shown: Sequence[Method]) -> set[str]:
    """The methods that the curves begin with: the best, MagMax, the unmerged, zero-shot, and then by rank."""
    wanted = [m.label for m in shown if m.rule in ("magmax", LAST, ZERO_SHOT)]
    return set(list(dict.fromkeys([shown[0].label, *wanted, *(m.label for m in shown)]))[:SHOWN])


def _accuracy(band: Band, learned: int, task: int) -> Cell:
    if not band.n:
        return Cell(NONE)
    what = f"task {task}" if task else "mean of all tasks"
    when = f"after task {learned}" if learned else "before any"
    spread = f" ± {100 * band.std:.1f} over {band.n} seeds" if band.n > 1 else ""
    return Cell(f"{100 * band.mean:.1f}", band.mean, f"{what}, {when}: {100 * band.mean:.1f} %{spread}")


def _learned(name: str) -> int:
    return 0 if name == "before any" else int(name.removeprefix("after "))


def _within(band: Band) -> tuple[float, float]:
    """The ends of a band of accuracies, which cannot be beyond 0 and 1."""
    return max(0.0, band.low), min(1.0, band.high)


def _colour(found: Sequence[Method], method: Method) -> Markup:
    """One for each rule, however the tasks were trained, in every figure of a page."""
    rules = sorted({other.rule for other in found}, key=lambda rule: (rule == ZERO_SHOT, rule == LAST, rule))
    return colour(rules.index(method.rule))


def _dash(found: Sequence[Method], chain: str) -> int:
    """One for each way of training."""
    chains = [other.chain for other in found if other.chain != ZERO_SHOT]
    order = sorted(set(chains), key=lambda name: (name != "sequential", chains.index(name)))
    return order.index(chain) % DASHES if chain in order else 0
