"""The pool against the bytes of the file: any sequence of calls, any number of slots."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef  # noqa: E402
from moe_surgery.checkpoint.direct_file import BLOCK, DirectFile, whole_blocks  # noqa: E402
from moe_surgery.checkpoint.fileops import FileOps  # noqa: E402
from moe_surgery.checkpoint.local_file import LocalFile  # noqa: E402
from moe_surgery.formats.native import native_module  # noqa: E402
from moe_surgery.kernels.weights import Mxfp4Weight  # noqa: E402
from moe_surgery.runtime.residency.device_slots import DeviceSlots  # noqa: E402
from moe_surgery.runtime.residency.pool import ExpertPool  # noqa: E402
from moe_surgery.runtime.residency.reads import (  # noqa: E402
    AHEAD,
    FILL,
    URGENT,
    Load,
    PythonReads,
    Read,
    open_reads,
    room,
)
from moe_surgery.runtime.residency.slots import ExpertFiles, Weights, aligned_memory  # noqa: E402
from moe_surgery.runtime.residency.usage import Usage, expected_use  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402
from tests.kernels.native_cases import needs_native  # noqa: E402
from tests.support.checkpoints import Shape, load_tensors, write_checkpoint  # noqa: E402

SHAPE = Shape(layers=3, experts=6, top_k=2, vocabulary=8)
Key = tuple[int, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pool") / "model", SHAPE, shards=2)


@pytest.fixture(scope="module")
def files(folder: Path) -> Iterator[ExpertFiles]:
    with Checkpoint.open(folder) as checkpoint:
        direct = {name: shard.source.direct() for name, shard in checkpoint.shards.items()}

        def part(layer: int, name: str) -> tuple[TensorRef, ...]:
            prefix = f"model.layers.{layer}.mlp.experts.{name}_proj_"
            return tuple(checkpoint.tensors[prefix + kind] for kind in ("blocks", "scales"))

        weights = [(part(n, "gate_up"), part(n, "down")) for n in range(SHAPE.layers)]
        yield ExpertFiles({k: v for k, v in direct.items() if v is not None}, weights)


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[Key, bytes]:
    """The bytes of every expert, read by the safetensors library's layout."""
    tensors = load_tensors(folder)
    parts = ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales")
    return {
        (n, e): b"".join(tensors[f"model.layers.{n}.mlp.experts.{p}"][e].tobytes() for p in parts)
        for n in range(SHAPE.layers)
        for e in range(SHAPE.experts)
    }


def bytes_of(weights: Weights) -> bytes:
    found = b""
    for weight in weights:
        assert isinstance(weight, Mxfp4Weight)
        found += weight.blocks.numpy().tobytes() + weight.scales.numpy().tobytes()
    return found


def make_pool(files: ExpertFiles, slots: int, scores: np.ndarray | None = None) -> ExpertPool:
    usage = Usage(np.zeros((SHAPE.layers, SHAPE.experts)) if scores is None else scores)
    return ExpertPool(files, open_reads(files.files.values()), usage, slots)


layers = st.integers(0, SHAPE.layers - 1)
experts = st.lists(st.integers(0, SHAPE.experts - 1), unique=True, min_size=1)
CALLS = st.one_of(
    st.tuples(st.just("take"), layers, experts),
    st.tuples(st.just("read_ahead"), layers, experts),
    st.tuples(st.just("interrupted"), layers, experts),
    st.tuples(st.just("resize"), st.integers(2, 20), st.just([])),
    st.tuples(st.just("fill"), st.just(0), st.just([])),
)


@given(slots=st.integers(2, 18), calls=st.lists(CALLS, max_size=25))
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_calls_hands_out_the_bytes_of_the_file(
    files: ExpertFiles, stored: dict[Key, bytes], slots: int, calls: list[tuple[str, int, list[int]]]
) -> None:
    pool = make_pool(files, slots, np.linspace(0, 1, 18).reshape(SHAPE.layers, SHAPE.experts))
    limit = slots
    for name, number, chosen in calls:
        if name == "take":
            pool.usage.count(number, chosen, [1] * len(chosen))
            taken = {expert: bytes_of(weights) for expert, weights in pool.take(number, chosen)}
            assert taken == {expert: stored[number, expert] for expert in chosen}
            pool.usage.end_step(1)
        elif name == "interrupted":
            next(iter(pool.take(number, chosen)))
        elif name == "read_ahead":
            pool.read_ahead(number, chosen)
        elif name == "fill":
            pool.fill()
        else:
            for _ in pool.take(0, [0]):
                pass  # nothing is in use
            pool.resize(limit := number)
        assert len(pool.resident) <= limit
    pool.close()


def test_what_is_used_least_is_evicted_and_ages(files: ExpertFiles) -> None:
    pool = make_pool(files, 3)

    def use(*keys: Key) -> None:
        for layer, expert in keys:
            pool.usage.count(layer, [expert], [1])
            list(pool.take(layer, [expert]))
        pool.usage.end_step(1)

    use((0, 0), (0, 0), (1, 1), (2, 2))
    use((0, 0), (2, 2))
    use((0, 3))  # 1, 1 was used least
    assert pool.resident == {(0, 0), (2, 2), (0, 3)}
    pool.usage.end_step(100_000)
    use((1, 4))  # all that was counted is old; the last use counts more than any of it
    use((1, 5), (1, 4))
    assert {(1, 4), (1, 5)} <= pool.resident
    pool.close()


def test_usage_is_the_decayed_sum_of_uses() -> None:
    random, usage = np.random.default_rng(0), Usage(np.full((2, 3), 0.25), half_life=10)
    expected = np.full((2, 3), 0.25 / (1 - 0.5**0.1))
    for _ in range(50):
        tokens, uses = int(random.integers(1, 5)), random.integers(0, 3, (2, 3))
        expected = expected * 0.5 ** (tokens / 10) + uses
        for layer in range(2):
            usage.count(layer, [0, 1, 2], uses[layer].tolist())
        usage.end_step(tokens)
    np.testing.assert_allclose(usage.scores, expected)


def test_a_plan_says_what_is_held_first(files: ExpertFiles) -> None:
    plan = Plan("gpt_oss", SHAPE.experts, ((0, 5), (1, 2, 3), (4,)))
    pool = make_pool(files, 6, expected_use(plan, SHAPE.layers, SHAPE.experts, 2))
    pool.fill()
    while len(pool.resident) < 6:
        time.sleep(0.001)
    assert pool.resident == {(0, 0), (0, 5), (1, 1), (1, 2), (1, 3), (2, 4)}
    pool.close()


def test_guesses_that_are_wrong_make_room_again(files: ExpertFiles) -> None:
    pool = make_pool(files, 8)
    pool.read_ahead(1, [0, 1])
    list(pool.take(1, [2, 3]))
    assert pool.counts.total("ahead") == 0
    for layer in (0, 2, 0):
        assert {e for e, _ in pool.take(layer, range(SHAPE.experts))} == set(range(SHAPE.experts))
    assert not pool.resident & {(1, 0), (1, 1)}
    pool.close()


def test_guesses_are_read_only_while_most_come_true(files: ExpertFiles) -> None:
    pool = make_pool(files, 8)

    def guess(experts: list[int], chosen: list[int]) -> int:
        """Experts read ahead for layer 1."""
        list(pool.take(0, range(6)))
        list(pool.take(2, [0, 1]))  # nothing of layer 1 is left
        before = pool.counts.layers[1].missed
        pool.read_ahead(1, experts)
        list(pool.take(1, chosen))
        return len(chosen) - (pool.counts.layers[1].missed - before)

    assert guess([0, 1], [0, 1]) == 2
    for _ in range(60):
        guess([2, 3], [0, 1])
    assert guess([0, 1], [0, 1]) == 0  # no longer read
    for _ in range(60):
        guess([0, 1], [0, 1])
    assert guess([0, 1], [0, 1]) == 2
    pool.close()


@given(offset=st.integers(0, 3 * BLOCK), nbytes=st.integers(1, 5 * BLOCK))
def test_whole_blocks_hold_the_range_and_no_block_more(offset: int, nbytes: int) -> None:
    start, length = whole_blocks(offset, nbytes)
    assert start % BLOCK == length % BLOCK == 0
    assert start <= offset < start + BLOCK
    assert start + length - BLOCK < offset + nbytes <= start + length <= start + room(nbytes)


def read_into(memory: mmap.mmap, file: DirectFile, offset: int, nbytes: int) -> Read:
    address = np.frombuffer(memory, np.uint8).ctypes.data
    return Read(file, offset, nbytes, memoryview(memory)[: room(nbytes)], address)


@given(data=st.data(), size=st.integers(1, 12 << 20))
@settings(max_examples=15, deadline=None)
def test_reads_fill_the_bytes_of_their_range(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, size: int
) -> None:
    path = tmp_path_factory.mktemp("reads") / "file"
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    path.write_bytes(content)
    with LocalFile(path) as source:
        file = source.direct()
    offset = data.draw(st.integers(0, size - 1))
    nbytes = data.draw(st.integers(1, size - offset))
    for reads in (PythonReads(threads=3), open_reads([file])):
        memory = aligned_memory(room(nbytes))
        reads.read([read_into(memory, file, offset, nbytes)])
        at = offset % BLOCK
        assert memory[at : at + nbytes] == content[offset : offset + nbytes]
        assert reads.nbytes == nbytes + at
        reads.close()
    file.close()


def test_urgent_reads_go_before_others_and_what_has_not_begun_is_cancelled(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64 * BLOCK))
    order: list[int] = []
    gate = threading.Event()

    class Slow(FileOps):
        def pread_into(self, fd: int, buffer: memoryview, offset: int, cache: bool = False) -> int:
            gate.wait()
            order.append(offset // BLOCK)
            return super().pread_into(fd, buffer, offset, cache)

    gate.set()
    with LocalFile(tmp_path / "file", Slow()) as source:
        file = source.direct()
    gate.clear()
    order.clear()
    memory = aligned_memory(room(BLOCK))

    def load(number: int, kind: int) -> Load:
        return Load([read_into(memory, file, number * BLOCK, BLOCK)], kind)

    reads = PythonReads(threads=1)
    first, ahead, dropped, hurried = load(0, URGENT), load(1, AHEAD), load(2, AHEAD), load(3, AHEAD)
    for one in (first, ahead, dropped, hurried):
        reads.start(one)
    while first.waiting:
        time.sleep(0.001)
    urgent = load(4, URGENT)
    reads.start(urgent)
    reads.hurry(hurried)
    assert reads.cancel(dropped) == BLOCK
    assert dropped.finished
    assert reads.cancel(first) == 0
    gate.set()
    for one in (ahead, urgent, hurried):
        reads.wait([one])
    assert order == [0, 4, 3, 1]
    reads.close()


@needs_native
def test_threads_of_the_extension_do_the_same(tmp_path: Path) -> None:
    module = native_module()
    assert module is not None
    fifo, path = tmp_path / "fifo", tmp_path / "file"
    os.mkfifo(fifo)
    path.write_bytes(np.arange(64 * BLOCK // 4, dtype=np.int32).tobytes())
    blocked, fd = os.open(fifo, os.O_RDWR), os.open(path, os.O_RDONLY)
    memory = np.zeros(5 * BLOCK, np.uint8)

    def piece(number: int, to: int) -> tuple[int, int, int, int, int]:
        return fd, number * BLOCK, memory.ctypes.data + to * BLOCK, BLOCK, BLOCK

    reads = module.Reads(1)
    # A pipe has no positions, so that reading from one fails.
    failing = reads.start([(blocked, 0, memory.ctypes.data, BLOCK, BLOCK), piece(0, 0)], URGENT)
    assert reads.wait([failing], 10_000) == failing
    assert reads.outcome(failing) == (True, errno.ESPIPE, 0)
    loads = [reads.start([piece(n, n)], kind) for n, kind in ((1, AHEAD), (2, AHEAD), (3, URGENT))]
    reads.hurry(loads[1])
    for load in loads:
        assert reads.wait([load], 10_000) == load
        assert reads.outcome(load) == (True, 0, 0)
        assert reads.cancel(load) == 0
        reads.forget(load)
    assert memory[BLOCK : 4 * BLOCK].tobytes() == path.read_bytes()[BLOCK : 4 * BLOCK]
    short = reads.start([(fd, 64 * BLOCK, memory.ctypes.data, BLOCK, 1)], FILL)
    reads.wait([short], 10_000)
    assert reads.outcome(short) == (True, -1, 0)
    if Path("/proc/self/mem").exists():
        nowhere = os.open("/proc/self/mem", os.O_RDONLY)
        bad = reads.start([(nowhere, 0, memory.ctypes.data, BLOCK, BLOCK)], URGENT)
        reads.wait([bad], 10_000)
        assert reads.outcome(bad) == (True, errno.EIO, 0)
        os.close(nowhere)
    reads.close()
    os.close(blocked)
    os.close(fd)


def test_a_device_holds_the_experts_used_last(files: ExpertFiles, stored: dict[Key, bytes]) -> None:
    pool = make_pool(files, 4)
    slots = DeviceSlots(pool, torch.device("cpu"), 3)
    for layer, chosen in ((0, [0, 1]), (1, [2]), (0, [1, 4]), (2, [0, 1, 2, 3]), (0, [4])):
        taken = {expert: bytes_of(weights) for expert, weights in slots.take(layer, chosen)}
        assert taken == {expert: stored[layer, expert] for expert in chosen}
        assert len(slots.resident) <= 3
        assert {(layer, chosen[-1])} <= slots.resident
    before = pool.counts.total("missed") + pool.counts.total("there")
    list(slots.take(0, [4]))
    assert pool.counts.total("missed") + pool.counts.total("there") == before
    pool.close()
