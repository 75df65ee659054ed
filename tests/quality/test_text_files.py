"""Files of texts by whatever name and form they come: read for what they say, or refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from moe_surgery import inspect, plan_random
from moe_surgery.errors import InvalidInputError
from moe_surgery.quality import text_files as module
from moe_surgery.quality.corpus import open_corpus, text_files
from moe_surgery.quality.json_list import JsonList
from moe_surgery.runtime.text import Text
from tests.quality.conftest import conversation
from tests.support.command import call

TEXTS: list[Any] = [
    {"text": "One [text], {two} braces."},
    {"text": "日本 🙂\nnext line", "id": 2},
    "A string.",
]
TALK: list[Any] = [conversation("What is 3 + 4?", "7"), conversation("Why?", None)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def listed(rows: list[Any], **options: Any) -> bytes:
    return json.dumps(rows, **options).encode()


FORMS = {
    "lines": ("x.jsonl", lines),
    "upper case": ("X.JSONL", lines),
    "mixed case": ("x.JsonL", lines),
    "ndjson": ("x.ndjson", lines),
    "lines named json": ("x.json", lines),
    "a list": ("x.json", listed),
    "a list, upper case": ("x.JSON", listed),
    "an indented list": ("x.json", lambda rows: listed(rows, indent=2, ensure_ascii=False)),
    "a list named jsonl": ("x.jsonl", listed),
    "a list after blank lines": ("x.json", lambda rows: b"\n \r\n" + listed(rows) + b"\n\n"),
    "a byte order mark": ("x.jsonl", lambda rows: b"\xef\xbb\xbf" + lines(rows)),
    "a list after a byte order mark": ("x.json", lambda rows: b"\xef\xbb\xbf" + listed(rows)),
    "compressed lines": ("x.jsonl.gz", lambda rows: gzip.compress(lines(rows))),
    "compressed lines, upper case": ("X.JSONL.GZ", lambda rows: gzip.compress(lines(rows))),
    "a compressed list": ("x.json.gz", lambda rows: gzip.compress(listed(rows))),
    "compressed under a plain name": ("x.jsonl", lambda rows: gzip.compress(lines(rows))),
    "plain under a compressed name": ("x.jsonl.gz", lines),
    "compressed in two members": (
        "x.jsonl.gz",
        lambda rows: gzip.compress(lines(rows[:1])) + gzip.compress(lines(rows[1:])),
    ),
}


@pytest.mark.parametrize("pieces", [3, 1 << 20])
@pytest.mark.parametrize("rows", [TEXTS, TALK], ids=["texts", "talk"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_same_in_every_form(
    form: str, rows: list[Any], pieces: int, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_BYTES", pieces)
    name, write = FORMS[form]
    (tmp_path / name).write_bytes(write(rows))
    [file] = text_files([tmp_path / name])
    assert file.format == ("chat" if rows is TALK else "jsonl")
    assert file.domain == name[0]
    results = open_corpus([file], text, context=4096)
    if rows is TEXTS:
        expected = [row["text"] if isinstance(row, dict) else row for row in rows]
        assert [d.text for d in results.documents()] == expected
        assert [text.decode(p.tokens) for p in results] == expected
    else:
        assert [d.chat.messages for d in results.documents() if d.chat] == [
            tuple(r["messages"]) for r in rows
        ]


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.py.GZ", "x"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_texts_are_the_same_compressed(name: str, compress: Any, text: Text, tmp_path: Path) -> None:
    result = 'A text {with} "quotes".\r\nÜber [zwei] Zeilen.\n'
    (tmp_path / name).write_bytes(compress(result.encode()))
    [file] = text_files([tmp_path / name])
    assert (file.domain, file.format) == ("x", "text")
    assert [d.text for d in open_corpus([file], text, context=99).documents()] == [result]


def test_a_byte_order_mark_is_not_part_of_a_text(text: Text, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffa\ufeffb".encode())
    [document] = open_corpus(text_files([tmp_path / "x.txt"]), text, context=99).documents()
    assert document.text == "a\ufeffb"


# --- a list of JSON in pieces


def in_pieces(text: str, sizes: list[int]) -> Iterator[str]:
    at = 0
    for size in sizes:
        yield text[at : at + size]
        at += size
    yield text[at:]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
sizes = st.lists(st.integers(0, 9), max_size=60)


@given(st.lists(values, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), sizes)
def test_a_list_in_pieces_is_its_items(
    rows: list[Any], indent: int | None, ascii: bool, cut: list[int]
) -> None:
    result = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    assert [row for _, row in JsonList(in_pieces(result, cut), "x")] == rows
    apart = "[" + ",".join("\n\n" + json.dumps(row) for row in rows) + "]"
    assert list(JsonList(in_pieces(apart, cut), "x")) == [(3 + 2 * n, row) for n, row in enumerate(rows)]


@given(st.lists(values, min_size=1, max_size=4), st.data(), sizes)
def test_a_damaged_list_is_refused_where_json_refuses_it(
    rows: list[Any], data: st.DataObject, cut: list[int]
) -> None:
    result = json.dumps(rows, indent=1)
    at = data.draw(st.integers(0, len(result)))
    damaged = (
        result[:at]
        + data.draw(st.text('[]{},:"\\ \n0x', max_size=2))
        + result[at + data.draw(st.integers(0, 3)) :]
    )
    try:
        expected = json.loads(damaged)
    except ValueError:
        expected = None
    if isinstance(expected, list):
        assert [row for _, row in JsonList(in_pieces(damaged, cut), "x")] == expected
    else:
        with pytest.raises(InvalidInputError, match=r"^x: line \d+: "):
            list(JsonList(in_pieces(damaged, cut), "x"))


# --- what is refused


def archive() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("x.jsonl", lines(TEXTS))
    return made.getvalue()


CUT = gzip.compress(lines(TEXTS) * 50)[:-20]
FLIPPED = bytearray(gzip.compress(lines(TEXTS) * 50))
FLIPPED[-5] ^= 1  # the checksum
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "parquet by name": (
        "x.parquet",
        b"PAR1",
        ".parquet is Parquet, which is not supported; convert it to .jsonl: ",
    ),
    "csv": ("x.csv", b"text\nfine\n", ".csv is a table, which is not supported; convert it to .jsonl: "),
    "a compressed csv": ("X.CSV.gz", gzip.compress(b"text\n"), ".csv is a table, which is not supported; "),
    "zstd by name": (
        "x.jsonl.zst",
        b"",
        ".zst is compressed, which is not supported; decompress it, or compress",
    ),
    "a notebook": ("x.ipynb", b'{"cells": []}', ".ipynb is a notebook, which is not supported; "),
    "arrow by name": ("x.arrow", b"", ".arrow is Arrow, which is not supported; convert it to .jsonl: "),
    "parquet": ("x.jsonl", b"PAR1\0\0", "this file is Parquet; convert it to .jsonl: "),
    "arrow": ("x.json", b"ARROW1\0\0", "this file is Arrow; "),
    "xz": ("x.jsonl", lzma.compress(lines(TEXTS)), "this file is compressed with xz; decompress it, or"),
    "bzip2": ("x.txt", bz2.compress(b"text"), "this file is compressed with bzip2; "),
    "zip": ("x", archive(), "this file is an archive; extract the texts"),
    "gzip in gzip": ("x.jsonl.gz", gzip.compress(gzip.compress(b"x")), "this file is compressed twice; "),
    "parquet in gzip": ("x.gz", gzip.compress(b"PAR1"), "this file is Parquet; "),
    "UTF-16": ("x.txt", "text".encode("utf-16"), "this file is UTF-16; convert it to UTF-8"),
    "bytes": ("x.txt", b"\x01\x00\x02", "this file is binary; texts are UTF-8, or rows of JSON in .jsonl or"),
    "bytes further on": (
        "x.txt",
        b"fine\n" * 59_999 + b"a\0b\n",
        "line 60000: contains a NUL byte; this is not text",
    ),
    "cut gzip": ("x.jsonl.gz", CUT, "damaged gzip data: "),
    "a wrong checksum": ("x.txt.gz", bytes(FLIPPED), "damaged gzip data: "),
    "rows named txt": ("x.txt", lines(TALK), "contains rows of JSON; name it .jsonl or .json, or set "),
    "a list named txt": (
        "x.txt",
        listed(TEXTS, indent=2),
        "contains rows of JSON; name it .jsonl or .json, or",
    ),
    "rows without a name": ("x", b'\n{"id": 1, "text": "x"}\n', "contains rows of JSON; name it .jsonl or"),
    "an object with a list": (
        "x.json",
        json.dumps({"data": TEXTS, "version": 1}).encode(),
        "line 1: expected {\"text\": \"...\"}, got an object with 'data', 'version'",
    ),
    "an indented object": (
        "x.json",
        json.dumps({"data": TEXTS}, indent=2).encode(),
        "line 1: not a row of JSON; write rows as a list or one per line, as jq -c does",
    ),
    "a row of numbers": ("x.json", b'["fine",\n7]', "row 2 (line 2): expected {"),
    "a row without messages": (
        "x.json",
        json.dumps([TALK[0], {"text": "x"}], indent=1).encode(),
        "row 2 (line 14): expected {\"messages\": [...]}, got an object with 'text'",
    ),
    "a bad message": (
        "x.json",
        listed([TALK[0], {"messages": [{"role": "user"}]}]),
        "row 2 (line 1): message 1: has neither content nor tool_calls",
    ),
    "a list cut off": ("x.json", b'["fine",\n"fine"\n', "line 3: the list is cut off here"),
    "a string cut off": ("x.json", b'["fine",\n"fi', "line 2: not JSON: Unterminated string"),
    "a comma too many": ("x.json", b'["fine",\n]', "line 2: not JSON: Expecting value"),
    "no comma": ("x.json", b'["fine"\n"fine"]', "line 2: expected ',' or the end of the list"),
    "text behind the list": ("x.json", b'["fine"]\n\n{}', "line 3: unexpected text after the list"),
    "a list of lists": ("x.json", b'[["fine"]]', 'row 1 (line 1): expected {"text": "..."}, got an array'),
    "deep nesting": ("x.json", b"[" * 200_000, "line 1: not JSON: nested too deeply"),
    "a list that is no UTF-8": ("x.json", b'["fine",\n"\xff"]', "line 2: not UTF-8"),
    "a list that ends within a character": ("x.json", b'["fine",\n"\xe6\x97', "line 2: not UTF-8"),
    "an empty list": ("x.json", b"[]", "contains no text"),
    "nothing": ("x.json", b"", "contains no text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_neither_text_nor_rows_is_refused_by_name(case: str, text: Text, tmp_path: Path) -> None:
    name, content, complaint = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError) as caught:
        list(open_corpus(text_files([tmp_path / name]), text, context=99))
    result = str(caught.value)
    assert result.startswith(f"{tmp_path / name}: {complaint}")
    assert "\n" not in result


def test_a_format_that_is_given_is_not_guessed(text: Text, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(lines(TEXTS[:1]))
    (tmp_path / "x.csv").write_bytes(b"a,b\n")
    for name, format, expected in (
        ("x.txt", "jsonl", TEXTS[0]["text"]),
        ("x.txt", "text", lines(TEXTS[:1]).decode()),
        ("x.csv", "text", "a,b\n"),
    ):
        files = text_files([tmp_path / name], format=format)
        assert [d.text for d in open_corpus(files, text, context=99).documents()] == [expected]


COMMANDS: dict[str, list[str]] = {
    "profile": ["profile", "example:tiny", "-o", "x.stats"],
    "search": ["search", "example:tiny", "-o", "x.ranking"],
    "evaluate": ["evaluate", "example:tiny", "--plan", "plan.json"],
    "bench": ["bench", "speculate", "example:tiny", "--draft-top-k", "1"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", ["parquet by name", "rows named txt", "cut gzip", "an object with a list"])
def test_every_command_that_takes_texts_refuses_in_one_line(
    case: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, complaint = REFUSED[case]
    Path(name).write_bytes(content)
    Path("plan.json").write_text(plan_random(4, 1, inspect("example:tiny")).to_json())
    before = sorted(tmp_path.iterdir())
    ended = call(capsys, *COMMANDS[command], "--texts", name)
    assert (ended.code, ended.out) == (3, "")
    assert ended.error.startswith(f"moe-surgery: {name}: {complaint}")
    assert sorted(tmp_path.iterdir()) == before
