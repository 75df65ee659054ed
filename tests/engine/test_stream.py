"""The pipeline keeps order, bounds memory and stops at the first error, with any thread schedule."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_surgery.engine.chunks import CHUNK_BYTES, Chunk, chunks_of
from moe_surgery.engine.spans import Copy, Span
from moe_surgery.engine.stream import stream
from moe_surgery.surgery.program import OutputShard, OutputTensor

SIZES = (CHUNK_BYTES, CHUNK_BYTES, 5000, 1)


def chunks(count: int) -> list[Chunk]:
    result, offset = [], 0
    for number in range(count):
        size = SIZES[number % len(SIZES)]
        result.append(Chunk(offset, size, ()))
        offset += size
    return result


def stamp(chunk: Chunk, buffer: memoryview) -> None:
    """Mark both ends of the buffer with the chunk's offset."""
    mark = chunk.offset.to_bytes(8, "little")[: chunk.nbytes]
    buffer[: len(mark)] = mark
    buffer[-len(mark) :] = mark


def stamped(chunk: Chunk, buffer: memoryview) -> bool:
    mark = chunk.offset.to_bytes(8, "little")[: chunk.nbytes]
    return len(buffer) == chunk.nbytes and buffer[: len(mark)] == mark and buffer[-len(mark) :] == mark


def address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("workers", [None, 1, 2, 7])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slow", ["fill", "consume", "write", "all"])
def test_chunks_are_consumed_and_written_in_order_with_their_bytes(
    workers: int | None, seed: int, slow: str
) -> None:
    rng, work = random.Random(seed), chunks(40)
    consumed: list[Chunk] = []
    written: list[Chunk] = []
    in_use: set[int] = set()
    lock = threading.Lock()

    def wait(what: str) -> None:
        if slow in (what, "all"):
            time.sleep(rng.uniform(0, 0.003))

    def fill(chunk: Chunk, buffer: memoryview) -> None:
        with lock:
            assert address(buffer) not in in_use
            in_use.add(address(buffer))
        wait("fill")
        stamp(chunk, buffer)

    def consume(chunk: Chunk, buffer: memoryview) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert stamped(chunk, buffer)
        wait("consume")
        assert stamped(chunk, buffer)
        consumed.append(chunk)

    def write(chunk: Chunk, buffer: memoryview) -> None:
        wait("write")
        assert stamped(chunk, buffer)
        written.append(chunk)
        with lock:
            in_use.remove(address(buffer))

    stream(work, fill, consume, write, workers=workers)
    assert consumed == work
    assert written == work


@pytest.mark.parametrize("writers", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_several_writers_write_every_chunk_once_with_its_bytes(writers: int, seed: int) -> None:
    rng, work = random.Random(seed), chunks(60)
    written: list[Chunk] = []
    threads: set[int] = set()

    def write(chunk: Chunk, buffer: memoryview) -> None:
        time.sleep(rng.uniform(0, 0.003))
        assert stamped(chunk, buffer)
        threads.add(threading.get_ident())
        written.append(chunk)

    stream(work, stamp, lambda chunk, buffer: None, write, workers=3, writers=writers)
    assert sorted(written) == work
    assert len(threads) == writers


@pytest.mark.parametrize("at", [0, 17, 39])
def test_an_error_of_one_of_several_writers_ends_all(at: int) -> None:
    work, written = chunks(40), []

    def write(chunk: Chunk, buffer: memoryview) -> None:
        if chunk is work[at]:
            raise OSError(f"full at {at}")
        time.sleep(0.001)
        written.append(chunk)

    with pytest.raises(OSError, match=f"full at {at}"):
        stream(work, stamp, lambda chunk, buffer: None, write, writers=3)
    assert work[at] not in written
    assert len(written) < at + 3


def test_without_write_chunks_are_consumed_in_order() -> None:
    work, consumed = chunks(50), []

    def consume(chunk: Chunk, buffer: memoryview) -> None:
        assert stamped(chunk, buffer)
        consumed.append(chunk)

    stream(iter(work), stamp, consume)
    assert consumed == work


def test_nothing_to_do_is_done() -> None:
    stream([], stamp, stamp, stamp)


def test_buffers_are_few_and_page_aligned() -> None:
    def used(count: int, write: Callable[[Chunk, memoryview], None] | None) -> set[int]:
        seen: set[int] = set()

        def fill(chunk: Chunk, buffer: memoryview) -> None:
            seen.add(address(buffer))

        stream(chunks(count), fill, lambda chunk, buffer: None, write, workers=3)
        return seen

    for write in (None, lambda chunk, buffer: time.sleep(0.001)):
        assert all(a % 4096 == 0 for a in used(30, write))
        assert len(used(300, write)) <= 8


def test_slow_consumer_holds_the_fillers_back() -> None:
    filled = threading.Semaphore(0)
    ahead: list[int] = []
    count = 0

    def fill(chunk: Chunk, buffer: memoryview) -> None:
        filled.release()

    def consume(chunk: Chunk, buffer: memoryview) -> None:
        nonlocal count
        time.sleep(0.005)
        while filled.acquire(blocking=False):
            count += 1
        ahead.append(count - len(ahead))

    stream(chunks(60), fill, consume, workers=3)
    assert max(ahead) <= 5


@pytest.mark.parametrize("stage", ["chunks", "fill", "consume", "write"])
@pytest.mark.parametrize("at", [0, 1, 17, 39])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_first_error_ends_everything_and_is_raised(stage: str, at: int, kind: type[BaseException]) -> None:
    work = chunks(40)
    culprit = work[at]
    written: list[Chunk] = []
    consumed: list[Chunk] = []

    def check(where: str, chunk: Chunk) -> None:
        if where == stage and chunk is culprit:
            raise kind(f"{where} {at}")

    def source() -> Iterator[Chunk]:
        for chunk in work:
            check("chunks", chunk)
            yield chunk

    def fill(chunk: Chunk, buffer: memoryview) -> None:
        check("fill", chunk)

    def consume(chunk: Chunk, buffer: memoryview) -> None:
        check("consume", chunk)
        consumed.append(chunk)

    def write(chunk: Chunk, buffer: memoryview) -> None:
        check("write", chunk)
        written.append(chunk)

    with pytest.raises(kind, match=f"{stage} {at}"):
        stream(source(), fill, consume, write)
    assert written == work[: len(written)]
    assert consumed == work[: len(consumed)]
    assert len(written) <= at
    if stage != "write":
        assert len(consumed) <= at


def test_error_of_write_is_raised_though_fill_continues() -> None:
    """An error of the last chunk is raised although no chunk follows."""

    def write(chunk: Chunk, buffer: memoryview) -> None:
        time.sleep(0.01)
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        stream(chunks(1), stamp, stamp, write)


def test_errors_of_several_stages_raise_one() -> None:
    def fails(chunk: Chunk, buffer: memoryview) -> None:
        raise ValueError(chunk.offset)

    for _ in range(20):
        with pytest.raises(ValueError, match=r"^0$"):
            stream(chunks(20), fails, fails, fails)


# --- chunks


def shard_of(header: int, tensors: list[list[int]]) -> OutputShard:
    made = tuple(
        OutputTensor(str(n), "U8", (sum(parts),), tuple(Copy(Span("s", 0, size)) for size in parts))
        for n, parts in enumerate(tensors)
    )
    return OutputShard("x", bytes(header), made)


@settings(max_examples=200)
@given(
    st.integers(1, 200),
    st.lists(st.lists(st.integers(0, 100), max_size=5), max_size=8),
    st.integers(1, 300),
)
def test_chunks_cover_every_byte_once(header: int, tensors: list[list[int]], chunk_bytes: int) -> None:
    shard = shard_of(header, tensors)
    covered: list[tuple[int, int, int]] = []
    position = 0
    result = list(chunks_of(shard, chunk_bytes))
    for chunk in result:
        assert chunk.offset == position
        assert sum(p.nbytes for p in chunk.slices) == chunk.nbytes
        filled = 0
        for piece in chunk.slices:
            assert piece.position == filled
            assert piece.nbytes > 0
            size = len(shard.header) if piece.part is None else piece.part.nbytes
            assert 0 <= piece.start <= size - piece.nbytes
            covered += [(piece.tensor, id(piece.part), piece.start + i) for i in range(piece.nbytes)]
            filled += piece.nbytes
        position += chunk.nbytes
    assert all(c.nbytes == chunk_bytes for c in result[:-1])
    assert position == shard.nbytes
    expected = [(-1, id(None), i) for i in range(header)]
    for number, tensor in enumerate(shard.tensors):
        expected += [(number, id(p), i) for p in tensor.parts for i in range(p.nbytes)]
    assert covered == expected
