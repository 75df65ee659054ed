"""Tokens to text as they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Decoder", "TextStream"]


class Decoder(Protocol):
    """The part of `moe_surgery.runtime.text.Text` that a stream needs."""

    def decode(self, tokens: Sequence[int]) -> str: ...


class TextStream:
    """Turns tokens into text as they are generated, holding back incomplete characters."""

    def __init__(self, text: Decoder) -> None:
        self._text = text
        self._tokens: list[int] = []
        self._emitted = ""

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly empty."""
        self._tokens.append(token)
        decoded = self._text.decode(self._tokens)
        if decoded.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new = decoded[len(self._emitted) :]
        # Tokens before the last complete text no longer matter: keep decoding short.
        if len(self._tokens) > 64 and new:
            self._tokens, self._emitted = [token], self._text.decode([token])
        else:
            self._emitted = decoded
        return new

    def flush(self) -> str:
        """The rest, incomplete characters included."""
        return self._text.decode(self._tokens)[len(self._emitted) :]
