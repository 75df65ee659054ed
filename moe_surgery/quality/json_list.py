"""A JSON list read item by item, so that a long file is never in memory whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from moe_surgery.errors import InvalidInputError

__all__ = ["JsonList"]

_SPACE = re.compile(r"[ \t\r\n]*")
_LOOKAHEAD = 32  # an error this near to what has been read may come from the rest that has not


class JsonList:
    """Items of the list that `pieces` spell together, each with the line in which it begins.

    `where` begins the messages of InvalidInputError, which name the line.
    """

    def __init__(self, pieces: Iterator[str], where: str) -> None:
        self._pieces = pieces
        self._where = where
        self._decoder = json.JSONDecoder()
        self._held = ""
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
            raise self._broken("something follows the list")

    def _value(self) -> object:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                unfinished = error.pos + _LOOKAHEAD > len(self._held) or error.msg.startswith("Unterminated")
                if unfinished and self._read():
                    continue
                self._advance(error.pos)
                raise self._broken(f"not JSON: {error.msg}") from None
            except RecursionError:
                raise self._broken("not JSON: nested too deeply") from None
            number = isinstance(value, int | float)  # "1" may be the beginning of "1e-5"
            if number and end + _LOOKAHEAD > len(self._held) and self._read():
                continue
            self._advance(end)
            found: object = value
            return found

    def _next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            end = _SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]
            self._advance(end)
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._read():
                return ""

    def _expect(self, character: str, complaint: str) -> None:
        if self._next() != character:
            raise self._broken(complaint if self._at < len(self._held) else "the list is cut off here")
        self._advance(self._at + 1)

    def _advance(self, to: int) -> None:
        self._line += self._held.count("\n", self._at, to)
        self._at = to

    def _read(self) -> bool:
        """Read at least as much again as is held; False, and nothing changed, at the end."""
        more: list[str] = []
        wanted = max(1, len(self._held) - self._at)
        while wanted > 0 and (piece := next(self._pieces, None)) is not None:
            more.append(piece)
            wanted -= len(piece)
        if not any(more):
            return False
        self._held = self._held[self._at :] + "".join(more)
        self._at = 0
        return True

    def _broken(self, complaint: str) -> InvalidInputError:
        return InvalidInputError(f"{self._where}: line {self._line}: {complaint}")
