"""A server on this machine whose answers break off, change or tarry as a test asks."""

from __future__ import annotations

import hashlib
import http.server
import random
import re
import time
from typing import Any

BODY = random.Random(1).randbytes(3_000_000)
HASH = hashlib.sha256(BODY).hexdigest()[:8]
assert re.search("[a-f]", HASH)  # else no name could carry it


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY, or what `bodies` has for a path, under every path that ends in .pth;
    `break_after`: after how many bytes each answer breaks off.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        self.bodies: dict[str, bytes] = {}
        self.break_after: list[int] = []
        self.ranges = True
        self.etag = '"1"'
        self.pause = 0.0  # seconds before the body
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        if not self.path.split("?")[0].endswith(".pth"):
            self.send_error(404)
            return
        body = self.server.bodies.get(self.path, BODY)
        unchanged = self.headers.get("If-Range") in (None, self.server.etag)
        start = (
            int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges and unchanged else 0
        )
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        time.sleep(self.server.pause)
        end = start + self.server.break_after.pop(0) if self.server.break_after else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *args: Any) -> None:
        pass
