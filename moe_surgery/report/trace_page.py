"""The trace page: one self-contained HTML file."""

from __future__ import annotations

from moe_surgery.errors import InvalidInputError
from moe_surgery.quality.routing_trace import Trace
from moe_surgery.report.document import document
from moe_surgery.report.trace_content import trace_content
from moe_surgery.report.trace_pack import LEVELS
from moe_surgery.report.trace_sections import compare_section, text_section, trace_header

__all__ = ["PAGE_BYTES", "build_trace_page"]

STYLES = ("report.css", "trace.css")
SCRIPTS = ("base.js", "trace-data.js", "trace-text.js", "trace-token.js", "trace-start.js")
# Beyond this a browser is slow to open the page.
PAGE_BYTES = 3_000_000


def build_trace_page(trace: Trace, title: str | None = None) -> str:
    """The page, as the text of an HTML file of at most `PAGE_BYTES` that needs no other file and no network.

    A long text gets coarser weights first; if that is not enough, only its first tokens are shown, and the page
    says so. `title` is the page's heading. Raises InvalidInputError for a model too large to show one token.
    """
    total = tokens = len(trace.tokens)
    for levels in LEVELS:
        page, size = _page(trace, title, tokens, levels)
        if size <= PAGE_BYTES:
            return page
    while tokens > 1:
        tokens = max(1, min(tokens - 1, int(0.97 * tokens * PAGE_BYTES / size)))
        page, size = _page(trace, title, tokens, LEVELS[-1])
        if size <= PAGE_BYTES:
            return page
    raise InvalidInputError(
        f"a page of {total} tokens through {len(trace.models)} models of {trace.layers} layers would exceed "
        f"{PAGE_BYTES:,} bytes; trace fewer plans"
    )


def _page(trace: Trace, title: str | None, tokens: int, levels: int) -> tuple[str, int]:
    """The page with the first `tokens` tokens, and its size in bytes."""
    heading = title or f"Experts of {trace.model_type}, token by token"
    sections = [text_section(trace, tokens)]
    if len(trace.models) > 1:
        sections.append(compare_section(trace, tokens))
    header = trace_header(heading, trace, tokens, levels)
    page = document(heading, header, sections, trace_content(trace, tokens, levels), STYLES, SCRIPTS)
    return page, len(page.encode())
