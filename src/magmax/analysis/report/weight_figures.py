"""The studies of weights as figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ..records import Band, Record, Study, bands
from ..weight_statistics import WHOLE
from .charts import Axis, dots, lines, number, percent, stacks
from .figures import NONE, Cell, Figure, Table, alternatives, heat
from .svg import Markup, Point, Series, colour, shades


def conflicts(study: Study) -> list[Figure]:
    """Share of conflicts by layer, a colour for each way of training."""
    layers, chains = _each(study.records, "layer"), _each(study.records, "chain")
    told = bands(study.records, ["chain", "layer"], "share")
    series = [
        Series(
            chain,
            [_mark(told[chain, layer], row, f"{layer}\n{_of(chain)}", percent) for row, layer in enumerate(layers)],
            colour(n),
        )
        for n, chain in enumerate(chains)
    ]
    expected = study.records[0]["expected"]
    axis = Axis("share of elements pulled both ways", percent, True, [(expected, "coin flips")])
    header = ["layer", *(f"{_of(chain)} conflicts, %" for chain in chains), "elements"]
    sizes = {r["layer"]: r["elements"] for r in study.records}
    rows = [
        [
            Cell(layer),
            *(_share(told[chain, layer]) for chain in chains),
            Cell(f"{sizes[layer]:,}", sizes[layer]),
        ]
        for layer in layers
    ]
    body = dots(layers, series, axis, joined=True)
    return [_figure(study, "", study.title, study.definition, body, series, Table(header, rows))]


def consistency(study: Study) -> list[Figure]:
    """How large changes are against how many tasks agree on their direction."""
    chains = _each(study.records, "chain")
    groups = [group for group in _each(study.records, "agreeing") if group > 0]
    largest = bands(study.records, ["chain", "agreeing"], "largest")
    average = bands(study.records, ["chain", "agreeing"], "average")
    share = bands(study.records, ["chain", "agreeing"], "share")

    def mark(chain: str, group: int) -> Point:
        band = largest[chain, group]
        tip = f"{group} tasks agree\n{_of(chain)}: max |τ| {_spread(band, number)}\n"
        return Point(group, band.mean, tip + f"{share[chain, group].mean:.2%} of the elements", band.low, band.high)

    series = [Series(chain, [mark(chain, g) for g in groups], colour(n)) for n, chain in enumerate(chains)]
    header, rows = ["chain", "tasks that agree", "elements, %", "mean max |τ|", "mean |τ|"], []
    for chain in chains:
        for group in _each(study.records, "agreeing"):
            key = chain, group
            cells = [Cell.share(share[key].mean, 2), Cell.number(largest[key].mean), Cell.number(average[key].mean)]
            rows.append([Cell(_of(chain)), Cell(str(group), group), *cells])
    body = lines(series, Axis("tasks that move an element the same way"), Axis("mean of the largest |τ|", number, True))
    return [_figure(study, "", study.title, study.definition, body, series, Table(header, rows))]


def contribution(study: Study) -> list[Figure]:
    """Who wins under MagMax: a bar for each layer; before it, if there are several ways of training, one for each."""
    by = ["chain", "layer", "task"]
    told, weight = bands(study.records, by, "share"), bands(study.records, by, "magnitude")
    chains, layers, tasks = (_each(study.records, name) for name in by)
    axis = Axis("share of the elements that changed", percent)

    def part(names: Sequence[str], keys: Sequence[tuple[str, str]]) -> tuple[Markup, list[Series]]:
        """A bar for each (chain, layer)."""
        series: list[Series] = []
        for task, shade in zip(tasks, shades(len(tasks)), strict=True):
            points: list[Point] = []
            for row, (name, (chain, layer)) in enumerate(zip(names, keys, strict=True)):
                share, amount = told[chain, layer, task], weight[chain, layer, task]
                tip = f"{name}\n{task}: {_spread(share, percent)} of the elements\n"
                points.append(Point(share.mean, row, f"{tip}{_spread(amount, percent)} of the magnitude"))
            series.append(Series(task, points, shade))
        return stacks(names, series, axis), series

    found: list[Figure] = []
    if len(chains) > 1:
        body, key = part(chains, [(chain, WHOLE) for chain in chains])
        found.append(_figure(study, "overview", study.title, study.definition, body, key, None))
    drawn = {chain: part(layers, [(chain, layer) for layer in layers]) for chain in chains}
    rows = [
        [*_place(chain, layer, chains), *(_share(told[chain, layer, task]) for task in tasks)]
        for chain in chains
        for layer in layers
    ]
    table = Table([*_places(chains), *(f"{task}, %" for task in tasks)], rows)
    title = "The same, layer by layer" if found else study.title
    bodies = {chain: body for chain, (body, _) in drawn.items()}
    found.append(_figure(study, "", title, study.definition, bodies, drawn[chains[0]][1], table))
    return found


def cosine(study: Study) -> list[Figure]:
    """A table of angles, and their mean by layer."""
    chains, tasks = _each(study.records, "chain"), _each(study.records, "task")
    told = bands([r for r in study.records if r["layer"] == WHOLE], ["chain", "task", "other"], "cosine")
    low = min(0.0, *(band.mean for band in told.values() if band.n))
    bodies: dict[str, Markup] = {}
    for chain in chains:
        rows = [(task, [_angle(told[chain, task, other], task, other) for other in tasks]) for task in tasks]
        bodies[chain] = heat("cosine", tasks, rows, low, 1.0, f"Cosine of each two task vectors{_in(chain)}")
    found = [_figure(study, "", study.title, study.definition, bodies, [], None)]
    pairs = [r for r in study.records if r["task"] != r["other"]]
    layers, means = _each(pairs, "layer"), bands(pairs, ["chain", "layer"], "cosine")
    if len(layers) > 1:
        series: list[Series] = []
        for n, chain in enumerate(chains):
            own = [means[chain, layer].mean for layer in layers]
            marks = [Point(v, row, f"{layers[row]}\n{_of(chain)}: {v:.3f}") for row, v in enumerate(own)]
            series.append(Series(chain, marks, colour(n)))
        body = dots(layers, series, Axis("mean cosine of two task vectors", number, True), joined=True)
        cells = [[Cell(layer), *(Cell.number(means[chain, layer].mean) for chain in chains)] for layer in layers]
        table = Table(["layer", *(f"{_of(chain)} mean cosine" for chain in chains)], cells)
        lead = "The mean over all pairs of tasks, layer by layer."
        found.append(_figure(study, "layers", "Likeness by layer", lead, body, series, table))
    return found


def norms(study: Study) -> list[Figure]:
    """How far each task moved each layer."""
    by = ["chain", "layer", "task"]
    relative, norm = bands(study.records, by, "relative"), bands(study.records, by, "norm")
    chains, layers, tasks = (_each(study.records, name) for name in by)
    axis = Axis("norm of the task vector, in % of the base's", percent, True)
    bodies: dict[str, Markup] = {}
    series: list[Series] = []
    for chain in chains:
        series = []
        for task, shade in zip(tasks, shades(len(tasks)), strict=True):
            points: list[Point] = []
            for row, layer in enumerate(layers):
                share, length = relative[chain, layer, task], norm[chain, layer, task]
                tip = f"{layer}\n{task}: {_spread(share, percent)} of the base's norm\n"
                points.append(Point(share.mean, row, f"{tip}L2 norm {_spread(length, number)}"))
            series.append(Series(task, points, shade))
        bodies[chain] = dots(layers, series, axis, joined=True)
    rows = [
        [
            *_place(chain, layer, chains),
            *(Cell.share(relative[chain, layer, task].mean, 3) for task in tasks),
            *(Cell.number(norm[chain, layer, task].mean) for task in tasks),
        ]
        for chain in chains
        for layer in layers
    ]
    units = [f"{task}, {unit}" for unit in ("% of the base", "L2 norm") for task in tasks]
    table = Table([*_places(chains), *units], rows)
    return [_figure(study, "", study.title, study.definition, bodies, series, table)]


FIGURES: Mapping[str, Callable[[Study], list[Figure]]] = {
    "conflicts": conflicts,
    "consistency": consistency,
    "contribution": contribution,
    "cosine": cosine,
    "norms": norms,
}


def _figure(
    study: Study,
    part: str,
    title: str,
    lead: str,
    body: Markup | Mapping[str, Markup],
    key: Sequence[Series],
    table: Table | None,
) -> Figure:
    """A figure of a study, or a part of one; a body for each way of training is shown one at a time."""
    ident = f"{study.kind}-{part}" if part else study.kind
    alt = " ".join(study.findings) or lead
    several = {} if isinstance(body, Markup) else body
    drawn = body if isinstance(body, Markup) else alternatives(body)
    choices = [chain for chain in several if len(several) > 1]
    shown = key if len(key) > 1 else ()
    return Figure(ident, title, lead, alt, drawn, shown, table=table, choices=choices, choice="Training")


def _mark(band: Band, row: int, what: str, written: Callable[[float], str]) -> Point:
    return Point(band.mean, row, f"{what}: {_spread(band, written)}", band.low, band.high)


def _spread(band: Band, written: Callable[[float], str]) -> str:
    """A mean, and its standard deviation where there are seeds."""
    if not band.n:
        return "unknown"
    return written(band.mean) + (f" ± {written(band.std)} over {band.n} seeds" if band.n > 1 else "")


def _share(band: Band) -> Cell:
    cell = Cell.share(band.mean)
    return Cell(f"{cell.words} ± {100 * band.std:.1f}", cell.value) if band.n > 1 else cell


def _angle(band: Band, task: str, other: str) -> Cell:
    words = f"{band.mean:.2f}" if math.isfinite(band.mean) else NONE
    return Cell(words, band.mean, f"{task} and {other}: {_spread(band, number)}")


def _each(records: Sequence[Record], name: str) -> list:
    """The values of a column, in the order they come."""
    return list(dict.fromkeys(record[name] for record in records))


def _places(chains: Sequence[str]) -> list[str]:
    """The columns that say what a row is of."""
    return ["training", "layer"] if len(chains) > 1 else ["layer"]


def _place(chain: str, layer: str, chains: Sequence[str]) -> list[Cell]:
    return [Cell(chain), Cell(layer)] if len(chains) > 1 else [Cell(layer)]


def _of(chain: str) -> str:
    return "these models" if chain == "given" else chain


def _in(chain: str) -> str:
    return "" if chain == "given" else f", {chain}"
