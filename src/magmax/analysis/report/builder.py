"""From runs and checkpoints to pages: which figures stand where, and what is said at the top."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...continual.experiment import LAST, ZERO_SHOT
from ..accuracy_studies import SWEEPS, has, study_scored
from ..method_comparison import Method, Records, best_two, methods, rivals
from ..recommendations import Advice, about_methods, about_weights, in_order
from ..records import Study, bands
from ..run_folders import Run
from ..weight_statistics import WHOLE
from ..weight_studies import Tallies, all_weights
from .accuracy_figures import curve_figures, matrix_figure, methods_figure, methods_table, sweep_figure
from .figures import Figure
from .html_page import Page, Section, Tile, calibration_figure
from .weight_figures import FIGURES

SECTIONS = {
    "conflicts": "Sign conflicts",
    "contribution": "Contribution",
    "cosine": "Likeness",
    "norms": "Distances",
    "consistency": "Agreement",
}


def figures_of(study: Study, cells: Records = ()) -> list[Figure]:
    """The figures of a study; curves are drawn from the benchmark's cells."""
    if study.kind == "curves":
        found = methods(cells)
        return [matrix_figure(found), *curve_figures(found)]
    return FIGURES[study.kind](study) if study.kind in FIGURES else [sweep_figure(study)]


def weights_page(tallies: Tallies, base: str, coefficients: Mapping[str, float] | None = None) -> Page:
    """The page of models that anyone made: no accuracy is needed."""
    studies = all_weights(tallies)
    tally = next(iter(tallies.values()))
    count = len(tally.tasks)
    whole = tally.layers()[WHOLE]
    about = (
        f"{count} fine-tuned model{'s' * (count > 1)} of {base}: {', '.join(tally.tasks)}. "
        f"{len(tally.tensors)} tensors, {whole.elements:,} elements."
    )
    return Page(
        "What the models have in common",
        about,
        weight_tiles(studies),
        in_order(about_weights(tallies)),
        [*_weight_sections(studies), *_calibration(coefficients)],
        tally.inputs,
        left_out=tally.apart,
    )


def run_page(run: Run, tallies: Tallies, coefficients: Mapping[str, float] | None = None) -> Page:
    """The page of a benchmark or a training: accuracies, and the weights where the checkpoints are still there."""
    found = methods(run.records)
    studies = all_weights(tallies) if tallies else []
    sections = [Section("methods", "Methods", [methods_figure(found)], methods_table(found))]
    sections.append(Section("matrix", "Accuracy matrix", [matrix_figure(found)]))
    if curves := curve_figures(found):
        sections.append(Section("forgetting", "Forgetting", curves))
    swept = [study_scored(kind, run.records) for kind in SWEEPS if kind != "penalties" and has(kind, run.records)]
    if has("penalties", run.records):
        swept.append(study_scored("penalties", run.records))
    if swept:
        sections.append(Section("sweeps", "What it depends on", [sweep_figure(study) for study in swept]))
    inputs = {name: digest for study in studies for name, digest in study.inputs.items()} or {
        f"{record['chain']}, seed {record['seed']}: {name}": digest
        for record in run.records
        for name, digest in (record.get("models") or {}).items()
    }
    return Page(
        "Benchmark report" if run.made_by == "bench" else "Training report",
        _about(run, found),
        [*method_tiles(found), *weight_tiles(studies)],
        in_order([*about_methods(found, run.records), *(about_weights(tallies) if tallies else [])]),
        [*sections, *_weight_sections(studies), *_calibration(coefficients)],
        inputs,
        run.recipe,
        _environment(run.records),
        {key: why for tally in tallies.values() for key, why in tally.apart.items()},
    )


def method_tiles(found: Sequence[Method]) -> list[Tile]:
    """The best method, MagMax if that is another, and what forgetting cost."""
    ours = rivals(found)
    tiles: list[Tile] = []
    if ours:
        best = ours[0]
        spread = f"± {100 * best.main.std:.1f} over {best.main.n} seeds" if best.main.n > 1 else "one seed"
        tiles.append(Tile(f"{best.main.mean:.1%}", f"best: {best.name}", spread))
    magmax = next((m for m in ours if m.rule == "magmax"), None)
    if magmax and magmax is not ours[0]:
        gap = 100 * (magmax.main.mean - ours[0].main.mean)
        tiles.append(Tile(f"{magmax.main.mean:.1%}", magmax.name, f"{gap:+.1f} points against the best"))
    pair = best_two(found)
    if pair and pair.difference.n > 1:
        mean, half = 100 * pair.difference.mean, 100 * pair.difference.half
        note = f"95 % interval {mean - half:+.1f} to {mean + half:+.1f}"
        tiles.append(Tile(f"{mean:+.1f}", f"points against the next best, {pair.other}", note))
    last = next((m for m in ours if m.rule == LAST), None)
    merged = next((m for m in ours if m.rule not in (LAST, ZERO_SHOT)), None)
    if last and merged and "forgetting" in last.means and "forgetting" in merged.means:
        kept = 100 * merged.means["forgetting"].mean
        tiles.append(Tile(f"{kept:.1f}", "points forgotten", f"{100 * last.means['forgetting'].mean:.1f} unmerged"))
    return tiles


def weight_tiles(studies: Sequence[Study]) -> list[Tile]:
    """Conflicts and likeness in one number each; of several chains the first two."""
    tiles: list[Tile] = []
    by_kind = {study.kind: study for study in studies}
    if "conflicts" in by_kind:
        records = by_kind["conflicts"].records
        shares = [(c, b) for (c, layer), b in bands(records, ["chain", "layer"], "share").items() if layer == WHOLE]
        for chain, band in shares[:2]:
            if band.n:
                label = "sign conflicts" + ("" if chain == "given" else f", {chain}")
                tiles.append(Tile(f"{band.mean:.1%}", label, f"coin flips: {records[0]['expected']:.1%}"))
    if "cosine" in by_kind:
        pairs = [r for r in by_kind["cosine"].records if r["layer"] == WHOLE and r["task"] != r["other"]]
        for (chain,), band in list(bands(pairs, ["chain"], "cosine").items())[:2]:
            label = "mean cosine" + ("" if chain == "given" else f", {chain}")
            if band.n:
                tiles.append(Tile(f"{round(band.mean, 2) + 0.0:.2f}", label, "of two task vectors"))
    return tiles


def _weight_sections(studies: Sequence[Study]) -> list[Section]:
    by_kind = {study.kind: study for study in studies}
    return [Section(kind, title, figures_of(by_kind[kind])) for kind, title in SECTIONS.items() if kind in by_kind]


def _calibration(coefficients: Mapping[str, float] | None) -> list[Section]:
    return [Section("calibration", "Calibration", [calibration_figure(coefficients)])] if coefficients else []


def _about(run: Run, found: Sequence[Method]) -> str:
    recipe = run.recipe
    seeds = sorted({record["seed"] for record in run.records})
    told = [_named(recipe[key]) for key in ("data", "model") if key in recipe]
    told.append(f"{found[0].tasks} tasks ({_named(recipe['scenario']).replace('_', '-')})")
    if "fit" in recipe:
        told.append(f"{recipe['fit']['steps']} steps a task, learning rate {recipe['fit']['learning_rate']:g}")
    told.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}".replace(" ", "\N{NO-BREAK SPACE}"))
    among = {"seen": "the classes learned so far", "all": "the classes of all tasks"}.get(recipe.get("among", ""))
    return "\N{NO-BREAK SPACE}· ".join([*told, *([f"told apart among {among}"] if among else [])])


def _named(choice: Any) -> str:
    """The name that a recipe chose, without its options."""
    return choice if isinstance(choice, str) else next(iter(choice))


def _environment(records: Sequence[Mapping[str, Any]]) -> str:
    found = {json.dumps(record["environment"], sort_keys=True) for record in records if record.get("environment")}
    told = [json.loads(each) for each in sorted(found)]
    return "; ".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in told)


__all__ = ["Advice", "figures_of", "run_page", "weights_page"]
