"""Tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Decoder", "TextStream"]


class Decoder(Protocol):
    """What is needed of `moe_surgery.runtime.text.Text`."""

    def decode(self, tokens: Sequence[int]) -> str: ...


class TextStream:
    """Turns tokens into text as they come, holding back what is not yet a whole character."""

    def __init__(self, text: Decoder) -> None:
        self._text = text
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly empty."""
        self._tokens.append(token)
        whole = self._text.decode(self._tokens)
        if whole.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new = whole[len(self._shown) :]
        # Tokens before the last complete text no longer matter: keep decoding short.
        if len(self._tokens) > 64 and new:
            self._tokens, self._shown = [token], self._text.decode([token])
        else:
            self._shown = whole
        return new

    def flush(self) -> str:
        """Whatever is left, incomplete characters included."""
        return self._text.decode(self._tokens)[len(self._shown) :]
