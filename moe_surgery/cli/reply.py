"""Prints a model's reply as it is generated: the answer on stdout, the reasoning on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moe_surgery.cli.terminal import Terminal

if TYPE_CHECKING:
    from moe_surgery.runtime.harmony import Piece

__all__ = ["ReplyView"]


class ReplyView:
    """Prints pieces of the answer, and with `reasoning` the rest too, dimmed. Silent with --json."""

    def __init__(self, terminal: Terminal, *, reasoning: bool) -> None:
        self._terminal = terminal
        self._reasoning = reasoning
        self._aside = False  # whether the last line is on stderr and unfinished
        self._answered = False

    def show(self, pieces: Iterable[Piece]) -> None:
        if self._terminal.json:
            return
        for piece in pieces:
            part, header = piece.header.part, piece.header
            if part in ("reasoning", "other"):
                if self._reasoning:
                    label = "reasoning: " if part == "reasoning" else f"{header.role}: "
                    self._print_aside(piece.text, label if piece.first else "")
                continue
            if self._aside:
                self._end_aside()
            before = ""
            if piece.first:
                before = ("\n" if self._answered else "") + (
                    f"to={header.recipient}: " if header.recipient else ""
                )
            self._terminal.stream(before + piece.text)
            self._answered = True

    def end(self) -> None:
        """End the last line."""
        if self._terminal.json:
            return
        if self._aside:
            self._end_aside()
        self._terminal.stream("\n")

    def _print_aside(self, text: str, label: str) -> None:
        if label and (self._aside or self._answered):
            self._terminal.aside("\n")
        self._terminal.aside(label + text)
        self._aside = True

    def _end_aside(self) -> None:
        self._terminal.aside("\n")
        self._aside = False
