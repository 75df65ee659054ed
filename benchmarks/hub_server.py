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
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
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


class Server(ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 128
    """Connections that wait to be accepted: with the standard library's 5, a client that opens more waits a second."""

    def __init__(self, folder: Path, link: Link) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.link = folder, link

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are expected."""


class Handler(StreamRequestHandler):
    """Answers to one connection. It shares the machine with the client, so it reads of a request what it needs alone:
    the standard library's handler takes as long for a head as the kernel for a MiB."""

    disable_nagle_algorithm = True
    server: Server

    def handle(self) -> None:
        while request := self.rfile.readline():
            method, target, _ = request.decode("latin-1").split(" ")
            wanted = None
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                if match := re.fullmatch(rb"range: *bytes=(\d+)-(\d+)\r\n", line, re.IGNORECASE):
                    wanted = int(match[1]), int(match[2]) + 1
            self.answer(method, urlsplit(target).path, wanted)

    def answer(self, method: str, route: str, wanted: tuple[int, int] | None) -> None:
        path = self.server.folder / route.rpartition("/")[2]
        if route == "/sent":
            self._text(str(self.server.link.sent))
        elif route.startswith("/api/models/"):
            files = [
                {"rfilename": path.name, "size": path.stat().st_size, "blobId": _etag(path)}
                for path in sorted(self.server.folder.iterdir())
            ]
            self._text(json.dumps({"id": MODEL, "sha": COMMIT, "siblings": files}))
        elif not path.is_file():
            self._head("404 Not Found", 0)
        elif method == "HEAD":
            self._head("200 OK", path.stat().st_size, **{"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(path)}"'})
        else:
            time.sleep(self.server.link.latency)
            self._send(path, wanted)

    def _send(self, path: Path, wanted: tuple[int, int] | None) -> None:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            begin, end = wanted or (0, size)
            headers = {"ETag": f'"{_etag(path)}"'}
            if wanted:
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
            self._head("206 Partial Content" if wanted else "200 OK", end - begin, **headers)
            link = self.server.link
            while begin < end:
                count = min(end - begin, link.block)
                link.take(count)
                stop = begin + count
                while begin < stop:
                    begin += os.sendfile(self.connection.fileno(), file.fileno(), begin, stop - begin)

    def _head(self, status: str, length: int, **headers: str) -> None:
        lines = [
            f"HTTP/1.1 {status}",
            f"Content-Length: {length}",
            *(f"{k}: {v}" for k, v in headers.items()),
        ]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def _text(self, text: str) -> None:
        body = text.encode()
        self._head("200 OK", len(body), **{"Content-Type": "application/json"})
        self.wfile.write(body)


def _etag(path: Path) -> str:
    return f"{path.stat().st_size:040x}"


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--rate", default=0.0, help="Bytes a second over all connections; 0: unlimited.")
@click.option("--latency", default=0.0, help="Seconds before each answer.")
def main(folder: Path, rate: float, latency: float) -> None:
    server = Server(folder, Link(rate, latency))
    click.echo(f"http://127.0.0.1:{server.server_address[1]}")
    server.serve_forever()


if __name__ == "__main__":
    main()
