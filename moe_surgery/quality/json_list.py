"""Reads a JSON list item by item, so that a long file is never entirely in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from moe_surgery.errors import InvalidInputError

__all__ = ["JsonList"]

_SPACE = re.compile(r"[ \t\r\n]*")
_LOOKAHEAD = 32  # an error this close to the end of the buffer may come from what is not read yet


class JsonList:
    """Items of the list in the joined `pieces`, each with the line where it starts.

    Messages of InvalidInputError start with `where` and name the line.
    """

    def __init__(self, pieces: Iterator[str], where: str) -> None:
        self._pieces = pieces
        self._where = where
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        self._line = 1

    def __iter__(self) -> Iterator[tuple[int, object]]:
        self._expect("[", "expected a list")
        if self._next() == "]":
            self._advance(self._at + 1)
        else:
            while True:
                self._next()
                line = self._line
                yield line, self._value()
                if self._next() != ",":
                    self._expect("]", "expected ',' or the end of the list")
                    break
                self._advance(self._at + 1)
        if self._next():
            raise self._broken("unexpected text after the list")

    def _value(self) -> object:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                unfinished = error.pos + _LOOKAHEAD > len(self._buffer) or error.msg.startswith(
                    "Unterminated"
                )
                if unfinished and self._read():
                    continue
                self._advance(error.pos)
                raise self._broken(f"not JSON: {error.msg}") from None
            except RecursionError:
                raise self._broken("not JSON: nested too deeply") from None
            number = isinstance(value, int | float)  # "1" may be the beginning of "1e-5"
            if number and end + _LOOKAHEAD > len(self._buffer) and self._read():
                continue
            self._advance(end)
            item: object = value
            return item

    def _next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            end = _SPACE.match(self._buffer, self._at).end()  # type: ignore[union-attr]
            self._advance(end)
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read():
                return ""

    def _expect(self, character: str, complaint: str) -> None:
        if self._next() != character:
            raise self._broken(complaint if self._at < len(self._buffer) else "the list is cut off here")
        self._advance(self._at + 1)

    def _advance(self, to: int) -> None:
        self._line += self._buffer.count("\n", self._at, to)
        self._at = to

    def _read(self) -> bool:
        """At least double the buffer; False, with nothing changed, at the end."""
        more: list[str] = []
        wanted = max(1, len(self._buffer) - self._at)
        while wanted > 0 and (piece := next(self._pieces, None)) is not None:
            more.append(piece)
            wanted -= len(piece)
        if not any(more):
            return False
        self._buffer = self._buffer[self._at :] + "".join(more)
        self._at = 0
        return True

    def _broken(self, complaint: str) -> InvalidInputError:
        return InvalidInputError(f"{self._where}: line {self._line}: {complaint}")
