"""Text files: their format, and reading them as blocks of text or rows of JSON."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from moe_surgery.checkpoint.files import open_regular, printable_path
from moe_surgery.checkpoint.kinds import NOT_TEXTS, kind_of, wrong_kind
from moe_surgery.errors import InvalidInputError, OutputError, UsageError
from moe_surgery.quality.json_list import JsonList
from moe_surgery.selection.arguments import PathLike

__all__ = ["FORMATS", "TextFile", "Texts", "as_text_files", "blocks", "rows", "text_files"]

FORMATS = ("text", "jsonl", "chat")
READ_BYTES = 1 << 20
BLOCK_CHARACTERS = 1 << 20
HEAD_BYTES = 1 << 16
ROW_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
CONVERT = 'convert it to .jsonl: a line {"text": "..."} or {"messages": [...]} for each row'
DECOMPRESS = "decompress it, or compress it with gzip"
REFUSED: Final = {
    **dict.fromkeys([".parquet", ".pq"], ("Parquet", CONVERT)),
    **dict.fromkeys([".arrow", ".feather"], ("Arrow", CONVERT)),
    **dict.fromkeys([".csv", ".tsv"], ("a table", CONVERT)),
    **dict.fromkeys([".ipynb"], ("a notebook", "convert it to text or to a script")),
    **dict.fromkeys([".pdf", ".rtf", ".doc", ".docx", ".odt", ".epub"], ("a document", "convert it to text")),
    **dict.fromkeys([".xls", ".xlsx", ".ods"], ("a table", CONVERT)),
    **dict.fromkeys([".zst", ".xz", ".bz2", ".lz4", ".br", ".lzma"], ("compressed", DECOMPRESS)),
    **dict.fromkeys([".zip", ".tar", ".tgz", ".7z", ".rar"], ("an archive", "extract the texts")),
}
"""By suffix: what such a file is, and what to do."""
GZIP = b"\x1f\x8b"
MAGIC: Final = {
    b"PAR1": ("Parquet", CONVERT),
    b"ARROW1": ("Arrow", CONVERT),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", DECOMPRESS),
    b"\xfd7zXZ\x00": ("compressed with xz", DECOMPRESS),
    b"BZh": ("compressed with bzip2", DECOMPRESS),
    b"\x04\x22\x4d\x18": ("compressed with lz4", DECOMPRESS),
    GZIP: ("compressed twice", DECOMPRESS),
    b"PK\x03\x04": ("an archive", "extract the texts"),
    b"7z\xbc\xaf": ("an archive", "extract the texts"),
    b"%PDF-": ("a document", "convert it to text"),
    b"{\\rtf": ("a document", "convert it to text"),
    b"\xff\xfe": ("UTF-16", "convert it to UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert it to UTF-8"),
}
"""By the first bytes."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file to read: `format` is one of `FORMATS`."""

    path: Path
    domain: str
    format: str


Texts = PathLike | TextFile | Iterable[PathLike | TextFile] | Mapping[str, PathLike | Iterable[PathLike]]
"""One path or several, with file names as domains; or a mapping from domains to paths."""


def as_text_files(texts: Texts, format: str | None = None) -> tuple[TextFile, ...]:
    """`texts` with their domains and formats; `format` and errors as for `text_files`.

    Raises TypeError for anything but paths.
    """
    if isinstance(texts, Mapping):
        pairs = [(domain, path) for domain, paths in texts.items() for path in _listed(paths)]
        return text_files([Path(p) for _, p in pairs], [domain for domain, _ in pairs], format)
    return tuple(
        t if isinstance(t, TextFile) else text_files([Path(t)], format=format)[0] for t in _listed(texts)
    )


def _listed(texts: Any) -> list[Any]:
    return [texts] if isinstance(texts, (str, os.PathLike, TextFile)) else list(texts)


def text_files(
    paths: Sequence[Path], domains: Sequence[str] = (), format: str | None = None
) -> tuple[TextFile, ...]:
    """Files with their domains: one for all, one per file, or by default the file's name.

    The format is guessed for each file unless given: .jsonl and .json contain conversations if their first
    row has "messages", else texts; other files are one text. All may be gzip-compressed. Raises
    UsageError, OutputError; InvalidInputError for a file that is neither text nor rows by name or
    content, contains rows but is named like a text, or is another kind of file: a plan, statistics,
    weights.
    """
    for path in paths:
        if (kind := kind_of(path)) in NOT_TEXTS:
            raise InvalidInputError(wrong_kind(path, "texts", kind))
    if domains and len(domains) not in (1, len(paths)):
        raise UsageError(
            f"`domains`: {len(domains)} names for {len(paths)} `texts`; give one for all, or one per file"
        )
    named = domains or [Path(_plain_name(p)).stem for p in paths]
    if len(named) == 1:
        named = list(named) * len(paths)
    for name in named:
        if not name or not name.isprintable() or any(c in name for c in ",/:"):
            raise UsageError(f"`domains` {name!r}: a domain is a name without commas, colons and slashes")
    return tuple(
        TextFile(path, domain, format or _guess_format(path))
        for path, domain in zip(paths, named, strict=True)
    )


def rows(path: Path) -> Generator[tuple[str, object], None, None]:
    """Rows of JSON, one per line or all in one list, each with its position ("FILE: line 3").

    Raises InvalidInputError naming file and line.
    """
    if _begins_list(path):
        yield from _listed_rows(path)
        return
    where = printable_path(path)
    has_rows = False
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not has_rows and _suffix(path) == ".json" and line.lstrip().startswith("{"):
                raise InvalidInputError(
                    f"{where}: line {number}: not a row of JSON; write rows as a list or one per line, "
                    "as jq -c does"
                ) from None
            raise InvalidInputError(f"{where}: line {number}: not JSON: {error}") from None
        has_rows = True
        yield f"{where}: line {number}", row


def blocks(path: Path) -> Generator[str, None, None]:
    """A text, divided at line ends if it is long. Raises InvalidInputError."""
    lines: list[str] = []
    size = 0
    for _, line in _lines(path):
        lines.append(line)
        size += len(line)
        if size >= BLOCK_CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _guess_format(path: Path) -> str:
    if (suffix := _suffix(path)) in REFUSED:
        what, advice = REFUSED[suffix]
        raise InvalidInputError(
            f"{printable_path(path)}: {suffix} is {what}, which is not supported; {advice}"
        )
    if suffix in ROW_SUFFIXES:
        with closing(rows(path)) as some:
            for _, row in some:
                return "chat" if isinstance(row, dict) and "messages" in row else "jsonl"
        return "jsonl"
    if _contains_rows(_head(path)):
        raise InvalidInputError(
            f"{printable_path(path)}: contains rows of JSON; name it .jsonl or .json, "
            "or set `format` to jsonl, chat or text"
        )
    return "text"


def _contains_rows(head: str) -> bool:
    if re.match(r'\s*\[\s*\{\s*"', head):
        return True
    try:
        row = json.loads(head.strip().partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and not {"text", "messages"}.isdisjoint(row)


def _plain_name(path: Path) -> str:
    """The name without .gz."""
    return path.name[:-3] if path.name.lower().endswith(".gz") else path.name


def _suffix(path: Path) -> str:
    return Path(_plain_name(path).lower()).suffix


def _begins_list(path: Path) -> bool:
    with closing(_pieces(path)) as pieces:
        for piece in pieces:
            if stripped := piece.lstrip():
                return stripped.startswith("[")
    return False


def _listed_rows(path: Path) -> Generator[tuple[str, object], None, None]:
    where = printable_path(path)
    with closing(_pieces(path)) as pieces:
        for number, (line, row) in enumerate(JsonList(pieces, where), 1):
            yield f"{where}: row {number} (line {line})", row


def _head(path: Path) -> str:
    with _open(path) as file:
        return file.read(HEAD_BYTES).decode(errors="replace").lstrip("\ufeff")


def _lines(path: Path) -> Generator[tuple[int, str], None, None]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            yield number, _decode(line, path, number)


def _pieces(path: Path) -> Generator[str, None, None]:
    """The text in pieces that may end anywhere."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # without a byte order mark
    line = 1
    with _open(path) as file:
        while raw := file.read(READ_BYTES):
            try:
                piece = decoder.decode(raw)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise InvalidInputError(f"{printable_path(path)}: line {line}: not UTF-8") from None
            yield piece
            line += piece.count("\n")
        if decoder.getstate()[0]:
            raise InvalidInputError(f"{printable_path(path)}: line {line}: not UTF-8")


def _decode(line: bytes, path: Path, number: int) -> str:
    where = f"{printable_path(path)}: line {number}"
    if b"\0" in line:
        raise InvalidInputError(f"{where}: contains a NUL byte; this is not text")
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise InvalidInputError(f"{where}: not UTF-8") from None
    return text.removeprefix("\ufeff") if number == 1 else text


@contextmanager
def _open(path: Path) -> Generator[BinaryIO, None, None]:
    """The file's bytes, decompressed if they are gzip, regardless of its name.

    Raises OutputError if it cannot be read, InvalidInputError if it is known not to be text, or, while
    reading, if gzip data is damaged.
    """
    where = printable_path(path)
    try:
        with os.fdopen(open_regular(path), "rb") as raw:
            if not raw.peek(len(GZIP)).startswith(GZIP):
                _check_beginning(raw, where)
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as plain, io.BufferedReader(plain) as buffered:
                _check_beginning(buffered, where)
                yield buffered
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidInputError(f"{where}: damaged gzip data: {error}") from None
    except OSError as error:
        raise OutputError(f"{where}: cannot read: {error.strerror or error}") from error


def _check_beginning(file: io.BufferedReader[Any], where: str) -> None:
    head = file.peek(64)
    for magic, (what, advice) in MAGIC.items():
        if head.startswith(magic):
            raise InvalidInputError(f"{where}: this file is {what}; {advice}")
    if b"\0" in head:
        raise InvalidInputError(
            f"{where}: this file is binary; texts are UTF-8, or rows of JSON in .jsonl or .json"
        )
