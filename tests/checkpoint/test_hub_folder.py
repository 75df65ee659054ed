"""Files of a model on the hub, against a server on loopback: what is asked for, and what becomes of every fault."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

import huggingface_hub

from moe_surgery.checkpoint.http_connections import check_no_downgrade
from moe_surgery.checkpoint.http_source import GAP_SHARE, START_BYTES, HttpSource, RemoteStamp, merged
from moe_surgery.checkpoint.hub_folder import HubFolder
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.checkpoint.retries import Retries, delay_asked_for
from moe_surgery.checkpoint.source import ByteSource
from moe_surgery.errors import InvalidInputError, NetworkError, OutputError

from ..support.hub_server import COMMIT, MODEL, TOKEN, Answer, Fault, HubServer, Request, serving

CONTENT = random.Random(5).randbytes(3_000_001)
SHARD = "model.safetensors"
PART = (100_000, 700_000)
"""A range beyond the start of the file."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    folder = tmp_path / "served"
    (folder / "original").mkdir(parents=True)
    (folder / SHARD).write_bytes(CONTENT)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "empty.txt").touch()
    (folder / "original" / "config.json").write_bytes(b'{"original": 1}')
    with serving(folder) as server:
        server.use(tmp_path / "cache", monkeypatch)
        yield server


def folder_of(revision: str | None = None) -> HubFolder:
    return HubFolder(MODEL, revision)


def read(source: ByteSource, begin: int = PART[0], end: int = PART[1]) -> None:
    """Read [begin, end) and compare."""
    assert source.read(begin, end - begin) == CONTENT[begin:end]


def first(count: int, answer: Answer, method: str = "GET") -> Fault:
    """A fault: the first `count` requests to the storage (HEAD: to the hub) get `answer`."""
    host = "storage" if method == "GET" else "hub"
    left = [count]

    def fault(request: Request) -> Answer | None:
        if request.host == host and request.method == method and left[0]:
            left[0] -= 1
            return answer
        return None

    return fault


# --- the folder


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_revision_is_resolved_once_and_files_are_of_that_commit(
    hub: HubServer, revision: str | None
) -> None:
    folder = folder_of(revision)
    assert folder.hub_model == (MODEL, COMMIT)
    assert str(folder) == f"{MODEL}@{COMMIT}"
    with folder.open("config.json") as small, folder.open(SHARD) as large:
        assert small.read(0, 2) == b"{}"
        assert large.stamp == RemoteStamp(COMMIT, hub.digest(SHARD), len(CONTENT))
    assert sum(request.path.startswith(MODEL) for request in hub.requests) == 1


def test_the_listing_has_the_names_of_one_folder(hub: HubServer) -> None:
    folder = folder_of()
    assert folder.listing() == {"config.json": True, "empty.txt": True, SHARD: True, "original": False}
    assert folder.folder("nowhere") is None
    assert folder.folder("..") is None
    inside = folder.folder("original")
    assert inside is not None
    assert inside.listing() == {"config.json": True}
    above = inside.folder("..")
    assert above is not None
    assert above.listing() == folder.listing()
    for file in (inside.open("config.json"), folder.open("original/config.json")):
        assert file.read(0, 15) == b'{"original": 1}'
    assert inside.open("../config.json").read(0, 2) == b"{}"
    with pytest.raises(InvalidInputError, match="original: is a folder"):
        folder.open("original")
    with pytest.raises(OutputError, match=r"nothing\.json: is not in the repository"):
        folder.open("nothing.json")


def test_an_empty_file_is_read_without_a_request(hub: HubServer) -> None:
    with folder_of().open("empty.txt") as source:
        assert source.read(0, 0) == b""
    assert all(request.method == "HEAD" for request in hub.requests if request.path == "empty.txt")


def test_the_token_goes_to_the_hub_and_never_to_the_storage(hub: HubServer) -> None:
    with folder_of().open(SHARD) as source, folder_of().open("config.json") as small:
        read(source)
        small.read(0, 2)
    tokens = {(request.host, request.token) for request in hub.requests}
    assert tokens == {("hub", f"Bearer {TOKEN}"), ("storage", None)}


def test_a_file_in_the_cache_is_read_from_there(hub: HubServer, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--owner--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / SHARD).write_bytes(CONTENT)
    folder = folder_of()
    with folder.open(SHARD) as source, folder.open("config.json") as other:
        assert isinstance(source, LocalFile)
        assert isinstance(other, HttpSource)
        read(source)
    assert (folder.bytes_to_fetch(SHARD), folder.bytes_to_fetch("config.json")) == (0, 2)
    assert hub.sent[SHARD] == 0


# --- ranges


def test_only_the_bytes_of_a_range_are_sent(hub: HubServer) -> None:
    folder = folder_of()
    with folder.open(SHARD) as source:
        read(source)
    assert hub.sent[SHARD] == folder.traffic.nbytes == PART[1] - PART[0]


def test_the_start_of_a_file_is_fetched_once(hub: HubServer) -> None:
    with folder_of().open(SHARD) as source:
        for begin, end in ((0, 8), (0, 1000), (8, 20_000), (START_BYTES - 5, START_BYTES + 5)):
            read(source, begin, end)
    assert hub.sent[SHARD] == START_BYTES + 5


def test_close_ranges_are_one_request_within_the_allowance(hub: HubServer) -> None:
    near = [(1_000_000 + 60_000 * i, 59_900) for i in range(10)]
    far = [(2_500_000, 1000), (2_900_000, 1000)]
    with folder_of().open(SHARD) as source:
        buffers = {(begin, size): bytearray(size) for begin, size in near + far}
        source.read_many([(begin, memoryview(buffer)) for (begin, _), buffer in reversed(buffers.items())])
    for (begin, size), buffer in buffers.items():
        assert buffer == CONTENT[begin : begin + size]
    assert sum(request.host == "storage" for request in hub.requests) == 3
    assert hub.sent[SHARD] == sum(size for _, size in near + far) + 9 * 100


def test_the_smallest_gaps_are_bridged_up_to_the_allowance() -> None:
    pieces = [(begin, memoryview(bytearray(10))) for begin in (100, 0, 13, 24, 40, 130)]
    runs, gaps = merged(pieces, 10)
    assert [[begin for begin, _ in run] for run in runs] == [[0, 13, 24, 40], [100], [130]]
    assert gaps == 3 + 1 + 6
    assert GAP_SHARE >= 100, "less than one byte in a hundred is fetched in vain"


def test_overlapping_ranges_are_separate_requests(hub: HubServer) -> None:
    with folder_of().open(SHARD) as source:
        one, other = bytearray(100_000), bytearray(100_000)
        source.read_many([(500_000, memoryview(one)), (550_000, memoryview(other))])
    assert one == CONTENT[500_000:600_000]
    assert other == CONTENT[550_000:650_000]


def test_a_proxy_or_a_programs_own_client_is_used(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def factory() -> object:
        made.append(client := default())
        client.headers["x-ours"] = "1"
        return client

    from huggingface_hub.utils._http import default_client_factory as default

    huggingface_hub.set_client_factory(factory)  # type: ignore[arg-type]
    try:
        hub.fault = first(2, Answer(cut=70_000))
        with folder_of().open(SHARD) as source:
            read(source)
    finally:
        huggingface_hub.set_client_factory(default)
    assert made
    assert hub.sent[SHARD] == PART[1] - PART[0]


def test_the_answer_to_a_request_sent_ahead_is_read(hub: HubServer) -> None:
    folder = folder_of()
    with folder.open(SHARD) as source:
        source.expect([(PART[0], PART[1] - PART[0])])
        read(source)
        source.expect([(0, 10_000)])  # comes with the start of the file
        source.expect([(800_000, 10), (900_000, 10)])  # may become one request
        source.expect([(1_000_000, 1_000_000)])  # never read
    folder.close()
    ranges = [request.range for request in hub.requests if request.host == "storage"]
    assert ranges[0] == PART
    assert set(ranges[1:]) <= {(1_000_000, 2_000_000)}


@pytest.mark.parametrize(
    "answer",
    [Answer(503, {"Retry-After": "0"}), Answer(403), Answer(302, {"Location": "/x"}), Answer(cut=5000)],
)
def test_a_request_sent_ahead_may_fail(hub: HubServer, answer: Answer) -> None:
    with folder_of().open(SHARD) as source:
        hub.fault = first(1, answer)
        source.expect([(PART[0], PART[1] - PART[0])])
        read(source)
    assert hub.sent[SHARD] == PART[1] - PART[0]


def test_a_connection_that_closes_after_a_request_was_sent_ahead_is_replaced(hub: HubServer) -> None:
    with folder_of().open(SHARD) as source:
        hub.fault = lambda request: Answer(503) if request.host == "storage" else None
        source.expect([(PART[0], PART[1] - PART[0])])
        while not any(request.host == "storage" for request in hub.requests):
            time.sleep(0.001)
        hub.fault = lambda request: None
        hub.hang_up()
        read(source)


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
