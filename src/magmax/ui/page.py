"""The page: sliders in, accuracies out. It draws and listens; `tuner.py` does the work."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nicegui import background_tasks, run, ui
from nicegui.elements.mixins.text_element import TextElement
from nicegui.elements.mixins.value_element import ValueElement

from ..errors import MagMaxError
from .sources import OUT
from .view_model import FACTOR, MAGMAX, Preview, Tuner

PAUSE = 0.15
"""Seconds without a change before a preview is made."""
LARGEST_FACTOR = 1.5
STYLE = (Path(__file__).parent / "style.css").read_text("utf-8")
BRAND = (
    '<svg viewBox="0 0 24 24" aria-hidden="true" focusable="false"><path class="b0" d="M4 19V9"/>'
    '<path class="b1" d="M12 19V13"/><path class="b2" d="M20 19V4"/></svg>'
)


def percent(share: float) -> str:
    """A share as it is shown."""
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Row:
    """What moves in a task's row."""

    slider: Slider
    share: TextElement
    bar: ui.element
    value: TextElement
    change: TextElement


class Page:
    """One open window."""

    def __init__(self, tuner: Tuner, folder: Path) -> None:
        self.tuner, self.folder = tuner, Path(tempfile.mkdtemp(dir=folder))
        ui.context.client.on_delete(lambda: shutil.rmtree(self.folder, ignore_errors=True))
        self.exact: list[float] | None = None
        self.asked = 0
        self.ready = False
        self.rows: list[Row] = []
        ui.add_css(STYLE)
        with box("main", "page") as self.main:
            self.header()
            self.tiles()
            self.tasks()
            self.strength()
            self.results()
        self.choose(MAGMAX)

    def header(self) -> None:
        """What is merged, and how it is looked at."""
        here, held = self.tuner.here, self.tuner.held
        with box("header"):
            with box("p", "brand"):
                ui.html(BRAND, sanitize=False, tag="span")
                words("span", "magmax")
            words("h1", "Tune a merge to what it is for")
            kind = "an archive" if self.tuner.source.archive else "a chain"
            words(
                "p",
                f"{self.tuner.source.folder}, {kind} of {len(here.tasks)} tasks. Move the sliders: how much of the "
                "merge each task supplies, and how far it goes from the base. The accuracies follow, on a sample of "
                f"{len(self.tuner.sample)} examples ({self.tuner.samples_from}).",
                "about",
            )
            words("p", f"The task vectors take {held.nbytes / 1e6:,.1f} MB of memory.", "about small")

    def tiles(self) -> None:
        """The means, and the state of the preview."""
        with box("dl", "tiles"):
            self.mean, self.mean_note = self.tile("mean accuracy")
            self.weighed, self.weighed_note = self.tile("weighed as preferred")
            self.state, self.state_note = self.tile("preview")
        self.spoken = words("p", "", "unseen").props("role=status aria-live=polite")

    def tile(self, label: str) -> tuple[TextElement, TextElement]:
        with box("div", "tile"):
            words("dt", label)
            return words("dd", "…", "value"), words("dd", "", "note")

    def tasks(self) -> None:
        """A row for each task: its slider, and what becomes of its accuracy."""
        with box("section", "card", "aria-labelledby=tasks"):
            words("h2", "What each task supplies").props("id=tasks")
            with box("div", "chips", 'role=group aria-label="Preferences to begin with"'):
                self.chips = box("span", "chips")
                self.list_presets()
                if self.tuner.source.archive:
                    self.name = ui.input(placeholder="name a preset").props('dense borderless aria-label="Preset name"')
                    self.name.classes("name").on("keydown.enter", self.store)
                    button("Store", "chip", self.store)
            with box("p", "legend"):
                for number, (name, mark) in enumerate(self.tuner.marks.items()):
                    words("span", f"{name} {percent(mark.mean)}", f"key k{number}")
                words("span", "this merge", "key k3")
            with box("div", "heads", "aria-hidden=true"):
                for head in ("task", "share of the merge", "accuracy, and its difference to MagMax"):
                    words("span", head)
            for number, (title, inside) in enumerate(self.tuner.titles):
                self.rows.append(self.task(number, title, inside))

    def task(self, number: int, title: str, inside: str) -> Row:
        with box("div", "task"):
            with box("div", "told"):
                words("h3", title)
                words("p", inside, "inside")
            with box("div", "prefer"):
                slider = Slider(f"Weight of {title}", 100, 1, 0, self.moved)
                share = words("span", "", "share")
            with box("div", "accuracy"):
                with box("div", "bar", "role=img") as bar:
                    box("i", "fill")
                    for place, (name, mark) in enumerate(self.tuner.marks.items()):
                        drawn = box("i", f"mark k{place}").style(f"--v:{mark.tasks[number]:.4f}")
                        drawn.props["title"] = f"{name} {percent(mark.tasks[number])}"
                value, change = words("span", "…", "value"), words("span", "", "change")
        return Row(slider, share, bar, value, change)

    def strength(self) -> None:
        """The scaling factor."""
        with box("section", "card", "aria-labelledby=strength"):
            words("h2", "How far to go").props("id=strength")
            words("p", "The scaling factor multiplies what is merged before it is added to the base.", "inside")
            with box("div", "prefer"):
                self.factor = Slider("Scaling factor", LARGEST_FACTOR, 0.05, FACTOR, self.moved)
                self.factor_text = words("span", "", "share")

    def results(self) -> None:
        """The exact merge and its recipe."""
        with box("section", "card", "aria-labelledby=take"):
            words("h2", "Take it with you").props("id=take")
            words(
                "p",
                "Previews meet the shares on a sample of the weights. The checkpoint is the exact merge, the same "
                "bytes that magmax tune writes.",
                "inside",
            )
            with box("div", "actions"):
                self.make = button("Make the checkpoint", "main-button", self.download)
                self.take = button("Download the recipe", "chip", self.download_recipe)
            self.progress = ui.linear_progress(0.0, show_value=False, size="8px")
            self.progress.props('aria-label="Progress of the exact merge"').classes("progress")
            self.progress.set_visibility(False)
            self.outcome = words("p", "", "inside").props("role=status")
            self.recipe = words("pre", "", "recipe").props('tabindex=0 role=region aria-label="The recipe"')
            words("h3", "On the command line")
            self.command = words("pre", "", "recipe wrapped").props('tabindex=0 role=region aria-label="The command"')

    def list_presets(self) -> None:
        """A button for each preset."""
        self.chips.clear()
        with self.chips:
            self.presets = {n: button(n, "chip", lambda n=n: self.choose(n)) for n in self.tuner.presets}

    @property
    def weights(self) -> list[float]:
        return self.exact or [float(row.slider.value or 0) for row in self.rows]

    @property
    def scaling_factor(self) -> float:
        return round(float(self.factor.value or 0), 4)

    def choose(self, name: str) -> None:
        """Set the sliders to a preset; its weights hold as they are until one is moved."""
        self.exact = self.tuner.presets[name]
        self.ready = False
        for row, weight in zip(self.rows, self.exact, strict=True):
            row.slider.value = round(100 * weight / sum(self.exact))
        self.ready = True
        self.pressed(name)
        self.changed()

    def pressed(self, chosen: str | None) -> None:
        """Show which preset holds."""
        for name, chip in self.presets.items():
            chip.props["aria-pressed"] = str(name == chosen).lower()

    def moved(self, event: Any) -> None:
        """A slider was moved, by hand or by `choose`."""
        if not self.ready:
            return
        if event.sender is not self.factor:
            self.exact = None
            self.pressed(None)
        self.changed()

    def changed(self) -> None:
        """Show what was asked for at once, and see to a preview of it."""
        weights, factor = self.weights, self.scaling_factor
        total = sum(weights)
        for row, weight in zip(self.rows, weights, strict=True):
            row.share.text = percent(weight / total) if total else "…"
        self.factor_text.text = f"{factor:.2f}"
        for chosen in (self.make, self.take):
            chosen.props["disabled"] = not total
        self.asked += 1
        self.main.classes(add="stale")
        if not total:
            self.state.text, self.state_note.text = "…", "give some task a weight"
            return
        self.recipe.text = self.tuner.recipe(weights, factor)
        self.command.text = self.tuner.command(weights, factor)
        self.state.text = "working"
        background_tasks.create(self.follow())

    async def follow(self) -> None:
        """Make a preview of what is asked for, once it has stood still; the newest alone."""
        asked = self.asked
        await asyncio.sleep(PAUSE)
        if asked != self.asked:
            return
        async with LOCK:
            if asked != self.asked or self.main.is_deleted:
                return
            weights, factor = self.weights, self.scaling_factor
            try:
                found = await run.io_bound(self.tuner.preview, weights, factor)
            except MagMaxError as error:
                self.state.text, self.state_note.text = "failed", str(error)
                return
        if found and asked == self.asked and not self.main.is_deleted:
            self.show(found, weights)

    def show(self, found: Preview, weights: Sequence[float]) -> None:
        """The accuracies of a preview, beside those of MagMax."""
        magmax = self.tuner.marks[MAGMAX]
        for number, (row, (title, _)) in enumerate(zip(self.rows, self.tuner.titles, strict=True)):
            share, count = found.tasks[number], found.counts[number]
            told = ", ".join(f"{name} {percent(mark.tasks[number])}" for name, mark in self.tuner.marks.items())
            row.bar.style(f"--v:{share:.4f}")
            row.bar.props["aria-label"] = f"{title}: {percent(share)} of {count} examples; {told}"
            row.value.text = percent(share)
            _change(row.change, share - magmax.tasks[number])
        self.mean.text, self.weighed.text = percent(found.mean), percent(found.weighed(weights))
        self.mean_note.text = f"{100 * (found.mean - magmax.mean):+.1f} to MagMax's own"
        self.weighed_note.text = f"{100 * (found.weighed(weights) - magmax.weighed(weights)):+.1f} to MagMax's own"
        self.state.text = f"{found.seconds:.1f} s"
        self.state_note.text = f"on {sum(found.counts)} examples"
        self.spoken.text = f"Preview: mean accuracy {percent(found.mean)}"
        self.main.classes(remove="stale")

    def store(self) -> None:
        """Keep the preference in the archive."""
        try:
            stored = self.tuner.store(self.name.value or "", self.weights)
        except MagMaxError as error:
            ui.notify(str(error), type="negative", multi_line=True)
            return
        self.name.value = ""
        self.list_presets()
        self.pressed(stored)

    def download_recipe(self) -> None:
        name = "tune.sh" if self.tuner.source.archive else "recipe.yaml"
        ui.download.content(self.tuner.recipe(self.weights, self.scaling_factor), name)

    async def download(self) -> None:
        """Write the exact merge, and hand it to the browser."""
        weights, factor, out = self.weights, self.scaling_factor, self.folder / OUT
        done = [0.0]

        def tell(share: float) -> None:
            done[0] = share

        self.make.props["disabled"] = True
        self.progress.set_visibility(True)
        self.outcome.text = "Merging exactly …"
        watch = ui.timer(0.2, lambda: self.progress.set_value(done[0]))
        try:
            outcome = await run.io_bound(self.tuner.write, weights, factor, out, tell)
        except (MagMaxError, OSError) as error:
            self.outcome.text = f"Not written: {error}"
            return
        finally:
            watch.cancel()
            self.progress.set_visibility(False)
            self.make.props["disabled"] = False
        if outcome and not self.main.is_deleted:
            self.outcome.text = f"{OUT}: {outcome.written_bytes / 1e6:,.1f} MB, exact, in {outcome.seconds:.1f} s."
            ui.download.file(out, OUT)


def _change(element: TextElement, change: float) -> None:
    element.text = f"{100 * change:+.1f}" if abs(change) > 5e-4 else "±0"
    element.classes(remove="up down", add="up" if change > 5e-4 else "down" if change < -5e-4 else "")


LOCK = asyncio.Lock()
"""The encoder has one set of weights: windows take turns."""


def words(tag: str, text: str = "", classes: str = "") -> TextElement:
    """An element that holds text."""
    return TextElement(tag=tag, text=text).classes(classes)


def box(tag: str, classes: str = "", props: str = "") -> ui.element:
    """An element that holds others."""
    return ui.element(tag).classes(classes).props(props)


def button(text: str, classes: str, on_click: Callable[[], Any]) -> TextElement:
    """A button."""
    made = words("button", text, classes).props("type=button")
    made.on("click", on_click, [])
    return made


class Slider(ValueElement[float], component="slider.js"):
    """The browser's own slider: keyboards and screen readers know it (NiceGUI's has its role and its focus apart)."""

    LOOPBACK = False

    def __init__(self, label: str, most: float, step: float, value: float, on_change: Callable[[Any], None]) -> None:
        super().__init__(value=value, on_value_change=on_change, throttle=0.05)
        for name, given in {"min": 0, "max": most, "step": step, "aria-label": label}.items():
            self.props[name] = given
