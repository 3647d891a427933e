"""The page's server: this machine alone, until it is interrupted."""

from __future__ import annotations

import atexit
import errno
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
        server = uvicorn.Server(uvicorn.Config(site, log_level="warning", timeout_graceful_shutdown=1))
        announce(f"{address}  (Ctrl-C ends it)")
        if open_browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        with suppress(KeyboardInterrupt), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # as NiceGUI looks at every object, torch's too
            server.run(sockets=[listener])
