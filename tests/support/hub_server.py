"""A hub on loopback: its API, and its storage on another host and port to which files redirect."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

MODEL = "owner/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"
LARGE = (".safetensors", ".gguf", "tokenizer.json")
"""Files in the storage; others come from the hub itself."""


@dataclass(frozen=True)
class Request:
    """`host` is "hub" or "storage"; `path` that of the file, or of the API; `range` [begin, end) or None."""

    host: str
    method: str
    path: str
    range: tuple[int, int] | None
    token: str | None


@dataclass(frozen=True)
class Answer:
    """Instead of the file: a status; or the file, cut after `cut` bytes, or with other headers, or whole."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    ignore_range: bool = False


Fault = Callable[[Request], Answer | None]


class HubServer:
    """Serves the files of `folder` as `MODEL` at `COMMIT`, which branch main names.

    `fault` decides what a request gets instead of what it should; `requests` are all so far, `sent` counts bytes of
    files by path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = COMMIT
        self.gated = self.private = False
        self.fault: Fault = lambda request: None
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._digests: dict[Path, tuple[int, str]] = {}
        self._hub = _Server(("127.0.0.1", 0), _handler(self, "hub"))
        self._storage = _Server(("127.0.0.1", 0), _handler(self, "storage"))
        self.url = f"http://localhost:{self._hub.server_address[1]}"
        self.storage_url = f"http://127.0.0.1:{self._storage.server_address[1]}"
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            for server in (self._hub, self._storage)
        ]
        for thread in self._threads:
            thread.start()

    def environment(self, cache: Path) -> dict[str, str]:
        """For a process that is to use this hub, with its cache in `cache`."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}

    def use(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same for this process, in which huggingface_hub has read its environment already."""
        from huggingface_hub import constants

        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    @property
    def total(self) -> int:
        """Bytes of files sent."""
        return sum(self.sent.values())

    def forget(self) -> None:
        """Forget requests and counts."""
        self.requests.clear()
        self.sent.clear()

    def hang_up(self) -> None:
        """End every connection."""
        for server in (self._hub, self._storage):
            server.hang_up()

    def close(self) -> None:
        for server in (self._hub, self._storage):
            server.shutdown()
            server.hang_up()
            server.server_close()
        for thread in self._threads:
            thread.join()

    def files(self) -> Iterator[str]:
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                yield str(path.relative_to(self.folder))

    def digest(self, name: str) -> str:
        path = self.folder / name
        mtime = path.stat().st_mtime_ns
        known = self._digests.get(path)
        if known is None or known[0] != mtime:
            make = hashlib.sha256 if name.endswith(LARGE) else hashlib.sha1
            known = self._digests[path] = (mtime, make(path.read_bytes()).hexdigest())
        return known[1]

    def count(self, request: Request, nbytes: int) -> None:
        with self._lock:
            self.sent[request.path] += nbytes

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)


@contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    server = HubServer(folder)
    try:
        yield server
    finally:
        server.close()


class _Server(ThreadingHTTPServer):
    request_queue_size = (
        128  # with the default of 5, a client that opens more connections at a time waits a second
    )
    daemon_threads = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End every connection, and with it its thread, which `server_close` waits for."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are expected."""


def _handler(server: HubServer, host: str) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"hub": server, "host": host})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, for the sake of small files
    disable_nagle_algorithm = True
    hub: HubServer
    host: str

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if self.host == "storage":
            request = self._request(path.partition("/")[2])
            self._file(request, {"ETag": f'"{self.hub.digest(request.path)[:32]}"'})
        elif path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/"))
        else:
            self._resolve(path)

    def _request(self, path: str) -> Request:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        token = self.headers.get("Authorization")
        request = Request(
            self.host, self.command, path, (int(match[1]), int(match[2]) + 1) if match else None, token
        )
        self.hub.record(request)
        return request

    def _known(self, model: str, revision: str) -> bool:
        """Whether there is such a model and revision; answers if not."""
        if model != MODEL or (self.hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._answer(404 if self.headers.get("Authorization") else 401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.hub.commit):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _api(self, path: str) -> None:
        if "/tree/" in path:
            self._tree(path)
            return
        model, _, revision = path.partition("/revision/")
        request = self._request(path)
        if (answer := self.hub.fault(request)) is not None and answer.status is not None:
            self._answer(answer.status, answer.headers)
            return
        if not self._known(model, revision or "main"):
            return
        siblings = []
        for name in self.hub.files():
            digest, size = self.hub.digest(name), (self.hub.folder / name).stat().st_size
            entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": digest[:40]}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            siblings.append(entry)
        body = json.dumps({"id": model, "sha": self.hub.commit, "siblings": siblings}).encode()
        self._answer(200, {"Content-Type": "application/json"}, body)

    def _tree(self, path: str) -> None:
        self._request(path)
        entries = []
        for name in self.hub.files():
            digest, size = self.hub.digest(name), (self.hub.folder / name).stat().st_size
            entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": digest[:40]}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
            entries.append(entry)
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    def _resolve(self, path: str) -> None:
        model, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        request = self._request(name)
        if (answer := self.hub.fault(request)) is not None and answer.status is not None:
            self._answer(answer.status, answer.headers)
            return
        if not self._known(model, revision):
            return
        if self.hub.gated:
            self._answer(403, {"X-Error-Code": "GatedRepo"})
        elif not (self.hub.folder / name).is_file():
            self._answer(404, {"X-Error-Code": "EntryNotFound"})
        elif name.endswith(LARGE):
            digest = self.hub.digest(name)
            size = (self.hub.folder / name).stat().st_size
            headers = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(size)}
            headers["Location"] = f"{self.hub.storage_url}/{digest}/{name}?signature=x"
            self._answer(302, {"X-Repo-Commit": self.hub.commit, **headers})
        else:
            self._file(request, {"ETag": f'"{self.hub.digest(name)}"', "X-Repo-Commit": self.hub.commit})

    def _file(self, request: Request, headers: dict[str, str]) -> None:
        answer = self.hub.fault(request) or Answer()
        if answer.status is not None:
            self._answer(answer.status, answer.headers)
            return
        path = self.hub.folder / request.path
        size = path.stat().st_size
        begin, end, status = 0, size, 200
        if request.range is not None and not answer.ignore_range:
            begin, end, status = request.range[0], min(request.range[1], size), 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
            if begin >= size:
                self._answer(416, {"Content-Range": f"bytes */{size}"})
                return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(end - begin), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method == "HEAD":
            return
        if answer.cut is not None:
            end = min(end, begin + answer.cut)
            self.close_connection = True
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end:
                block = file.read(min(1 << 20, end - begin))
                self.hub.count(request, len(block))  # before the client can have them
                try:
                    self.wfile.write(block)
                    self.wfile.flush()
                except ConnectionError:
                    self.close_connection = True
                    return
                begin += len(block)

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
