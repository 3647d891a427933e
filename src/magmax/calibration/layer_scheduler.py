"""Pieces of work that go on in turns, so that a decision about all of them can fall while each is half done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any


class _StopCoroutine(BaseException):
    """Raised inside a piece of work that is not to go on."""


class LayerCoroutine:
    """One piece of work. Its thread is used as a coroutine: it runs only inside `resume`.

    Attributes:
        number: which of the pieces it is.
        waits_with: what it gave to `wait`, while it waits.
        waiting: whether it waits; it is not begun, or ended, otherwise.
    """

    def __init__(self, number: int, work: Callable[[], None]) -> None:
        self.number, self.waiting = number, False
        self.waits_with: Any = None
        self._work, self._stopped = work, False
        self._error: BaseException | None = None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        context = copy_context()
        self._thread = threading.Thread(target=lambda: context.run(self._run), name=f"turn {number}", daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Run until the work waits again or ends; raises what it raised."""
        self.waiting = False
        self._mine.release()
        self._theirs.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the work where it stands."""
        self._stopped = True
        self._mine.release()
        self._thread.join()

    def wait(self, value: Any) -> None:
        """Called by the work itself: hand over, until it is its turn again."""
        self.waits_with, self.waiting = value, True
        self._theirs.release()
        self._mine.acquire()
        if self._stopped:
            raise _StopCoroutine

    def is_running(self) -> bool:
        """Return whether the caller is this work."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        self._mine.acquire()
        try:
            if not self._stopped:
                self._work()
        except _StopCoroutine:
            pass
        except BaseException as error:
            self._error = error
        self._theirs.release()


class LayerScheduler:
    """Pieces of work of which one runs at a time, each until it waits.

    Args:
        decide: given all that wait, what is to be known of them is found out, and those that go on are returned.
    """

    def __init__(self, decide: Callable[[list[LayerCoroutine]], Sequence[LayerCoroutine]]) -> None:
        self._decide, self._turns = decide, list[LayerCoroutine]()

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        """Do all of it, in turns that depend on nothing but `decide`; the first error stops everything."""
        try:
            self._turns = [LayerCoroutine(number, work) for number, work in enumerate(works)]
            for turn in self._turns:
                turn.resume()
            while waiting := [turn for turn in self._turns if turn.waiting]:
                for turn in self._decide(waiting):
                    turn.resume()
        finally:
            for turn in self._turns:
                turn.stop()
            self._turns = []

    def wait(self, value: Any) -> None:
        """Called by a piece of work: wait with this value for a decision."""
        next(turn for turn in self._turns if turn.is_running()).wait(value)
