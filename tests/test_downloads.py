"""Servers that answer wrongly, slowly or with bad intent: never a wrong file under the
final name, never an endless wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pathlib
import random
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import torch

from checkpoint_io import downloads, url_download, urls
from errors import UserError

pytestmark = pytest.mark.usefixtures("hub")

BODY = random.Random(2).randbytes(1000)
HASH = hashlib.sha256(BODY).hexdigest()[:8]
OK, REST = "HTTP/1.1 200 OK", "HTTP/1.1 206 Partial Content"


def answer(*head: str, body: bytes = b"") -> bytes:
    return "\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1") + body


FIRST_PART = answer(OK, "Content-Length: 1000", 'ETag: "1"', body=BODY[:400])  # cut
WHOLE = answer(OK, "Content-Length: 1000", 'ETag: "1"', body=BODY)


class Script:
    """A server that gives one prepared answer (bytes, or a function of the connection)
    a request, the last for ever.
    """

    def __init__(self) -> None:
        self.answers: list[bytes | Callable[[socket.socket], None]] = []
        self.requests: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.handle, args=(connection,), daemon=True).start()

    def handle(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += connection.recv(65536)
            self.requests.append(asked.decode("latin-1"))
            said = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if callable(said):
                said(connection)
            else:
                connection.sendall(said)


@pytest.fixture
def server() -> Iterator[Script]:
    script = Script()
    yield script
    script.listener.close()


def final_files(hub: pathlib.Path) -> list[str]:
    return [
        path.name
        for path in hub.rglob("*")
        if path.is_file() and path.suffix not in (".lock", ".part", ".from")
    ]


@pytest.mark.parametrize(
    "head",
    [
        ["Content-Range: bytes 0-599/1000", "Content-Length: 600"],  # wrong start
        ["Content-Range: bytes 400-899/1000", "Content-Length: 500"],  # wrong end
        ["Content-Range: bytes 400-1099/1100", "Content-Length: 700"],  # another length than it was
        ["Content-Range: bytes 400-999/1000", "Content-Length: 599"],
        ["Content-Range: 400-999", "Content-Length: 600"],
        ["Content-Length: 600", 'ETag: "2"'],  # another file
        ["Content-Length: 599"],
    ],
)
def test_a_206_with_another_part_is_not_put_behind_the_first(server: Script, head: list[str]) -> None:
    server.answers = [FIRST_PART, answer(REST, *head, body=b"x" * 700), WHOLE]
    assert downloads.fetch(f"{server.url}/w.pth").read_bytes() == BODY
    assert "Range: bytes=400-" in server.requests[1] and 'If-Range: "1"' in server.requests[1]
    assert "Range:" not in server.requests[2]


def test_the_right_206_is_used(server: Script) -> None:
    rest = answer(
        REST, "Content-Range: bytes 400-999/1000", "Content-Length: 600", 'ETag: "1"', body=BODY[400:]
    )
    server.answers = [FIRST_PART, rest]
    assert downloads.fetch(f"{server.url}/w.pth").read_bytes() == BODY


def test_without_a_version_or_a_hash_a_file_is_not_resumed(server: Script) -> None:
    first = answer(OK, "Content-Length: 1000", body=b"y" * 400)
    server.answers = [first, WHOLE]
    assert downloads.fetch(f"{server.url}/w.pth").read_bytes() == BODY
    assert "Range:" not in server.requests[1]


def weights(form: str) -> bytes:
    tensors, file = {"w": torch.arange(300.0)}, io.BytesIO()
    if form == "safetensors":
        return safetensors.torch.save(tensors)
    torch.save(tensors, file)
    return file.getvalue()


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_without_a_length_only_what_is_seen_to_be_whole_is_kept(
    server: Script, hub: pathlib.Path, form: str
) -> None:
    body = weights(form)
    for cut in (body[:-200], BODY):
        server.answers = [answer(OK, body=cut)]
        with pytest.raises(UserError, match="is incomplete"):
            downloads.fetch(f"{server.url}/w.{form}")
        assert not final_files(hub)
    server.answers = [answer(OK, body=body)]
    assert downloads.fetch(f"{server.url}/w.{form}").read_bytes() == body


def test_a_cut_in_chunks_is_no_end(server: Script, hub: pathlib.Path) -> None:
    server.answers = [answer(OK, "Transfer-Encoding: chunked", body=b"190\r\n" + BODY[:400] + b"\r\n")]
    with pytest.raises(UserError, match="cannot download"):
        downloads.fetch(f"{server.url}/w.pth")
    assert not final_files(hub)
    server.answers = [answer(OK, "Transfer-Encoding: chunked", body=b"3e8\r\n" + BODY + b"\r\n0\r\n\r\n")]
    assert downloads.fetch(f"{server.url}/w.pth").read_bytes() == BODY


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (answer(OK, "Content-Length: 1000", "Content-Encoding: gzip", body=BODY), "compressed"),
        (answer(OK, "Content-Length: 0"), "empty"),
        (answer(OK, "Content-Length: 6", "Content-Type: text/html", body=b"<html>"), "a web page"),
        (answer(OK, "Content-Length: 900000000000000", body=BODY), "make room"),
        (answer(OK, f"Content-Length: {'9' * 5000}", body=BODY), "not a number"),
        (
            answer(REST, "Content-Range: bytes 0-999/1000", "Content-Length: 1000", body=BODY),
            "a part of the file",
        ),
        (answer("HTTP/1.1 204 No Content"), "answers 204"),
        (answer("HTTP/1.1 302 Found", "Location: /w.pth"), "infinite loop"),
        (answer("HTTP/1.1 302 Found", "Location: http://example.com/w.pth"), "tampered"),
        (answer("HTTP/1.1 302 Found", "Location: file:///etc/passwd"), "passwd"),
        (b"garbage\r\n\r\n", "cannot download"),
    ],
)
def test_answers_that_are_refused(server: Script, hub: pathlib.Path, said: bytes, expected: str) -> None:
    server.answers = [said]
    with pytest.raises(UserError, match=expected):
        downloads.fetch(f"{server.url}/w.pth")
    assert not final_files(hub)
    assert "accept-encoding: identity" in server.requests[0].lower()


def test_https_is_not_left_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEIT_ALLOW_HTTP", "1")
    request = urllib.request.Request("https://example.com/w.pth")
    with pytest.raises(UserError, match="tampered"):
        urls.SafeRedirects().redirect_request(request, None, 302, "Found", {}, "http://127.0.0.1/w.pth")


def test_a_password_goes_where_the_url_goes(server: Script) -> None:
    other = Script()
    server.answers = [answer("HTTP/1.1 302 Found", "Location: /x.pth"), WHOLE]
    assert downloads.fetch(server.url.replace("//", "//user:pw@") + "/w.pth").read_bytes() == BODY
    assert all("Authorization: Basic dXNlcjpwdw==" in request for request in server.requests)
    other.answers = [WHOLE]
    server.answers = [answer("HTTP/1.1 302 Found", f"Location: {other.url.replace('//', '//a:b@')}/y.pth")]
    assert downloads.fetch(server.url.replace("//", "//user:pw@") + "/z.pth").read_bytes() == BODY
    assert "Authorization" not in other.requests[0]
    other.listener.close()


@pytest.mark.parametrize(
    "head", [b"", answer(OK, "Content-Length: 1000"), answer(OK, "Transfer-Encoding: chunked")]
)
def test_a_server_that_trickles_is_left(server: Script, head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def trickle(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b"1")
            time.sleep(0.02)

    monkeypatch.setattr(url_download, "TIMEOUT", 0.3)
    server.answers = [trickle]
    with pytest.raises(UserError, match=r"sent nothing for|sends only"):
        downloads.fetch(f"{server.url}/w.pth")


@pytest.mark.parametrize(
    "path",
    ["%2e%2e%2f%2e%2e%2fx.pth", "..%5c..%5cx.pth", "x%00%1b.pth", "é" * 300 + ".pth", "x y\u202e\udcff.pth"],
)
def test_names_in_urls_stay_names(server: Script, hub: pathlib.Path, path: str) -> None:
    server.answers = [WHOLE]
    found = downloads.fetch(f"{server.url}/{path}")
    assert found.parent.parent == hub and found.suffix == ".pth" and found.read_bytes() == BODY
    assert found.name.isprintable()


@pytest.mark.parametrize(
    "url", ["https://", "https://u:a/SECRET@h/w.pth", "https://[::1/w.pth", "https://h:99999/w.pth"]
)
def test_what_is_no_url_is_said_to_be_none(url: str) -> None:
    with pytest.raises(UserError, match="no URL that can be read") as error:
        downloads.fetch(url)
    assert "SECRET" not in str(error.value)


def test_without_locks_two_downloads_do_not_mix(
    server: Script, hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(connection: socket.socket) -> None:
        for start in range(0, len(WHOLE), 100):
            connection.sendall(WHOLE[start : start + 100])
            time.sleep(0.02)

    monkeypatch.setattr(downloads, "fcntl", None)
    monkeypatch.setattr(os, "getpid", threading.get_ident)
    server.answers = [slowly]
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(downloads.fetch(f"{server.url}/w-{HASH}.pth")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [BODY] * 3
    assert not list(hub.rglob("*.part"))
