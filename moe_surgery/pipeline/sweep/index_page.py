"""index.html and index.md of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from moe_surgery.card.text import code, counted, size, table
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.writer import remove_leftover, write_file
from moe_surgery.pipeline.sweep.state import Entry, State
from moe_surgery.report import markup
from moe_surgery.report.document import document
from moe_surgery.report.markup import Html, tag
from moe_surgery.report.parts import choice, controls, more, panel, scroll, section
from moe_surgery.report.svg import Chart, Series, legend
from moe_surgery.version import __version__

__all__ = ["write_pages"]

ALL_TEXTS = "all texts"
SCRIPTS = ("base.js", "tables.js", "sweep.js")
_DASH = "\N{EN DASH}"


def write_pages(state: State, folder: Path, ops: FileOps) -> None:
    """Write index.html and index.md, of the variants in the order of `state`."""
    entries = list(state.variants.values())
    for name, text in (("index.html", _page(state, entries)), ("index.md", _markdown(state, entries))):
        path = folder / name
        remove_leftover(path.with_name(f".{name}.tmp"), ops)
        write_file(path, text.encode(), ops)


def _domains(entries: Sequence[Entry]) -> list[str]:
    """The texts with figures, "" for all of them first."""
    return sorted({domain for entry in entries for domain in entry.figures})


def _lead(state: State, entries: Sequence[Entry]) -> str:
    dense = max((e.dense_nbytes for e in entries), default=0)
    total = sum(e.nbytes for e in entries)
    rankings = len({e.ranking for e in entries})
    text = f"{counted(len(entries), 'variant')} by {counted(rankings, 'ranking')}, {size(total)} together"
    if dense and len(entries) > 1:
        text += f"; the {size(dense)} of tensors that do not count experts are the same in all of them"
    return text


def _page(state: State, entries: Sequence[Entry]) -> str:
    domains = _domains(entries)
    title = f"Pruned variants of {markup.display_name(state.model)}"
    head = tag(
        "header",
        tag("h1", title),
        tag("p", _lead(state, entries), ".", class_="lead"),
        tag(
            "dl",
            tag("dt", "Full model"),
            tag("dd", f"{state.experts} experts in each layer, top-{state.top_k}, {size(state.nbytes)}"),
            tag("dt", "Model type"),
            tag("dd", state.model_type),
            tag("dt", "Checkpoint"),
            tag("dd", tag("code", state.identity)),
            tag("dt", "Made by"),
            tag("dd", f"moe-surgery {__version__}"),
            class_="facts",
        ),
    )
    fields = (
        controls(choice("sweep-domain", "Texts", [d or ALL_TEXTS for d in domains])) if domains[1:] else ""
    )
    columns, rows = _table(state, entries, domains[:1])
    cells = [[tag("a", row[0], href=f"{row[0]}/"), *row[1:]] for row in rows]
    sections = [
        *([_charts(entries)] if domains else []),
        section(
            "variants",
            "All variants",
            "Each is a checkpoint folder with its model card and a manifest for moe-surgery verify. Share is the size "
            "compared with the full model, KL the mean divergence from its next-token distribution, agreement how "
            "often the most likely next token is the same."
            if domains
            else "Each is a checkpoint folder with its model card and a manifest for moe-surgery verify. None was "
            "evaluated yet: put the file that moe-surgery evaluate -o writes into this folder and run the sweep again.",
            fields,
            scroll(
                markup.table(columns, cells, class_="plain numbers sortable", id="variants"), "All variants"
            ),
            more("variants"),
        ),
    ]
    data = {
        "domains": domains,
        "variants": [
            {
                "name": e.name,
                "ranking": e.ranking,
                "experts": e.experts,
                "top_k": e.top_k,
                "store": e.store,
                "parameters": e.parameters,
                "active": e.active_parameters,
                "bytes": e.nbytes,
                "share": markup.number(e.nbytes / state.nbytes),
                "figures": {d: {k: v for k, v in f.items() if v is not None} for d, f in e.figures.items()},
            }
            for e in entries
        ],
    }
    return document(title, head, sections, data, ("report.css",), SCRIPTS)


def _charts(entries: Sequence[Entry]) -> Html:
    """KL and agreement over all texts against experts, a line for each ranking."""
    rankings = list(dict.fromkeys(e.ranking for e in entries if e.figures))
    panels = []
    for measure, title, label in (
        ("kl", "KL divergence from the full model", "nats per token"),
        ("agreement", "Same most likely token", "share of tokens"),
    ):
        series = []
        for index, ranking in enumerate(rankings):
            points = sorted(
                (e.experts, value)
                for e in entries
                if e.ranking == ranking and (value := e.figures.get("", {}).get(measure)) is not None
            )
            if points:
                x, y = zip(*points, strict=True)
                series.append(Series(ranking, index, x, y))
        x_values = [x for s in series for x in s.x]
        most = max((y for s in series for y in s.y), default=0.0)
        top = 1.0 if measure == "agreement" else most * 1.05 or 1.0
        span = (min(x_values, default=0), max(x_values, default=1))
        chart = Chart(
            title, "experts kept in each layer", label, span, (0, top), series, percent=measure == "agreement"
        )
        panels.append(panel(chart))
    return section(
        "figures",
        "Quality against experts",
        "Over all texts of the evaluation. A line is a ranking.",
        tag(
            "figure",
            tag("div", *panels, class_="panels"),
            tag("figcaption", legend(list(enumerate(rankings)))),
        ),
    )


def _table(
    state: State, entries: Sequence[Entry], domains: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows; figures are those of the first of `domains`."""
    columns = ["Variant", "Ranking", "Experts", "Top-k", "Stored as", "Parameters", "Active", "Size"]
    columns += ["Share", *(["KL", "Perplexity", "Agreement"] if domains else [])]
    rows = []
    for e in entries:
        row = [e.name, e.ranking, str(e.experts), str(e.top_k), e.store, f"{e.parameters:,}"]
        row += [f"{e.active_parameters:,}", size(e.nbytes), f"{100 * e.nbytes / state.nbytes:.0f} %"]
        for domain in domains:
            f = e.figures.get(domain, {})
            row += [_shown(f.get("kl"), "{:.4f}"), _shown(f.get("perplexity"), "{:.4g}")]
            row += [_shown(f.get("agreement"), "{:.1%}")]
        rows.append(row)
    return columns, rows


def _shown(value: float | None, form: str) -> str:
    return _DASH if value is None or not math.isfinite(value) else form.format(value)


def _markdown(state: State, entries: Sequence[Entry]) -> str:
    domains = _domains(entries)
    columns, rows = _table(state, entries, domains[:1])
    cells = [[f"[{row[0]}]({row[0]}/)", *row[1:]] for row in rows]
    lines = [
        f"# Pruned variants of {code(state.model)}",
        "",
        f"{_lead(state, entries)}. The full model has {state.experts} experts in each layer, top-{state.top_k}, "
        f"{size(state.nbytes)}.",
        "",
        table(columns, cells, left=2),
        "",
        f"Made by moe-surgery {__version__}.",
    ]
    return "\n".join(lines) + "\n"
