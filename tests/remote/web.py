"""A small web server of files: with ranges or without, one that breaks off, one that lies, one whose files change."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Web:
    """What the server holds and how it behaves.

    Attributes:
        files: path -> content.
        asked: path and range of every request.
        ranges: whether it can send a part of a file.
        breaks: of how many answers it breaks off in the middle, each the first to its question; -1 for all.
        spared: how many requests are answered well before that.
        busy: how many requests get status 503.
        lie: "more", "fewer" or "elsewhere": what it sends instead of what was asked.
        after: called before each answer with the number of requests so far.
    """

    files: dict[str, bytes]
    asked: list[tuple[str, str]] = field(default_factory=list)
    ranges: bool = True
    breaks: int = 0
    spared: int = 0
    busy: int = 0
    lie: str = ""
    after: Any = None
    sent: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        web, path = self.web, urlsplit(self.path).path
        with web.lock:
            asked = self.headers.get("Range", "")
            first = (path, asked) not in web.asked
            web.asked.append((path, asked))
            number = len(web.asked)
            if web.after:
                web.after(number)
            busy = web.busy > 0
            web.busy -= busy
            broken = number > web.spared and (web.breaks < 0 or (web.breaks > 0 and first))
            web.breaks -= broken and web.breaks > 0
        if busy:
            return self.answer(503, b"", {})
        if path not in web.files:
            return self.answer(404, b"", {})
        whole = web.files[path]
        headers = {"ETag": f'"{hashlib.sha256(whole).hexdigest()[:16]}"'}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if not web.ranges or not found:
            return self.answer(200, whole, headers)
        begin, end = int(found[1]), min(int(found[2]) + 1, len(whole))
        if begin >= len(whole):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(whole)}"})
        if begin > 0 and web.lie:
            end = {"more": end + 7, "fewer": end - 3}.get(web.lie, end)
            begin += web.lie == "elsewhere"
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(whole)}"
        return self.answer(206, whole[begin:end], headers, broken)

    def answer(self, status: int, content: bytes, headers: dict[str, str], broken: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = content[: len(content) // 2] if broken else content
        with self.web.lock:
            self.web.sent += len(sent)
        try:
            self.wfile.write(sent)
        except ConnectionError:
            self.close_connection = True
        self.close_connection = self.close_connection or broken


@contextmanager
def served(web: Web) -> Iterator[Web]:
    """The server in a thread of its own, at 127.0.0.1 and a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("WebHandler", (Handler,), {"web": web}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
