"""A file behind HTTP range requests as a source of bytes."""

from __future__ import annotations

import http.client
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from moe_surgery.checkpoint.http_connections import (
    MOST_REQUESTS,
    REDIRECTS,
    Connections,
    Headers,
    Pending,
    Reply,
    transport_errors,
)
from moe_surgery.checkpoint.retries import TRANSIENT, Retries, delay_asked_for
from moe_surgery.checkpoint.source import ByteSource
from moe_surgery.errors import InvalidInputError, NetworkError, OutputError

__all__ = ["HttpSource", "Location", "RemoteStamp", "Traffic", "merged"]

START_BYTES: Final = 32 << 10
"""Fetched at the first read of the start of a file: small files and most headers whole, in one request."""

REQUESTS_IN_FLIGHT: Final = 4
"""Of one source: each fills a chunk of the output, so more would not fit 64 MiB of memory."""

LATENCY_COVERED: Final = 0.002
"""Requests that are sent ahead, and those for the ranges of one read: as many as are in flight anyway, and one more for
so many seconds of latency. Each has a connection of its own, so that more than that make a fast link slower."""

LARGEST_GAP: Final = 256 << 10
GAP_SHARE: Final = 200
"""Bytes between two wanted ranges that are fetched along to save a request: at most 256 KiB, and in total at
most one for 200 wanted ones."""

_EXPIRED: Final = frozenset({401, 403, 404, 410})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.ASCII)

Piece = tuple[int, memoryview]
Range = tuple[int, int]
"""Offset and number of bytes."""


@dataclass(frozen=True, slots=True)
class RemoteStamp:
    """Identifies a file and its version: the repository's commit, the file's ETag there, and its bytes."""

    commit: str
    etag: str
    size: int


@dataclass(frozen=True, slots=True)
class Location:
    """An address that serves a file's bytes until it expires, the headers to send, and the file's version."""

    url: str
    headers: Headers
    stamp: RemoteStamp


class Traffic:
    """What was fetched of a folder's files: requests and bytes of bodies. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._credit = 0
        self.requests = 0
        self.nbytes = 0

    def plan(self, ranges: Sequence[Range]) -> list[list[int]]:
        """`ranges` of one file, by number, in runs to be fetched in one request each."""
        with self._lock:
            self._credit += sum(nbytes for _, nbytes in ranges)
            runs, gaps = merged(ranges, self._credit // GAP_SHARE)
            self._credit -= gaps * GAP_SHARE
        return runs

    def add(self, requests: int, nbytes: int) -> None:
        with self._lock:
            self.requests += requests
            self.nbytes += nbytes


class HttpSource(ByteSource):
    """A file at a `Location`, which is asked for again when it expires.

    Every answer must be of the version that was opened: total size, storage ETag and commit are compared.
    """

    concurrent_reads = REQUESTS_IN_FLIGHT

    def __init__(
        self, where: str, locate: Callable[[], Location], connections: Connections, traffic: Traffic
    ) -> None:
        """Raises as `locate`, which finds the file."""
        self.where = where
        self._locate = locate
        self._location = locate()
        self._stamp = self._location.stamp
        self.size = self._stamp.size
        self._connections = connections
        self._traffic = traffic
        self._lock = threading.RLock()
        self._start: bytes | None = None
        self._storage_etag: str | None = None
        self._closed = False
        self._planned: dict[tuple[Range, ...], list[list[int]]] = {}
        self._expected: dict[tuple[int, int], Pending] = {}

    @property
    def stamp(self) -> RemoteStamp:
        return self._stamp

    def read_into(self, offset: int, buffer: memoryview, *, cache: bool = False) -> None:
        self.read_many([(offset, buffer)])

    def read_many(self, wanted: Sequence[Piece]) -> None:
        if self._closed:
            raise OutputError(f"{self.where}: is closed")
        for offset, buffer in wanted:
            if offset + len(buffer) > self.size:
                end = offset + len(buffer)
                raise InvalidInputError(f"{self.where}: ends before byte {end}; it has {self.size} bytes")
        pieces = [p for piece in wanted for p in self._beyond_start(*piece) if len(p[1])]
        ranges = tuple((offset, len(buffer)) for offset, buffer in pieces)
        runs = self._planned.pop(ranges, None) or self._traffic.plan(ranges)
        self._fetch_all(deque([pieces[number] for number in run] for run in runs))

    def expect(self, ranges: Sequence[Range]) -> None:
        """Send the requests for `ranges`; a `read_many` of the same ranges takes the answers."""
        wanted = tuple(ranges)
        if self._closed or wanted in self._planned or any(b < START_BYTES or not n for b, n in wanted):
            return
        self._planned[wanted] = runs = self._traffic.plan(wanted)
        for run in runs:
            span = wanted[run[0]][0], sum(wanted[run[-1]])
            if len(self._expected) >= self._requests_by_latency:
                return
            if span in self._expected:
                continue
            try:
                pending = self._connections.send(self._location.url, self._headers(*span))
            except transport_errors():
                return  # the read tries again, and says what is wrong
            if pending is None:
                return
            self._expected[span] = pending

    def cancel(self) -> None:
        self._connections.cancel()

    def check_unchanged(self) -> None:
        if self._locate().stamp != self._stamp:
            raise self._changed()

    def close(self) -> None:
        self._closed = True
        while self._expected:
            self._connections.give_up(self._expected.popitem()[1])

    @property
    def _requests_by_latency(self) -> int:
        return min(REQUESTS_IN_FLIGHT + int(self._connections.latency / LATENCY_COVERED), MOST_REQUESTS)

    def _headers(self, begin: int, end: int) -> Headers:
        return {**self._location.headers, "Range": f"bytes={begin}-{end - 1}"}

    def _beyond_start(self, offset: int, buffer: memoryview) -> Iterator[Piece]:
        """Fill what is in the start of the file, which is fetched once; yields the piece that is not."""
        if offset < min(START_BYTES, self.size) and self._start is None:
            if offset > 0:
                yield offset, buffer
                return
            with self._lock:
                if self._start is None:
                    start = bytearray(min(START_BYTES, self.size))
                    self._fetch([(0, memoryview(start))])
                    self._start = bytes(start)
        known = self._start[offset : offset + len(buffer)] if self._start else b""
        buffer[: len(known)] = known
        if len(known) < len(buffer):
            yield offset + len(known), buffer[len(known) :]

    def _fetch_all(self, requests: deque[list[Piece]]) -> None:
        """Fetch several ranges, this thread and others taking one after the other."""

        def work() -> None:
            while True:
                try:
                    request = requests.popleft()
                except IndexError:
                    return
                self._fetch(request)

        futures = []
        try:
            for _ in range(min(self._requests_by_latency, len(requests)) - 1):
                futures.append(self._connections.pool.submit(work))
            work()
        finally:
            requests.clear()  # after an error
            running = [future for future in futures if not future.cancel()]
            wait(running)
        for future in running:
            future.result()

    def _fetch(self, pieces: list[Piece]) -> None:
        """Fill `pieces`, in order of offset, by one range request, continued where a connection breaks."""
        sink = _Sink(pieces)
        retries = Retries(self.where, self._connections.wait)
        relocated: Location | None = None
        errors = transport_errors()
        while not sink.is_full:
            location = self._location
            self._traffic.add(1, 0)
            sent = self._expected.pop((sink.position, sink.end), None)
            try:
                with self._answer(sent, sink.position, sink.end) as reply:
                    if sent and reply.status in REDIRECTS:
                        continue
                    if reply.status in TRANSIENT:
                        problem, delay = _refusal(reply.status), delay_asked_for(reply.headers)
                    elif reply.status in _EXPIRED and relocated is not location:
                        problem, delay = None, None
                    else:
                        self._check(reply, sink.position, sink.end)
                        if not self._receive(reply, sink, retries):
                            return
                        problem, delay = "the connection was cut", None
            except errors as error:
                if sent:
                    continue  # the connection may have been closed before the request reached the server
                problem, delay = f"the connection failed: {describe(error)}", None
            if problem is None:
                relocated = self._relocate(location)
            else:
                retries.failed(problem, delay)

    def _answer(self, sent: Pending | None, begin: int, end: int) -> AbstractContextManager[Reply]:
        """The answer to a request for [begin, end), which may have been sent ahead."""
        if sent is not None:
            return self._connections.answer(sent)
        return self._connections.get(self._location.url, self._headers(begin, end))

    def _receive(self, reply: Reply, sink: _Sink, retries: Retries) -> bool:
        """Whether the body ended before `sink` was full."""
        while not sink.is_full:
            count = reply.read_into(sink.next)
            if not count:
                return True
            sink.advance(count)
            self._traffic.add(0, count)
            retries.succeeded()
        return False

    def _relocate(self, expired: Location) -> Location:
        """The file's location, looked up again unless another thread just did."""
        with self._lock:
            if self._location is expired:
                location = self._locate()
                if location.stamp != self._stamp:
                    raise self._changed()
                if _host(location) != _host(expired):
                    self._storage_etag = None  # hosts differ in how they make one
                self._location = location
            return self._location

    def _check(self, reply: Reply, begin: int, end: int) -> None:
        """Raise unless `reply` holds bytes [begin, end) of the file that was opened."""
        if reply.status == 416:
            raise self._changed()
        whole = (begin, end) == (0, self.size)
        if reply.status == 200 and not whole:
            raise OutputError(
                f"{self.where}: the server {_host(self._location)} does not support range requests; download the "
                "whole model first, with hf download, which puts it into the cache"
            )
        if reply.status not in (200, 206):
            raise NetworkError(f"{self.where}: cannot be read: {_refusal(reply.status)}")
        if reply.status == 206:
            match = _CONTENT_RANGE.fullmatch(reply.headers.get("content-range", ""))
            if match and match[3] not in ("*", str(self.size)):
                raise self._changed()
            if not match or (int(match[1]), int(match[2])) != (begin, end - 1):
                raise NetworkError(f"{self.where}: the server sent other bytes than were asked for")
        elif reply.headers.get("content-length", str(self.size)) != str(self.size):
            raise self._changed()
        if reply.headers.get("x-repo-commit", self._stamp.commit) != self._stamp.commit:
            raise self._changed()
        if etag := reply.headers.get("etag"):
            with self._lock:
                first = self._storage_etag = self._storage_etag or etag
            if etag != first:
                raise self._changed()

    def _changed(self) -> InvalidInputError:
        return InvalidInputError(f"{self.where}: changed while it was being read; run again")


class _Sink:
    """Buffers for one range of a file, filled in order; bytes between them are dropped."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces
        self._number = 0
        self._gap = memoryview(bytearray(0))
        self.position = pieces[0][0]
        self.end = pieces[-1][0] + len(pieces[-1][1])

    @property
    def is_full(self) -> bool:
        return self.position >= self.end

    @property
    def next(self) -> memoryview:
        """Where the next bytes belong."""
        offset, buffer = self._pieces[self._number]
        if self.position >= offset:
            return buffer[self.position - offset :]
        if not self._gap:
            self._gap = memoryview(bytearray(64 << 10))
        return self._gap[: offset - self.position]

    def advance(self, count: int) -> None:
        self.position += count
        while not self.is_full:
            offset, buffer = self._pieces[self._number]
            if self.position < offset + len(buffer):
                return
            self._number += 1


def merged(ranges: Sequence[Range], most_gaps: int) -> tuple[list[list[int]], int]:
    """The numbers of `ranges` by offset, in runs to be fetched in one request each, and the bytes of gaps within runs.

    The smallest gaps are bridged first, of at most `LARGEST_GAP` bytes each and `most_gaps` in total. Overlapping
    ranges stay separate.
    """
    ordered = sorted(range(len(ranges)), key=ranges.__getitem__)
    gaps = [ranges[b][0] - sum(ranges[a]) for a, b in pairwise(ordered)]
    bridged: set[int] = set()
    total = 0
    for place in sorted(range(len(gaps)), key=gaps.__getitem__):
        gap = gaps[place]
        if gap > LARGEST_GAP or total + gap > most_gaps:
            break
        if gap >= 0:
            bridged.add(place)
            total += gap
    runs: list[list[int]] = []
    for place, number in enumerate(ordered):
        if place and place - 1 in bridged:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs, total


def describe(error: BaseException) -> str:
    """The reason of a failed connection, on one line."""
    if isinstance(error, http.client.IncompleteRead):
        return "it was cut"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _refusal(status: int) -> str:
    return "the server limits requests (HTTP 429)" if status == 429 else f"the server answers HTTP {status}"


def _host(location: Location) -> str:
    return location.url.partition("//")[2].partition("/")[0]
