"""A shard index may only name plain files next to it, each unambiguously."""

from __future__ import annotations

import json

import pytest

from moe_surgery.checkpoint.index import (
    MAX_INDEX_BYTES,
    Index,
    build_index,
    parse_index,
    safe_shard_name,
)
from moe_surgery.errors import InvalidInputError

FILE = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"

UNSAFE_NAMES = [
    ("parent", "../../../etc/passwd.safetensors", "not a path"),
    ("parent-below-folder", "folder/../../../etc/passwd.safetensors", "not a path"),
    ("folder", "folder/model.safetensors", "not a path"),
    ("backslash-parent", "..\\..\\Windows\\evil.safetensors", "not a path"),
    ("backslash-below-folder", "folder\\..\\..\\evil.safetensors", "not a path"),
    ("absolute", "/etc/passwd.safetensors", "not a path"),
    ("backslash-absolute", "\\evil.safetensors", "not a path"),
    ("drive-backslash", "C:\\evil.safetensors", "not a path"),
    ("drive-slash", "C:/evil.safetensors", "not a path"),
    ("drive-relative", "D:relative\\evil.safetensors", "not a path"),
    ("drive-only", "D:evil.safetensors", "not a path"),
    ("drive-below-folder", "folder/C:\\evil.safetensors", "not a path"),
    ("share", "\\\\attacker\\share\\evil.safetensors", "not a path"),
    ("share-below-folder", "folder/\\\\attacker\\share\\evil.safetensors", "not a path"),
    ("mixed", "folder/\\evil.safetensors", "not a path"),
    ("empty", "", "is empty"),
    ("dot", ".", "begins with a dot"),
    ("dot-dot", "..", "begins with a dot"),
    ("hidden", ".safetensors", "begins with a dot"),
    ("trailing-slash", "model.safetensors/", "not a path"),
    ("nul", "model\0.safetensors", "unprintable"),
    ("newline", "model\n.safetensors", "unprintable"),
    ("trailing-newline", "model.safetensors\n", "unprintable"),
    ("terminal-escape", "\x1b[2Jmodel.safetensors", "unprintable"),
    ("direction-mark", "model\u202e.safetensors", "unprintable"),
    ("256-bytes", "m" * 244 + ".safetensors", "longer than 255 bytes"),
    ("256-bytes-of-utf8", "é" * 122 + ".safetensors", "longer than 255 bytes"),
    ("other-suffix", "pytorch_model.bin", "does not end in .safetensors"),
    ("suffix-in-capitals", "model.SAFETENSORS", "does not end in .safetensors"),
    ("null", None, "must be a string"),
    ("number", 1, "must be a string"),
    ("array", [SHARD], "must be a string"),
    ("object", {"file": SHARD}, "must be a string"),
]


def index_of(weight_map: object, **more: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map, **more}).encode()


@pytest.mark.parametrize(
    ("name", "why"), [row[1:] for row in UNSAFE_NAMES], ids=[row[0] for row in UNSAFE_NAMES]
)
def test_shard_name_that_is_no_plain_file_name_is_refused(name: object, why: str) -> None:
    with pytest.raises(InvalidInputError, match=why) as alone:
        safe_shard_name(name, file=FILE)
    with pytest.raises(InvalidInputError, match=why) as within:
        parse_index(index_of({"a": SHARD, "b": name}), file=FILE)
    assert str(alone.value) == str(within.value)
    assert str(alone.value).startswith(FILE)
    assert str(alone.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [SHARD, "model.safetensors", "a b.safetensors", "modèle.safetensors", "m" * 243 + ".safetensors"],
)
def test_plain_shard_names_are_accepted(name: str) -> None:
    assert safe_shard_name(name, file=FILE) == name


def test_index_keeps_order_metadata_and_total_size() -> None:
    raw = json.dumps(
        {"metadata": {"total_size": 12, "x": [1.5]}, "weight_map": {"b": SHARD, "a": SHARD}}
    ).encode()
    index = parse_index(raw, file=FILE)
    assert index == Index({"b": SHARD, "a": SHARD}, 12, {"total_size": 12, "x": [1.5]})
    assert list(index.weight_map) == ["b", "a"]


@pytest.mark.parametrize(
    ("metadata", "total_size"),
    [
        ({}, None),
        ({"total_size": None}, None),
        ({"total_size": 0}, 0),
        ({"total_size": 13761264768.0}, 13761264768),
    ],
)
def test_total_size_may_be_absent_or_a_whole_float(metadata: object, total_size: int | None) -> None:
    raw = json.dumps({"metadata": metadata, "weight_map": {}}).encode()
    assert parse_index(raw, file=FILE).total_size == total_size


def test_metadata_may_be_absent() -> None:
    assert parse_index(b'{"weight_map":{}}', file=FILE) == Index({}, None, {})


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        pytest.param(b"", "not valid JSON", id="empty-file"),
        pytest.param(b"[]", "must be a JSON object, got an array", id="root-array"),
        pytest.param(b"{}", "weight_map is missing", id="no-weight-map"),
        pytest.param(b'{"weight_map":[]}', "weight_map must be an object", id="weight-map-array"),
        pytest.param(b'{"weight_map":null}', "weight_map must be an object", id="weight-map-null"),
        pytest.param(b'{"weight_map":{},"weight_map":{}}', "duplicate key 'weight_map'", id="map-twice"),
        pytest.param(
            b'{"weight_map":{"a":"x.safetensors","\\u0061":"y.safetensors"}}',
            "duplicate key 'a'",
            id="tensor-twice-through-escape",
        ),
        pytest.param(b'{"weight_map":{},"metadata":[]}', "metadata must be an object", id="metadata-array"),
        pytest.param(
            b'{"weight_map":{},"metadata":{"total_size":"12"}}',
            "total_size .*string '12'",
            id="size-string",
        ),
        pytest.param(b'{"weight_map":{},"metadata":{"total_size":true}}', "got true", id="size-true"),
        pytest.param(b'{"weight_map":{},"metadata":{"total_size":-1}}', "got -1", id="size-negative"),
        pytest.param(b'{"weight_map":{},"metadata":{"total_size":1.5}}', "got 1.5", id="size-fraction"),
        pytest.param(b'{"weight_map":{},"metadata":{"x":NaN}}', "NaN is not JSON", id="nan"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "not valid JSON", id="lfs-pointer"),
        pytest.param(
            index_of({"n" * 4097: SHARD}),
            "tensor 'nnn.*name is longer than 4096",
            id="tensor-name-too-long",
        ),
        pytest.param(b'{"a":' * 3000, "nested deeper", id="nested"),
    ],
)
def test_malformed_index_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(InvalidInputError, match=why) as caught:
        parse_index(raw, file=FILE)
    assert str(caught.value).startswith(FILE)
    assert str(caught.value).isprintable()


def test_index_over_the_limit_is_refused_unparsed() -> None:
    with pytest.raises(InvalidInputError, match="100000001 bytes are over the limit of 100000000"):
        parse_index(bytes(MAX_INDEX_BYTES + 1), file=FILE)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model.safetensors", "MODEL.safetensors"),
        ("straße.safetensors", "STRASSE.safetensors"),
        ("mod\u00e8le.safetensors", "mode\u0300le.safetensors"),
    ],
)
def test_shard_names_that_differ_only_in_case_or_normal_form_are_refused(first: str, second: str) -> None:
    with pytest.raises(InvalidInputError, match="are the same file on case-insensitive file systems"):
        parse_index(index_of({"a": first, "b": second}), file=FILE)


def test_built_index_has_the_form_of_the_hub() -> None:
    weight_map = {"b": "model-00002-of-00002.safetensors", "a": SHARD}
    expected = {"metadata": {"total_size": 12}, "weight_map": weight_map}
    raw = build_index(weight_map, 12)
    assert raw.decode() == json.dumps(expected, indent=2, sort_keys=True) + "\n"
    assert list(parse_index(raw, file=FILE).weight_map) == ["a", "b"]


def test_built_index_is_independent_of_the_order_given() -> None:
    pairs = [("a", SHARD), ("b", SHARD), ("c", SHARD)]
    assert build_index(dict(pairs), 1) == build_index(dict(reversed(pairs)), 1)


def test_built_index_never_holds_what_the_parser_refuses() -> None:
    with pytest.raises(InvalidInputError, match="not a path"):
        build_index({"a": "../x.safetensors"}, 12)
    with pytest.raises(InvalidInputError, match="got -1"):
        build_index({}, -1)
