"""The harmony format of gpt-oss: what a model generates, split into reasoning, answer and tool calls.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
    <|start|>assistant<|channel|>commentary to=functions.x <|constrain|>json<|message|>{...}<|call|>

A header names role, recipient, channel and content type; the recipient follows the role or the channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_surgery.runtime.text_stream import Decoder, TextStream

__all__ = ["Harmony", "Header", "Markers", "Piece", "Reply", "ToolCall"]

Part = Literal["answer", "reasoning", "tool_call", "other"]


@dataclass(frozen=True, slots=True)
class Markers:
    """Ids of the tokens that structure a conversation; None for those a tokenizer lacks."""

    start: int
    message: int
    end: int
    channel: int | None = None
    constrain: int | None = None
    call: int | None = None
    return_: int | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """The role, channel and recipient of a message."""

    role: str = "assistant"
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None

    @property
    def part(self) -> Part:
        """The kind of message for the user; "other" for roles other than the assistant."""
        if self.role != "assistant":
            return "other"
        if self.recipient is not None:
            return "tool_call"
        return "reasoning" if self.channel == "analysis" else "answer"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a message, never empty; `first` where the message begins."""

    header: Header
    text: str
    first: bool


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A message to a tool: its name ("functions.x") and the content, usually JSON."""

    recipient: str
    content: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's answer, its reasoning, and the tools it called. Messages of one kind are joined by a line break."""

    answer: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Reply:
        messages: list[tuple[Header, list[str]]] = []
        for piece in pieces:
            if piece.first:
                messages.append((piece.header, []))
            messages[-1][1].append(piece.text)
        joined = [(header, "".join(texts)) for header, texts in messages]
        return cls(
            "\n".join(text for header, text in joined if header.part == "answer"),
            "\n".join(text for header, text in joined if header.part == "reasoning"),
            tuple(ToolCall(h.recipient or "", text) for h, text in joined if h.part == "tool_call"),
        )


class Harmony:
    """Parses the tokens generated after a prompt, one by one.

    Where the prompt does not end in a turn of the assistant, or the tokenizer has no such markers, all text is
    the answer; so is text in place of a header.
    """

    def __init__(self, text: Decoder, markers: Markers | None, prompt: Sequence[int]) -> None:
        self._text = text
        self._markers = markers
        self._header: list[int] | None = None  # tokens of the header being read
        self._prompt_tokens = 0  # how many of them come from the prompt
        self._body: Header | None = None  # of the message being read
        self._stream = TextStream(text)
        self._first = True
        turn = [] if markers is None else _last_turn(prompt, markers.start)
        for token in turn:
            self.push(token)
        header = self._body if self._header is None else self._parse(self._header)
        self._prompt_tokens = len(self._header or ())
        if not turn or (header is not None and header.role != "assistant"):
            self._markers = None
            self._begin(Header())
        elif self._body is not None:
            self._begin(self._body)

    @property
    def structured(self) -> bool:
        """Whether what follows the prompt is split; else all of it is the answer."""
        return self._markers is not None

    def push(self, token: int) -> list[Piece]:
        """The text that `token` completes, if any."""
        markers = self._markers
        if markers is None:
            return self._emit(self._stream.push(token))
        if token in (markers.end, markers.call, markers.return_):
            return self.flush()
        if token == markers.start:
            pieces = self.flush()
            self._header, self._prompt_tokens = [], 0
            return pieces
        if token == markers.channel and self._header is None:
            pieces = self.flush()
            self._header, self._prompt_tokens = [token], 0
            return pieces
        if token == markers.message:
            if self._header is not None:
                self._begin(self._parse(self._header))
            elif self._body is None:
                self._begin(Header())
            return []
        if self._header is not None:
            self._header.append(token)
            return self._check_header(self._header)
        if self._body is None:
            self._begin(Header())
        return self._emit(self._stream.push(token))

    def flush(self) -> list[Piece]:
        """The rest of a message that ends here, complete or not."""
        pieces: list[Piece] = []
        if self._header is not None:
            pieces = self._check_header(self._header, ended=True)
        if self._body is not None:
            pieces += self._emit(self._stream.flush())
        self._body = self._header = None
        return pieces

    def _begin(self, header: Header) -> None:
        self._header, self._body = None, header
        self._stream, self._first = TextStream(self._text), True

    def _emit(self, text: str) -> list[Piece]:
        if not text or self._body is None:
            return []
        piece = Piece(self._body, text, self._first)
        self._first = False
        return [piece]

    def _check_header(self, header: list[int], *, ended: bool = False) -> list[Piece]:
        """Nothing while `header` can be one; else its text as the beginning of a message.

        `ended`: the header is complete. Until then it is not checked within a character.
        """
        markers = self._markers
        assert markers is not None
        if markers.channel in header:
            parsed = self._parse(header)
            text = self._text.decode(header[header.index(markers.channel) :])
            max_words = 2 if parsed.recipient or parsed.channel == "commentary" else 1
        else:
            parsed = self._parse(header[: self._prompt_tokens] or header)
            text = self._text.decode(header[self._prompt_tokens :])
            max_words = 0 if self._has_role() else 1
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not ended:
            return []
        words = [w for w in text.split() if not (w.startswith("to=") or (not ended and "to=".startswith(w)))]
        if len(words) <= max_words:
            return []
        self._begin(Header(parsed.role, parsed.channel))
        return self._emit(re.sub(r"^\s*\S+\s?", "", text) if max_words else text)

    def _has_role(self) -> bool:
        """Whether the prompt's part of the header names the role."""
        return bool(self._text.decode((self._header or [])[: self._prompt_tokens]).strip())

    def _parse(self, header: Sequence[int]) -> Header:
        markers = self._markers
        assert markers is not None
        at = header.index(markers.channel) if markers.channel in header else len(header)
        kind = header.index(markers.constrain) if markers.constrain in header else len(header)
        role, channel, rest = (
            self._text.decode(part).split()
            for part in (header[:at], header[at : max(at, kind)], header[kind:])
        )
        to = [w.removeprefix("to=") for w in (*role, *channel, *rest) if w.startswith("to=")]
        role, channel, rest = ([w for w in ws if not w.startswith("to=")] for ws in (role, channel, rest))
        return Header(
            role[0] if role else "assistant",
            channel[0] if channel else None,
            to[0] if to else None,
            (*channel[1:], *rest)[0] if (*channel[1:], *rest) else None,
        )


def _last_turn(prompt: Sequence[int], start: int) -> Sequence[int]:
    """`prompt` from its last start of a message; empty without one."""
    at = next((i for i in reversed(range(len(prompt))) if prompt[i] == start), len(prompt))
    return prompt[at:]
