"""Broken headers are refused by one line that names key or tensor, and never less strictly than by llama.cpp."""

from __future__ import annotations

import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from moe_surgery.checkpoint.gguf.header import GgufHeader, read_gguf_header
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.errors import InvalidInputError
from tests.support.ggml_reader import GgmlReader
from tests.support.gguf_bytes import ARRAY, F32, STRING, U8, array, file, kv, tensor, text
from tests.support.sources import MemoryFile, MemorySource

from .corpus import ACCEPT, CASES, LOOSER, STRICTER, VALID, Case


def header(blob: bytes) -> GgufHeader:
    return read_gguf_header(MemorySource("model.gguf", MemoryFile(blob)))


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_corpus_verdict_and_message(case: Case, tmp_path: Path) -> None:
    if case.ours == ACCEPT:
        header(case.blob)
        return
    path = tmp_path / "model.gguf"
    path.write_bytes(case.blob)
    with pytest.raises(InvalidInputError, match=case.ours) as caught, LocalFile(path) as source:
        read_gguf_header(source)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 400 + len(str(path))


def test_corpus_lists_what_differs_from_llama_cpp() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.id for case in CASES if case.ours != ACCEPT and case.llama} == STRICTER
    assert {case.id for case in CASES if case.ours == ACCEPT and not case.llama} == LOOSER


def test_llama_cpp_says_what_the_corpus_says(ggml_reader: GgmlReader, tmp_path: Path) -> None:
    verdicts = {}
    for number, case in enumerate(CASES):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(case.blob)
        verdicts[case.id] = ggml_reader.accepts(path)
    assert verdicts == {case.id: case.llama for case in CASES}


def test_every_prefix_of_a_valid_file_is_refused() -> None:
    for length in range(len(VALID)):
        with pytest.raises(InvalidInputError, match=r"cut off|announces"):
            header(VALID[:length])


@pytest.mark.parametrize("flip", [1, 0x20, 0x80, 0xFF])
def test_no_changed_byte_is_a_crash(flip: int) -> None:
    start = header(VALID).data_start
    for position in range(start):
        damaged = bytearray(VALID)
        damaged[position] ^= flip
        with suppress(InvalidInputError):
            header(bytes(damaged))


def vocabulary(count: int, nbytes: int) -> bytes:
    """A file with `count` tokens of `nbytes` bytes, scores and as many merges."""
    tokens = text(b"t" * nbytes) * count
    return file(
        [
            kv("tokenizer.ggml.tokens", ARRAY, array(STRING, count, tokens)),
            kv("tokenizer.ggml.scores", ARRAY, array(F32, count, bytes(4 * count))),
            kv("tokenizer.ggml.merges", ARRAY, array(STRING, count, tokens)),
        ],
        [tensor("t", [8], 0, 0)],
        bytes(32),
    )


def test_a_large_vocabulary_is_read_in_bounded_time() -> None:
    blob = vocabulary(250_000, 12)
    begin = time.perf_counter()
    assert list(header(blob).tensors) == ["t"]
    assert time.perf_counter() - begin < 20


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    source = MemorySource("model.gguf", MemoryFile(vocabulary(20_000, 500)))
    tracemalloc.start()
    try:
        read_gguf_header(source)
        assert tracemalloc.get_traced_memory()[1] < 5 << 20  # of 20 MB: a window, and the source's copy
    finally:
        tracemalloc.stop()


def test_memory_is_proportional_to_the_header() -> None:
    blob = file([], [tensor(f"t{i}", [0], 0, 0) for i in range(4_000)])
    tracemalloc.start()
    try:
        assert len(header(blob).tensors) == 4_000
        assert tracemalloc.get_traced_memory()[1] < 40 * len(blob)
    finally:
        tracemalloc.stop()


def test_a_string_in_the_way_of_two_windows() -> None:
    for length in (262_100, 262_144, 262_180, 5 << 20):
        value = array(STRING, 3, text(b"x" * length) + text("y") + text(b"z" * 300))
        blob = file([kv("a", ARRAY, value), kv("b", U8, b"\7")], [tensor("t", [1], 0, 0)], bytes(32))
        read = header(blob)
        assert read.metadata["b"].nbytes == 8 + 1 + 4 + 1
        assert list(read.tensors) == ["t"]
