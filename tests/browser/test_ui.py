"""The page of `magmax ui` in a real browser: silent, local, accessible, and its numbers and downloads right."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("nicegui", reason="nicegui is not installed: pip install '.[ui]'")

from tests.browser.window import DESK, PHONE, BrowserWindow  # noqa: E402
from tests.continual import toys  # noqa: E402

from magmax.checkpoints import open_checkpoint  # noqa: E402
from magmax.continual.experiment import Experiment  # noqa: E402
from magmax.continual.training.trainer import ContinualTraining  # noqa: E402
from magmax.merging.execution.execution_options import ExecutionOptions  # noqa: E402
from magmax.preference.archive import Archive  # noqa: E402
from magmax.preference.archive_writer import write_archive  # noqa: E402
from magmax.ui.sources import open_source  # noqa: E402
from magmax.ui.view_model import TunerModel  # noqa: E402


@pytest.fixture(scope="module")
def archived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive, with the training that it was made of beside it."""
    folder = tmp_path_factory.mktemp("served")
    ContinualTraining(Experiment(**toys.RECIPE, validation=10), folder / "run").run()
    base = open_checkpoint(str(folder / "run" / "theta_0.safetensors"))
    models = [open_checkpoint(str(folder / "run" / f"theta_{t}.safetensors"), base=base) for t in (1, 2, 3)]
    names = ["theta_1", "theta_2", "theta_3"]
    write_archive(base, models, names, folder / "archive", base_given=str(base.path), execution=ExecutionOptions())
    return folder / "archive"


@pytest.fixture(scope="module")
def address(browser: Any, archived: Path) -> Iterator[str]:
    """Where the page of the archive is, served by the command itself; Ctrl-C must end it."""
    recipe = archived.parent / "run" / "recipe.json"
    words = ["ui", str(archived), "--recipe", str(recipe), "--port", "0", "--no-browser", "--examples", "60"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    env["OMP_NUM_THREADS"] = "1"
    with subprocess.Popen(
        [sys.executable, "-m", "magmax.cli", *words], env=env, text=True, stdout=subprocess.PIPE, cwd=archived.parent
    ) as server:
        assert server.stdout is not None
        told = server.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:\d+", told)
        assert found, told
        yield found[0]
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    assert sorted(path.name for path in archived.parent.iterdir()) == ["archive", "run"], "nothing is left behind"


class Open(BrowserWindow):
    """A window on the page."""

    def __init__(self, context: Any, address: str) -> None:
        super().__init__(context, address)
        self.settle()

    def settle(self) -> None:
        """Wait for the preview of what is asked for."""
        self.page.wait_for_function("document.querySelector('.page:not(.stale) .task .value')", timeout=60_000)

    def shares(self) -> list[str]:
        return self.page.locator(".task .share").all_text_contents()

    def accuracies(self) -> list[str]:
        return self.page.locator(".task .value").all_text_contents()

    def press(self, label: str, key: str, times: int = 1) -> None:
        """Move a slider by keyboard."""
        slider = self.page.get_by_role("slider", name=label, exact=True)
        slider.focus()
        for _ in range(times):
            self.page.keyboard.press(key)
        self.page.wait_for_timeout(300)
        self.settle()


@pytest.fixture
def shown(browser: Any, address: str) -> Iterator[Any]:
    """Opens the page in a window of some size, light or dark."""
    contexts: list[Any] = []

    def show(size: dict[str, int] = DESK, scheme: str = "light") -> Open:
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce"))
        return Open(contexts[-1], address)

    yield show
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def tuner(archived: Path) -> TunerModel:
    """The same, without a page."""
    return TunerModel.open(open_source(archived, archived.parent / "run" / "recipe.json"), 60)


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["desk-light", "phone-dark"])
def test_silent_local_and_accessible(shown: Any, address: str, axe: str, size: dict[str, int], scheme: str) -> None:
    window = shown(size, scheme)
    page = window.page
    page.evaluate(axe)
    serious, passed = window.run_axe()
    assert serious == []
    assert passed > 20, "axe has looked"
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "nothing sticks out"
    assert window.messages == []
    own = (address, address.replace("http", "ws"), "data:", "blob:")
    assert [url for url in window.requests if not url.startswith(own)] == []
    assert any(url.startswith("ws") for url in window.requests), "the browser has told of every request"


def test_strangers_are_refused(browser: Any, address: str) -> None:
    context = browser.new_context(extra_http_headers={"Host": "elsewhere.example"})
    assert context.request.get(address).status == 400
    context.close()


def test_moving_sliders_moves_accuracies(shown: Any, tuner: TunerModel) -> None:
    window = shown()
    page = window.page
    own = tuner.natural_counts
    assert window.shares() == [f"{100 * count / sum(own):.1f} %" for count in own]
    before = window.accuracies()
    window.press("Weight of Task 1", "End")
    window.press("Weight of Task 2", "Home")
    window.press("Weight of Task 3", "Home")
    assert window.shares() == ["100.0 %", "0.0 %", "0.0 %"]
    assert window.accuracies() == [f"{100 * share:.1f} %" for share in tuner.preview([1, 0, 0], 0.5).task_accuracies]
    window.press("Scaling factor", "End")
    expected = tuner.preview([1, 0, 0], 1.5)
    assert window.accuracies() == [f"{100 * share:.1f} %" for share in expected.task_accuracies]
    assert window.accuracies() != before
    assert page.locator(".tile .value").first.text_content() == f"{100 * expected.mean:.1f} %"
    assert "Task 1: " + window.accuracies()[0] in page.locator(".bar").first.get_attribute("aria-label")
    page.get_by_role("slider", name="Weight of Task 1", exact=True).press("Home")
    page.get_by_text("give some task a weight").wait_for()
    assert page.get_by_role("button", name="Make the checkpoint").is_disabled()
    page.get_by_role("button", name="MagMax").click()
    window.press("Scaling factor", "Home")
    assert window.shares() == [f"{100 * count / sum(own):.1f} %" for count in own]
    assert window.accuracies() == [
        f"{100 * share:.1f} %" for share in tuner.reference_previews["Zero-shot"].task_accuracies
    ]
    assert window.messages == []


def test_downloads_are_exact(shown: Any, tuner: TunerModel, tmp_path: Path) -> None:
    window = shown(PHONE)
    page = window.page
    page.get_by_role("button", name="Equal").click()
    window.press("Scaling factor", "ArrowRight", 2)
    tuner.write_merge(tuner.presets["Equal"], 0.6, tmp_path / "tuned.safetensors", lambda share: None)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Make the checkpoint").click()
    assert waiting.value.suggested_filename == "tuned.safetensors"
    assert Path(waiting.value.path()).read_bytes() == (tmp_path / "tuned.safetensors").read_bytes()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download the recipe").click()
    assert waiting.value.suggested_filename == "tune.sh"
    assert Path(waiting.value.path()).read_text() == tuner.recipe(tuner.presets["Equal"], 0.6)
    assert window.messages == []


def test_presets_are_stored_and_chosen(shown: Any, archived: Path) -> None:
    window = shown()
    page = window.page
    window.press("Weight of Task 2", "End")
    wanted = window.shares()
    page.get_by_label("Preset name").fill("shop")
    page.get_by_role("button", name="Store").click()
    page.get_by_role("button", name="shop", pressed=True).wait_for()
    stored = Archive(archived).preset("shop")
    assert [f"{100 * weight / sum(stored.values()):.1f} %" for weight in stored.values()] == wanted
    page.get_by_role("button", name="Early tasks").click()
    page.get_by_role("button", name="Early tasks", pressed=True).wait_for()
    assert window.shares() == ["57.1 %", "28.6 %", "14.3 %"]
    again = shown()
    again.page.get_by_role("button", name="shop").click()
    again.page.wait_for_timeout(300)
    again.settle()
    assert again.shares() == wanted
    assert window.messages == again.messages == []
