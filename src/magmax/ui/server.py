"""The page's server: this machine alone, until it is interrupted."""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import warnings
import webbrowser
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from nicegui import ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..errors import MagMaxError
from .page import LOGO_SVG, TunerPage
from .view_model import TunerModel

HOST = "127.0.0.1"


def bind_socket(port: int) -> socket.socket:
    """A socket that listens on loopback; port 0 means any that is free. Raises MagMaxError for one that is not."""
    if not 0 <= port < 1 << 16:
        raise MagMaxError(f"--port is a whole number from 0 (any that is free) to 65535, not {port}")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise MagMaxError(f"port {port} {why}; say --port with another number, or --port 0 for any free one") from error
    return listener


@contextmanager
def _end_on_signals() -> Generator[None]:
    """Leave the block, as on an error, where the process is asked to end; by default it would end at once."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    def end(_number: int, _frame: object) -> None:
        signal.raise_signal(signal.SIGTERM)  # which the server itself knows, and hands on when it has ended

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, leave), signal.SIGHUP: signal.signal(signal.SIGHUP, end)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _PageServer(uvicorn.Server):
    """A server that says where it is once it answers, and that a signal before that ends at once.

    uvicorn itself, asked to end while it starts, skips its shutdown and waits for tasks that go on for ever.
    """

    def __init__(self, config: uvicorn.Config, folder: str, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._folder, self._announce, self._answers = folder, announce, False

    async def main_loop(self) -> None:
        self._answers = True
        self._announce()
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._answers:
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(128 + sig)
        super().handle_exit(sig, frame)


def serve(tuner: TunerModel, listener: socket.socket, open_browser: bool, announce: Callable[[str], None]) -> None:
    """Serve the page until an interruption or SIGTERM; the folder of its checkpoints is removed with it."""
    address = f"http://{HOST}:{listener.getsockname()[1]}"
    with _end_on_signals(), tempfile.TemporaryDirectory(prefix="magmax-ui-", ignore_cleanup_errors=True) as folder:
        # Once more when all threads have ended: a merge that is under way may write until then.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        site = FastAPI(openapi_url=None)
        site.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        ui.run_with(
            site,
            root=lambda: TunerPage(tuner, Path(folder)) and None,
            title="magmax ui",
            favicon=LOGO_SVG.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1),
            dark=None,
            language="en-US",
            tailwind=False,
            show_welcome_message=False,
        )

        def show() -> None:
            announce(f"{address}  (Ctrl-C ends it)")
            if open_browser:
                threading.Timer(0.5, webbrowser.open, [address]).start()

        server = _PageServer(uvicorn.Config(site, log_level="warning", timeout_graceful_shutdown=1), folder, show)
        with suppress(KeyboardInterrupt), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # as NiceGUI looks at every object, torch's too
            server.run(sockets=[listener])
