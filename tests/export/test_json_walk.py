"""The walker returns the same values as json.loads and refuses the same texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.errors import InvalidInputError
from moe_surgery.export.json_walk import JsonWalk

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAF = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(-1e9, 1e9) | TEXT
VALUES = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


def walked(raw: bytes) -> Any:
    """The document, its objects and arrays walked at the first two levels and parsed below."""
    walk = JsonWalk(raw, "file")
    result: list[Any] = []

    def take(at: int, depth: int = 0) -> tuple[int, Any]:
        if depth < 2 and raw[at : at + 1] == b"{":
            members: list[tuple[str, Any]] = []

            def member(key: str, at: int) -> int:
                end, value = take(at, depth + 1)
                members.append((key, value))
                return end

            return walk.members(at, member), dict(members)
        if depth < 2 and raw[at : at + 1] == b"[":
            items: list[Any] = []

            def item(at: int) -> int:
                end, value = take(at, depth + 1)
                items.append(value)
                return end

            return walk.elements(at, item), items
        values: list[Any] = []
        return walk.value(at, values.append), values[0] if values else None

    def document(at: int) -> int:
        end, value = take(at)
        result.append(value)
        return end

    walk.document(document)
    return result[0]


@given(VALUES, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_what_json_wrote_is_found(value: Any, escaped: bool, indent: Any) -> None:
    text = json.dumps(value, ensure_ascii=escaped, indent=indent)
    assert walked(f" \n{text}\t".encode()) == value


@given(VALUES, st.data())
def test_a_changed_byte_is_refused_or_read_as_json_reads_it(value: Any, data: st.DataObject) -> None:
    raw = bytearray(json.dumps(value).encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 127))
    try:
        expected = json.loads(raw)
    except ValueError:
        with pytest.raises(InvalidInputError, match=r"^file"):
            walked(bytes(raw))
        return
    try:
        got = walked(bytes(raw))
    except InvalidInputError:  # the strict parser refuses more: NaN, equal keys, huge numbers
        return
    assert got == expected


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[1,]",
        b"[,1]",
        b"[1 2]",
        b"[1",
        b"{",
        b'{"a"}',
        b'{"a" 1}',
        b'{"a":1,}',
        b"{a:1}",
        b'{"a":1}}',
        b"[1] 2",
        b'["a\n"]',
        b'["\xff"]',
        b'["a',
        b'{"a":[1,{"b":2]}}',
        b'["\\ud800"]',
        b'{"\\ud800":1}',
    ],
    ids=repr,
)
def test_malformed_text_is_refused_in_one_line(raw: bytes) -> None:
    with pytest.raises(InvalidInputError) as caught:
        walked(raw)
    assert str(caught.value).startswith("file")
    assert "\n" not in str(caught.value)
