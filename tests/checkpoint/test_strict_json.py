"""A JSON text is parsed unambiguously or refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.errors import InvalidInputError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


def parse(text: str | bytes, *, allow_floats: bool = False, max_depth: int = 64) -> object:
    raw = text.encode() if isinstance(text, str) else text
    return parse_json(raw, where="here", allow_floats=allow_floats, max_depth=max_depth)


@given(VALUES, st.booleans())
def test_output_of_pythons_json_is_read_back(value: object, ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse_json(raw, where="here", allow_floats=True) == value


@given(st.binary(max_size=40) | st.text('[]{}",:\\u0dD8e1-. ntf', max_size=40).map(str.encode))
def test_any_bytes_give_a_value_or_one_line_of_error(raw: bytes) -> None:
    problem = None
    try:
        assert parse_json(raw, where="here", allow_floats=True) == json.loads(raw)
    except InvalidInputError as error:
        problem = str(error)
    assert problem is None or (problem.startswith("here: ") and problem.isprintable())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("\ufeff{}", "byte order mark"),
        (b"\xff", "not UTF-8 at byte 0"),
        ("", "not valid JSON at character 0"),
        ('{"a":1,"a":1}', "duplicate key 'a'"),
        ('{"a":1,"\\u0061":1}', "duplicate key 'a'"),
        ('[{"b":{"c":0,"d":0,"c":0}}]', "duplicate key 'c'"),
        ('{"\\u001b":1,"\\u001b":1}', r"duplicate key '\\x1b'"),
        ("NaN", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("18446744073709551616", "not a 64-bit integer"),
        ("-9223372036854775809", "not a 64-bit integer"),
        ("9" * 100_000, "not a 64-bit integer"),
        ("-0", "-0 is not a 64-bit integer"),
        ("1.0", "1.0 is not a plain integer"),
        ("1e2", "1e2 is not a plain integer"),
        ("01", "not valid JSON"),
        ("1.", "not valid JSON"),
        ("\u0661", "not valid JSON"),
        ('"\\ud800"', "lone surrogate"),
        ('{"\\udc00":1}', "lone surrogate"),
        ('[["\\ud800\\u0041"]]', "lone surrogate"),
        ('"\t"', "Invalid control character"),
        ('{"a":1,}', "not valid JSON"),
        ("[1]//", "not valid JSON"),
        ("{'a':1}", "not valid JSON"),
    ],
)
def test_second_readings_are_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(InvalidInputError, match=why) as caught:
        parse(text)
    assert str(caught.value).startswith("here: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18446744073709551615", 2**64 - 1),
        ("-9223372036854775808", -(2**63)),
        ("9007199254740993", 2**53 + 1),
        (' \t\r\n{"a" : [ true , null ]} ', {"a": [True, None]}),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ('"\\\\ud800"', "\\ud800"),
        ('"\x7f"', "\x7f"),
    ],
)
def test_exact_values(text: str, value: object) -> None:
    assert parse(text) == value


def test_floats_only_where_allowed_and_within_range() -> None:
    assert parse("[1.5, 1e2, -0]", allow_floats=True) == [1.5, 100.0, 0]
    with pytest.raises(InvalidInputError, match="1e999 is out of range"):
        parse("1e999", allow_floats=True)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_depth_is_limited_exactly(opening: str, closing: str) -> None:
    levels = opening.count("[") + opening.count("{")
    repeats = 12 // levels
    text = opening * repeats + "0" + closing * repeats
    parse(text, max_depth=12)
    with pytest.raises(InvalidInputError, match="nested deeper than 11"):
        parse(text, max_depth=11)


@pytest.mark.parametrize(
    "text",
    [
        "[[[[",
        '}]"',
        '\\"[[[[[[',
        '\\\\\\"{{{{{{',
        '"\\',
    ],
)
def test_brackets_within_strings_do_not_nest(text: str) -> None:
    value = {text: [text, text * 3]}
    assert parse(json.dumps(value), max_depth=2) == value


@pytest.mark.parametrize("before", ['["]"', '["\\\\"', '["\\"]"', '["\\\\\\"]"', '["\\u005d"', '["a","]]]]"'])
def test_brackets_after_strings_do_nest(before: str) -> None:
    with pytest.raises(InvalidInputError, match="nested deeper than 4"):
        parse(before + "," + "[" * 4 + "]" * 4 + "]", max_depth=4)


def test_strings_across_scan_windows_are_followed() -> None:
    value = ["[" * (3 << 20), "x"]
    assert parse(json.dumps(value), max_depth=1) == value
    with pytest.raises(InvalidInputError, match="nested deeper than 1"):
        parse(json.dumps([*value, []]), max_depth=1)


def test_ten_million_brackets_are_refused_at_once() -> None:
    with pytest.raises(InvalidInputError, match="nested deeper than 64"):
        parse(b"[" * 10**7)


def test_recursion_error_does_not_escape_a_caller_close_to_the_limit() -> None:
    script = (
        "import sys\n"
        "from moe_surgery.checkpoint.strict_json import parse_json\n"
        "from moe_surgery.errors import InvalidInputError\n"
        "sys.setrecursionlimit(10**6)\n"
        "for depth in (64, 100_000):\n"
        "    try:\n"
        "        parse_json(b'[' * depth, where='x')\n"
        "    except InvalidInputError:\n"
        "        print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\nrefused\n"
