"""HTML and JSON with names from untrusted files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape

from moe_surgery.checkpoint.text import printable

__all__ = ["Html", "display_name", "embedded_json", "number", "table", "tag", "text"]

NAME_LIMIT = 80
TEXT_LIMIT = 2000


class Html(str):
    """Safe markup; every other string is escaped when it enters the page."""

    __slots__ = ()


def display_name(value: object) -> str:
    """`value` as one printable line: no control characters, direction marks or very long names."""
    return printable(value if isinstance(value, str) else str(value), limit=NAME_LIMIT)


def text(value: object) -> Html:
    """`value` as page text or an attribute's content, unprintable characters as escapes."""
    return (
        value
        if isinstance(value, Html)
        else Html(escape(printable(str(value), limit=TEXT_LIMIT), quote=True))
    )


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element. `class_` is class, `aria_label` aria-label; attributes that are None are omitted."""
    attribute_text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{attribute_text}>{''.join(text(c) for c in content)}</{name}>")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], **attributes: object) -> Html:
    """A table whose first column names the rows."""
    columns = Html("".join(tag("th", c, scope="col") for c in head))
    body = Html(
        "".join(
            tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows
        )
    )
    return tag("table", tag("thead", tag("tr", columns)), tag("tbody", body), **attributes)


def number(value: float, digits: int = 5) -> float | int | None:
    """`value` with `digits` significant digits, an int if integral; None unless finite."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) else rounded


def embedded_json(value: object) -> str:
    """`value` as JSON for a script element: no markup, ASCII only."""
    dumped = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
