"""Headers written by us and by the safetensors library are read identically by both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from xxhash import xxh3_128_hexdigest

from moe_surgery.checkpoint.dtypes import DTYPE_BITS, tensor_nbytes
from moe_surgery.checkpoint.header import (
    MAX_HEADER_BYTES,
    MAX_NAME_BYTES,
    MAX_RANK,
    build_header,
    parse_header,
)
from moe_surgery.errors import InvalidInputError

from .oracle import ACCEPT, BAD_JSON, ours, ours_tensors, reference_tensors, reference_verdict
from .oracle import st as file_bytes

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = TEXT.filter(lambda name: name != "__metadata__")
METADATA = st.none() | st.dictionaries(TEXT, TEXT, max_size=4)
NUMPY_DTYPES = ["float64", "float32", "float16", "int64", "int16", "int8", "uint8", "bool", "complex64"]
Specs = list[tuple[str, str, tuple[int, ...]]]
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
ARRAYS = st.builds(lambda shape, dtype: np.zeros(shape, dtype), SHAPES, st.sampled_from(NUMPY_DTYPES))


@st.composite
def whole_byte_tensors(draw: st.DrawFn) -> Specs:
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    tensors = []
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(SHAPES)
        if math.prod(shape) * DTYPE_BITS[dtype] % 8:
            shape = (*shape, 4)
        tensors.append((name, dtype, shape))
    return tensors


def data_for(tensors: Specs) -> bytes:
    size = sum(tensor_nbytes(dtype, shape) for _, dtype, shape in tensors)
    return bytes(i % 251 for i in range(size))


@given(st.dictionaries(NAMES, ARRAYS, max_size=6), METADATA)
def test_files_of_the_library_are_read_identically(
    arrays: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str] | None
) -> None:
    assume(arrays or metadata != {})  # see the test below
    blob = safetensors.numpy.save(arrays, metadata)
    header = ours(blob)
    assert ours_tensors(blob) == reference_tensors(blob)
    infos = header.tensors.items()
    assert {name: info.shape for name, info in infos} == {name: a.shape for name, a in arrays.items()}
    assert {name: info.nbytes for name, info in infos} == {name: a.nbytes for name, a in arrays.items()}
    assert header.metadata == (metadata or {})
    assert header.file_size == len(blob)
    assert header.digest == xxh3_128_hexdigest(blob[: header.data_start])


def test_what_the_library_writes_for_no_tensors_and_empty_metadata_neither_reads() -> None:
    blob = safetensors.numpy.save({}, {})
    assert blob[8:].rstrip() == b'{},"__metadata__":{}}'
    assert BAD_JSON in reference_verdict(blob)
    with pytest.raises(InvalidInputError, match="not valid JSON"):
        ours(blob)
    assert reference_verdict(build_header([], metadata={})) == ACCEPT


@given(whole_byte_tensors(), METADATA, st.sampled_from([1, 8, 64, 4096]), st.integers(0, 4095))
def test_our_files_are_read_identically_by_the_library(
    tensors: Specs, metadata: dict[str, str] | None, pad_to: int, residue: int
) -> None:
    raw = build_header(tensors, metadata=metadata, pad_to=pad_to, residue=residue % pad_to)
    assert len(raw) % pad_to == residue % pad_to
    blob = raw + data_for(tensors)
    reference = reference_tensors(blob)
    assert {name: (view[0], tuple(view[1])) for name, view in reference.items()} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }
    assert ours_tensors(blob) == reference
    assert ours(blob).metadata == (metadata or {})
    assert set(ours(blob).tensors) == {name for name, _, _ in tensors}


@given(METADATA)
def test_metadata_we_write_the_library_reads(metadata: dict[str, str] | None) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(build_header([("a", "U8", (1,))], metadata=metadata) + b"\0")
        with safe_open(path, framework="np") as file:
            assert (file.metadata() or {}) == (metadata or {})


@given(whole_byte_tensors(), st.data())
def test_order_of_the_json_does_not_matter(tensors: Specs, draw: st.DataObject) -> None:
    raw = build_header(tensors)
    data = data_for(tensors)
    members = draw.draw(st.permutations(list(json.loads(raw[8:]).items())))
    shuffled = file_bytes(json.dumps(dict(members)).encode(), data)
    assert ours_tensors(shuffled) == reference_tensors(shuffled) == ours_tensors(raw + data)
    assert list(ours(shuffled).tensors.values()) == list(ours(raw + data).tensors.values())


@given(st.lists(st.integers(0, 3), max_size=8), st.data())
def test_empty_tensors_are_accepted_at_boundaries_and_only_there(
    sizes: list[int], data: st.DataObject
) -> None:
    total = sum(sizes)
    at = data.draw(st.integers(0, total + 1))
    boundaries = {sum(sizes[:i]) for i in range(len(sizes) + 1)}
    members = {f"t{i}": ("U8", size, sum(sizes[:i])) for i, size in enumerate(sizes)} | {"z": ("U8", 0, at)}
    names = data.draw(st.permutations(sorted(members)))
    body = {
        name: {"dtype": dtype, "shape": [size], "data_offsets": [begin, begin + size]}
        for name in names
        for dtype, size, begin in [members[name]]
    }
    blob = file_bytes(json.dumps(body).encode(), bytes(total))
    if at in boundaries:
        assert ours_tensors(blob) == reference_tensors(blob)
    else:
        with pytest.raises(InvalidInputError, match="data begin at"):
            ours(blob)
        with pytest.raises(safetensors.SafetensorError, match="invalid offset"):
            reference_tensors(blob)


@given(whole_byte_tensors(), METADATA)
def test_same_tensors_give_the_same_bytes(tensors: Specs, metadata: dict[str, str] | None) -> None:
    other = None if metadata is None else dict(reversed(metadata.items()))
    assert build_header(tensors, metadata=metadata) == build_header(list(tensors), metadata=other)


def test_built_header_is_compact_with_metadata_first_and_padded_with_spaces() -> None:
    raw = build_header([("b", "F32", (2, 2)), ("a\u00e9", "U8", (3,))], metadata={"y": "2", "x": "1"})
    assert raw[8:].decode().rstrip(" ") == (
        '{"__metadata__":{"x":"1","y":"2"},'
        '"b":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        '"a\u00e9":{"dtype":"U8","shape":[3],"data_offsets":[16,19]}}'
    )
    assert len(raw) % 8 == 0


def test_tensors_come_in_offset_order() -> None:
    body = b'{"late":%s,"early":%s}' % (
        b'{"dtype":"U8","shape":[1],"data_offsets":[2,3]}',
        b'{"dtype":"U8","shape":[2],"data_offsets":[0,2]}',
    )
    assert list(ours(file_bytes(body, b"abc")).tensors) == ["early", "late"]


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "duplicate key 'a'"),
        ([("__metadata__", "U8", (1,))], "__metadata__"),
        ([("a", "U9", (1,))], "unknown dtype 'U9'"),
        ([("a", "U8", (-1,))], "dimension -1 is outside"),
        ([("a", "F4", (1,))], "4 bits of F4"),
        ([("a", "U8", (2**61,))], "overflows 64-bit sizes"),
        ([("a", "U8", (1,) * (MAX_RANK + 1))], "17 dimensions"),
        ([("n" * (MAX_NAME_BYTES + 1), "U8", (1,))], "longer than 4096 bytes"),
        ([("\ud800", "U8", (1,))], "lone surrogate"),
    ],
)
def test_header_that_could_not_be_read_is_not_built(tensors: Specs, why: str) -> None:
    with pytest.raises(InvalidInputError, match=why):
        build_header(tensors)


def test_header_padded_beyond_the_limit_is_not_built() -> None:
    with pytest.raises(InvalidInputError, match="over the limit of 100000000"):
        build_header([], pad_to=MAX_HEADER_BYTES + 16)


@pytest.mark.parametrize(("pad_to", "residue"), [(8, 8), (8, -1), (0, 0)])
def test_impossible_padding_is_a_value_error(pad_to: int, residue: int) -> None:
    with pytest.raises(ValueError, match="below pad_to"):
        build_header([], pad_to=pad_to, residue=residue)


@given(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 2**64), max_size=5))
def test_tensor_nbytes_is_exact_or_refused(dtype: str, shape: list[int]) -> None:
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    non_zero = DTYPE_BITS[dtype] * math.prod(filter(None, shape))
    sound = all(dimension < 2**63 for dimension in shape) and non_zero < 2**64 and bits % 8 == 0
    if sound:
        assert tensor_nbytes(dtype, shape) == bits // 8
    else:
        with pytest.raises(InvalidInputError):
            tensor_nbytes(dtype, shape)


def test_parsing_does_not_depend_on_the_data_section_being_there() -> None:
    raw = build_header([("a", "BF16", (1 << 20, 1 << 12))])
    info = parse_header(raw, len(raw) + (1 << 33), file="remote").tensors["a"]
    assert (info.begin, info.end, info.nbytes) == (0, 1 << 33, 1 << 33)
