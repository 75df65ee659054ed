"""The data embedded in the trace page, and token texts made safe to show."""

from __future__ import annotations

from html import escape

import numpy as np

from moe_surgery.quality.routing_trace import ModelTrace, Trace
from moe_surgery.report.markup import Html, display_name, number
from moe_surgery.report.trace_figures import kept_mask
from moe_surgery.report.trace_pack import pack_routes, slots

__all__ = ["inline_html", "inline_text", "names", "running_text", "trace_content"]

WORD_LIMIT = 80
SYMBOLS = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}


def trace_content(trace: Trace, tokens: int, levels: int) -> dict[str, object]:
    """The embedded object, for the first `tokens` tokens, weights with `levels` levels (see `trace_pack`).

    `words` are the texts of all predicted tokens, `predicted` indices into them. `kept` has a string of
    hexadecimal digits per layer, bit e % 8 of byte e // 8 set for each expert e; null for the full model.
    """
    words: dict[str, int] = {}
    shown_names = names(trace)
    models = [
        _model(trace, model, name, words, tokens, levels)
        for name, model in zip(shown_names, trace.models, strict=True)
    ]
    return {
        "layers": trace.layers,
        "experts": trace.num_experts,
        "topK": max(n for model in trace.models for n in slots(model)),
        "levels": levels,
        "promptTokens": trace.prompt_tokens,
        "ids": list(trace.tokens[:tokens]),
        "texts": [inline_text(t) for t in trace.texts[:tokens]],
        "models": models,
        "words": list(words),
    }


def names(trace: Trace) -> list[str]:
    """What the page calls each model."""
    return ["full model", *(display_name(model.name) for model in trace.models[1:])]


def _model(
    trace: Trace, model: ModelTrace, name: str, words: dict[str, int], tokens: int, levels: int
) -> dict[str, object]:
    kept = None
    if model.kind != "full":
        bits = np.packbits(kept_mask(model, trace.num_experts), axis=1, bitorder="little")
        kept = [row.tobytes().hex() for row in bits]
    return {
        "name": name,
        "kept": kept,
        "slots": slots(model),
        "routes": pack_routes(model, tokens, levels),
        "kl": [number(float(x), 4) for x in model.kl[:tokens]],
        "loss": [number(float(x), 4) for x in model.loss[:tokens]],
        "predicted": [words.setdefault(inline_text(t), len(words)) for t in model.predicted_texts[:tokens]],
        "probability": [number(float(x), 3) for x in model.probability[:tokens]],
    }


def inline_text(piece: str) -> str:
    """A token's text on one line: line breaks and tabs as symbols, unprintable characters as escapes.

    A token that ends within a character, which has no text, is a small square.
    """
    if not piece:
        return "\N{WHITE SMALL SQUARE}"
    return "".join(map(_character, piece[:WORD_LIMIT]))


def inline_html(piece: str) -> Html:
    return Html(escape(inline_text(piece)))


def running_text(piece: str) -> tuple[Html, str]:
    """A token in the running text: as `inline_html`, with line breaks after their symbols; and the last line
    break, if the token ends with one, to be put after the token's element."""
    broken = inline_html(piece).replace(SYMBOLS["\n"], SYMBOLS["\n"] + "\n")
    words = broken.removesuffix("\n")
    return Html(words), broken[len(words) :]


def _character(character: str) -> str:
    if character in SYMBOLS:
        return SYMBOLS[character]
    return character if character.isprintable() else character.encode("unicode_escape").decode()
