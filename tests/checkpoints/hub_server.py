"""A small server that answers as the Hugging Face hub does: listings, redirects, etags, ranges, refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 2000
"""From this many bytes on a file is redirected to another host, as the hub does with large files."""


@dataclass
class Repository:
    """A model: its commits, and which of them each branch or tag names."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False


@dataclass
class HubState:
    """The state of the server: its models, what it was asked, and how its next download breaks off."""

    repositories: dict[str, Repository]
    requests: list[tuple[str, str]] = field(default_factory=list)
    cut_after: int | None = None

    def downloads(self) -> list[str]:
        """The files that were asked for."""
        return sorted({path.rpartition("/")[2] for _, path in self.requests if "/resolve/" in path})


class HubHandler(BaseHTTPRequestHandler):
    hub: HubState
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.handle_request()

    def do_HEAD(self) -> None:
        self.handle_request()

    def log_message(self, *_: Any) -> None:
        pass

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[0] == "large":
            return self.send(self.find_content(parts[1]), {"ETag": f'"{parts[1]}"'})
        api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.send_refusal(401 if api else 404, "RepoNotFound")
        verb, revision, *inside = rest or ["revision", "main"]
        file = "/".join(inside)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self.send_refusal(404, "RevisionNotFound")
        files = repository.commits[commit]
        if verb == "revision":
            about = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "downloads": 0}
            return self.send_json(about | {"siblings": [{"rfilename": file} for file in files]})
        if verb == "tree":
            return self.send_json([self.file_entry(file, content) for file, content in files.items()])
        if repository.gated:
            return self.send_refusal(403, "GatedRepo")
        if file not in files:
            return self.send_refusal(404, "EntryNotFound")
        return self.send_file(files[file], commit)

    def send_file(self, content: bytes, commit: str) -> None:
        digest = hashlib.sha256(content).hexdigest()
        if len(content) < LARGE_BYTES:
            return self.send(content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        port = self.headers["Host"].rpartition(":")[2]
        return self.send(b"", headers | {"Location": f"http://localhost:{port}/large/{digest}"}, 302)

    def find_content(self, digest: str) -> bytes:
        every = [c for r in self.hub.repositories.values() for files in r.commits.values() for c in files.values()]
        return next(content for content in every if hashlib.sha256(content).hexdigest() == digest)

    def file_entry(self, file: str, content: bytes) -> dict[str, Any]:
        told = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if len(content) < LARGE_BYTES:
            return told
        return told | {
            "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130},
        }

    def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            content, status = content[start:], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut_after is not None and len(content) > self.hub.cut_after:
            self.wfile.write(content[: self.hub.cut_after])
            self.close_connection = True
            self.hub.cut_after = None
            return
        self.wfile.write(content)

    def send_json(self, content: Any) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_refusal(self, status: int, code: str) -> None:
        self.send(b"", {"X-Error-Code": code, "X-Error-Message": f"{code}, says the server"}, status)


def start_server(hub: HubState) -> ThreadingHTTPServer:
    """A server in a thread of its own, at 127.0.0.1 and a free port."""
    handler = type("HubHandler", (HubHandler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
