"""Progress, told by the functions that work and drawn by whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class ProgressCallback(Protocol):
    """A callback that receives how many of how many steps are done, and a short note."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


BarFactory = Callable[[str], ProgressCallback]
"""Opens a bar with this title and returns what moves it."""


def no_progress(done: int, total: int, note: str = "") -> None:
    """Draws nothing."""


def no_bars(title: str) -> ProgressCallback:
    """Opens nothing."""
    return no_progress


@contextmanager
def bars() -> Iterator[BarFactory]:
    """Bars on stderr with the time left; where stderr is no terminal, a line for each finished one."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=14),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def new_bar(title: str) -> ProgressCallback:
            began = time.monotonic()
            bar = progress.add_task(title, total=None, note="")

            def tell(done: int, total: int, note: str = "") -> None:
                progress.update(bar, completed=done, total=total, note=note)
                if done == total and not console.is_terminal:
                    seconds = time.monotonic() - began
                    console.print(f"{title}: {seconds:.0f} s {note}".rstrip(), highlight=False)

            return tell

        yield new_bar
