"""Texts by domain from JSON-lines files, and the prompts that benchmarks make of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.errors import InvalidInputError, OutputError, UsageError
from moe_surgery.runtime.text import Text

__all__ = ["prompts_of", "read_texts"]

MAX_BYTES = 1 << 30


def read_texts(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Texts by domain: a line {"text": "..."} each, in files named for their domain (code.jsonl: code).

    A folder stands for all of its .jsonl files. Raises InvalidInputError naming the line that is no such
    object, OutputError where a file cannot be read, UsageError where there is no text.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise UsageError(f"{printable_path(path)}: holds no .jsonl file")
        for file in files:
            found.setdefault(file.stem, []).extend(_read(file))
    if not any(found.values()):
        raise UsageError("--texts: there is no text in these files")
    return found


def _read(file: Path) -> list[str]:
    where = printable_path(file)
    try:
        lines = read_small_file(file, limit=MAX_BYTES, what="a file of texts").decode().splitlines()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{where}: not UTF-8 at byte {error.start}") from None
    except IsADirectoryError:
        raise OutputError(f"{where}: is a folder") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise InvalidInputError(f'{where}: line {number} is no JSON object with a string "text"')
        texts.append(text)
    return texts


def prompts_of(
    texts: Mapping[str, Sequence[str]], text: Text, tokens: int, most: int
) -> dict[str, list[list[int]]]:
    """The first `tokens` tokens of up to `most` texts of each domain; shorter texts are left out.

    Raises UsageError where no text is that long.
    """
    found = {}
    for domain, several in texts.items():
        encoded = (text.encode(one)[:tokens] for one in several)
        if prompts := [ids for ids in encoded if len(ids) == tokens][:most]:
            found[domain] = prompts
    if not found:
        raise UsageError(f"no text has {tokens} tokens; pass a smaller --prompt-tokens")
    return found
