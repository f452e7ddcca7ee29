"""The part of Hugging Face's hub that huggingface_hub asks for one model, on this
machine: files to download, and a commit of uploaded ones.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
from typing import Any

COMMIT = "a" * 40


class HubServer(http.server.ThreadingHTTPServer):
    """`models`: id -> file -> content; `visibility`: of those that were made here."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str] = {}
        self.downloads: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes = b"", status: int = 200, send_body: bool = True, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_file(send_body=False)

    def do_GET(self) -> None:
        self.send_file(send_body=True)

    def send_file(self, send_body: bool) -> None:
        owner, name, resolve, _, file = [*self.path.strip("/").split("/", 4), "", "", "", ""][:5]
        files = self.server.models.get(f"{owner}/{name}")
        if files is None or resolve != "resolve" or file not in files:
            error = "RepoNotFound" if files is None else "EntryNotFound"
            self.answer(status=404, send_body=send_body, X_Error_Code=error, X_Repo_Commit=COMMIT)
            return
        if send_body:
            self.server.downloads.append(file)
        body = files[file]
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        self.answer(body, send_body=send_body, ETag=etag, X_Repo_Commit=COMMIT)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.read_chunks()
        self.answer(json.dumps(self.obey(body)).encode(), Content_Type="application/json")

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def obey(self, body: bytes) -> Any:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.models.setdefault(name, {})
            self.server.visibility[name] = asked.get("visibility") or str(asked.get("private"))
            return {"url": f"{self.server.url}/{name}"}
        if parts[1:] == ["validate-yaml"]:
            return {"errors": [], "warnings": []}
        if parts[4:5] == ["preupload"]:
            files = json.loads(body)["files"]
            return {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files
                ]
            }
        assert parts[4:5] == ["commit"], self.path
        name = "/".join(parts[2:4])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.models[name][line["value"]["path"]] = content
        return {
            "commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}",
            "commitOid": COMMIT,
            "success": True,
        }

    def log_message(self, *args: Any) -> None:
        pass
