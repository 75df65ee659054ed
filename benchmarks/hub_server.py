"""A hub on loopback that sends files with sendfile, as fast as the kernel can or at the rate of a given link.

    python -m benchmarks.hub_server FOLDER [--rate BYTES] [--latency SECONDS]

Prints its address. GET /sent returns the bytes of files sent so far, as text.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import click

MODEL = "owner/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BLOCK_BYTES = 4 << 20
PACED_BYTES = 128 << 10


class Link:
    """A shared rate in bytes a second (0: none) and a delay in seconds before every answer."""

    def __init__(self, rate: float, latency: float) -> None:
        self.rate, self.latency = rate, latency
        self.block = PACED_BYTES if rate else BLOCK_BYTES
        self.sent = 0
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, nbytes: int) -> None:
        """Wait until `nbytes` have passed the link, after those of all other connections."""
        with self._lock:
            self.sent += nbytes
            if not self.rate:
                return
            start = max(self._free_at, time.monotonic() - 0.01)
            self._free_at = start + nbytes / self.rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    """Connections that wait to be accepted: with the standard library's 5, a client that opens more waits a second."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are expected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    link: Link

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        path = self.folder / urlsplit(self.path).path.rpartition("/")[2]
        size = str(path.stat().st_size)
        self._head(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(path)}"', "Content-Length": size})

    def do_GET(self) -> None:
        route = urlsplit(self.path).path
        if route == "/sent":
            self._text(str(self.link.sent))
        elif route.startswith("/api/models/"):
            files = [
                {"rfilename": path.name, "size": path.stat().st_size, "blobId": _etag(path)}
                for path in sorted(self.folder.iterdir())
            ]
            self._text(json.dumps({"id": MODEL, "sha": COMMIT, "siblings": files}))
        elif (path := self.folder / route.rpartition("/")[2]).is_file():
            time.sleep(self.link.latency)
            self._send(path)
        else:
            self._head(404, {"Content-Length": "0"})

    def _send(self, path: Path) -> None:
        size = path.stat().st_size
        begin, end = 0, size
        headers = {"ETag": f'"{_etag(path)}"'}
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            begin, end = int(match[1]), int(match[2]) + 1
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self._head(206 if match else 200, {**headers, "Content-Length": str(end - begin)})
        with path.open("rb", buffering=0) as file:
            while begin < end:
                count = min(end - begin, self.link.block)
                self.link.take(count)
                stop = begin + count
                while begin < stop:
                    begin += os.sendfile(self.connection.fileno(), file.fileno(), begin, stop - begin)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _text(self, text: str) -> None:
        body = text.encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)


def _etag(path: Path) -> str:
    return f"{path.stat().st_size:040x}"


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--rate", default=0.0, help="Bytes a second over all connections; 0: unlimited.")
@click.option("--latency", default=0.0, help="Seconds before each answer.")
def main(folder: Path, rate: float, latency: float) -> None:
    handler = type("Serving", (Handler,), {"folder": folder, "link": Link(rate, latency)})
    server = Server(("127.0.0.1", 0), handler)
    click.echo(f"http://127.0.0.1:{server.server_address[1]}")
    server.serve_forever()


if __name__ == "__main__":
    main()
