"""Walks a large JSON text member by member, so that only selected values become Python objects.

A tokenizer of 200 000 tokens is 28 MB of JSON and five times that as dicts and lists. Small values
go to the strict parser; the walker accepts only valid JSON around them.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Final, NoReturn

from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.errors import InvalidInputError

__all__ = ["STRING", "JsonWalk"]

STRING: Final = rb'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"'
_SPACE: Final = re.compile(rb"[ \t\n\r]*")
_STRING: Final = re.compile(STRING)
_SCALAR: Final = re.compile(rb"[-+.0-9A-Za-z]+")
_TOKENS: Final = re.compile(STRING + rb"|[\[\]{}]")
_CHECK_BYTES: Final = 1 << 20


class JsonWalk:
    """The JSON text `raw`, named `where` in errors. Positions are byte offsets of values.

    A callback gets the position of a value and returns the position after it, as do `value`, `members`
    and `elements`. All methods raise InvalidInputError for what is not JSON.
    """

    def __init__(self, raw: bytes, where: str) -> None:
        self.raw = raw
        self.where = where
        _check_utf8(raw, where)

    def document(self, take: Callable[[int], int]) -> None:
        """Call `take` with the position of the text's value and check that nothing follows it."""
        end = self.space(take(self.space(0)))
        if end != len(self.raw):
            self.fail(end, "text after the end of the document")

    def members(self, at: int, take: Callable[[str, int], int]) -> int:
        """Call `take(key, position)` for every member of the object at `at`."""
        at = self._open(at, b"{", "an object")
        while not self._closes(at, b"}"):
            match = _STRING.match(self.raw, at)
            if match is None:
                self.fail(at, "expected a key")
            at = self.space(match.end())
            if self.raw[at : at + 1] != b":":
                self.fail(at, "expected a colon")
            at = self._next(take(self.text(match[0]).decode(), self.space(at + 1)), b"}")
        return at + 1

    def elements(self, at: int, take: Callable[[int], int]) -> int:
        """Call `take(position)` for every element of the array at `at`."""
        at = self._open(at, b"[", "an array")
        while not self._closes(at, b"]"):
            at = self._next(take(at), b"]")
        return at + 1

    def value(self, at: int, take: Callable[[object], object] | None = None) -> int:
        """Parse the value at `at` strictly and pass it to `take`."""
        end = self._end(at)
        value = parse_json(self.raw[at:end], where=f"{self.where}, from byte {at}", allow_floats=True)
        if take is not None:
            take(value)
        return end

    def text(self, quoted: bytes) -> bytes:
        """The unescaped UTF-8 bytes of a quoted string."""
        if b"\\" not in quoted:
            return quoted[1:-1]
        value = parse_json(quoted, where=self.where)
        assert isinstance(value, str)
        return value.encode()

    def space(self, at: int) -> int:
        """The first position from `at` that is not white space."""
        match = _SPACE.match(self.raw, at)
        assert match is not None
        return match.end()

    def fail(self, at: int, problem: str) -> NoReturn:
        raise InvalidInputError(f"{self.where}: not the expected JSON at byte {at}: {problem}")

    def _open(self, at: int, bracket: bytes, what: str) -> int:
        if self.raw[at : at + 1] != bracket:
            self.fail(at, f"expected {what}")
        return self.space(at + 1)

    def _closes(self, at: int, bracket: bytes) -> bool:
        return self.raw[at : at + 1] == bracket

    def _next(self, at: int, bracket: bytes) -> int:
        """Past a comma to the next item, or to the closing bracket."""
        at = self.space(at)
        if self._closes(at, bracket):
            return at
        if self.raw[at : at + 1] != b",":
            self.fail(at, "expected a comma")
        at = self.space(at + 1)
        if self._closes(at, bracket):
            self.fail(at, "a trailing comma")
        return at

    def _end(self, at: int) -> int:
        """The position after the value at `at`, which is not validated."""
        first = self.raw[at : at + 1]
        if first not in (b"[", b"{"):
            match = (_STRING if first == b'"' else _SCALAR).match(self.raw, at)
            if match is None:
                self.fail(at, "expected a value")
            return match.end()
        depth = 0
        for match in _TOKENS.finditer(self.raw, at):
            depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
            if depth == 0:
                return match.end()
        self.fail(at, "a bracket that is never closed")


def _check_utf8(raw: bytes, where: str) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(raw), _CHECK_BYTES):
            decoder.decode(raw[start : start + _CHECK_BYTES])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{where}: not UTF-8 ({error.reason})") from None
