"""Faults of a server like the hub's while a file is read: those that pass are waited out, others are errors."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("huggingface_hub")


from moe_surgery.checkpoint.http_connections import check_no_downgrade
from moe_surgery.checkpoint.retries import Retries, delay_asked_for
from moe_surgery.errors import InvalidInputError, NetworkError, OutputError

from ..support.hub_server import COMMIT, MODEL, Answer, HubServer
from .hub_files import CONTENT, PART, SHARD, first, folder_of, read

# --- faults that pass


@pytest.mark.parametrize(
    "answer",
    [
        Answer(429, {"Retry-After": "0"}),
        Answer(429, {"RateLimit": '"pages";r=0;t=0'}),
        Answer(500),
        Answer(503, {"Retry-After": "0"}),
    ],
    ids=lambda answer: f"{answer.status}{''.join(answer.headers)}",
)
def test_a_passing_refusal_is_tried_again(hub: HubServer, answer: Answer) -> None:
    with folder_of().open(SHARD) as source:
        hub.fault = first(2, answer)
        read(source)
    assert hub.sent[SHARD] == PART[1] - PART[0]


def test_the_hubs_api_is_tried_again(hub: HubServer) -> None:
    hub.fault = lambda request: Answer(503) if len(hub.requests) == 1 else None
    folder = folder_of()
    hub.fault = first(1, Answer(429, {"Retry-After": "0"}), "HEAD")
    with folder.open(SHARD) as source:
        read(source)


def test_a_cut_connection_continues_where_it_broke(hub: HubServer) -> None:
    with folder_of().open(SHARD) as source:
        hub.fault = first(3, Answer(cut=100_000))
        read(source)
    assert hub.sent[SHARD] == PART[1] - PART[0]
    begins = [request.range[0] for request in hub.requests if request.host == "storage" and request.range]
    assert begins == [100_000, 200_000, 300_000, 400_000]


def test_a_cut_within_several_pieces_fills_the_right_ones(hub: HubServer) -> None:
    wanted = [(200_000 + 1010 * i, 1000) for i in range(300)]
    with folder_of().open(SHARD) as source:
        read(source, *PART)  # an allowance for gaps
        hub.forget()
        hub.fault = first(40, Answer(cut=77_777))
        buffers = [bytearray(size) for _, size in wanted]
        source.read_many([(o, memoryview(b)) for (o, _), b in zip(wanted, buffers, strict=True)])
    assert buffers == [CONTENT[o : o + size] for o, size in wanted]


def test_an_expired_address_is_asked_for_again(hub: HubServer) -> None:
    with folder_of().open(SHARD) as source:
        hub.fault = first(1, Answer(403))
        read(source)
    assert sum(request.method == "HEAD" for request in hub.requests) == 2


def test_delays_grow_until_the_attempts_are_used_up() -> None:
    waits: list[float] = []
    retries = Retries("here", waits.append, most=6)
    for _ in range(5):
        retries.failed("it broke")
    assert all(a <= wait <= 2 * a for a, wait in zip([0.125, 0.25, 0.5, 1, 2], waits, strict=True))
    retries.succeeded()
    retries.failed("it broke", asked_for=100)
    assert waits[-1] == 100
    for _ in range(4):
        retries.failed("it broke")
    with pytest.raises(NetworkError, match=r"^here: it broke, after 6 attempts$"):
        retries.failed("it broke")
    with pytest.raises(NetworkError, match="here: limited, and asks to wait for 3600 s"):
        Retries("here", waits.append).failed("limited", 3600)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "-1"}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=3;t=55'}, None),
        ({"ratelimit": "nonsense"}, None),
    ],
)
def test_the_delay_that_a_server_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert delay_asked_for(headers) == seconds


def test_a_read_that_waits_ends_when_it_is_cancelled(hub: HubServer) -> None:
    folder = folder_of()
    with folder.open(SHARD) as source:
        hub.fault = lambda request: Answer(429, {"Retry-After": "500"})
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                source.read(*PART)
            except NetworkError as error:
                caught.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while not any(request.host == "storage" for request in hub.requests):
            time.sleep(0.001)
        source.cancel()
        thread.join(30)
        assert len(caught) == 1
        folder.close()
        hub.fault = lambda request: None
        read(source)


# --- faults that do not


def test_a_server_without_ranges_is_an_error(hub: HubServer) -> None:
    with folder_of().open(SHARD) as source:
        hub.fault = lambda request: Answer(ignore_range=True)
        with pytest.raises(
            OutputError, match="does not support range requests; download the whole model first"
        ):
            read(source)


def test_a_small_file_is_read_from_a_server_without_ranges(hub: HubServer) -> None:
    hub.fault = lambda request: Answer(ignore_range=True)
    with folder_of().open("config.json") as source:
        assert source.read(0, 2) == b"{}"


@pytest.mark.parametrize(
    "headers",
    [{"ETag": '"another"'}, {"X-Repo-Commit": "f" * 40}, {"Content-Range": "bytes 700000-799999/99"}],
    ids=lambda headers: next(iter(headers)),
)
def test_an_answer_of_another_version_is_an_error(hub: HubServer, headers: dict[str, str]) -> None:
    with folder_of().open(SHARD) as source:
        read(source)
        hub.fault = lambda request: Answer(headers=headers)
        with pytest.raises(
            InvalidInputError, match=rf"{MODEL}@{COMMIT}/{SHARD}: changed while it was being read"
        ):
            source.read(700_000, 100_000)


def test_other_bytes_than_were_asked_for_are_an_error(hub: HubServer) -> None:
    with folder_of().open(SHARD) as source:
        hub.fault = lambda request: Answer(headers={"Content-Range": f"bytes 0-599999/{len(CONTENT)}"})
        with pytest.raises(NetworkError, match="other bytes than were asked for"):
            read(source)


def test_a_file_that_is_not_what_was_listed_is_an_error(hub: HubServer) -> None:
    folder = folder_of()
    (hub.folder / SHARD).write_bytes(CONTENT[:-1])
    with pytest.raises(InvalidInputError, match="changed while"):
        folder.open(SHARD)


def test_a_lasting_refusal_is_an_error(hub: HubServer) -> None:
    with folder_of().open(SHARD) as source:
        hub.fault = lambda request: Answer(403) if request.host == "storage" else None
        with pytest.raises(NetworkError, match="cannot be read: the server answers HTTP 403"):
            read(source)
        hub.fault = lambda request: Answer(429, {"Retry-After": "3600"})
        with pytest.raises(NetworkError, match=r"limits requests \(HTTP 429\), and asks to wait for 3600 s"):
            read(source)


def test_a_redirect_away_from_tls_is_refused() -> None:
    check_no_downgrade("https://a.example/x", "https://b.example/y")
    check_no_downgrade("http://a.example/x", "http://b.example/y")
    for target in ("http://b.example/y", "file:///etc/passwd", "ftp://b.example/y"):
        with pytest.raises(NetworkError, match=r"a\.example: redirects to an address without TLS"):
            check_no_downgrade("https://a.example/x", target)
