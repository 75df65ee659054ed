"""A self-contained HTML file: inline style, script and data, and a policy that forbids everything else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from moe_surgery.report.markup import Html, embedded_json, tag
from moe_surgery.report.palette import (
    DARK,
    LIGHT,
    SERIES_DARK,
    SERIES_LIGHT,
    ink_on,
    sequential,
)

__all__ = ["document"]


def document(
    heading: str,
    header: Html,
    sections: Sequence[Html],
    data: object,
    styles: Sequence[str],
    scripts: Sequence[str],
    *,
    packed: Html | None = None,
) -> str:
    """The text of the file. `styles` and `scripts` name assets; the script reads `data` from element "data".

    `packed` is more JSON, in element "packed", which the page reads when it needs it.
    """
    style = "".join(map(_asset, styles)) + _colours()
    script = '(function(){"use strict";\n' + "\n".join(map(_asset, scripts)) + "})();\n"
    # Blocks all network access, and any style or script but these.
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = [
        Html('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">\n'),
        Html(
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        ),
        tag("title", heading),
        Html(f"\n<style>{style}</style>\n</head>\n<body>\n"),
        header,
        Html("\n<main>\n"),
        Html("\n".join(sections)),
        Html("\n</main>\n"),
        Html(f'<script type="application/json" id="data">{embedded_json(data)}</script>\n'),
        Html("" if packed is None else f'<script type="application/json" id="packed">{packed}</script>\n'),
        Html(f"<script>{script}</script>\n</body>\n</html>\n"),
    ]
    return "".join(page)


def _asset(name: str) -> str:
    return (files("moe_surgery.report") / "assets" / name).read_text(encoding="utf-8")


def _digest(inline: str) -> str:
    """The hash of an inline element in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()


def _colours() -> str:
    """Rules for the palette and the lines, on white (and paper) and on a dark screen."""

    def rules(background: str, steps: list[str], series: Sequence[str]) -> str:
        lines = [f":root{{--back:{background}}}"]
        lines += [f".q{i}{{fill:{c};background:{c};color:{ink_on(c)}}}" for i, c in enumerate(steps)]
        lines += [
            f".s{i}{{stroke:{c};--line:{c}}}.mark.s{i},.band.s{i}{{fill:{c}}}" for i, c in enumerate(series)
        ]
        return "\n".join(lines)

    dark = rules(DARK, sequential(True), SERIES_DARK)
    return (
        f"\n{rules(LIGHT, sequential(False), SERIES_LIGHT)}\n"
        f"@media screen and (prefers-color-scheme: dark){{\n{dark}\n}}\n"
    )
