"""Files of a model on the hub, against a server on loopback: what is asked for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

import huggingface_hub

from moe_surgery.checkpoint.http_source import (
    GAP_SHARE,
    MOST_REQUESTS,
    START_BYTES,
    HttpSource,
    RemoteStamp,
    merged,
)
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.errors import InvalidInputError, NetworkError, OutputError

from ..support.hub_server import COMMIT, MODEL, TOKEN, Answer, HubServer
from .hub_files import CONTENT, PART, SHARD, first, folder_of, read

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


def test_an_answer_that_is_not_a_hubs_is_an_error(hub: HubServer) -> None:
    hub.fault = lambda request: Answer(200)
    with pytest.raises(OutputError, match=f"{hub.url} does not answer as the hub does"):
        folder_of()


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
    begins = (100, 0, 13, 24, 40, 130)
    runs, gaps = merged([(begin, 10) for begin in begins], 10)
    assert [[begins[number] for number in run] for run in runs] == [[0, 13, 24, 40], [100], [130]]
    assert gaps == 3 + 1 + 6
    assert GAP_SHARE >= 100, "less than one byte in a hundred is fetched in vain"


def test_overlapping_ranges_are_separate_requests(hub: HubServer) -> None:
    with folder_of().open(SHARD) as source:
        one, other = bytearray(100_000), bytearray(100_000)
        source.read_many([(500_000, memoryview(one)), (550_000, memoryview(other))])
    assert one == CONTENT[500_000:600_000]
    assert other == CONTENT[550_000:650_000]


def scattered(number: int) -> dict[int, memoryview]:
    """Buffers of 100 bytes for forty places far apart."""
    return {100_000 + 70_000 * i + 100 * number: memoryview(bytearray(100)) for i in range(40)}


def test_several_reads_of_scattered_ranges_share_threads_that_end(hub: HubServer) -> None:
    folder = folder_of()
    reads = [scattered(number) for number in range(6)]
    with folder.open(SHARD) as source, ThreadPoolExecutor(len(reads)) as pool:
        for future in [pool.submit(source.read_many, list(wanted.items())) for wanted in reads]:
            future.result()
        names = [thread.name for thread in threading.enumerate()]
        assert 0 < sum(name.startswith("range") for name in names) <= MOST_REQUESTS
    folder.close()
    for begin, buffer in (item for wanted in reads for item in wanted.items()):
        assert buffer == CONTENT[begin : begin + 100]
    limit = time.monotonic() + 10
    while any(t.name.startswith("range") for t in threading.enumerate()) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("range")]


@pytest.mark.parametrize("which", [0, 20, 39])
def test_an_error_of_one_of_several_ranges_is_that_of_the_read(hub: HubServer, which: int) -> None:
    wanted = scattered(0)
    begin = list(wanted)[which]
    with folder_of().open(SHARD) as source:
        hub.fault = lambda request: Answer(404) if request.range and request.range[0] == begin else None
        with pytest.raises(NetworkError, match="HTTP 404"):
            source.read_many(list(wanted.items()))
        hub.fault = lambda request: None
        source.read_many(list(wanted.items()))
    assert all(buffer == CONTENT[at : at + 100] for at, buffer in wanted.items())


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
        source.expect([(1_000_000, 1_000_000)])  # never read
    folder.close()
    ranges = [request.range for request in hub.requests if request.host == "storage"]
    assert ranges[0] == PART
    assert set(ranges[1:]) <= {(1_000_000, 2_000_000)}


def test_the_answers_to_requests_sent_ahead_for_several_ranges_are_read(hub: HubServer) -> None:
    wanted = [(800_000, 100_000), (900_050, 100_000), (1_800_000, 10)]
    with folder_of().open(SHARD) as source:
        source.expect(wanted)
        source.expect(wanted)
        source.expect([(2_000_000 + 10 * i, 1) for i in range(2 * MOST_REQUESTS)])
        buffers = [memoryview(bytearray(nbytes)) for _, nbytes in wanted]
        source.read_many([(begin, buffer) for (begin, _), buffer in zip(wanted, buffers, strict=True)])
    for (begin, nbytes), buffer in zip(wanted, buffers, strict=True):
        assert buffer == CONTENT[begin : begin + nbytes]
    ranges = [request.range for request in hub.requests if request.host == "storage"]
    assert 2 <= len(ranges) <= MOST_REQUESTS
    assert {(800_000, 1_000_050), (1_800_000, 1_800_010)} <= set(ranges)
    assert len(set(ranges)) == len(ranges)


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
