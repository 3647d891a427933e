"""From runs and checkpoints to pages: which figures stand where, and what is said at the top."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...continual.experiment import LAST_CHECKPOINT, ZERO_SHOT
from ..accuracy_studies import ACCURACY_SWEEPS, has_records, run_accuracy_study
from ..method_comparison import MethodResult, Records, compare_best_two, competing_methods, summarise_methods
from ..recommendations import Recommendation, recommend_from_accuracies, recommend_from_weights, sort_recommendations
from ..records import Study, aggregate
from ..run_folders import FinishedRun
from ..weight_statistics import WHOLE_MODEL
from ..weight_studies import StatisticsByOrigin, run_weight_studies
from .accuracy_figures import curve_figures, matrix_figure, methods_figure, methods_table, sweep_figure
from .figures import ReportFigure
from .html_page import PageSection, ReportPage, SummaryTile, calibration_figure
from .weight_figures import FIGURE_BUILDERS

WEIGHT_SECTIONS = {
    "conflicts": "Sign conflicts",
    "contribution": "Contribution",
    "cosine": "Likeness",
    "norms": "Distances",
    "consistency": "Agreement",
}


def build_figures(study: Study, cells: Records = ()) -> list[ReportFigure]:
    """The figures of a study; curves are drawn from the benchmark's cells."""
    if study.kind == "curves":
        methods = summarise_methods(cells)
        return [matrix_figure(methods), *curve_figures(methods)]
    return FIGURE_BUILDERS[study.kind](study) if study.kind in FIGURE_BUILDERS else [sweep_figure(study)]


def build_weights_page(
    statistics: StatisticsByOrigin, base: str, coefficients: Mapping[str, float] | None = None
) -> ReportPage:
    """The page of models that anyone made: no accuracy is needed."""
    studies = run_weight_studies(statistics)
    tally = next(iter(statistics.values()))
    count = len(tally.task_names)
    whole = tally.by_layer()[WHOLE_MODEL]
    about = (
        f"{count} fine-tuned model{'s' * (count > 1)} of {base}: {', '.join(tally.task_names)}. "
        f"{len(tally.by_tensor)} tensors, {whole.elements:,} elements."
    )
    return ReportPage(
        "What the models have in common",
        about,
        weight_tiles(studies),
        sort_recommendations(recommend_from_weights(statistics)),
        [*_weight_sections(studies), *_calibration_sections(coefficients)],
        tally.input_digests,
        excluded_tensors=tally.left_out,
    )


def build_run_page(
    run: FinishedRun, statistics: StatisticsByOrigin, coefficients: Mapping[str, float] | None = None
) -> ReportPage:
    """The page of a benchmark or a training: accuracies, and the weights where the checkpoints are still there."""
    methods = summarise_methods(run.records)
    studies = run_weight_studies(statistics) if statistics else []
    sections = [PageSection("methods", "Methods", [methods_figure(methods)], methods_table(methods))]
    sections.append(PageSection("matrix", "Accuracy matrix", [matrix_figure(methods)]))
    if curves := curve_figures(methods):
        sections.append(PageSection("forgetting", "Forgetting", curves))
    swept = [
        run_accuracy_study(kind, run.records)
        for kind in ACCURACY_SWEEPS
        if kind != "penalties" and has_records(kind, run.records)
    ]
    if has_records("penalties", run.records):
        swept.append(run_accuracy_study("penalties", run.records))
    if swept:
        sections.append(PageSection("sweeps", "What it depends on", [sweep_figure(study) for study in swept]))
    inputs = {name: digest for study in studies for name, digest in study.inputs.items()} or {
        f"{record['training']}, seed {record['seed']}: {name}": digest
        for record in run.records
        for name, digest in (record.get("models") or {}).items()
    }
    return ReportPage(
        "Benchmark report" if run.made_by == "bench" else "Training report",
        _describe_run(run, methods),
        [*method_tiles(methods), *weight_tiles(studies)],
        sort_recommendations(
            [
                *recommend_from_accuracies(methods, run.records),
                *(recommend_from_weights(statistics) if statistics else []),
            ]
        ),
        [*sections, *_weight_sections(studies), *_calibration_sections(coefficients)],
        inputs,
        run.recipe,
        _describe_environment(run.records),
        {key: why for tally in statistics.values() for key, why in tally.left_out.items()},
    )


def method_tiles(methods: Sequence[MethodResult]) -> list[SummaryTile]:
    """The best method, MagMax if that is another, and what forgetting cost."""
    ours = competing_methods(methods)
    tiles: list[SummaryTile] = []
    if ours:
        best = ours[0]
        spread = (
            f"± {100 * best.average_accuracy.std:.1f} over {best.average_accuracy.n} seeds"
            if best.average_accuracy.n > 1
            else "one seed"
        )
        tiles.append(SummaryTile(f"{best.average_accuracy.mean:.1%}", f"best: {best.name}", spread))
    magmax = next((m for m in ours if m.rule == "magmax"), None)
    if magmax and magmax is not ours[0]:
        gap = 100 * (magmax.average_accuracy.mean - ours[0].average_accuracy.mean)
        tiles.append(
            SummaryTile(f"{magmax.average_accuracy.mean:.1%}", magmax.name, f"{gap:+.1f} points against the best")
        )
    pair = compare_best_two(methods)
    if pair and pair.difference.n > 1:
        mean, half = 100 * pair.difference.mean, 100 * pair.difference.half
        note = f"95 % interval {mean - half:+.1f} to {mean + half:+.1f}"
        tiles.append(SummaryTile(f"{mean:+.1f}", f"points against the next best, {pair.other}", note))
    last = next((m for m in ours if m.rule == LAST_CHECKPOINT), None)
    merged = next((m for m in ours if m.rule not in (LAST_CHECKPOINT, ZERO_SHOT)), None)
    if last and merged and "forgetting" in last.means and "forgetting" in merged.means:
        forgotten = 100 * merged.means["forgetting"].mean
        tiles.append(
            SummaryTile(f"{forgotten:.1f}", "points forgotten", f"{100 * last.means['forgetting'].mean:.1f} unmerged")
        )
    return tiles


def weight_tiles(studies: Sequence[Study]) -> list[SummaryTile]:
    """Conflicts and likeness in one number each; of several trainings the first two."""
    tiles: list[SummaryTile] = []
    by_kind = {study.kind: study for study in studies}
    if "conflicts" in by_kind:
        records = by_kind["conflicts"].records
        shares = [
            (c, b)
            for (c, layer), b in aggregate(records, ["training", "layer"], "share").items()
            if layer == WHOLE_MODEL
        ]
        expected = aggregate(records, ["training", "layer"], "expected")
        for training, band in shares[:2]:
            if band.n:
                label = "sign conflicts" + ("" if training == "given" else f", {training}")
                tiles.append(
                    SummaryTile(f"{band.mean:.1%}", label, f"chance: {expected[training, WHOLE_MODEL].mean:.1%}")
                )
    if "cosine" in by_kind:
        pairs = [r for r in by_kind["cosine"].records if r["layer"] == WHOLE_MODEL and r["task"] != r["other"]]
        for (training,), band in list(aggregate(pairs, ["training"], "cosine").items())[:2]:
            label = "mean cosine" + ("" if training == "given" else f", {training}")
            if band.n:
                tiles.append(SummaryTile(f"{round(band.mean, 2) + 0.0:.2f}", label, "of two task vectors"))
    return tiles


def _weight_sections(studies: Sequence[Study]) -> list[PageSection]:
    by_kind = {study.kind: study for study in studies}
    return [
        PageSection(kind, title, build_figures(by_kind[kind]))
        for kind, title in WEIGHT_SECTIONS.items()
        if kind in by_kind
    ]


def _calibration_sections(coefficients: Mapping[str, float] | None) -> list[PageSection]:
    return [PageSection("calibration", "Calibration", [calibration_figure(coefficients)])] if coefficients else []


def _describe_run(run: FinishedRun, methods: Sequence[MethodResult]) -> str:
    recipe = run.recipe
    seeds = sorted({record["seed"] for record in run.records})
    parts = [_choice_name(recipe[key]) for key in ("data", "model") if key in recipe]
    parts.append(f"{methods[0].num_tasks} tasks ({_choice_name(recipe['scenario']).replace('_', '-')})")
    if "fit" in recipe:
        parts.append(f"{recipe['fit']['steps']} steps a task, learning rate {recipe['fit']['learning_rate']:g}")
    parts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}".replace(" ", "\N{NO-BREAK SPACE}"))
    among = {"seen": "the classes learned so far", "all": "the classes of all tasks"}.get(recipe.get("among", ""))
    return "\N{NO-BREAK SPACE}· ".join([*parts, *([f"told apart among {among}"] if among else [])])


def _choice_name(choice: Any) -> str:
    """The name that a recipe chose, without its options."""
    return choice if isinstance(choice, str) else next(iter(choice))


def _describe_environment(records: Sequence[Mapping[str, Any]]) -> str:
    environments = {
        json.dumps(record["environment"], sort_keys=True) for record in records if record.get("environment")
    }
    contents = [json.loads(each) for each in sorted(environments)]
    return "; ".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in contents)


__all__ = ["Recommendation", "build_figures", "build_run_page", "build_weights_page"]
