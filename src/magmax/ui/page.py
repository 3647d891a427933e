"""The page: sliders in, accuracies out. It draws and listens; `view_model.py` does the work."""

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
from .sources import OUTPUT_NAME
from .view_model import DEFAULT_FACTOR, MAGMAX_PRESET, Preview, TunerModel

PREVIEW_DELAY = 0.15
"""Seconds without a change before a preview is made."""
MAX_FACTOR = 1.5
STYLE = (Path(__file__).parent / "style.css").read_text("utf-8")
LOGO_SVG = (
    '<svg viewBox="0 0 24 24" aria-hidden="true" focusable="false"><path class="b0" d="M4 19V9"/>'
    '<path class="b1" d="M12 19V13"/><path class="b2" d="M20 19V4"/></svg>'
)


def format_percent(share: float) -> str:
    """A share as it is shown."""
    return f"{100 * share:.1f} %"


def format_interval(interval: tuple[float, float]) -> str:
    """A 95 % interval as it is shown."""
    low, high = interval
    return f"95 %: {100 * low:.0f} to {100 * high:.0f} %"


@dataclass(frozen=True)
class SliderRow:
    """The elements of a task's row that change."""

    slider: Slider
    share: TextElement
    bar: ui.element
    value: TextElement
    difference: TextElement
    certainty: TextElement


class TunerPage:
    """One open window."""

    def __init__(self, tuner: TunerModel, folder: Path) -> None:
        self.tuner, self.folder = tuner, Path(tempfile.mkdtemp(dir=folder))
        ui.context.client.on_delete(lambda: shutil.rmtree(self.folder, ignore_errors=True))
        self.preset_weights: list[float] | None = None
        self.request_number = 0
        self.is_ready = False
        self.task_rows: list[SliderRow] = []
        ui.add_css(STYLE)
        with container("main", "page") as self.root:
            self.build_header()
            self.build_tiles()
            self.build_tasks()
            self.build_factor()
            self.build_export()
        self.apply_preset(MAGMAX_PRESET)

    def build_header(self) -> None:
        """Return what is merged, and how it is looked at."""
        context, merges = self.tuner.context, self.tuner.merges
        with container("header"):
            with container("p", "brand"):
                ui.html(LOGO_SVG, sanitize=False, tag="span")
                text_element("span", "magmax")
            text_element("h1", "Tune a merge to what it is for")
            kind = "an archive" if self.tuner.source.archive else "a training"
            text_element(
                "p",
                f"{self.tuner.source.folder}, {kind} of {len(context.tasks)} tasks. Move the sliders: how much of the "
                "merge each task supplies, and how far it goes from the base. The accuracies follow, on a sample of "
                f"{len(self.tuner.examples)} examples ({self.tuner.examples_source}); beside each stands how many "
                "these are, and the interval in which it would be in 95 of 100 such samples.",
                "about",
            )
            text_element("p", f"The task vectors take {merges.nbytes / 1e6:,.1f} MB of memory.", "about small")

    def build_tiles(self) -> None:
        """The means, and the state of the preview."""
        with container("dl", "tiles"):
            self.mean_text, self.mean_note = self.build_tile("mean accuracy")
            self.weighted_mean_text, self.weighted_mean_note = self.build_tile("weighed as preferred")
            self.status_text, self.status_note = self.build_tile("preview")
        self.screen_reader_text = text_element("p", "", "unseen").props("role=status aria-live=polite")

    def build_tile(self, label: str) -> tuple[TextElement, TextElement]:
        with container("div", "tile"):
            text_element("dt", label)
            return text_element("dd", "…", "value"), text_element("dd", "", "note")

    def build_tasks(self) -> None:
        """A row for each task: its slider, and what becomes of its accuracy."""
        with container("section", "card", "aria-labelledby=tasks"):
            text_element("h2", "What each task supplies").props("id=tasks")
            with container("div", "chips", 'role=group aria-label="Preferences to begin with"'):
                self.presets_box = container("span", "chips")
                self.build_presets()
                if self.tuner.source.archive:
                    self.preset_name_input = ui.input(placeholder="name a preset").props(
                        'dense borderless aria-label="Preset name"'
                    )
                    self.preset_name_input.classes("name").on("keydown.enter", self.store_preset)
                    button("Store", "chip", self.store_preset)
            with container("p", "legend"):
                for number, (name, mark) in enumerate(self.tuner.reference_previews.items()):
                    text_element("span", f"{name} {format_percent(mark.mean)}", f"key k{number}")
                text_element("span", "this merge", "key k3")
            with container("div", "heads", "aria-hidden=true"):
                for head in ("task", "share of the merge", "accuracy, and its difference to MagMax"):
                    text_element("span", head)
            for number, (title, inside) in enumerate(self.tuner.task_titles):
                self.task_rows.append(self.build_task(number, title, inside))

    def build_task(self, number: int, title: str, description: str) -> SliderRow:
        with container("div", "task"):
            with container("div", "told"):
                text_element("h3", title)
                text_element("p", description, "inside")
            with container("div", "prefer"):
                slider = Slider(f"Weight of {title}", 100, 1, 0, self.on_slider_move)
                share = text_element("span", "", "share")
            with container("div", "accuracy"):
                with container("div", "bar", "role=img") as bar:
                    container("i", "fill")
                    for place, (name, mark) in enumerate(self.tuner.reference_previews.items()):
                        drawn = container("i", f"mark k{place}").style(f"--v:{mark.task_accuracies[number]:.4f}")
                        drawn.props["title"] = f"{name} {format_percent(mark.task_accuracies[number])}"
                value, change = text_element("span", "…", "value"), text_element("span", "", "change")
                certainty = text_element("span", "", "certainty")
        return SliderRow(slider, share, bar, value, change, certainty)

    def build_factor(self) -> None:
        """The scaling factor."""
        with container("section", "card", "aria-labelledby=strength"):
            text_element("h2", "How far to go").props("id=strength")
            text_element("p", "The scaling factor multiplies what is merged before it is added to the base.", "inside")
            with container("div", "prefer"):
                self.factor_slider = Slider("Scaling factor", MAX_FACTOR, 0.05, DEFAULT_FACTOR, self.on_slider_move)
                self.factor_text = text_element("span", "", "share")

    def build_export(self) -> None:
        """The exact merge and its recipe."""
        with container("section", "card", "aria-labelledby=take"):
            text_element("h2", "Take it with you").props("id=take")
            text_element(
                "p",
                "Previews meet the shares on a sample of the weights. The checkpoint is the exact merge, the same "
                "bytes that magmax tune writes.",
                "inside",
            )
            with container("div", "actions"):
                self.merge_button = button("Make the checkpoint", "main-button", self.download_checkpoint)
                self.recipe_button = button("Download the recipe", "chip", self.download_recipe)
            self.progress_bar = ui.linear_progress(0.0, show_value=False, size="8px")
            self.progress_bar.props('aria-label="Progress of the exact merge"').classes("progress")
            self.progress_bar.set_visibility(False)
            self.result_text = text_element("p", "", "inside").props("role=status")
            self.recipe_text = text_element("pre", "", "recipe").props('tabindex=0 role=region aria-label="The recipe"')
            text_element("h3", "On the command line")
            self.command_text = text_element("pre", "", "recipe wrapped").props(
                'tabindex=0 role=region aria-label="The command"'
            )

    def build_presets(self) -> None:
        """A button for each preset."""
        self.presets_box.clear()
        with self.presets_box:
            self.preset_buttons = {n: button(n, "chip", lambda n=n: self.apply_preset(n)) for n in self.tuner.presets}

    @property
    def weights(self) -> list[float]:
        return self.preset_weights or [float(row.slider.value or 0) for row in self.task_rows]

    @property
    def scaling_factor(self) -> float:
        return round(float(self.factor_slider.value or 0), 4)

    def apply_preset(self, name: str) -> None:
        """Set the sliders to a preset; its weights hold as they are until one is moved."""
        self.preset_weights = self.tuner.presets[name]
        self.is_ready = False
        for row, weight in zip(self.task_rows, self.preset_weights, strict=True):
            row.slider.value = round(100 * weight / sum(self.preset_weights))
        self.is_ready = True
        self.mark_preset(name)
        self.refresh()

    def mark_preset(self, preset: str | None) -> None:
        """Show which preset holds."""
        for name, chip in self.preset_buttons.items():
            chip.props["aria-pressed"] = str(name == preset).lower()

    def on_slider_move(self, event: Any) -> None:
        """A slider was moved, by hand or by `choose`."""
        if not self.is_ready:
            return
        if event.sender is not self.factor_slider:
            self.preset_weights = None
            self.mark_preset(None)
        self.refresh()

    def refresh(self) -> None:
        """Show what was asked for at once, and see to a preview of it."""
        weights, factor = self.weights, self.scaling_factor
        total = sum(weights)
        for row, weight in zip(self.task_rows, weights, strict=True):
            row.share.text = format_percent(weight / total) if total else "…"
        self.factor_text.text = f"{factor:.2f}"
        for chosen in (self.merge_button, self.recipe_button):
            chosen.props["disabled"] = not total
        self.request_number += 1
        self.root.classes(add="stale")
        if not total:
            self.status_text.text, self.status_note.text = "…", "give some task a weight"
            return
        self.recipe_text.text = self.tuner.recipe(weights, factor)
        self.command_text.text = self.tuner.command(weights, factor)
        self.status_text.text = "working"
        background_tasks.create(self.update_preview())

    async def update_preview(self) -> None:
        """Make a preview of what is asked for, once it has stood still; the newest alone."""
        asked = self.request_number
        await asyncio.sleep(PREVIEW_DELAY)
        if asked != self.request_number:
            return
        async with ENCODER_LOCK:
            if asked != self.request_number or self.root.is_deleted:
                return
            weights, factor = self.weights, self.scaling_factor
            try:
                found = await run.io_bound(self.tuner.preview, weights, factor)
            except MagMaxError as error:
                self.status_text.text, self.status_note.text = "failed", str(error)
                return
        if found and asked == self.request_number and not self.root.is_deleted:
            self.show_preview(found, weights)

    def show_preview(self, preview: Preview, weights: Sequence[float]) -> None:
        """The accuracies of a preview, beside those of MagMax."""
        magmax = self.tuner.reference_previews[MAGMAX_PRESET]
        intervals = preview.intervals
        for number, (row, (title, _)) in enumerate(zip(self.task_rows, self.tuner.task_titles, strict=True)):
            share, count = preview.task_accuracies[number], preview.example_counts[number]
            certainty = f"{count} examples, {format_interval(intervals[number])}"
            text = ", ".join(
                f"{name} {format_percent(mark.task_accuracies[number])}"
                for name, mark in self.tuner.reference_previews.items()
            )
            row.bar.style(f"--v:{share:.4f}")
            row.bar.props["aria-label"] = f"{title}: {format_percent(share)} of {certainty}; {text}"
            row.value.text, row.certainty.text = format_percent(share), certainty
            _show_difference(row.difference, share - magmax.task_accuracies[number])
        self.mean_text.text, self.weighted_mean_text.text = (
            format_percent(preview.mean),
            format_percent(preview.weighted_mean(weights)),
        )
        for note, of in ((self.mean_note, [1.0] * len(weights)), (self.weighted_mean_note, weights)):
            change = 100 * (preview.weighted_mean(of) - magmax.weighted_mean(of))
            note.text = f"{format_interval(preview.mean_interval(of))}; {change:+.1f} to MagMax's own"
        self.status_text.text = f"{preview.seconds:.1f} s"
        self.status_note.text = f"on {sum(preview.example_counts)} examples"
        self.screen_reader_text.text = f"Preview: mean accuracy {format_percent(preview.mean)}"
        self.root.classes(remove="stale")

    def store_preset(self) -> None:
        """Keep the preference in the archive."""
        try:
            stored = self.tuner.store_preset(self.preset_name_input.value or "", self.weights)
        except MagMaxError as error:
            ui.notify(str(error), type="negative", multi_line=True)
            return
        self.preset_name_input.value = ""
        self.build_presets()
        self.mark_preset(stored)

    def download_recipe(self) -> None:
        name = "tune.sh" if self.tuner.source.archive else "recipe.yaml"
        ui.download.content(self.tuner.recipe(self.weights, self.scaling_factor), name)

    async def download_checkpoint(self) -> None:
        """Write the exact merge, and hand it to the browser."""
        weights, factor, out = self.weights, self.scaling_factor, self.folder / OUTPUT_NAME
        done = [0.0]

        def tell(share: float) -> None:
            done[0] = share

        self.merge_button.props["disabled"] = True
        self.progress_bar.set_visibility(True)
        self.result_text.text = "Merging exactly …"
        watch = ui.timer(0.2, lambda: self.progress_bar.set_value(done[0]))
        try:
            outcome = await run.io_bound(self.tuner.write_merge, weights, factor, out, tell)
        except (MagMaxError, OSError) as error:
            self.result_text.text = f"Not written: {error}"
            return
        finally:
            watch.cancel()
            self.progress_bar.set_visibility(False)
            self.merge_button.props["disabled"] = False
        if outcome and not self.root.is_deleted:
            self.result_text.text = (
                f"{OUTPUT_NAME}: {outcome.written_bytes / 1e6:,.1f} MB, exact, in {outcome.seconds:.1f} s."
            )
            ui.download.file(out, OUTPUT_NAME)


def _show_difference(element: TextElement, change: float) -> None:
    element.text = f"{100 * change:+.1f}" if abs(change) > 5e-4 else "±0"
    element.classes(remove="up down", add="up" if change > 5e-4 else "down" if change < -5e-4 else "")


ENCODER_LOCK = asyncio.Lock()
"""The encoder has one set of weights: windows take turns."""


def text_element(tag: str, text: str = "", classes: str = "") -> TextElement:
    """An element that holds text."""
    return TextElement(tag=tag, text=text).classes(classes)


def container(tag: str, classes: str = "", props: str = "") -> ui.element:
    """An element that holds others."""
    return ui.element(tag).classes(classes).props(props)


def button(text: str, classes: str, on_click: Callable[[], Any]) -> TextElement:
    """A button."""
    element = text_element("button", text, classes).props("type=button")
    element.on("click", on_click, [])
    return element


class Slider(ValueElement[float], component="slider.js"):
    """The browser's own slider: keyboards and screen readers know it (NiceGUI's has its role and its focus apart)."""

    LOOPBACK = False

    def __init__(self, label: str, maximum: float, step: float, value: float, on_change: Callable[[Any], None]) -> None:
        super().__init__(value=value, on_value_change=on_change, throttle=0.05)
        for name, attribute in {"min": 0, "max": maximum, "step": step, "aria-label": label}.items():
            self.props[name] = attribute
