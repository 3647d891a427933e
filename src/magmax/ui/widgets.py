"""What the page is built of: elements with text, boxes, buttons, sliders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement
from nicegui.elements.mixins.value_element import ValueElement


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
