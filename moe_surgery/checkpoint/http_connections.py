"""HTTP requests for the bytes of files: connections that are kept open, bodies read straight into buffers.

Everything else about the hub (API, tokens, where a file is) goes through huggingface_hub's own client. That
client also serves these requests where a proxy is set or a program has replaced its factory; elsewhere the
standard library's does, which needs a fifth of the CPU time per byte.
"""

from __future__ import annotations

import http.client
import math
import socket
import ssl
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from moe_surgery.errors import NetworkError

__all__ = ["MOST_REQUESTS", "REDIRECTS", "Connections", "Headers", "Pending", "Reply", "transport_errors"]

Headers = Mapping[str, str]
MOST_REDIRECTS: Final = 5
MOST_REQUESTS: Final = 32
"""At a time."""
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


class Reply(ABC):
    """The answer to a GET: `status`, `headers` by lower-case name, and the body, read in order."""

    status: int
    headers: Headers

    @abstractmethod
    def read_into(self, buffer: memoryview) -> int:
        """Fill the start of `buffer` with the next bytes of the body; returns how many, 0 at its end."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A request that was sent, over a connection that waits for the answer."""

    scheme: str
    host: str
    connection: http.client.HTTPConnection


class Connections:
    """GET requests from several threads. Idle connections are kept until `close`, after which it can be used again."""

    def __init__(self, timeout: float) -> None:
        """`timeout` in seconds, for connecting and for each read."""
        self._timeout = timeout
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._busy: set[http.client.HTTPConnection] = set()
        self._cancelled = threading.Event()
        self._tls: ssl.SSLContext | None = None
        self._is_direct: dict[tuple[str, str], bool] = {}
        self._fastest = math.inf
        self._pool: ThreadPoolExecutor | None = None

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Threads for requests beside those of the caller's own, until `close`."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(MOST_REQUESTS, "range")
            return self._pool

    @property
    def latency(self) -> float:
        """Seconds from a request to the first byte of its answer, the fastest so far; 0 before the first."""
        return self._fastest if self._fastest < math.inf else 0.0

    @contextmanager
    def get(self, url: str, headers: Headers) -> Iterator[Reply]:
        """Request `url`, following redirects; an authorization header stays with the host it is for.

        Raises one of `transport_errors()` where the connection fails, NetworkError after `cancel`, for a redirect
        away from TLS, and for too many redirects.
        """
        for _ in range(MOST_REDIRECTS):
            with self._once(url, headers) as reply:
                if reply.status not in REDIRECTS or "location" not in reply.headers:
                    yield reply
                    return
                target = urljoin(url, reply.headers["location"])
            check_no_downgrade(url, target)
            if urlsplit(target)[:2] != urlsplit(url)[:2]:
                headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            url = target
        raise NetworkError(f"{urlsplit(url).netloc}: more than {MOST_REDIRECTS} redirects")

    def send(self, url: str, headers: Headers) -> Pending | None:
        """Request `url` without waiting for the answer; None where that cannot be done. Raises as `get`."""
        parts = urlsplit(url)
        if self._cancelled.is_set() or not self._goes_direct(parts.scheme, parts.netloc):
            return None
        connection, _ = self._take(parts.scheme, parts.netloc)
        try:
            connection.request("GET", _target(url), headers=dict(headers))
        except BaseException:
            self._put_back(parts.scheme, parts.netloc, connection, reusable=False)
            raise
        return Pending(parts.scheme, parts.netloc, connection)

    @contextmanager
    def answer(self, pending: Pending) -> Iterator[Reply]:
        """The answer to what was sent; a redirect is not followed. Raises as `get`."""
        try:
            response = pending.connection.getresponse()
        except BaseException:
            self.give_up(pending)
            raise
        with self._replying(pending.scheme, pending.host, pending.connection, response) as reply:
            yield reply

    def give_up(self, pending: Pending) -> None:
        """Drop a request whose answer is no longer wanted."""
        self._put_back(pending.scheme, pending.host, pending.connection, reusable=False)

    def wait(self, seconds: float) -> None:
        """Sleep; raises NetworkError at once after `cancel`."""
        if self._cancelled.wait(seconds):
            raise NetworkError("the request was cancelled")

    def cancel(self) -> None:
        """End requests under way in other threads, and every later one, with an error."""
        self._cancelled.set()
        with self._lock:
            busy = list(self._busy)
        for connection in busy:
            if (sock := connection.sock) is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close idle connections, let the pool's threads end, and forget `cancel`."""
        self._cancelled.clear()
        with self._lock:
            idle, self._idle = self._idle, {}
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)
        for connection in (c for connections in idle.values() for c in connections):
            connection.close()

    def __del__(self) -> None:
        self.close()

    def _once(self, url: str, headers: Headers) -> AbstractContextManager[Reply]:
        if self._cancelled.is_set():
            raise NetworkError("the request was cancelled")
        parts = urlsplit(url)
        if self._goes_direct(parts.scheme, parts.netloc):
            return self._direct(url, headers)
        return _by_the_hubs_client(url, headers, self._timeout)

    def _goes_direct(self, scheme: str, host: str) -> bool:
        origin = scheme, host
        if origin not in self._is_direct:
            self._is_direct[origin] = _is_direct(scheme, host)
        return self._is_direct[origin]

    @contextmanager
    def _direct(self, url: str, headers: Headers) -> Iterator[Reply]:
        parts = urlsplit(url)
        connection, response = self._respond(parts.scheme, parts.netloc, url, headers)
        with self._replying(parts.scheme, parts.netloc, connection, response) as reply:
            yield reply

    @contextmanager
    def _replying(
        self,
        scheme: str,
        host: str,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
    ) -> Iterator[Reply]:
        try:
            yield _DirectReply(response)
        finally:
            read_to_its_end = response.isclosed()
            response.close()
            self._put_back(scheme, host, connection, reusable=read_to_its_end)

    def _respond(
        self, scheme: str, host: str, url: str, headers: Headers
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send the request; again over a new connection if the server had closed an idle one."""
        while True:
            connection, idle = self._take(scheme, host)
            try:
                start = time.monotonic()
                connection.request("GET", _target(url), headers=dict(headers))
                response = connection.getresponse()
                self._fastest = min(self._fastest, time.monotonic() - start)
                return connection, response
            except BaseException as error:
                self._put_back(scheme, host, connection, reusable=False)
                if not idle or not isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                    raise

    def _take(self, scheme: str, host: str) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, and whether it was idle."""
        with self._lock:
            idle = self._idle.get((scheme, host))
            connection = idle.pop() if idle else None
            if connection is not None:
                self._busy.add(connection)
                return connection, True
            if scheme == "https" and self._tls is None:
                self._tls = _tls_context()
        if scheme == "https":
            connection = http.client.HTTPSConnection(host, timeout=self._timeout, context=self._tls)
        else:
            connection = http.client.HTTPConnection(host, timeout=self._timeout)
        with self._lock:
            self._busy.add(connection)
        return connection, False

    def _put_back(
        self, scheme: str, host: str, connection: http.client.HTTPConnection, *, reusable: bool
    ) -> None:
        with self._lock:
            self._busy.discard(connection)
            if reusable and connection.sock is not None and not self._cancelled.is_set():
                self._idle.setdefault((scheme, host), []).append(connection)
                return
        connection.close()


def transport_errors() -> tuple[type[Exception], ...]:
    """What a failed connection raises, here and in huggingface_hub's client (httpx, or its successor)."""
    from huggingface_hub.errors import HfHubHTTPError

    theirs = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (OSError, http.client.HTTPException, *theirs)


def check_no_downgrade(url: str, target: str) -> None:
    """Raise NetworkError where `url` uses TLS and `target`, to which it redirects, does not."""
    scheme = urlsplit(target).scheme
    if scheme not in ("http", "https") or (urlsplit(url).scheme == "https" and scheme != "https"):
        raise NetworkError(
            f"{urlsplit(url).netloc}: redirects to an address without TLS, which is not followed"
        )


def _target(url: str) -> str:
    """What follows the host in `url`."""
    return urlsplit(url)._replace(scheme="", netloc="", fragment="").geturl() or "/"


class _DirectReply(Reply):
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self._response = response

    def read_into(self, buffer: memoryview) -> int:
        return self._response.readinto(buffer)


class _ClientReply(Reply):
    def __init__(self, response: Any) -> None:
        self.status = response.status_code
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._chunks: Iterator[bytes] = response.iter_raw()
        self._rest = memoryview(b"")

    def read_into(self, buffer: memoryview) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


@contextmanager
def _by_the_hubs_client(url: str, headers: Headers, timeout: float) -> Iterator[Reply]:
    from huggingface_hub import get_session

    with get_session().stream(
        "GET", url, headers=dict(headers), timeout=timeout, follow_redirects=False
    ) as response:
        yield _ClientReply(response)


def _is_direct(scheme: str, host: str) -> bool:
    """Whether neither a proxy nor a program's own client is to be used for `host`."""
    proxies = getproxies()
    if (scheme in proxies or "all" in proxies) and not proxy_bypass(host):
        return False
    from huggingface_hub.utils import _http

    ours: Callable[..., Any] | None = getattr(_http, "default_client_factory", None)
    return ours is not None and getattr(_http, "_GLOBAL_CLIENT_FACTORY", None) is ours


def _tls_context() -> ssl.SSLContext:
    """The one that huggingface_hub's client uses: the same certificates and environment variables."""
    from huggingface_hub import get_session

    library = sys.modules[type(get_session()).__module__.partition(".")[0]]
    make: Callable[[], ssl.SSLContext] = getattr(library, "create_ssl_context", ssl.create_default_context)
    return make()
