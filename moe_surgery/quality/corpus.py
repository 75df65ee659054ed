"""Texts as token sequences by domain: plain text, rows of JSON, or conversations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import xxhash

from moe_surgery.checkpoint.files import open_regular, printable_path
from moe_surgery.errors import InvalidInputError, OutputError, UsageError
from moe_surgery.quality.conversation import (
    Conversation,
    answer_start,
    common_length,
    conversation,
    describe_row,
)
from moe_surgery.quality.text_files import FORMATS, TextFile, blocks, rows, text_files

__all__ = [
    "FORMATS",
    "Corpus",
    "Document",
    "Passage",
    "TextFile",
    "Tokenizer",
    "batches",
    "open_corpus",
    "text_files",
]

READ_BYTES = 1 << 20


class Tokenizer(Protocol):
    """The part of `moe_surgery.runtime.text.Text` used here."""

    def encode(self, text: str) -> list[int]: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        prompt: bool = True,
        tools: Sequence[object] | None = None,
        documents: Sequence[object] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str: ...

    def reads(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens of one sequence. From index `answer` on they are a model's answer (None: there is none)."""

    domain: str
    tokens: tuple[int, ...]
    answer: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A text (long ones are divided), or a conversation."""

    domain: str
    where: str
    text: str | None = None
    chat: Conversation | None = None


@dataclass(slots=True)
class Corpus:
    """Passages by file, read on every iteration; at most one document is in memory.

    `context` bounds a passage's tokens: longer documents are split into several, counted in `split`.
    `max_tokens` bounds the tokens of each domain (None: no bound). `texts` lists the files by domain:
    {"name", "xxh3_128", "tokens"}; tokens are known after a full iteration.
    """

    files: tuple[TextFile, ...]
    tokenizer: Tokenizer
    context: int
    max_tokens: int | None
    texts: dict[str, list[dict[str, object]]]
    split: int = 0

    @property
    def domains(self) -> list[str]:
        """Domain names in the order in which files name them."""
        return list(dict.fromkeys(f.domain for f in self.files))

    def documents(self) -> Iterator[Document]:
        """All documents, file by file. Raises InvalidInputError naming file and line."""
        for file in self.files:
            yield from _documents(file)

    def prompts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Domain and tokens of each conversation without its answer, ready for a new one. Raises
        InvalidInputError for a text that is not a conversation."""
        for file in self.files:
            document = None
            for document in _documents(file):
                if document.chat is None:
                    raise InvalidInputError(
                        f'{document.where}: answers are generated for conversations: {{"messages": [...]}} rows'
                    )
                question = document.chat.question()
                if not question.messages:
                    raise InvalidInputError(f"{document.where}: an answer without a question")
                yield file.domain, tuple(self.encode_chat(question, document.where))
            if document is None:
                raise InvalidInputError(f"{printable_path(file.path)}: contains no text")

    def __iter__(self) -> Iterator[Passage]:
        """All passages, file by file. Raises InvalidInputError for a file without any token."""
        self.split = 0
        remaining = dict.fromkeys(self.domains, self.max_tokens)
        files_read: dict[str, int] = {}
        for file in self.files:
            entry = self.texts[file.domain][files_read.get(file.domain, 0)]
            files_read[file.domain] = files_read.get(file.domain, 0) + 1
            tokens = 0
            last_split = None  # the last text that was split
            for document in _documents(file):
                if remaining[file.domain] == 0:
                    break
                for piece, passage in enumerate(self._passages(document)):
                    kept = _shortened(passage, remaining[file.domain])
                    if not kept.tokens:
                        break
                    if piece and document.where != last_split:
                        last_split = document.where
                        self.split += 1
                    tokens += len(kept.tokens)
                    if (budget := remaining[file.domain]) is not None:
                        remaining[file.domain] = budget - len(kept.tokens)
                    yield kept
            if not tokens and remaining[file.domain] != 0:
                raise InvalidInputError(f"{printable_path(file.path)}: contains no text")
            entry["tokens"] = tokens

    def encode_chat(self, chat: Conversation, where: str, *, prompt: bool = True) -> list[int]:
        """Tokens of a conversation; with `prompt`, ready for an answer. Raises InvalidInputError,
        starting with `where`, if the chat template fails."""
        return self.encode(self._rendered(chat, where, prompt=prompt), where)

    def _passages(self, document: Document) -> Iterator[Passage]:
        if document.chat is not None:
            tokens, answer = self.encode_answered(document.chat, document.where)
        else:
            tokens, answer = self.encode(document.text or "", document.where), None
        for start in range(0, len(tokens), self.context):
            piece = tuple(tokens[start : start + self.context])
            yield Passage(document.domain, piece, None if answer is None else max(0, answer - start))

    def encode_answered(self, chat: Conversation, where: str) -> tuple[list[int], int | None]:
        """Tokens of a conversation, and the index where its last message starts if it is the assistant's. Raises
        as `encode_chat`."""
        if chat.question() is chat:
            return self.encode_chat(chat, where), None
        whole = self._rendered(chat, where, prompt=False)
        start = answer_start(lambda c, prompt: self._rendered(c, where, prompt=prompt), chat)
        tokens, before = self.encode(whole, where), self.encode(whole[:start], where)
        return tokens, common_length(tokens, before)

    def _rendered(self, chat: Conversation, where: str, *, prompt: bool) -> str:
        try:
            also = {key: value for key, value in chat.also.items() if self.tokenizer.reads(key)}
            return self.tokenizer.chat(
                chat.messages,
                prompt=prompt,
                tools=chat.tools,
                documents=chat.documents,
                variables={**also, **chat.variables},
            )
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}: {error}") from None

    def encode(self, text: str, where: str) -> list[int]:
        """Tokens of a text. Raises InvalidInputError, starting with `where`, if it is not Unicode."""
        try:
            return self.tokenizer.encode(text)
        except UsageError as error:
            raise InvalidInputError(f"{where}: {error}") from None


def open_corpus(
    files: Iterable[TextFile], tokenizer: Tokenizer, *, context: int, max_tokens: int | None = None
) -> Corpus:
    """A corpus over `files`, each hashed once.

    Raises OutputError for a file that cannot be read, UsageError for a text that a domain already has,
    which would count twice.
    """
    listed = tuple(files)
    if not listed:
        raise UsageError("no texts; name at least one file in `texts`")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"`max_tokens` {max_tokens}: must be at least 1")
    texts: dict[str, list[dict[str, object]]] = {}
    for file in listed:
        entry = {"name": file.path.name, "xxh3_128": _digest(file.path), "tokens": 0}
        entries = texts.setdefault(file.domain, [])
        if entry["xxh3_128"] in [text["xxh3_128"] for text in entries]:
            raise UsageError(
                f"`texts` {printable_path(file.path)}: domain {file.domain!r} already has this text; "
                "it would count twice"
            )
        entries.append(entry)
    return Corpus(listed, tokenizer, context, max_tokens, texts)


def batches(passages: Iterable[Passage], tokens: int) -> Iterator[list[Passage]]:
    """Passages in groups of at most `tokens` tokens (a longer passage is a separate group)."""
    group: list[Passage] = []
    size = 0
    for passage in passages:
        if group and size + len(passage.tokens) > tokens:
            yield group
            group, size = [], 0
        group.append(passage)
        size += len(passage.tokens)
    if group:
        yield group


def _shortened(passage: Passage, budget: int | None) -> Passage:
    return passage if budget is None else replace(passage, tokens=passage.tokens[:budget])


def _documents(file: TextFile) -> Iterator[Document]:
    if file.format == "text":
        for block in blocks(file.path):
            yield Document(file.domain, printable_path(file.path), block)
        return
    for where, row in rows(file.path):
        if file.format == "chat":
            yield Document(file.domain, where, chat=conversation(row, where))
            continue
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise InvalidInputError(f'{where}: expected {{"text": "..."}}, got {describe_row(row)}')
        yield Document(file.domain, where, text)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    fd = open_regular(path)
    try:
        while block := os.read(fd, READ_BYTES):
            digest.update(block)
    except OSError as error:
        raise OutputError(f"{printable_path(path)}: cannot read: {error.strerror}") from error
    finally:
        os.close(fd)
    return digest.hexdigest()
