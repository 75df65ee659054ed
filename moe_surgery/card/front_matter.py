"""Metadata of a source's README.md that its pruned versions inherit: licence, languages, base model, citation.

Front matter is YAML. This reads the subset that cards use (strings, lists of strings) and ignores the
rest, so that no README can stop a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from moe_surgery.card.source_card import SourceCard
from moe_surgery.checkpoint.hub import is_hub_id

__all__ = ["front_matter", "is_license", "read_source_card"]

MAX_CITATION = 4000
MAX_WORDS = 200
MAX_LANGUAGES = 400

_LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_LANGUAGE = re.compile(r"[A-Za-z]{2,12}(?:-[A-Za-z0-9]{1,8})*", re.ASCII)
_LINE = re.compile(r"\r\n|\r|\n")
_KEY = re.compile(r"([A-Za-z_][\w-]*)[ ]*:(?:[ \t]+(.*)|)", re.ASCII)
_ITEM = re.compile(r" *-[ ]+(.*)")
_QUOTED = re.compile(r"""(?:"([^"\\]*)"|'([^']*)')[ ]*(?:[ ]#.*)?""")
_INDICATORS = tuple("[]{}&*!|>%@`'\"#,?:-")
_NOTHING = frozenset({"", "~", "null", "Null", "NULL"})
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_CITATION = re.compile(r"\b(?:citation|citations|cite|citing|bibtex)\b", re.IGNORECASE)

Value = str | tuple[str, ...]


def read_source_card(raw: bytes) -> SourceCard:
    """The card in the bytes of a README.md; missing or unsupported values are None or empty."""
    lines = _LINE.split(raw.decode("utf-8-sig", "replace"))
    metadata = front_matter(lines)
    bases = [b for b in _texts(metadata.get("base_model")) if is_hub_id(b) and "/" in b]
    licenses = [text for text in _texts(metadata.get("license")) if is_license(text)]
    languages = [text for text in _texts(metadata.get("language")) if _LANGUAGE.fullmatch(text)]
    return SourceCard(
        licenses[0] if len(licenses) == 1 else None,
        _words(metadata.get("license_name")),
        _words(metadata.get("license_link")),
        tuple(dict.fromkeys(languages))[:MAX_LANGUAGES],
        bases[0] if len(bases) == 1 else None,
        _citation(lines),
    )


def is_license(text: str) -> bool:
    """Whether `text` has the form of the hub's licence identifiers."""
    return _LICENSE.fullmatch(text) is not None


def front_matter(lines: Sequence[str]) -> dict[str, Value]:
    """Keys of the front matter whose value is a string or a list of strings on simple lines."""
    begin = next((i for i, line in enumerate(lines) if line.strip()), 0)
    if not lines or lines[begin].strip() != "---":
        return {}
    rest = lines[begin + 1 :]
    end = next((i for i, line in enumerate(rest) if line.rstrip() == "---"), None)
    if end is None:
        return {}
    values: dict[str, Value] = {}
    for key, first, following in _entries(rest[:end]):
        value = _value(first, following)
        if value is None:
            values.pop(key, None)  # the last of equal keys wins
        else:
            values[key] = value
    return values


def _entries(lines: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Every top-level key with the rest of its line and the lines that belong to it."""
    entry: tuple[str, str, list[str]] | None = None
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _KEY.fullmatch(line)
        if match:
            if entry:
                yield entry
            entry = (match[1], match[2] or "", [])
        elif entry:
            entry[2].append(line)
    if entry:
        yield entry


def _value(first: str, following: Sequence[str]) -> Value | None:
    first = first.strip()
    if first.startswith("#"):
        first = ""
    if following:
        matches = [_ITEM.fullmatch(line) for line in following]
        depths = {len(line) - len(line.lstrip()) for line in following}
        if first or len(depths) != 1:
            return None
        return _all(_scalar(m[1]) if m else None for m in matches)
    flow = re.fullmatch(r"\[([^\[\]{}'\"#:]*)\][ ]*(?:[ ]#.*)?", first)
    if flow:
        return _all(_scalar(item) for item in flow[1].split(",")) if flow[1].strip() else ()
    return _scalar(first)


def _all(items: Iterator[str | None]) -> tuple[str, ...] | None:
    values = tuple(items)
    return tuple(v for v in values if v is not None) if None not in values else None


def _scalar(text: str) -> str | None:
    text = text.strip(" ")
    quoted = _QUOTED.fullmatch(text)
    if quoted:
        return quoted[1] if quoted[1] is not None else quoted[2]
    text = re.split(r"[ \t]#", text, maxsplit=1)[0].strip()
    if text in _NOTHING or text.startswith(_INDICATORS) or ": " in text or text.endswith(":"):
        return None
    return text if text.isprintable() else None


def _texts(value: Value | None) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _words(value: Value | None) -> str | None:
    """A short printable string, or None."""
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_WORDS else None


def _citation(lines: Sequence[str]) -> str | None:
    """The fenced blocks of the first section with a citation heading, else its text."""
    section: list[tuple[bool, str]] | None = None
    level, fence = 0, ""
    for line in lines:
        mark = _FENCE.fullmatch(line)
        title = None if fence else _HEADING.fullmatch(line)
        if title:
            if section is not None and len(title[1]) <= level:
                break
            if section is None and _CITATION.search(title[2]):
                section, level = [], len(title[1])
            continue
        if mark and not fence:
            fence = mark[1]
            continue
        if mark and mark[1].startswith(fence) and not mark[2].strip():
            fence = ""
            continue
        if section is not None:
            section.append((bool(fence), line.rstrip()))
    if not section:
        return None
    blocks = [line for inside, line in section if inside]
    text = "\n".join(blocks or [line for _, line in section]).strip("\n")
    return text if text.strip() and len(text) <= MAX_CITATION else None
