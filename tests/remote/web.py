"""A small web server of files: with ranges or without, one that breaks off, one that lies, one whose files change."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class WebServer:
    """What the server holds and how it behaves.

    Attributes:
        files: path -> content.
        requests: path and range of every request.
        supports_ranges: whether it can send a part of a file.
        broken_answers: of how many answers it breaks off in the middle, each the first to its question; -1 for all.
        answers_before_break: how many requests are answered well before that.
        busy_answers: how many requests get status 503.
        range_error: "more", "fewer" or "elsewhere": what it sends instead of what was asked.
        seconds_per_byte: how long it waits before each byte of an answer; for a silent one, before any.
        on_request: called before each answer with the number of requests so far.
    """

    files: dict[str, bytes]
    requests: list[tuple[str, str]] = field(default_factory=list)
    supports_ranges: bool = True
    broken_answers: int = 0
    answers_before_break: int = 0
    busy_answers: int = 0
    range_error: str = ""
    seconds_per_byte: float = 0.0
    on_request: Any = None
    bytes_sent: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class WebHandler(BaseHTTPRequestHandler):
    web: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        web, path = self.web, urlsplit(self.path).path
        with web.lock:
            asked = self.headers.get("Range", "")
            first = (path, asked) not in web.requests
            web.requests.append((path, asked))
            number = len(web.requests)
            if web.on_request:
                web.on_request(number)
            busy = web.busy_answers > 0
            web.busy_answers -= busy
            broken = number > web.answers_before_break and (
                web.broken_answers < 0 or (web.broken_answers > 0 and first)
            )
            web.broken_answers -= broken and web.broken_answers > 0
        if busy:
            return self.send_answer(503, b"", {})
        if path not in web.files:
            return self.send_answer(404, b"", {})
        whole = web.files[path]
        headers = {"ETag": f'"{hashlib.sha256(whole).hexdigest()[:16]}"'}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if not web.supports_ranges or not found:
            return self.send_answer(200, whole, headers)
        begin, end = int(found[1]), min(int(found[2]) + 1, len(whole))
        if begin >= len(whole):
            return self.send_answer(416, b"", {"Content-Range": f"bytes */{len(whole)}"})
        if begin > 0 and web.range_error:
            end = {"more": end + 7, "fewer": end - 3}.get(web.range_error, end)
            begin += web.range_error == "elsewhere"
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(whole)}"
        return self.send_answer(206, whole[begin:end], headers, broken)

    def send_answer(self, status: int, content: bytes, headers: dict[str, str], broken: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = content[: len(content) // 2] if broken else content
        with self.web.lock:
            self.web.bytes_sent += len(sent)
        try:
            if self.web.seconds_per_byte:
                for byte in sent:
                    time.sleep(self.web.seconds_per_byte)
                    self.wfile.write(bytes([byte]))
            else:
                self.wfile.write(sent)
        except ConnectionError:
            self.close_connection = True
        self.close_connection = self.close_connection or broken


@contextmanager
def serve_files(web: WebServer) -> Iterator[WebServer]:
    """The server in a thread of its own, at 127.0.0.1 and a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("WebHandler", (WebHandler,), {"web": web}))
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
