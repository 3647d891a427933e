"""The verbs that look for reasons: study, report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..errors import MagMaxError, nearest_hint
from .common_options import Json, Models, OptionalOut, Out, Threads
from .console import print_line, print_table, progress_options

if TYPE_CHECKING:
    from ..analysis.method_comparison import Records
    from ..analysis.records import Study
    from ..analysis.report.html_page import ReportPage
    from ..analysis.weight_studies import StatisticsByOrigin

MAX_TABLE_ROWS = 40


def study(
    what: str,
    models: Models = (),
    *,
    base: str | None = None,
    source: Annotated[str | None, Parameter(name="--from")] = None,
    out: OptionalOut = None,
    density: float | None = None,
    as_json: Json = False,
    threads: Threads = 0,
) -> None:
    """Why a merge works: one of the MagMax paper's analyses, of any models or of a benchmark's results.

    Parameters
    ----------
    what
        Of checkpoints, without any data: conflicts, consistency, contribution, cosine, norms. Of a benchmark's
        accuracies: retention, kth, scaling, drop, penalties, curves.
    models
        Fine-tuned models; anything that magmax merge reads.
    base
        The model that all of them were fine-tuned from.
    source
        Instead of models: the output folder of magmax bench or train, with every training and seed that is in it.
    out
        A folder for WHAT.csv, WHAT.json, WHAT.html and, of most, WHAT.svg.
    density
        With conflicts: count only this fraction of each task vector, its largest entries.
    """
    from ..analysis.accuracy_studies import ACCURACY_STUDIES
    from ..analysis.weight_studies import WEIGHT_STUDIES

    if what not in (*WEIGHT_STUDIES, *ACCURACY_STUDIES):
        raise MagMaxError(f"there is no study {what!r}; {nearest_hint(what, [*WEIGHT_STUDIES, *ACCURACY_STUDIES])}")
    if density is not None and (what != "conflicts" or not 0 < density <= 1):
        raise MagMaxError(f"--density is a fraction from 0 to 1 for the study conflicts, not {density} for {what}")
    from ..checkpoints.journal import hold_folder

    with nullcontext() if out is None else hold_folder(Path(out)):
        result, cells = _run_study(what, models, base, source, density, threads)
        # Written before anything is printed: who reads what is printed may stop early.
        files = [] if out is None else _write_study(result, cells, Path(out))
    if as_json:
        print(result.as_json(), end="")
    else:
        _print_study(result)
    if files:
        print_line(", ".join(map(str, files)))


def report(
    *sources: str,
    base: str | None = None,
    out: Out,
    calibration: str | None = None,
    threads: Threads = 0,
) -> None:
    """Write one self-contained page about models, a benchmark or a training; it opens without a network.

    Parameters
    ----------
    sources
        Fine-tuned models of --base, which need no training run: conflicts, contribution, likeness, distances. Or one
        output folder of magmax bench or magmax train: accuracies too.
    base
        The model that all of them were fine-tuned from.
    out
        The page (.html).
    calibration
        A calibration's report (.json), whose coefficients are shown too.
    """
    path = Path(out)
    if path.suffix not in (".html", ".htm"):
        raise MagMaxError(f"--out {out}: a report is one page; name a file that ends in .html")
    from ..checkpoints.journal import WorkingFolder
    from ..checkpoints.output_paths import find_place_problems
    from ..errors import list_problems

    if problems := find_place_problems(path, "file"):
        raise list_problems(f"{path} cannot be written", problems)
    with WorkingFolder(path):
        page = _build_page(sources, base, calibration, threads)
        page.write(path)
    for each in page.recommendations:
        print_line(f"{each.kind}: {each.headline}")
        print_line(f"  {each.evidence}")
    print_line(f"{path} ({path.stat().st_size / 1000:,.0f} kB)")


def _build_page(sources: Sequence[str], base: str | None, calibration: str | None, threads: int) -> ReportPage:
    """The page of models, or of the output folder of a benchmark or a training."""
    from ..analysis.report.builder import build_run_page, build_weights_page

    coefficients = None if calibration is None else coefficients_of(Path(calibration))
    if base is None and len(sources) == 1:
        from ..analysis.run_folders import load_results

        run = load_results(Path(sources[0]))
        with progress_options(
            _total_bytes(run.checkpoints.values()), "reading checkpoints", threads, False
        ) as settings:
            tallies = run.weight_statistics(None, threads, settings.progress)
        return build_run_page(run, tallies, coefficients)
    return build_weights_page(_collect_statistics(sources, base, None, threads), Path(str(base)).name, coefficients)


def coefficients_of(path: Path) -> dict[str, float]:
    """Layer -> coefficient, from a calibration's report: "layers" with name and xi; or a map, alone or under
    "coefficients".

    Raises MagMaxError for a file that holds none.
    """
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MagMaxError(f"{path}: cannot be read: {error}") from error
    inner = content.get("coefficients", content) if isinstance(content, dict) else None
    numbers: list[tuple[Any, Any]] = list(inner.items()) if isinstance(inner, dict) else []
    layers = content.get("layers") if isinstance(content, dict) else None
    if isinstance(layers, list):
        numbers = [(layer.get("name"), layer.get("xi")) for layer in layers if isinstance(layer, dict)]
    coefficients = {str(k): float(v) for k, v in numbers if type(v) in (int, float) and math.isfinite(v)}
    if not coefficients:
        raise MagMaxError(
            f"{path}: holds no coefficients; expected layers with a name and xi, or a map from tensor to number"
        )
    return coefficients


def _run_study(
    what: str, models: Sequence[str], base: str | None, source: str | None, density: float | None, threads: int
) -> tuple[Study, Records]:
    """The study, and the benchmark's cells if it is of one."""
    from ..analysis.accuracy_studies import ACCURACY_STUDIES, run_accuracy_study
    from ..analysis.weight_studies import run_weight_study

    if source is None:
        if what in ACCURACY_STUDIES:
            raise MagMaxError(f"{what} is read from accuracies; give a benchmark's results: --from FOLDER")
        return run_weight_study(what, _collect_statistics(models, base, density, threads), density), ()
    if models or base:
        raise MagMaxError("give either models and their --base, or --from FOLDER, not both")
    from ..analysis.run_folders import load_results

    run = load_results(Path(source))
    if what in ACCURACY_STUDIES:
        return run_accuracy_study(what, run.cells), run.cells
    if not run.checkpoints:
        raise MagMaxError(
            f"{source}: has no checkpoints any more (magmax bench --discard deletes them); {what} needs them"
        )
    with progress_options(_total_bytes(run.checkpoints.values()), "reading checkpoints", threads, False) as settings:
        return run_weight_study(what, run.weight_statistics(density, threads, settings.progress), density), run.cells


def _collect_statistics(
    models: Sequence[str], base: str | None, density: float | None, threads: int
) -> StatisticsByOrigin:
    from ..analysis.weight_statistics import collect_weight_statistics
    from ..analysis.weight_studies import ModelsOrigin
    from ..checkpoints import open_checkpoint
    from ..merging.model_names import default_names

    if base is None or not models:
        raise MagMaxError("give --base BASE and the fine-tuned models, or the folder of a benchmark or a training")
    start = open_checkpoint(base)
    others = [open_checkpoint(model, base=start) for model in models]
    names = default_names([other.source for other in others])
    total = start.nbytes * (1 + len(others))
    with progress_options(total, f"reading {len(others)} models", threads, False) as settings:
        return {ModelsOrigin(): collect_weight_statistics(start, others, names, density, threads, settings.progress)}


def _total_bytes(trainings: Any) -> int:
    return sum(path.stat().st_size for paths in trainings for path in paths)


def _print_study(result: Study) -> None:
    """Return what was found in words, and the records; of many only the first."""
    for sentence in result.findings:
        print_line(sentence)
    from ..analysis.records import json_safe

    def told(value: Any) -> str:
        return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

    rows = [tuple(told(value) for value in json_safe(record).values()) for record in result.records[:MAX_TABLE_ROWS]]
    if rows:
        print_table(list(result.records[0]), rows)
    if len(result.records) > MAX_TABLE_ROWS:
        print_line(f"... {len(result.records) - MAX_TABLE_ROWS} more records; all of them: --json, or --out FOLDER")


def _write_study(result: Study, cells: Records, folder: Path) -> list[Path]:
    """The records, the page and the drawings of a study, each as a file."""
    from ..analysis.report.builder import build_figures
    from ..analysis.report.html_page import standalone_svgs, study_page
    from ..checkpoints.output_paths import replace_file

    figures = build_figures(result, cells)
    paths = result.write(folder)
    paths.append(study_page(result, figures).write(folder / f"{result.kind}.html"))
    for figure in figures:
        for name, drawing in standalone_svgs(figure).items():
            paths.append(folder / f"{name}.svg")
            replace_file(paths[-1], drawing.encode())
    return paths
