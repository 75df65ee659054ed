"""Texts as token sequences: files of text, rows of JSON, or conversations, by domain."""

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
    described,
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
    """What is needed of `moe_surgery.runtime.text.Text`."""

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
    """Tokens that are run as one sequence. From `answer` on they are a model's answer (None: the text
    has no such part)."""

    domain: str
    tokens: tuple[int, ...]
    answer: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A text (a long one comes in several), or a conversation."""

    domain: str
    where: str
    text: str | None = None
    chat: Conversation | None = None


@dataclass(slots=True)
class Corpus:
    """Passages by file, read anew at every iteration; never more than one document in memory.

    `context` bounds a passage's tokens: longer documents are split into several, counted in `split`.
    `max_tokens` bounds the tokens of each domain (None: no bound). `texts` lists the files by domain:
    {"name", "xxh3_128", "tokens"}; tokens are known after a whole iteration.
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
        """Domain and tokens of each conversation, with its answer left open (one that is there is not
        read). Raises InvalidInputError for a text that is no conversation."""
        for file in self.files:
            document = None
            for document in _documents(file):
                if document.chat is None:
                    raise InvalidInputError(
                        f'{document.where}: answers are generated for conversations: {{"messages": [...]}} rows'
                    )
                asked = document.chat.question()
                if not asked.messages:
                    raise InvalidInputError(f"{document.where}: an answer without a question")
                yield file.domain, tuple(self.encode_chat(asked, document.where))
            if document is None:
                raise InvalidInputError(f"{printable_path(file.path)}: holds no text")

    def __iter__(self) -> Iterator[Passage]:
        """All passages, file by file. Raises InvalidInputError for a file without any token."""
        self.split = 0
        left = dict.fromkeys(self.domains, self.max_tokens)
        seen: dict[str, int] = {}
        for file in self.files:
            told = self.texts[file.domain][seen.get(file.domain, 0)]
            seen[file.domain] = seen.get(file.domain, 0) + 1
            tokens = 0
            longer = None  # the text last seen to come in several passages
            for document in _documents(file):
                if left[file.domain] == 0:
                    break
                for piece, passage in enumerate(self._passages(document)):
                    kept = _shortened(passage, left[file.domain])
                    if not kept.tokens:
                        break
                    if piece and document.where != longer:
                        longer = document.where
                        self.split += 1
                    tokens += len(kept.tokens)
                    if (room := left[file.domain]) is not None:
                        left[file.domain] = room - len(kept.tokens)
                    yield kept
            if not tokens and left[file.domain] != 0:
                raise InvalidInputError(f"{printable_path(file.path)}: holds no text")
            told["tokens"] = tokens

    def encode_chat(self, chat: Conversation, where: str, *, prompt: bool = True) -> list[int]:
        """Tokens of a conversation; with `prompt` an answer is left open. Raises InvalidInputError,
        beginning with `where`, for what the chat template cannot take."""
        return self._encoded(self._rendered(chat, where, prompt=prompt), where)

    def _passages(self, document: Document) -> Iterator[Passage]:
        if document.chat is not None:
            tokens, answer = self._conversation(document.chat, document.where)
        else:
            tokens, answer = self._encoded(document.text or "", document.where), None
        for start in range(0, len(tokens), self.context):
            piece = tuple(tokens[start : start + self.context])
            yield Passage(document.domain, piece, None if answer is None else max(0, answer - start))

    def _conversation(self, chat: Conversation, where: str) -> tuple[list[int], int | None]:
        """Tokens of a conversation, and where its last message starts if the assistant said it."""
        if chat.question() is chat:
            return self.encode_chat(chat, where), None
        whole = self._rendered(chat, where, prompt=False)
        start = answer_start(lambda c, prompt: self._rendered(c, where, prompt=prompt), chat)
        tokens, before = self._encoded(whole, where), self._encoded(whole[:start], where)
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

    def _encoded(self, text: str, where: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except UsageError as error:
            raise InvalidInputError(f"{where}: {error}") from None


def open_corpus(
    files: Iterable[TextFile], tokenizer: Tokenizer, *, context: int, max_tokens: int | None = None
) -> Corpus:
    """A corpus over `files`, each hashed once.

    Raises OutputError for one that cannot be read, UsageError for one that a domain already has: it
    would count twice.
    """
    listed = tuple(files)
    if not listed:
        raise UsageError("no texts; name at least one file in `texts`")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"`max_tokens` {max_tokens}: must be at least 1")
    texts: dict[str, list[dict[str, object]]] = {}
    for file in listed:
        told = {"name": file.path.name, "xxh3_128": _digest(file.path), "tokens": 0}
        held = texts.setdefault(file.domain, [])
        if told["xxh3_128"] in [text["xxh3_128"] for text in held]:
            raise UsageError(
                f"`texts` {printable_path(file.path)}: domain {file.domain!r} already has this text; "
                "it would count twice"
            )
        held.append(told)
    return Corpus(listed, tokenizer, context, max_tokens, texts)


def batches(passages: Iterable[Passage], tokens: int) -> Iterator[list[Passage]]:
    """Passages in groups of at most `tokens` tokens (a longer passage is a group of its own)."""
    group: list[Passage] = []
    held = 0
    for passage in passages:
        if group and held + len(passage.tokens) > tokens:
            yield group
            group, held = [], 0
        group.append(passage)
        held += len(passage.tokens)
    if group:
        yield group


def _shortened(passage: Passage, room: int | None) -> Passage:
    return passage if room is None else replace(passage, tokens=passage.tokens[:room])


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
            raise InvalidInputError(f'{where}: expected {{"text": "..."}}, got {described(row)}')
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
