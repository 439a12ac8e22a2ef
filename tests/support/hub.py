"""A local replacement for the hub: serves a folder's data sets over HTTP with the requests that huggingface_hub makes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit", usedforsecurity=False).hexdigest()


class _Hub(ThreadingHTTPServer):
    def __init__(self, data_sets: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.data_sets = data_sets
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            self._info("/".join(parts[2:4]))
        elif parts[0] == "datasets" and "resolve" in parts:
            name = "/".join(parts[parts.index("resolve") + 2 :])
            if self.command == "GET":
                self.server.asked.append(name)
            self._file(self.server.data_sets / parts[1] / parts[2] / name)
        else:
            self._answer(404, b"", {})

    def _info(self, name: str) -> None:
        folder = self.server.data_sets / name
        if not folder.is_dir():
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": each} for each in files], "tags": [], "private": False}
        self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(data_sets: Path) -> Iterator[tuple[str, list[str]]]:
    """The address for HF_ENDPOINT, and the files requested so far; `data_sets` holds owner/name/files."""
    with _Hub(data_sets) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{hub.server_port}", hub.asked
        finally:
            hub.shutdown()
            thread.join()
