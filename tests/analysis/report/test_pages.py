"""Pages and figures: they parse, load nothing, name every figure, and their tables are the records."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.analysis import runs
from tests.continual import toys
from tests.models import save_tensors, small_model

pytest.importorskip("jinja2")
pytest.importorskip("scipy")

import itertools

from magmax import cli

VOID = {"meta", "link", "br", "wbr", "input", "img", "hr"}
KINDS = ["conflicts", "consistency", "contribution", "cosine", "norms"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command line in this process; returns (exit code, stdout, stderr)."""

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["magmax", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        told = capsys.readouterr()
        return code, told.out, told.err

    return command


class Read(HTMLParser):
    """Every element with its attributes, every table's text; an element that is not closed is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip()


def checked(path: Path) -> Read:
    """The page, with what must hold of every page."""
    text = path.read_text()
    page = Read(text)
    idents = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(idents)) == len(idents)
    assert not re.search(r"https?://|//cdn|@import|url\(", text.replace("http://www.w3.org/2000/svg", ""))
    for table in page.tables:
        assert len({len(row) for row in table}) == 1, table[0]
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed")
        assert "src" not in attributes
        if tag == "link":
            assert attributes["href"] == "data:,"
        if tag == "a":
            assert (attributes["href"] or "")[1:] in idents
        if tag == "figure":
            assert attributes["aria-labelledby"] in idents
        if attributes.get("role") in ("img", "region"):
            assert attributes["aria-label"]
        if tag == "svg":
            assert attributes["aria-hidden"] == "true"
    return page


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    names = ["base", "cars", "mnist", "euro<sat"]
    return [save_tensors(small_model(n), tmp_path / "in" / f"{name}.safetensors") for n, name in enumerate(names)]


def test_a_report_of_models(run, models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    code, told, errors = run("report", *models[1:], "--base", models[0], "--out", out)
    assert code == 0, errors
    assert str(out) in told
    page = checked(out)
    assert "euro<sat" not in out.read_text(), "names are escaped"
    figures = [attributes["id"] for tag, attributes in page.elements if tag == "figure"]
    assert figures == [
        "figure-conflicts", "figure-contribution", "figure-cosine", "figure-cosine-layers", "figure-norms",
        "figure-consistency",
    ]  # fmt: skip
    again = tmp_path / "again.html"
    run("report", *models[1:], "--base", models[0], "--out", again, "--threads", 1)
    assert again.read_bytes() == out.read_bytes()


def test_tables_are_the_records(run, models: list[Path], tmp_path: Path) -> None:
    """The digits in a page's tables are those of the records, rounded as they are shown."""
    words = [*models[1:], "--base", models[0]]
    out = tmp_path / "report.html"
    run("report", *words, "--out", out)
    tables = checked(out).tables
    records = json.loads(run("study", "contribution", *words, "--json")[1])["records"]
    table = next(t for t in tables if t[0][0] == "layer" and t[0][1] == "cars, %")
    told = {
        (row[0], head.removesuffix(", %")): cell
        for row in table[1:]
        for head, cell in zip(table[0][1:], row[1:], strict=True)
    }
    for record in records:
        share = record["share"]
        expected = "\N{EM DASH}" if share is None else f"{100 * share:.1f}"
        assert told[record["layer"], record["task"]] == expected
    records = json.loads(run("study", "cosine", *words, "--json")[1])["records"]
    table = next(t for t in tables if t[0][0] == "cosine")
    for row in table[1:]:
        for head, cell in zip(table[0][1:], row[1:], strict=True):
            key = ("whole model", row[0], head)
            value = next(r["cosine"] for r in records if (r["layer"], r["task"], r["other"]) == key)
            assert cell == f"{value:.2f}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_study_is_written_in_every_form(run, models: list[Path], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "study"
    code, told, errors = run("study", kind, *models[1:], "--base", models[0], "--out", out)
    assert code == 0, errors
    content = json.loads((out / f"{kind}.json").read_text())
    rows = list(csv.DictReader(io.StringIO((out / f"{kind}.csv").read_text())))
    assert len(rows) == len(content["records"]) > 0
    for row, record in zip(rows, content["records"], strict=True):
        assert row == {k: "" if v is None else str(v) for k, v in record.items()}
    assert set(content["inputs"]) == {"base", "cars", "mnist", "euro<sat"}
    assert all(sentence in told for sentence in content["findings"])
    checked(out / f"{kind}.html")
    for drawing in out.glob("*.svg"):
        root = ElementTree.fromstring(drawing.read_text())
        assert root.find("{http://www.w3.org/2000/svg}title") is not None
    assert kind == "cosine" or (out / f"{kind}.svg").exists() or kind == "contribution"


def test_a_report_of_a_benchmark(run, tmp_path: Path) -> None:
    folder, out = runs.write_results(tmp_path / "results"), tmp_path / "bench.html"
    code, _told, errors = run("report", folder, "--out", out)
    assert code == 0, errors
    page = checked(out)
    figures = [(attributes["id"] or "")[7:] for tag, attributes in page.elements if tag == "figure"]
    assert figures == ["methods", "matrix", "learned", "forgetting", "retention", "kth", "scaling", "drop", "penalties"]
    from magmax.analysis.method_comparison import summarise_methods
    from magmax.analysis.run_folders import load_results

    found = {method.label: method for method in summarise_methods(load_results(folder).records)}
    table = next(t for t in page.tables if t[0][0] == "method" and "scaling factor" in t[0][1])
    assert {row[0] for row in table[1:]} == {label for label, m in found.items() if m.variant == "default"}
    for row in table[1:]:
        assert row[2] == f"{100 * found[row[0]].average_accuracy.mean:.1f}"
    matrix = next(t for t in page.tables if t[0][0] == "R, in %")
    best = next(iter(found.values()))
    assert [row[1] for row in matrix[2:]] == [f"{100 * best.accuracy(i, 1).mean:.1f}" for i in range(1, runs.TASKS + 1)]


def test_a_report_of_a_real_benchmark_and_training(run, tmp_path: Path) -> None:
    """Toys trained here: the checkpoints are still there, so that the weights are shown, training by training."""
    pytest.importorskip("torch")
    from magmax.continual.benchmark import Benchmark
    from magmax.continual.evaluation.result_files import write_results
    from magmax.continual.experiment_file import read_experiment

    recipe = toys.write_recipe(tmp_path / "toy.yaml", seeds=[0, 1])
    experiment = read_experiment(str(recipe))
    with ThreadPoolExecutor(1) as executor:
        records = Benchmark(experiment, tmp_path / "bench", executor).run()
    write_results(experiment, records, tmp_path / "bench")
    code, told, errors = run("report", tmp_path / "bench", "--out", tmp_path / "bench.html")
    assert code == 0, errors
    page = checked(tmp_path / "bench.html")
    figures = {attributes["id"] for tag, attributes in page.elements if tag == "figure"}
    assert {"figure-conflicts", "figure-contribution-overview", "figure-norms"} <= figures
    choices = [attributes["data-choice"] for tag, attributes in page.elements if "data-choice" in attributes]
    assert choices.count("sequential") == choices.count("independent") == 3, "contribution, cosine, norms"
    code, told, errors = run("study", "conflicts", "--from", tmp_path / "bench", "--json")
    assert code == 0, errors
    origins = {(r["training"], r["seed"]) for r in json.loads(told)["records"]}
    assert origins == {(training, seed) for training in ("sequential", "independent") for seed in (0, 1)}

    assert run("train", recipe, "--out", tmp_path / "train", "--rule", "{random_mix: {seed: 5}}")[0] == 0
    code, told, errors = run("report", tmp_path / "train", "--out", tmp_path / "train.html")
    assert code == 0, errors
    page = checked(tmp_path / "train.html")
    metrics = json.loads((tmp_path / "train" / "metrics.json").read_text())
    table = next(t for t in page.tables if t[0][0] == "method")
    told_means = {row[0]: row[2] for row in table[1:]}
    assert told_means["last/sequential"] == f"{100 * sum(metrics['model']['3']['tasks']) / 3:.1f}"
    assert told_means["random_mix(seed=5)/sequential"] == f"{100 * sum(metrics['merged']['3']['tasks']) / 3:.1f}"


@pytest.mark.parametrize("kind", ["scaling", "penalties", "curves"])
def test_a_study_of_accuracies_is_written_in_every_form(run, tmp_path: Path, kind: str) -> None:
    folder, out = runs.write_results(tmp_path / "results"), tmp_path / "study"
    code, _, errors = run("study", kind, "--from", folder, "--out", out)
    assert code == 0, errors
    checked(out / f"{kind}.html")
    drawings = list(out.glob("*.svg"))
    assert drawings
    for drawing in drawings:
        shown = {
            group.get("data-series")
            for group in ElementTree.fromstring(drawing.read_text()).iter("{http://www.w3.org/2000/svg}g")
            if group.get("data-series") and group.get("hidden") is None
        }
        words = {
            text.text for text in ElementTree.fromstring(drawing.read_text()).iter("{http://www.w3.org/2000/svg}text")
        }
        assert shown
        assert shown <= words, "the drawing has its key"


def test_calibration_coefficients(run, models: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"coefficients": {"layer.weight": 1.25, "wide.weight": 0.9}}))
    out = tmp_path / "report.html"
    words = [*models[1:], "--base", models[0], "--out", out, "--calibration", file]
    assert run("report", *words)[0] == 0
    table = next(t for t in checked(out).tables if t[0][:2] == ["tensor", "coefficient"])
    assert table[1:] == [["layer.weight", "1.25"], ["wide.weight", "0.9"]]
    layers = [{"name": "layer", "xi": 1.25}, {"name": "left", "xi": None}, {"name": "wide", "xi": 0.9}]
    file.write_text(json.dumps({"models": ["a"], "layers": layers}))
    assert run("report", *words)[0] == 0
    table = next(t for t in checked(out).tables if t[0][:2] == ["tensor", "coefficient"])
    assert table[1:] == [["layer", "1.25"], ["wide", "0.9"]]
    file.write_text("[1, 2]")
    code, _, errors = run("report", *words)
    assert (code, "holds no coefficients" in errors) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study", "conflict"], "did you mean 'conflicts'"),
        (["study", "conflicts"], "give --base BASE"),
        (["study", "kth", "a.safetensors", "--base", "b.safetensors"], "--from FOLDER"),
        (["study", "norms", "--density", "0.5", "--from", "x"], "--density"),
        (["study", "conflicts", "--density", "1.5", "--from", "x"], "--density"),
        (["report", "a", "--out", "b.pdf"], "ends in .html"),
        (["report", "nowhere", "--out", "b.html"], "no such folder"),
    ],
)
def test_mistakes(run, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(*words)
    assert (code, message in errors) == (2, True), errors
    assert not any(tmp_path.iterdir())


def test_a_single_model_has_a_report_too(run, models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert run("report", models[1], "--base", models[0], "--out", out)[0] == 0
    figures = [attributes["id"] for tag, attributes in checked(out).elements if tag == "figure"]
    assert figures == ["figure-norms"]


def test_ticks_are_round_and_hold_everything() -> None:
    from magmax.analysis.report.svg import ticks

    cases: list[Any] = [(0.0, 1.0, 5), (0.1234, 0.1239, 7), (-3, 1e6, 4), (5, 5, 5), (0, 0, 3), (1e-9, 2e-9, 5)]
    for low, high, about in cases:
        marks = ticks(low, high, about)
        steps = {round((b - a) / (marks[1] - marks[0]), 6) for a, b in itertools.pairwise(marks)}
        assert marks[0] <= low
        assert marks[-1] >= high
        assert steps == {1.0}
        assert len(marks) <= 2 * about + 2
