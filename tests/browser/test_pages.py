"""Reports in a real browser: silent, alone, accessible, and operable by keyboard and by touch."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.analysis import runs
from tests.browser.window import DESK, PHONE, BrowserWindow
from tests.models import small_model

pytest.importorskip("jinja2")
pytest.importorskip("scipy")

from magmax.analysis.method_comparison import summarise_methods
from magmax.analysis.report.builder import build_run_page, build_weights_page
from magmax.analysis.run_folders import load_results
from magmax.analysis.weight_statistics import collect_weight_statistics
from magmax.analysis.weight_studies import ModelsOrigin
from magmax.checkpoints import open_checkpoint

TWO_FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of made-up results and one of made-up models."""
    folder = tmp_path_factory.mktemp("pages")
    base, *models = [open_checkpoint(small_model(n), f"model {n}") for n in range(4)]
    found = {ModelsOrigin(): collect_weight_statistics(base, models, ["cars", "mnist", "svhn"])}
    coefficients = {"layer.weight": 1.2, "wide.weight": 0.9, "scale": 1.0}
    return {
        "bench": build_run_page(load_results(runs.write_results(folder / "results", few=True)), {}).write(
            folder / "bench.html"
        ),
        "models": build_weights_page(found, "base", coefficients).write(folder / "models.html"),
    }


@pytest.fixture
def shown(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Opens a page in a window of some size, light or dark."""
    contexts: list[Any] = []

    def show(name: str, size: dict[str, int] = DESK, scheme: str = "light") -> BrowserWindow:
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce"))
        return BrowserWindow(contexts[-1], pages[name].as_uri())

    yield show
    for context in contexts:
        context.close()


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [("bench", DESK, "light"), ("bench", PHONE, "dark"), ("models", DESK, "dark"), ("models", PHONE, "light")],
    ids=["bench-desk-light", "bench-phone-dark", "models-desk-dark", "models-phone-light"],
)
def test_silent_alone_and_accessible(shown: Any, axe: str, name: str, size: dict[str, int], scheme: str) -> None:
    window = shown(name, size, scheme)
    page = window.page
    for summary in page.query_selector_all("summary"):
        summary.click()
    page.add_script_tag(content=axe)
    serious, passed = window.run_axe()
    assert serious == []
    assert passed > 20, "axe has looked"
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "nothing sticks out"
    assert window.messages == []
    assert [url for url in window.requests if not url.startswith("data:")] == [window.url]


def test_marks_can_be_reached_by_keyboard(shown: Any) -> None:
    page = shown("models").page
    plot = page.locator("#figure-conflicts .plot")
    plot.focus()
    page.keyboard.press("ArrowRight")
    first = page.locator("#spoken").text_content()
    assert first.startswith("whole model, these models: ")
    page.keyboard.press("ArrowRight")
    assert page.locator("#spoken").text_content().startswith("embed, these models: ")
    page.keyboard.press("End")
    page.keyboard.press("Home")
    assert page.locator("#spoken").text_content() == first
    assert page.locator("#tip.shown").text_content().replace("\n", ", ") == first
    page.keyboard.press("Escape")
    assert page.locator("#tip.shown").count() == 0


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_marks_tell_of_themselves_when_pointed_at(shown: Any, size: dict[str, int]) -> None:
    page = shown("models", size).page
    kind = ".wide" if size == DESK else ".narrow"
    mark = page.locator(f"#figure-norms {kind} .mark").nth(3)
    mark.scroll_into_view_if_needed()
    page.evaluate(TWO_FRAMES)  # of a scroll the page is told a frame later, and then it hides what it shows
    mark.hover(force=True)
    assert page.locator("#tip.shown").text_content() == mark.get_attribute("data-tip")
    place = page.locator("#tip").bounding_box()
    assert place["x"] >= 0
    assert place["x"] + place["width"] <= size["width"]


def test_methods_are_chosen_in_all_figures_of_a_section(shown: Any) -> None:
    page = shown("bench").page
    button = page.locator("#figure-learned .key button", has_text="zero_shot")
    lines = page.locator('#forgetting g[data-series="zero_shot"]')
    count = lines.count()
    assert count == 2 + runs.TASKS, "wide, narrow, and one for each task"
    assert button.get_attribute("aria-pressed") == "true"
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator('#forgetting g[data-series="zero_shot"][hidden]').count() == count
    assert page.locator('#forgetting .key button[aria-pressed="false"]', has_text="zero_shot").count() == 2
    page.keyboard.press("Enter")
    assert page.locator('#forgetting g[data-series="zero_shot"][hidden]').count() == 0


def test_one_matrix_is_shown_at_a_time(shown: Any, pages: dict[str, Path]) -> None:
    page = shown("bench").page
    select = page.locator("#pick-matrix")
    names = select.locator("option").all_text_contents()
    for name in names[:3]:
        select.select_option(name)
        assert page.locator("#figure-matrix [data-choice]:visible").count() == 1
        assert page.locator("#figure-matrix caption:visible").text_content() == f"Accuracy in % of {name}"
    found = {
        method.label: method for method in summarise_methods(load_results(pages["bench"].parent / "results").records)
    }
    shares = page.locator("#figure-matrix [data-choice]:visible tbody tr").last.locator("td").all_text_contents()
    method = found[names[2]]
    expected = [method.accuracy(runs.TASKS, j).mean for j in range(1, runs.TASKS + 1)]
    assert shares[:-1] == [f"{100 * share:.1f}" for share in expected]


def test_tables_are_sorted_by_number(shown: Any) -> None:
    page = shown("bench").page
    head = page.locator("#methods .numbers thead button", has_text="average accuracy")
    cells = page.locator("#methods .numbers tbody tr td:nth-child(3)")
    for order, reverse in (("descending", True), ("ascending", False)):
        head.click()
        numbers = [float(words) for words in cells.all_text_contents()]
        assert numbers == sorted(numbers, reverse=reverse)
        assert page.locator(f"#methods th[aria-sort={order}]").count() == 1


def test_a_table_is_saved_as_csv(shown: Any) -> None:
    page = shown("bench").page
    with page.expect_download() as waiting:
        page.locator("#methods [data-save]").click()
    download = waiting.value
    assert download.suggested_filename == "methods.csv"
    rows = list(csv.reader(Path(download.path()).read_text().splitlines()))
    table = page.locator("#methods .numbers tr")
    assert len(rows) == table.count()
    assert rows[1] == table.nth(1).locator("th, td").all_text_contents()


def test_everything_is_there_without_scripts(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(viewport=DESK, java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["bench"].as_uri())
    assert page.locator("#figure-matrix [data-choice]:visible").count() > 3
    assert page.locator("#pick-matrix").is_hidden()
    context.close()
