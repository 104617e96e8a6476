"""A hub in a thread: as much of Hugging Face's HTTP interface as fetching a model needs.

GET  /api/models/{owner}/{name}/revision/{revision}   the commit
GET  /api/models/{owner}/{name}/tree/{commit}         the files, with sizes and hashes
HEAD, GET  /{owner}/{name}/resolve/{commit}/{file}    a file, whole or from a byte on
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    """What the server has and does, changed by tests while it runs; and what it was asked."""

    repositories: dict[str, dict[str, bytes]]
    revisions: tuple[str, ...] = ("main", COMMIT)
    gated: bool = False
    cut: dict[str, int] = dataclasses.field(default_factory=dict)  # file: bytes to send of it
    damaged: tuple[str, ...] = ()
    sent: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)  # file, from, bytes
    url: str = ""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self.describe(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(*match.groups())
        else:
            self.refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")

    def refuse(self, status: HTTPStatus, code: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def knows(self, repository: str, revision: str | None) -> bool:
        """Whether there is such a revision; refuses it, if not."""
        if repository not in self.hub.repositories:
            self.refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        elif self.hub.gated:
            self.refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        elif revision not in (None, *self.hub.revisions):
            self.refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        else:
            return True
        return False

    def describe(self, repository: str, what: str | None, revision: str | None) -> None:
        if not self.knows(repository, revision):
            return
        files = self.hub.repositories[repository]
        if what == "tree":
            content = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(body),
                    "oid": hashlib.sha1(body).hexdigest(),
                }
                | ({"lfs": lfs(body)} if name.endswith(".safetensors") else {})
                for name, body in files.items()
            ]
        else:
            content = {
                "id": repository,
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in files],
            }
        body = json.dumps(content).encode()
        self.answer(HTTPStatus.OK, body, {"Content-Type": "application/json"})

    def send_file(self, repository: str, revision: str, name: str) -> None:
        if not self.knows(repository, revision):
            return
        body = self.hub.repositories[repository].get(name)
        if body is None:
            self.refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")
            return
        large = name.endswith(".safetensors")
        headers = {
            "ETag": f'"{sha256(body) if large else hashlib.sha1(body).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status, start = HTTPStatus.OK, 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = HTTPStatus.PARTIAL_CONTENT, int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if name in self.hub.damaged:
            body = body[:-1] + bytes([body[-1] ^ 1])
        part = body[start:]
        headers["Content-Length"] = str(len(part))
        if self.command == "GET":
            if name in self.hub.cut:
                part = part[: self.hub.cut[name]]
                self.close_connection = True
            self.hub.sent.append((name, start, len(part)))
        self.answer(status, part, headers)


def lfs(body: bytes) -> dict[str, object]:
    """How a large file is described: by its content's hash, not by git's."""
    return {"oid": sha256(body), "size": len(body), "pointerSize": 134}


@contextlib.contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """Runs a hub that has these files of these repositories."""
    hub = Hub(repositories)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
