"""Card section on repaired tensors: what was trained, on which texts, and what it gained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moe_surgery.card.facts import Facts
from moe_surgery.card.method import text_rows
from moe_surgery.card.text import code, counted, table

__all__ = ["repair_section"]

MAX_ROWS = 60


def repair_section(facts: Facts) -> str:
    """Paragraphs on the repair that the manifest records."""
    repair = facts.repair or {}
    names = repair.get("tensors")
    count = len(names) if isinstance(names, Sequence) and not isinstance(names, str) else 0
    settings = repair.get("settings")
    norms = isinstance(settings, Mapping) and settings.get("norms") is True
    what = "routers, biases of the experts" + (" and norm weights" if norms else "")
    parts = [
        f"{counted(count, 'small tensor')} ({what}; `repair` in `surgery.json` lists them) were trained so that this "
        "model's next-token distributions follow the source's. Every other tensor is the source's, byte for byte. The "
        "texts are not those that the figures are from: a share of them was held out."
    ]
    texts = repair.get("texts")
    if isinstance(texts, Mapping) and texts:
        parts.append(
            "Trained on these texts:\n\n" + table(["domain", "texts", "tokens", "names"], text_rows(texts))
        )
    rows = [*_rows(repair.get("held_out"), "held out"), *_rows(repair.get("measured"), "not trained on")]
    if rows:
        columns = ["domain", "texts", "tokens", "KL before", "KL after"]
        parts.append(
            "KL divergence from the source's next-token distributions, nats per token:\n\n"
            + table(columns, rows, left=2)
        )
    if not _rows(repair.get("measured"), ""):
        parts.append(
            "What the repair changes on other kinds of texts was not measured; it may be worse there."
        )
    return "\n\n".join(parts)


def _rows(figures: object, texts: str) -> list[list[str]]:
    return list(_figures(figures, texts)) if isinstance(figures, Mapping) else []


def _figures(figures: Mapping[str, object], texts: str) -> Iterator[list[str]]:
    for domain, values in list(figures.items())[:MAX_ROWS]:
        if isinstance(values, Mapping):
            before, after = (_figure(values.get(key)) for key in ("kl_before", "kl_after"))
            tokens = values.get("tokens")
            yield [code(domain), texts, f"{tokens:,}" if type(tokens) is int else "", before, after]


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""
