"""A page taken apart with the standard library's parser, and names that try to break out of it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=http://example.org/x onerror=alert(1)>',
    "<!--<script>",
    "a\u2028b\u202ec\x00\x1b[31m",
    "' onfocus='alert(1)",
    "{{x}} & &lt; </style> $x^2$",
)
LOADING = {
    "src",
    "srcset",
    "href",
    "action",
    "formaction",
    "data",
    "poster",
    "background",
    "ping",
    "xlink:href",
}


class Page(HTMLParser):
    """Elements with attributes, and the text of every script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.words = ""
        self._inside: tuple[str, dict[str, str | None]] | None = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({k for k, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw.append((*self._inside, data))
        else:
            self.words += data

    @property
    def data(self) -> dict:  # type: ignore[type-arg]
        return self._json("data")

    @property
    def packed(self) -> dict:  # type: ignore[type-arg]
        return self._json("packed")

    def _json(self, name: str) -> dict:  # type: ignore[type-arg]
        [result] = [body for _, attributes, body in self.raw if attributes.get("id") == name]
        return json.loads(result)
