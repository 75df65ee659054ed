"""The harmony format of gpt-oss: what a model generates, split into reasoning, answer and tool calls.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
    <|start|>assistant<|channel|>commentary to=functions.x <|constrain|>json<|message|>{...}<|call|>

A header names role, recipient, channel and content type; the recipient stands behind the role or the channel.
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
    """Numbers of the tokens that structure a conversation; None for those a tokenizer lacks."""

    start: int
    message: int
    end: int
    channel: int | None = None
    constrain: int | None = None
    call: int | None = None
    return_: int | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """Who speaks, in which channel, to which tool."""

    role: str = "assistant"
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None

    @property
    def part(self) -> Part:
        """What the message is for the user: "other" is what a role other than the assistant says."""
        if self.role != "assistant":
            return "other"
        if self.recipient is not None:
            return "tool_call"
        return "reasoning" if self.channel == "analysis" else "answer"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a message, never empty; `first` where the message begins."""

    header: Header
    text: str
    first: bool


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A message to a tool: "functions.x", and what it is given, mostly JSON."""

    recipient: str
    content: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's answer, what it thought before, and the tools it called. Messages of one kind are
    joined by a line break."""

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
        said = [(header, "".join(texts)) for header, texts in messages]
        return cls(
            "\n".join(text for header, text in said if header.part == "answer"),
            "\n".join(text for header, text in said if header.part == "reasoning"),
            tuple(ToolCall(h.recipient or "", text) for h, text in said if h.part == "tool_call"),
        )


class Harmony:
    """Takes the tokens generated after a prompt one by one.

    Where the prompt does not end in a turn of the assistant, or the tokenizer has no such markers, all
    text is the answer; so is text where a header should stand.
    """

    def __init__(self, text: Decoder, markers: Markers | None, prompt: Sequence[int]) -> None:
        self._text = text
        self._markers = markers
        self._header: list[int] | None = None  # tokens of a header that is being read
        self._given = 0  # how many of them the prompt holds
        self._body: Header | None = None  # of the message that is being read
        self._stream = TextStream(text)
        self._first = True
        turn = [] if markers is None else _last_turn(prompt, markers.start)
        for token in turn:
            self.push(token)
        header = self._body if self._header is None else self._parsed(self._header)
        self._given = len(self._header or ())
        if not turn or (header is not None and header.role != "assistant"):
            self._markers = None
            self._begin(Header())
        elif self._body is not None:
            self._begin(self._body)

    def push(self, token: int) -> list[Piece]:
        """What `token` completes: text of a message, or nothing."""
        marks = self._markers
        if marks is None:
            return self._added(self._stream.push(token))
        if token in (marks.end, marks.call, marks.return_):
            return self.flush()
        if token == marks.start:
            found = self.flush()
            self._header, self._given = [], 0
            return found
        if token == marks.channel and self._header is None:
            found = self.flush()
            self._header, self._given = [token], 0
            return found
        if token == marks.message:
            if self._header is not None:
                self._begin(self._parsed(self._header))
            elif self._body is None:
                self._begin(Header())
            return []
        if self._header is not None:
            self._header.append(token)
            return self._checked(self._header)
        if self._body is None:
            self._begin(Header())
        return self._added(self._stream.push(token))

    def flush(self) -> list[Piece]:
        """What is left of a message that ends here, complete or not."""
        found: list[Piece] = []
        if self._header is not None:
            found = self._checked(self._header, ended=True)
        if self._body is not None:
            found += self._added(self._stream.flush())
        self._body = self._header = None
        return found

    def _begin(self, header: Header) -> None:
        self._header, self._body = None, header
        self._stream, self._first = TextStream(self._text), True

    def _added(self, text: str) -> list[Piece]:
        if not text or self._body is None:
            return []
        piece = Piece(self._body, text, self._first)
        self._first = False
        return [piece]

    def _checked(self, header: list[int], *, ended: bool = False) -> list[Piece]:
        """Nothing while `header` reads as one; else its text as the beginning of a message.

        `ended`: no more of it comes. Until then it is not judged within a character.
        """
        marks = self._markers
        assert marks is not None
        if marks.channel in header:
            instead = self._parsed(header)
            text = self._text.decode(header[header.index(marks.channel) :])
            most = 2 if instead.recipient or instead.channel == "commentary" else 1
        else:
            instead = self._parsed(header[: self._given] or header)
            text = self._text.decode(header[self._given :])
            most = 0 if self._has_role() else 1
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not ended:
            return []
        words = [w for w in text.split() if not (w.startswith("to=") or (not ended and "to=".startswith(w)))]
        if len(words) <= most:
            return []
        self._begin(Header(instead.role, instead.channel))
        return self._added(re.sub(r"^\s*\S+\s?", "", text) if most else text)

    def _has_role(self) -> bool:
        """Whether the prompt's part of the header names the role."""
        return bool(self._text.decode((self._header or [])[: self._given]).strip())

    def _parsed(self, header: Sequence[int]) -> Header:
        marks = self._markers
        assert marks is not None
        at = header.index(marks.channel) if marks.channel in header else len(header)
        kind = header.index(marks.constrain) if marks.constrain in header else len(header)
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
