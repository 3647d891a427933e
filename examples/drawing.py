"""How the demo shows its numbers: a table on stdout and a picture."""

import os
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

COLOURS = ["#999999", "#E69F00", "#56B4E9", "#0072B2"]  # Okabe and Ito's, for every kind of eyes
HATCHES = ["", "//", "..", ""]  # and in black and white


def table(columns: list[str], accuracy: dict[str, list[float]], caption: str) -> None:
    """Prints accuracies in percent, a method a row; the best of each column stands out."""
    shown = Table(title="Accuracy in %, among all classes", caption=caption, title_style="bold")
    shown.add_column("")
    for column in columns:
        shown.add_column(column, justify="right")
    best = [max(column) for column in zip(*accuracy.values(), strict=True)]
    for name, row in accuracy.items():
        styles = ["bold" if x == top else "" for x, top in zip(row, best, strict=True)]
        cells = [Text(f"{100 * x:.1f}", style) for x, style in zip(row, styles, strict=True)]
        shown.add_row(name, *cells)
    Console(highlight=False).print(shown)


def picture(path: Path, columns: list[str], accuracy: dict[str, list[float]], caption: str) -> None:
    """Draws one bar for each method and column; the last column, the average, stands apart."""
    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(accuracy)
    centres = [*range(len(columns) - 1), len(columns) - 0.7]
    with matplotlib.rc_context({"hatch.linewidth": 0.6}):
        for i, (name, row) in enumerate(accuracy.items()):
            left = [c + (i - (len(accuracy) - 1) / 2) * width for c in centres]
            look = {"color": COLOURS[i % 4], "hatch": HATCHES[i % 4], "edgecolor": "white", "linewidth": 0}
            bars = axes.bar(left, [100 * x for x in row], width * 0.92, label=name, **look)
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7, color="#444444")
        figure.suptitle("What is left of each task after learning all of them", fontweight="bold")
        axes.set_title(textwrap.fill(caption, 180), fontsize=7.5, color="#555555")
        axes.set_ylabel("accuracy among all classes (%)")
        axes.set_xticks(centres, columns)
        axes.set_ylim(0, 100)
        axes.axvline(len(columns) - 1.35, color="#cccccc", linewidth=1)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(accuracy), frameon=False)
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, format="png")
    os.replace(partial, path)
