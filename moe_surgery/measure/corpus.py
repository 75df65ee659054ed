"""Texts as token sequences: files of text, lines of JSON, or conversations, by domain."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import xxhash

from moe_surgery.checkpoint.files import open_regular, printable_path
from moe_surgery.checkpoint.kinds import NOT_TEXTS, kind_of, wrong_kind
from moe_surgery.checkpoint.text import describe
from moe_surgery.errors import InvalidInputError, OutputError, UsageError

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

FORMATS = ("text", "jsonl", "chat")
READ_BYTES = 1 << 20
BLOCK_CHARACTERS = 1 << 20


class Tokenizer(Protocol):
    """What is needed of `moe_surgery.runtime.text.Text`."""

    def encode(self, text: str) -> list[int]: ...

    def chat(self, messages: Sequence[Mapping[str, str]], *, prompt: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file to read: `format` is one of `FORMATS`."""

    path: Path
    domain: str
    format: str


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens that are run as one sequence. From `answer` on they are a model's answer (None: the text
    has no such part)."""

    domain: str
    tokens: tuple[int, ...]
    answer: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A text (a long one comes in several), or the messages of a conversation."""

    domain: str
    where: str
    text: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()


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
                if document.text is not None:
                    raise InvalidInputError(
                        f'{document.where}: answers are generated for conversations: {{"messages": [...]}} lines'
                    )
                said = document.messages
                asked = said[:-1] if said[-1]["role"] == "assistant" else said
                if not asked:
                    raise InvalidInputError(f"{document.where}: an answer without a question")
                yield file.domain, tuple(self._chat(asked, document.where))
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

    def _passages(self, document: Document) -> Iterator[Passage]:
        if document.text is not None:
            tokens, answer = self._encoded(document.text, document.where), None
        else:
            tokens, answer = self._conversation(document)
        for start in range(0, len(tokens), self.context):
            piece = tuple(tokens[start : start + self.context])
            yield Passage(document.domain, piece, None if answer is None else max(0, answer - start))

    def _conversation(self, document: Document) -> tuple[list[int], int | None]:
        """Tokens of a conversation, and where its last message starts if the assistant said it."""
        last = document.messages[-1]
        if last["role"] != "assistant":
            return self._chat(document.messages, document.where), None
        whole = self._chat(document.messages, document.where, prompt=False)
        asked = self._chat(document.messages[:-1], document.where)
        same = (i for i, (a, b) in enumerate(zip(whole, asked, strict=False)) if a != b)
        return whole, next(same, min(len(whole), len(asked)))

    def _chat(self, messages: Sequence[Mapping[str, str]], where: str, *, prompt: bool = True) -> list[int]:
        try:
            text = self.tokenizer.chat(messages, prompt=prompt)
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}: {error}") from None
        return self._encoded(text, where)

    def _encoded(self, text: str, where: str) -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except UsageError as error:
            raise InvalidInputError(f"{where}: {error}") from None


def text_files(
    paths: Sequence[Path], domains: Sequence[str] = (), format: str | None = None
) -> tuple[TextFile, ...]:
    """Files with their domains: one name for all, one for each, or without any the file's own name.

    The format is guessed for each file unless given: .jsonl holds conversations if its first line
    has "messages", else texts; other files are one text. Raises UsageError, OutputError, and
    InvalidInputError for a file of another kind: a plan, statistics, weights.
    """
    for path in paths:
        if (kind := kind_of(path)) in NOT_TEXTS:
            raise InvalidInputError(wrong_kind(path, "texts", kind))
    if domains and len(domains) not in (1, len(paths)):
        raise UsageError(
            f"--domain: {len(domains)} names for {len(paths)} --texts; give one for all, or one for each"
        )
    named = domains or [p.stem for p in paths]
    if len(named) == 1:
        named = list(named) * len(paths)
    for name in named:
        if not name or not name.isprintable() or any(c in name for c in ",/:"):
            raise UsageError(f"--domain {name!r}: a domain is a name without commas, colons and slashes")
    return tuple(
        TextFile(path, domain, format or _guessed(path)) for path, domain in zip(paths, named, strict=True)
    )


def open_corpus(
    files: Iterable[TextFile], tokenizer: Tokenizer, *, context: int, max_tokens: int | None = None
) -> Corpus:
    """A corpus over `files`, each hashed once.

    Raises OutputError for one that cannot be read, UsageError for one that a domain already has: it
    would count twice.
    """
    listed = tuple(files)
    if not listed:
        raise UsageError("no texts; name at least one file with --texts")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: must be at least 1")
    texts: dict[str, list[dict[str, object]]] = {}
    for file in listed:
        told = {"name": file.path.name, "xxh3_128": _digest(file.path), "tokens": 0}
        held = texts.setdefault(file.domain, [])
        if told["xxh3_128"] in [text["xxh3_128"] for text in held]:
            raise UsageError(
                f"--texts {printable_path(file.path)}: domain {file.domain!r} already has this text; "
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


def _guessed(path: Path) -> str:
    if path.suffix != ".jsonl":
        return "text"
    for _, value in _json_lines(path):
        return "chat" if isinstance(value, dict) and "messages" in value else "jsonl"
    return "jsonl"


def _documents(file: TextFile) -> Iterator[Document]:
    where = printable_path(file.path)
    if file.format == "text":
        for block in _blocks(file.path):
            yield Document(file.domain, where, block)
        return
    for number, value in _json_lines(file.path):
        line = f"{where}: line {number}"
        if file.format == "jsonl":
            text = value.get("text") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise InvalidInputError(f'{line}: expected {{"text": "..."}}, got {describe(value)}')
            yield Document(file.domain, line, text)
        else:
            yield Document(file.domain, line, messages=_messages(value, line))


def _messages(value: object, line: str) -> tuple[Mapping[str, str], ...]:
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InvalidInputError(f'{line}: expected {{"messages": [...]}}, got {describe(value)}')
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise InvalidInputError(f'{line}: a message is not {{"role": "...", "content": "..."}}')
    return tuple(messages)


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    where = printable_path(path)
    number = 0
    try:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                yield number, json.loads(line)
    except UnicodeDecodeError:
        raise InvalidInputError(f"{where}: line {number + 1}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where}: line {number}: not JSON: {error}") from None


def _blocks(path: Path) -> Iterator[str]:
    """A text whole, or if it is long in pieces that end with a line."""
    held: list[str] = []
    size = 0
    try:
        for line in _lines(path):
            held.append(line)
            size += len(line)
            if size >= BLOCK_CHARACTERS:
                yield "".join(held)
                held, size = [], 0
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{printable_path(path)}: not UTF-8: {error.reason}") from None
    if held:
        yield "".join(held)


def _lines(path: Path) -> Iterator[str]:
    _check_regular(path)
    with open(path, "rb") as opened:  # decoded line by line, so that an error is of the line it is said of
        for line in opened:
            yield line.decode()


def _check_regular(path: Path) -> None:
    os.close(open_regular(path))


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
