"""One self-contained page: no network, light and dark, readable on a phone, with every number as a table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...checkpoints.output_paths import replace_file
from ...errors import missing_extra
from ..recommendations import Recommendation
from ..records import Study
from .charts import ChartAxis, dot_chart, format_number
from .figures import FigureTable, ReportFigure, TableCell
from .svg import Markup, SvgPoint, SvgSeries, colour, draw_legend

MARGIN = 16.0
"""Around a drawing that is a file of its own."""
COEFFICIENT_TOLERANCE = 0.005
"""Coefficients nearer to 1 than this do nothing worth a colour."""


@dataclass(frozen=True)
class SummaryTile:
    """A number of note, at the top of a page."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class PageSection:
    """A part of a page, with a place in its contents."""

    html_id: str
    title: str
    figures: Sequence[ReportFigure] = ()
    table: FigureTable | None = None
    text: str = ""


@dataclass(frozen=True)
class ReportPage:
    """The content of a report page, in the order in which it is shown.

    Attributes:
        summary: of what was run, in a sentence.
        input_digests: name -> digest.
        recipe: what was run, in full.
    """

    title: str
    summary: str
    tiles: Sequence[SummaryTile] = ()
    recommendations: Sequence[Recommendation] = ()
    sections: Sequence[PageSection] = ()
    input_digests: Mapping[str, str] = field(default_factory=dict[str, str])
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: str = ""
    excluded_tensors: Mapping[str, str] = field(default_factory=dict[str, str])

    def render(self) -> str:
        """The page. The same page always gives the same bytes."""
        from ..._version import __version__

        recipe = json.dumps(self.recipe, indent=2) if self.recipe else ""
        return load_template("report.html").render(page=self, version=__version__, recipe=recipe, **_read_page_assets())

    def write(self, path: Path) -> Path:
        """The page as a file, whole or not at all."""
        replace_file(path, self.render().encode())
        return path


def study_page(study: Study, figures: Sequence[ReportFigure]) -> ReportPage:
    """A study by itself as a page."""
    tiles = ()
    return ReportPage(
        study.title, study.definition, tiles, (), [PageSection(study.kind, study.title, figures)], study.inputs
    )


def calibration_figure(coefficients: Mapping[str, float]) -> ReportFigure:
    """The coefficient of each tensor that was calibrated, around 1."""
    names = list(coefficients)
    finite = [value for value in coefficients.values() if math.isfinite(value)]
    points = [
        SvgPoint(value, row, f"{name}\nxi = {value:.4g}, {'grows' if value > 1 else 'shrinks'}")
        for row, (name, value) in enumerate(coefficients.items())
    ]
    sides = [
        SvgSeries("grows", [p for p in points if p.x > 1 + COEFFICIENT_TOLERANCE], colour(0)),
        SvgSeries("stays", [p for p in points if abs(p.x - 1) <= COEFFICIENT_TOLERANCE], colour(7)),
        SvgSeries("shrinks", [p for p in points if p.x < 1 - COEFFICIENT_TOLERANCE], colour(1)),
    ]
    axis = ChartAxis("calibration coefficient", format_number, reference_values=[(1.0, "unchanged")])
    alt = f"{len(names)} coefficients from {min(finite):.3g} to {max(finite):.3g}; 1 leaves a tensor as it is."
    lead = "What each tensor's merged change is multiplied by, so that its features have the size they should."
    table = FigureTable(
        ["tensor", "coefficient"], [[TableCell(n), TableCell.from_number(v)] for n, v in coefficients.items()]
    )
    key = [side for side in sides if side.points]
    return ReportFigure(
        "calibration", "Calibration coefficients", lead, alt, dot_chart(names, key, axis), key, table=table
    )


def standalone_svgs(figure: ReportFigure) -> dict[str, str]:
    """The drawings for wide windows, each to be a file of its own, in colours for light and dark; none of tables."""
    drawings = re.findall(r'<div class="wide">(<svg .*?</svg>)</div>', str(figure.body), re.DOTALL)
    names = [f"{figure.html_id}-{choice}" for choice in figure.options] or [figure.html_id]
    words = (figure.title, figure.alt_text, Markup(_read_asset("figures.css")))
    style = Markup("<title>{}</title><desc>{}</desc><style>{}</style>").format(*words)
    made: dict[str, str] = {}
    for name, drawing in zip(names, drawings, strict=False):
        head, _, rest = drawing.partition(">")
        width, height = map(float, re.findall(r"viewBox=.0 0 (\S+) ([^ \"]+)", head)[0])
        key, end = draw_legend(figure.legend, width, height) if figure.legend else (Markup(""), height)
        place = -MARGIN, -MARGIN, width + 2 * MARGIN, end + 2 * MARGIN
        head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="{" ".join(f"{n:g}" for n in place)}"'
        shared_files = Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="12" class="ground"/>').format(*place)
        made[name] = f"{head}>{style}{shared_files}{rest.removesuffix('</svg>')}{key}</svg>\n"
    return made


@cache
def load_template(name: str) -> Any:
    """A template of this package; what it is given is escaped."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise missing_extra(f"reports need {error.name}", "report") from error
    environment = Environment(
        loader=PackageLoader("magmax.analysis.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(name + ".j2")


def _read_asset(name: str) -> str:
    return (files("magmax.analysis.report") / "templates" / name).read_text("utf-8")


def _read_page_assets() -> dict[str, Markup]:
    return {
        "figures_css": Markup(_read_asset("figures.css")),
        "page_css": Markup(_read_asset("page.css")),
        "script": Markup(_read_asset("page.js")),
    }
