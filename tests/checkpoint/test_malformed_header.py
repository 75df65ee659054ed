"""Broken headers are refused for their true cause, and never less strictly than by the library."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import safetensors
from safetensors import safe_open

from moe_surgery.checkpoint.dtypes import DTYPE_BITS
from moe_surgery.checkpoint.header import MAX_HEADER_BYTES, Header, parse_header, read_header
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError

from .header_corpus import CASES, OK1, STRICTER_THAN_REFERENCE, VALID
from .oracle import (
    ACCEPT,
    FILE,
    Case,
    entry,
    obj,
    ours,
    ours_tensors,
    reference_tensors,
    reference_verdict,
    st,
)

THREE = st(
    obj(
        ("__metadata__", '{"format":"pt"}'),
        ("a", entry("F32", [2, 2], 0, 16)),
        ("b\\n", entry("U8", [0], 16, 16)),
        ("c", entry("BF16", [3], 16, 22)),
    ),
    bytes(range(22)),
)


def read_path(path: Path) -> Header:
    with LocalFile(path) as file:
        return read_header(file)


def write(path: Path, blob: bytes) -> Path:
    path.write_bytes(blob)
    return path


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_corpus_verdict_and_message(case: Case, tmp_path: Path) -> None:
    path = write(tmp_path / FILE, case.blob)
    assert case.reference in reference_verdict(case.blob)
    if case.ours == ACCEPT:
        assert ours_tensors(case.blob) == reference_tensors(case.blob)
        assert read_path(path) == ours(case.blob)
        return
    for attempt in (partial(ours, case.blob), partial(read_path, path)):
        with pytest.raises(InvalidInputError, match=case.ours) as caught:
            attempt()
        message = str(caught.value)
        assert FILE in message
        assert message.isprintable()
        assert len(message) < 500 + len(str(path))


def test_corpus_ids_are_unique() -> None:
    assert len({case.id for case in CASES}) == len(CASES)


def test_stricter_than_the_library_exactly_where_listed() -> None:
    stricter = {case.id for case in CASES if case.ours != ACCEPT and case.reference == ACCEPT}
    looser = {case.id for case in CASES if case.ours == ACCEPT and case.reference != ACCEPT}
    assert stricter == STRICTER_THAN_REFERENCE
    assert looser == set()


@pytest.mark.parametrize("length", range(len(THREE)))
def test_every_prefix_of_a_valid_file_is_refused(length: int) -> None:
    assert reference_verdict(THREE[:length]) != ACCEPT
    with pytest.raises(InvalidInputError):
        ours(THREE[:length])


@pytest.mark.parametrize("position", range(len(THREE) - 22))
def test_flipped_header_byte_never_crashes_nor_passes_where_the_library_refuses(position: int) -> None:
    for flip in range(1, 256):
        blob = bytearray(THREE)
        blob[position] ^= flip
        damaged = bytes(blob)
        try:
            tensors = ours_tensors(damaged)
        except InvalidInputError:
            continue
        assert tensors == reference_tensors(damaged)


def test_dtypes_are_those_of_the_library() -> None:
    for dtype, bits in DTYPE_BITS.items():
        blob = st(obj(("t", entry(dtype, [8], 0, bits))), b"\0" * bits)
        assert ours_tensors(blob) == reference_tensors(blob)
    unknown = reference_verdict(st(obj(("t", entry("?", [8], 0, 8))), b"\0" * 8))
    named = {word for word in unknown.split("`")[3::2] if word.isupper() or "_" in word}
    assert named == set(DTYPE_BITS)


@pytest.mark.parametrize(
    ("start", "hint"),
    [
        (b"PK\x03\x04\x00\x00\x08\x08" + b"\0" * 20, "zip archive"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
        (b"GGUF\x03\0\0\0" + b"\0" * 16, "GGUF"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (b"\n\n<html><body>login</body></html>", "HTML page"),
        (b'{\n  "metadata": {"total_size": 1}}', "plain JSON"),
    ],
)
def test_error_names_the_format_the_file_really_has(start: bytes, hint: str) -> None:
    with pytest.raises(InvalidInputError, match=hint):
        ours(start)


def test_F21_no_false_hint_for_a_short_file_whose_length_looks_like_a_magic() -> None:
    with pytest.raises(InvalidInputError) as caught:
        ours(st(OK1, b"", int.from_bytes(b'{"', "little")))
    assert "looks like" not in str(caught.value)


def test_F07_header_over_the_limit_costs_no_memory(tmp_path: Path) -> None:
    path = write(tmp_path / FILE, struct.pack("<Q", MAX_HEADER_BYTES + 1))
    os.truncate(path, 8 + MAX_HEADER_BYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInputError, match="100000001 is over the limit of 100000000"):
            read_path(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with (
        pytest.raises(safetensors.SafetensorError, match="header too large"),
        safe_open(path, framework="np"),
    ):
        pass


def test_F08_header_of_exactly_the_limit_is_accepted(tmp_path: Path) -> None:
    header = OK1.ljust(MAX_HEADER_BYTES)
    path = write(tmp_path / FILE, st(header, bytes(16)))
    assert list(read_path(path).tensors) == ["test"]
    with safe_open(path, framework="np") as reference:
        assert reference.keys() == ["test"]


def test_J26_many_tensors_on_one_range_are_refused_in_bounded_time() -> None:
    blob = st(obj(*((f"t{i}", entry("U8", [200, 200], 0, 40000)) for i in range(40_000))), b"\0" * 40000)
    begin = time.process_time()
    with pytest.raises(InvalidInputError, match="expected 40000: it overlaps tensor 't0'"):
        ours(blob)
    assert time.process_time() - begin < 20
    assert "invalid offset" in reference_verdict(blob)


@pytest.mark.parametrize("size", [0, 1])
def test_J27_many_valid_tensors_are_accepted_in_bounded_time_and_memory(size: int) -> None:
    count = 20_000
    blob = st(
        obj(*((f"t{i}", entry("U8", [size], i * size, (i + 1) * size)) for i in range(count))),
        b"\0" * (size * count),
    )
    begin = time.process_time()
    header = ours(blob)
    assert time.process_time() - begin < 5
    assert len(header.tensors) == count
    assert len(reference_tensors(blob)) == count


def test_J27_parsing_memory_is_proportional_to_the_header() -> None:
    header = obj(*((f"t{i}", entry("U8", [1], i, i + 1)) for i in range(5_000)))
    raw = st(header)
    tracemalloc.start()
    try:
        parse_header(raw, len(raw) + 5_000, file=FILE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * len(raw)


def test_containers_beyond_the_limit_are_refused_before_they_are_built() -> None:
    body = b'{"t":[' + b"[]," * 4_000_000 + b"[]]}"
    with pytest.raises(InvalidInputError, match="more than 4000000 objects and arrays"):
        ours(st(body))


def test_tensors_beyond_the_limit_are_refused() -> None:
    body = b"{" + b",".join(b'"%d":0' % i for i in range(1_000_001)) + b"}"
    with pytest.raises(InvalidInputError, match="1000001 tensors are over the limit of 1000000"):
        ours(st(body))


def test_header_bytes_that_do_not_match_their_length_are_refused() -> None:
    for raw in (VALID[:67], VALID[:69]):
        with pytest.raises(InvalidInputError, match="bytes of header, expected 68"):
            parse_header(raw, len(VALID), file=FILE)


def test_hostile_names_are_escaped_and_shortened_in_messages() -> None:
    name = "\\u001b[2J\\u202e" + "x" * 3000
    with pytest.raises(InvalidInputError) as caught:
        ours(st(obj((name, entry("U8", [1], 1, 2))), b"\0\0"))
    message = str(caught.value)
    assert r"'\x1b[2J\u202exxx" in message
    assert message.isprintable()
    assert len(message) < 300


def test_names_that_differ_are_printed_differently() -> None:
    names = ["\x1b", "\\x1b", "\\\\x1b", "a\u200bb", "ab", "\ud800", "é", "e\u0301"]
    printed = [printable(name) for name in names]
    assert len(set(printed)) == len(names)
    assert all(text.isprintable() for text in printed)


def test_file_name_is_escaped_in_messages() -> None:
    with pytest.raises(InvalidInputError, match=r"a\\nb\.safetensors"):
        parse_header(b"", 0, file="a\nb.safetensors")
