"""Untrusted text escaped for Markdown and YAML, and numbers formatted for people."""

from __future__ import annotations

import json
import re

from moe_surgery.checkpoint.text import printable

__all__ = ["code", "count", "counted", "fenced", "heading", "ranges", "scalar", "size", "table"]

_PLAIN_HEADING = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*", re.ASCII)
_PLAIN_SCALAR = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(?:[./][A-Za-z0-9][A-Za-z0-9_-]*)*", re.ASCII)
# YAML 1.1 reads these as booleans or null.
_RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_BACKTICKS = re.compile("`+")


def code(text: object) -> str:
    """`text` as an inline code span without markup, links or table borders.

    Unprintable characters, backslashes, backticks and pipes become Python escapes.
    """
    shown = printable(str(text)).replace("`", "\\x60").replace("|", "\\x7c")
    return f"`{shown}`" if shown.strip() else "(blank)"


def heading(name: str) -> str:
    """`name` for a heading: unchanged if it is a plain word, else as code."""
    return name if _PLAIN_HEADING.fullmatch(name) else code(name)


def fenced(text: str, language: str = "") -> str:
    """`text` as a fenced block that it cannot close; unprintable characters are dropped."""
    shown = "".join(c for c in text.expandtabs(4) if c == "\n" or c.isprintable())
    longest = max((len(run) for run in _BACKTICKS.findall(shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def scalar(text: str) -> str:
    """The string `text`, which must be printable, as a YAML scalar on one line."""
    if _PLAIN_SCALAR.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    return json.dumps(text, ensure_ascii=False)


def table(columns: list[str], rows: list[list[str]], *, left: int = 1) -> str:
    """A Markdown table; the first `left` columns left-aligned, the others right. Cells are Markdown."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [columns, rule, *rows])


def ranges(numbers: tuple[int, ...]) -> str:
    """Numbers in order, with ascending runs shortened: 0-3, 7, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


def size(nbytes: int) -> str:
    """Bytes in decimal units: 13.76 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} bytes"


def count(number: int) -> str:
    """A number of parameters, short and exact: 20.91 B (20,914,757,184)."""
    for unit, factor in (("B", 10**9), ("M", 10**6)):
        if number >= factor:
            return f"{number / factor:.2f} {unit} ({number:,})"
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """1 layer, 24 layers."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
