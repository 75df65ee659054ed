"""The bytes of a shard do not depend on chunks, threads or the implementation of conversions."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_surgery import families
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.engine.chunks import CHUNK_BYTES, Chunk, chunks_of
from moe_surgery.engine.spans import Copy
from moe_surgery.formats.native import native_module
from moe_surgery.selection.plan import plan_keeping
from moe_surgery.surgery.compiler import compile_program
from moe_surgery.surgery.producer import producer_of
from moe_surgery.surgery.program import Decode, Encode, OutputShard

from ..support.checkpoints import (
    Shape,
    decode_transposed,
    kept_tensors,
    load_tensors,
    to_bf16,
    write_checkpoint,
)
from ..support.command import contents, run

KEPT = [3, 0, 2]
SHAPE = Shape(layers=1, vocabulary=8)
NEEDS_NATIVE = pytest.mark.skipif(native_module() is None, reason="the native extension is not there")


@dataclass(frozen=True)
class Case:
    """One shard, its source checkpoint, and all its bytes produced as one chunk."""

    checkpoint: Checkpoint
    shard: OutputShard
    whole: bytes

    def produce(self, chunks: list[Chunk]) -> bytes:
        """The shard's bytes with chunks filled in sequence."""
        producer = producer_of(self.shard, self.checkpoint.shards)
        result = bytearray(self.shard.nbytes)
        for chunk in chunks:
            producer.fill(chunk, memoryview(result)[chunk.offset : chunk.offset + chunk.nbytes])
        return bytes(result)


@contextmanager
def prepared(folder: Path, dtype: str, shape: Shape = SHAPE) -> Iterator[Case]:
    layout = "bf16" if dtype == "mxfp4" else "mxfp4"
    source = write_checkpoint(folder / "source", shape, layout, shards=2)
    with Checkpoint.open(source) as checkpoint:
        model = families.identify_model(checkpoint)
        (shard,) = compile_program(checkpoint, model, plan_keeping(KEPT, model), store=dtype).shards
        buffer = bytearray(shard.nbytes)
        (chunk,) = chunks_of(shard, shard.nbytes)
        producer_of(shard, checkpoint.shards).fill(chunk, memoryview(buffer))
        yield Case(checkpoint, shard, bytes(buffer))


@pytest.fixture(scope="module", params=["keep", "bf16", "mxfp4"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with prepared(tmp_path_factory.mktemp("case"), request.param) as result:
        kinds = {type(p) for t in result.shard.tensors for p in t.parts}
        assert kinds == {"keep": {Copy}, "bf16": {Copy, Decode}, "mxfp4": {Copy, Encode}}[request.param]
        yield result


def test_whole_shard_is_what_numpy_makes_of_the_source(case: Case, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(case.whole)
    got = load_tensors(tmp_path)
    source = load_tensors(case.checkpoint.path)
    expected = kept_tensors(source, [KEPT])
    if any(n.endswith("gate_up_proj") for n in got):
        expected = to_bf16(expected)
    for name, value in got.items():
        base = name.removesuffix("_blocks").removesuffix("_scales")
        if name in expected:
            assert value.tobytes() == expected[name].tobytes(), name
        elif name.endswith("_blocks"):
            again = decode_transposed(value, got[base + "_scales"])
            assert again.tobytes() == expected[base].tobytes(), name


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.integers(1, 64).map(lambda n: n * 61), st.integers(200, 30_000)))
def test_any_chunk_size_gives_the_same_bytes(case: Case, chunk_bytes: int) -> None:
    assert case.produce(list(chunks_of(case.shard, chunk_bytes))) == case.whole


@pytest.mark.parametrize("chunk_bytes", [1, 7, 16])
def test_chunks_of_a_few_bytes_give_the_same_bytes(tmp_path: Path, chunk_bytes: int) -> None:
    shape = Shape(1, 4, 2, 32, 32, 1, 1, 2, 2)
    for dtype in ("keep", "bf16", "mxfp4"):
        with prepared(tmp_path / dtype, dtype, shape) as case:
            start = len(case.shard.header)
            producer = producer_of(case.shard, case.checkpoint.shards)
            # Of chunks of one byte every fifth: blocks of powers of two are met at each of their bytes.
            step = 5 if chunk_bytes == 1 else 1
            for chunk in list(chunks_of(case.shard, chunk_bytes))[::step]:
                if chunk.offset + chunk.nbytes > start:
                    buffer = bytearray(chunk.nbytes)
                    producer.fill(chunk, memoryview(buffer))
                    assert buffer == case.whole[chunk.offset : chunk.offset + chunk.nbytes]


@pytest.mark.parametrize("seed", range(4))
def test_threads_that_fill_out_of_step_give_the_same_bytes(case: Case, seed: int) -> None:
    """Chunks start in order, as in the pipeline, and finish at any pace."""
    rng = random.Random(seed)
    producer = producer_of(case.shard, case.checkpoint.shards)
    result = bytearray(case.shard.nbytes)
    work = list(chunks_of(case.shard, rng.randrange(700, 9000)))
    pauses = [rng.uniform(0, 0.002) for _ in work]
    started = threading.Semaphore(6)

    def fill(chunk: Chunk, pause: float) -> None:
        threading.Event().wait(pause)
        producer.fill(chunk, memoryview(result)[chunk.offset : chunk.offset + chunk.nbytes])
        started.release()

    with ThreadPoolExecutor(6) as pool:
        futures = []
        for chunk, pause in zip(work, pauses, strict=True):
            assert started.acquire(timeout=60)
            futures.append(pool.submit(fill, chunk, pause))
        for future in futures:
            future.result(60)
    assert bytes(result) == case.whole


@pytest.mark.parametrize("chunk_bytes", [1501, 30_000])
@pytest.mark.parametrize("order", ["backwards", "shuffled"])
def test_chunks_in_any_order_give_the_same_bytes(case: Case, order: str, chunk_bytes: int) -> None:
    """One thread: waiting for another chunk would deadlock."""
    work = list(chunks_of(case.shard, chunk_bytes))[::-1]
    if order == "shuffled":
        random.Random(7).shuffle(work)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(case.produce, work).result(60) == case.whole


@pytest.mark.parametrize("seed", range(4))
def test_threads_that_start_in_any_order_give_the_same_bytes(case: Case, seed: int) -> None:
    work = list(chunks_of(case.shard, random.Random(seed).randrange(700, 9000)))
    random.Random(seed).shuffle(work)
    producer = producer_of(case.shard, case.checkpoint.shards)
    result = bytearray(case.shard.nbytes)

    def fill(chunk: Chunk) -> None:
        producer.fill(chunk, memoryview(result)[chunk.offset : chunk.offset + chunk.nbytes])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(fill, work, timeout=60))
    assert bytes(result) == case.whole


def test_conversion_is_reported_once_however_it_is_cut(case: Case) -> None:
    reports = []
    for chunk_bytes, step in ((case.shard.nbytes, 1), (5000, 1), (611, 1), (611, -1)):
        producer = producer_of(case.shard, case.checkpoint.shards)
        for chunk in list(chunks_of(case.shard, chunk_bytes))[::step]:
            producer.fill(chunk, memoryview(bytearray(chunk.nbytes)))
        reports.append(producer.report())
    encoded = sum(
        p.rows * p.columns // 32
        for t in case.shard.tensors
        for p in t.parts
        if isinstance(p, Encode) and not p.scales
    )
    for report in reports:
        assert report.blocks == encoded
        assert report.inexact_blocks == 0
        assert report.error_sq == 0
        assert report.norm_sq == pytest.approx(reports[0].norm_sq, rel=1e-12)


@NEEDS_NATIVE
@pytest.mark.parametrize("chunk_bytes", [None, 4096, 1501])
def test_numpy_makes_the_same_bytes(
    case: Case, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int | None
) -> None:
    monkeypatch.setenv("MOE_SURGERY_NATIVE", "0")
    assert native_module() is None
    assert case.produce(list(chunks_of(case.shard, chunk_bytes or case.shard.nbytes))) == case.whole


def test_conversion_gives_back_what_it_mapped_in(tmp_path: Path) -> None:
    """Memory does not grow with the model; the kernel may map some pages around a region as well."""
    if not os.path.exists("/proc/self/smaps"):
        pytest.skip("resident pages of a mapping are seen in /proc/self/smaps only")
    with prepared(tmp_path, "bf16", Shape(1, 4, 2, 2048, 1024, 4, 2, 8, 8)) as case:
        producer = producer_of(case.shard, case.checkpoint.shards)
        for chunk in chunks_of(case.shard, 1_000_000):
            producer.fill(chunk, memoryview(bytearray(chunk.nbytes)))
        mappings = [
            m
            for m in Path("/proc/self/smaps").read_text().split("VmFlags")
            if f"{case.checkpoint.path}/model" in m
        ]
        assert mappings
        lines = [line.split() for m in mappings for line in m.splitlines() if line.startswith("Rss:")]
        resident = sum(int(kilobytes) for _, kilobytes, _ in lines) << 10
        assert resident < case.shard.bytes_read / 4


# --- whole folders


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", ["keep", "bf16", "mxfp4"])
def test_two_runs_give_the_same_folder_byte_for_byte(tmp_path: Path, dtype: str) -> None:
    layout = "bf16" if dtype == "mxfp4" else "mxfp4"
    shape = Shape(2, 8, 4, 512, 256, 8, 2, 32, 128)

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        """Make conversion to MXFP4 lossy, so that its error is reported."""
        for name, value in tensors.items():
            if value.dtype == np.uint16 and value.ndim == 3:
                value[:, ::3, ::5] ^= 0x11
                assert ".mlp.experts." in name

    source = write_checkpoint(tmp_path / "source", shape, layout, shards=3, edit_tensors=spoil)
    options = ("--keep", "0-2,5,7", "--store", dtype, "--max-shard-size", "800kB")
    folders = {}
    for name, env in {"one": {}, "two": {}, "numpy": {"MOE_SURGERY_NATIVE": "0"}}.items():
        (tmp_path / name).mkdir()
        assert run("prune", source, tmp_path / name / "out", *options, env=env).code == 0
        folders[name] = contents(tmp_path / name / "out")
    assert folders["one"] == folders["two"]
    assert folders["one"] == folders["numpy"]
    assert sum(n.endswith(".safetensors") for n in folders["one"]) > 1
    assert shape_is_larger_than_a_chunk(tmp_path / "one" / "out")


def shape_is_larger_than_a_chunk(out: Path) -> bool:
    return sum(f.stat().st_size for f in out.glob("*.safetensors")) > CHUNK_BYTES
