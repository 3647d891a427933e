"""A report drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import MagMaxError, missing_extra
from .calibration_report import CalibrationReport

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise MagMaxError where a report could not be drawn to this file."""
    if path.suffix not in PLOT_SUFFIXES:
        raise MagMaxError(f"{path}: a plot is a {', '.join(PLOT_SUFFIXES[:-1])} or {PLOT_SUFFIXES[-1]} file")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra(f"{path}: drawing needs {error.name}", "report") from error


def draw(report: CalibrationReport, path: Path) -> None:
    """Draw xi, magnitudes of features and of weights before and after, and cosines of task vectors, layer by layer."""
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = report.layers
    features = any(layer.features and any(layer.features) for layer in layers)
    figure = Figure(figsize=(max(8.0, 0.11 * len(layers) + 4), 10 if features else 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(4 if features else 3, sharex=True, squeeze=True)
    where = range(len(layers))
    _plot_line(axes[0], where, [layer.xi for layer in layers], "C3", "xi")
    clipped = [n for n, layer in enumerate(layers) if layer.why]
    axes[0].plot(clipped, [layers[n].xi for n in clipped], "x", color="0.5", label="clipped or left alone")
    axes[0].axhline(1, color="0.7", linewidth=0.8)
    axes[0].set_ylabel("xi")
    if features:
        _plot_line(axes[1], where, [_ratio(layer.features_before, layer.features) for layer in layers], "C0", "merged")
        _plot_line(
            axes[1], where, [_ratio(layer.features_after, layer.features) for layer in layers], "C2", "calibrated"
        )
        axes[1].axhline(1, color="0.7", linewidth=0.8)
        axes[1].set_ylabel("feature magnitude,\nof the tasks' own")
    of = [sum(layer.weights[:-1]) / max(1, len(layer.weights) - 1) for layer in layers]
    before = [layer.weights[-1] / size if size else float("nan") for layer, size in zip(layers, of, strict=True)]
    after = [layer.weight_after / size if size else float("nan") for layer, size in zip(layers, of, strict=True)]
    _plot_line(axes[-2], where, before, "C0", "merged")
    _plot_line(axes[-2], where, after, "C2", "calibrated")
    axes[-2].axhline(1, color="0.7", linewidth=0.8)
    axes[-2].set_ylabel("weight magnitude,\nof the task vectors'")
    cosines = [float("nan") if layer.cosine is None else layer.cosine for layer in layers]
    _plot_line(axes[-1], where, cosines, "C1", "cosine")
    axes[-1].set_ylabel("mean cosine of\ntask vectors")
    axes[-1].set_xticks(list(where), [layer.name for layer in layers], rotation=90, fontsize=5)
    for axis in axes[:-1]:
        axis.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _plot_line(axis: Any, where: range, values: list[float], colour: str, label: str) -> None:
    axis.plot(where, values, ".-", color=colour, linewidth=0.6, label=label)


def _ratio(ours: Any, theirs: Any) -> float:
    total = sum(theirs)
    return sum(ours) / total if total else float("nan")
