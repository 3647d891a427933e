"""A window of a browser that listens, and the sizes and findings that the tests of pages agree on."""

from __future__ import annotations

from typing import Any

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SERIOUS_IMPACTS = ("serious", "critical")


class BrowserWindow:
    """A page in a window, with everything it said and asked for."""

    def __init__(self, context: Any, url: str) -> None:
        self.page = context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda socket: self.requests.append(socket.url))
        self.url = url
        self.page.goto(url)

    def run_axe(self) -> tuple[list[Any], int]:
        """What axe, which the page has by now, finds that is serious, and how many of its rules the page passes."""
        found = self.page.evaluate("axe.run(document)")
        serious = [
            (each["id"], each["help"], [node["html"][:160] for node in each["nodes"]][:3])
            for each in found["violations"]
            if each["impact"] in SERIOUS_IMPACTS
        ]
        return serious, len(found["passes"])
