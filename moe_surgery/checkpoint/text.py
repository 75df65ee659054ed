"""Untrusted text made safe for one line of an error message.

Tensor names, keys and file names come from downloaded files: they may contain terminal escape
sequences, line breaks, direction marks, or ten million characters.
"""

from __future__ import annotations

__all__ = ["describe_value", "printable"]

NAME_LIMIT = 96


def printable(name: str, *, limit: int = NAME_LIMIT) -> str:
    """`name` as one line of printable characters, at most about `limit` of the original ones.

    Characters that Unicode calls unprintable (controls, direction marks, unassigned, lone surrogates)
    and the backslash itself become Python escapes, so different names stay different; a longer
    name keeps its two ends around "...". Costs O(limit).
    """
    if len(name) <= limit:
        return _escaped(name)
    tail = limit // 3
    return f"{_escaped(name[: limit - tail])}...{_escaped(name[-tail:])}"


def describe_value(value: object) -> str:
    """What a parsed JSON `value` is, for "expected ..., got ...": always short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the string '{printable(value)}'"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    return printable(str(value))


def _escaped(text: str) -> str:
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_escaped_character, text))


def _escaped_character(character: str) -> str:
    if character.isprintable() and character != "\\":
        return character
    return character.encode("unicode_escape").decode("ascii")
