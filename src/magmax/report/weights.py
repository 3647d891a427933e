"""The studies of weights as figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ..study.records import Band, Record, Study, bands
from ..study.tally import WHOLE
from .charts import Axis, dots, lines, number, percent, stacks
from .figures import NONE, Cell, Figure, Table, heat
from .marks import Markup, Point, Series, colour, shades


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
    """Who wins under MagMax: a bar for each layer, a figure for each way of training."""
    found: list[Figure] = []
    for chain in _each(study.records, "chain"):
        own = [record for record in study.records if record["chain"] == chain]
        layers, tasks = _each(own, "layer"), _each(own, "task")
        told, weight = bands(own, ["task", "layer"], "share"), bands(own, ["task", "layer"], "magnitude")
        colours = shades(len(tasks))
        series = [
            Series(
                task,
                [
                    Point(
                        told[task, layer].mean,
                        row,
                        f"{layer}\n{task}: {_spread(told[task, layer], percent)} of the elements\n"
                        f"{_spread(weight[task, layer], percent)} of the magnitude",
                    )
                    for row, layer in enumerate(layers)
                ],
                colours[t],
            )
            for t, task in enumerate(tasks)
        ]
        header = ["layer", *(f"{task}, %" for task in tasks)]
        rows = [[Cell(layer), *(_share(told[task, layer]) for task in tasks)] for layer in layers]
        body = stacks(layers, series, Axis("share of the elements that changed", percent))
        title = study.title + _in(chain)
        found.append(_figure(study, chain, title, study.definition, body, series, Table(header, rows)))
    return found


def cosine(study: Study) -> list[Figure]:
    """A table of angles, and their mean by layer."""
    chains = _each(study.records, "chain")
    found: list[Figure] = []
    for chain in chains:
        own = [r for r in study.records if r["chain"] == chain and r["layer"] == WHOLE]
        tasks, told = _each(own, "task"), bands(own, ["task", "other"], "cosine")
        low = min(0.0, *(band.mean for band in told.values() if band.n))
        rows = [(task, [_angle(told[task, other], task, other) for other in tasks]) for task in tasks]
        title = study.title + _in(chain)
        body = heat("cosine", tasks, rows, low, 1.0, f"Cosine of each two task vectors{_in(chain)}")
        found.append(_figure(study, chain, title, study.definition, body, [], None))
    pairs = [r for r in study.records if r["task"] != r["other"]]
    layers, told = _each(pairs, "layer"), bands(pairs, ["chain", "layer"], "cosine")
    if len(layers) > 1:
        series = [
            Series(
                chain,
                [
                    Point(told[chain, layer].mean, row, f"{layer}\n{_of(chain)}: {told[chain, layer].mean:.3f}")
                    for row, layer in enumerate(layers)
                ],
                colour(n),
            )
            for n, chain in enumerate(chains)
        ]
        body = dots(layers, series, Axis("mean cosine of two task vectors", number, True), joined=True)
        rows = [[Cell(layer), *(Cell.number(told[chain, layer].mean) for chain in chains)] for layer in layers]
        table = Table(["layer", *(f"{_of(chain)} mean cosine" for chain in chains)], rows)
        lead = "The mean over all pairs of tasks, layer by layer."
        found.append(_figure(study, "layers", "Likeness by layer", lead, body, series, table))
    return found


def norms(study: Study) -> list[Figure]:
    """How far each task moved each layer."""
    found: list[Figure] = []
    for chain in _each(study.records, "chain"):
        own = [record for record in study.records if record["chain"] == chain]
        layers, tasks = _each(own, "layer"), _each(own, "task")
        relative, norm = bands(own, ["task", "layer"], "relative"), bands(own, ["task", "layer"], "norm")
        colours = shades(len(tasks))
        series = [
            Series(
                task,
                [
                    Point(
                        relative[task, layer].mean,
                        row,
                        f"{layer}\n{task}: {_spread(relative[task, layer], percent)} of the base's norm\n"
                        f"L2 norm {_spread(norm[task, layer], number)}",
                    )
                    for row, layer in enumerate(layers)
                ],
                colours[t],
            )
            for t, task in enumerate(tasks)
        ]
        header = ["layer", *(f"{task}, % of the base" for task in tasks), *(f"{task}, L2 norm" for task in tasks)]
        rows = [
            [
                Cell(layer),
                *(Cell.share(relative[task, layer].mean, 3) for task in tasks),
                *(Cell.number(norm[task, layer].mean) for task in tasks),
            ]
            for layer in layers
        ]
        axis = Axis("norm of the task vector, in % of the base's", percent, True)
        body = dots(layers, series, axis, joined=True)
        title = study.title + _in(chain)
        found.append(_figure(study, chain, title, study.definition, body, series, Table(header, rows)))
    return found


FIGURES: Mapping[str, Callable[[Study], list[Figure]]] = {
    "conflicts": conflicts,
    "consistency": consistency,
    "contribution": contribution,
    "cosine": cosine,
    "norms": norms,
}


def _figure(
    study: Study, part: str, title: str, lead: str, body: Markup, key: Sequence[Series], table: Table | None
) -> Figure:
    ident = study.kind + (f"-{part}" if part not in ("", "given") else "")
    alt = " ".join(study.findings) or lead
    return Figure(ident, title, lead, alt, body, key if len(key) > 1 else (), table=table)


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


def _of(chain: str) -> str:
    return "these models" if chain == "given" else chain


def _in(chain: str) -> str:
    return "" if chain == "given" else f", {chain}"
