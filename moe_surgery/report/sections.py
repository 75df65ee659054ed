"""The page's sections: heading, how to read the figure, controls, initial view."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from moe_surgery.quality.evaluation import Evaluation, ModelResult
from moe_surgery.report.charts import KINDS, coverage_charts, evaluation_charts
from moe_surgery.report.content import ALL_TEXTS, data_of
from moe_surgery.report.curves import MEASURES
from moe_surgery.report.figures import Subject, View, common, plan_coverage
from moe_surgery.report.fit import Detail
from moe_surgery.report.markup import Html, table, tag
from moe_surgery.report.palette import step
from moe_surgery.report.parts import (
    choice,
    controls,
    min_to_max,
    more,
    panel,
    scroll,
    section,
    several,
    slider,
)
from moe_surgery.report.svg import Chart, heat_map, legend, scale_bar
from moe_surgery.selection.plan import Plan

__all__ = [
    "coverage_section",
    "evaluation_section",
    "experts_section",
    "first_overlap",
    "map_section",
    "overlap_section",
]

# A larger map is drawn on a canvas: an element per cell would make the page large and slow.
MOST_CELLS = 5000
# Experts of a layer in the table under the map before the script fills it.
MOST_LISTED = 64
# With more domains, tables are narrower or turned.
MANY = 12

METRIC_TEXTS = {
    "frequency": "how often the router chose the expert",
    "gate": "sum of its routing weights g",
    "ean_sum": "sum of its output norms |f|",
    "ean_mean": "mean of |f| over the tokens that chose it",
    "weighted_ean": "sum of g |f|",
    "reap": "mean of g |f| over the tokens that chose it",
    "ean_ca": "norm of its mean output",
    "rms_count": "number of tokens that chose it times the RMS of its down projection's input",
    "energy": "its output's squared norm summed over tokens, as far as an importance matrix and the weights tell",
}


def map_section(subject: Subject, detail: Detail, plans: Sequence[tuple[str, Plan]]) -> Html:
    """The heat map, and its layers as lists of experts."""
    view, metric = subject.views[0], detail.metrics[0]
    kept = plans[0][1].layers if plans else None
    label = f"Heat map: {metric} of {subject.experts} experts in {subject.layers} layers, {view.name}"
    large = subject.layers * subject.experts > MOST_CELLS
    fields = controls(
        several("map-view", "Domain" if subject.measured else "Ranking", [v.name for v in subject.views]),
        several("map-metric", "Metric", detail.metrics),
        choice("map-plan", "Mark experts kept by", [*(name for name, _ in plans), "no plan"])
        if plans
        else "",
        choice("map-scale", "Colour scale", ["per layer", "over all layers"]) if subject.measured else "",
        choice("map-zoom", "Cell size", ["fit", "4 px", "8 px", "14 px"]) if large else "",
    )
    low, high = ("0", "largest of the layer") if subject.measured else ("last", "first")
    key = [tag("span", tag("span", low, id="scale-low"), scale_bar(), tag("span", high, id="scale-high"))]
    if plans and large:
        key.append(tag("span", "blank: dropped by the plan", id="map-key"))
    elif plans:
        dot = tag(
            "svg", tag("path", class_="rim rim2", d="M8 8h0"), tag("path", class_="dot dot2", d="M8 8h0"),
            width=16, height=16, viewBox="0 0 16 16", aria_hidden="true",
        )  # fmt: skip
        key.append(tag("span", dot, "kept by the plan", id="map-key"))
    if large:
        drawing = Html(
            tag("div", id="map", class_="bigmap", aria_label=label, hidden="")
            + tag("noscript", tag("p", "A map of this size needs JavaScript."))
        )
    else:
        drawing = heat_map(view.relative(metric), kept, label)
    count = min(detail.listed, MOST_LISTED)
    rows = [(layer, " ".join(map(str, row[:count]))) for layer, row in enumerate(view.orders[metric])]
    first = "" if count == subject.experts else f" (the first {count})"
    lists = tag(
        "details",
        tag("summary", "The map as a table: the experts of each layer, best first"),
        scroll(
            table(("Layer", f"Experts, best first{first}"), rows, id="orders", class_="plain orders"),
            "Experts, best first",
        ),
        id="lists",
    )
    hint = "Hover over a cell, or focus the map and use the arrow keys."
    terms = {**METRIC_TEXTS, **subject.about}
    return section(
        "map",
        "Which experts the texts use" if subject.measured else "Which experts are ranked first",
        "Each row is a layer, each cell an expert; the stronger the colour, the higher the score on the chosen "
        "domain. A row with a few strong cells relies on a few experts, an even row on many."
        if subject.measured
        else "Each row is a layer, each cell an expert; the stronger the colour, the earlier the expert comes in the "
        "chosen ranking.",
        fields,
        tag(
            "figure",
            scroll(drawing, "Heat map", focus=False),
            tag("figcaption", tag("div", *key, class_="key")),
        ),
        tag("div", tag("p", hint), id="map-readout", class_="readout", hidden=""),
        lists,
        tag("p", Html("<br>".join(tag("b", m) + tag("span", f": {terms[m]}") for m in detail.metrics)), class_="terms"),
    )  # fmt: skip


def overlap_section(subject: Subject, detail: Detail) -> Html:
    """How much the best experts of two domains overlap, and which experts several domains share."""
    views, metric = subject.views, detail.metrics[0]
    n = max(1, min(subject.experts // 4, detail.listed))
    names = [v.name for v in views]
    matrix = first_overlap(views, metric, n)
    rows = [(a, *(_heat_cell(matrix[i][j]) for j in range(len(names)))) for i, a in enumerate(names)]
    many = " many" if len(names) > MANY else ""
    columns = "".join(tag("th", tag("span", name), scope="col") for name in ("", *names))
    body = "".join(tag("tr", tag("th", row[0], scope="row"), *row[1:]) for row in rows)
    grid = Html(
        f'<table class="matrix{many}" id="overlap"><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>'
    )
    fields = controls(
        several("overlap-metric", "Metric", detail.metrics),
        slider("overlap-n", "Best experts per layer", detail.listed, n),
    )
    pair = controls(
        choice("overlap-a", "Compare", names),
        choice("overlap-b", "with", names),
    )
    by, what = (f" by {metric}", "domain") if subject.measured else ("", "ranking")
    count = len(subject.domains)
    return section(
        "overlap",
        f"How much {what}s overlap",
        f"The share of a layer's best experts for one {what} that are also among its best for the other; mean over "
        f"layers. If it is low, a plan for one {what} drops experts that the other uses.",
        fields,
        tag("figure", scroll(grid, "Overlap"),
            tag("figcaption", f"Percent. The best {n} of {subject.experts} experts{by}; "
                f"random choice would give {100 * n / subject.experts:.0f}.", id="overlap-caption")),
        tag("h3", "Overlap by layer"),
        pair,
        tag("figure", tag("div", class_="panels", id="overlap-layers"), tag("figcaption", id="overlap-legend")),
        tag("h3", f"Experts that {what}s share"),
        controls(slider("shared-least", f"Number of {what}s", count, count, least=2)) if count > 2 else "",
        tag("p", id="shared-caption", class_="words"),
        tag("noscript", tag("p", "The overlap by layer and the shared experts need JavaScript.")),
        scroll(tag("table", id="shared", class_="plain numbers sortable"), f"Experts that {what}s share"),
        more("shared"),
    )  # fmt: skip


def first_overlap(views: Sequence[View], metric: str, n: int) -> list[list[float]]:
    """Mean overlap of the n best experts, for all pairs of views."""
    shares = common(views, metric, n) / (n * len(views[0].orders[metric]))
    return [[float(x) for x in row] for row in shares]


def coverage_section(subject: Subject, detail: Detail, plans: Sequence[tuple[str, Plan]]) -> Html:
    """The share of routing weight in the best experts."""
    views, kind = subject.views, subject.kinds[0]
    charts = coverage_charts(views, plans, kind=kind, metrics=detail.metrics)
    n = max(1, subject.experts // 2)
    compare = ["metrics", "domains"] if len(views) > 1 else ["metrics"]
    fields = controls(
        several("coverage-compare", "Compare", compare),
        several("coverage-view", "Domain", [v.name for v in views]),
        several("coverage-metric", "Metric", detail.metrics) if len(views) > 1 else "",
        several("coverage-kind", "Share of", [KINDS[k] for k in subject.kinds]),
        slider("coverage-n", "Experts kept", subject.experts, n),
    )
    parts: list[Html] = [
        fields,
        tag(
            "figure",
            tag("div", *(panel(c) for c in charts), class_="panels", id="coverage"),
            tag("figcaption", legend([(s.index, s.name) for s in charts[0].series]), id="coverage-legend"),
        ),
        scroll(_coverage_table(charts, n), "Coverage in numbers"),
    ]
    if plans:
        cells = [[_mean_and_worst(*plan_coverage(plan, v.shares[kind])) for v in views] for _, plan in plans]
        names = [name for name, _ in plans]
        if len(views) > MANY:
            head = ("Domain", *names)
            rows = [(v.name, *(row[i] for row in cells)) for i, v in enumerate(views)]
        else:
            head = ("Plan", *(v.name for v in views))
            rows = [(name, *row) for name, row in zip(names, cells, strict=True)]
        parts += [
            tag("h3", f"Share of {KINDS[kind]} that each plan keeps"),
            tag("p", "Percent for each domain: mean over layers (worst layer)."),
            scroll(table(head, rows, class_="plain numbers"), "Coverage of plans"),
        ]
    shown = " (or of routes)" if len(subject.kinds) > 1 else ""
    return section(
        "coverage",
        "How much the best experts cover",
        f"The share of {KINDS[kind]}{shown} that goes to the best experts of each layer, on average and in "
        "the worst layer. The rest would be routed to other experts.",
        *parts,
    )


def evaluation_section(evaluations: Sequence[tuple[str, Evaluation]]) -> Html:
    """Quality against experts kept, and the models in a table."""
    first = evaluations[0][1]
    where = [*([ALL_TEXTS] if len(first.domains) > 1 else []), *first.domains]
    fields = controls(
        choice("evaluation-file", "Evaluation", [n for n, _ in evaluations]) if len(evaluations) > 1 else "",
        choice("evaluation-domain", "Texts", where),
        choice("evaluation-set", "Ranked on", ["any domain"]),
        tag(
            "label", Html('<input type="checkbox" id="evaluation-log"> '), "KL on a log scale", class_="check"
        ),
    )
    charts = evaluation_charts(first)
    head = (
        "Model", "Experts", "Top-k", "Method", "Data or seed", "Tokens", "Cross-entropy", "Perplexity", "KL",
        "Agreement", "Rerouted",
    )  # fmt: skip
    rows = [_model_row(m, first) for m in first.models]
    return section(
        "evaluation",
        "Quality of pruned models",
        "Compared with the full model on the same texts: KL divergence (0 is identical), cross-entropy, how often the "
        "most likely next token is the same, and the share of token-expert assignments that change. A line is a "
        "method; random choices are one line, their median, with a band from best to worst.",
        fields,
        tag(
            "figure",
            tag("div", *(panel(c) for c in charts), class_="panels", id="evaluation"),
            tag(
                "figcaption",
                legend([(s.index, s.name) for s in charts[0].series]),
                id="evaluation-legend",
            ),
        ),
        tag("h3", "Evaluated models"),
        scroll(table(head, rows, class_="plain numbers sortable", id="models"), "Evaluated models"),
        more("models"),
    )


def experts_section(detail: Detail) -> Html:
    """The table of all experts, which the script fills."""
    first = detail.metrics[0]
    return section(
        "table",
        "All experts in numbers",
        "One row per expert. Click a heading to sort by it, click again to reverse the order.",
        controls(id_="table-controls"),
        tag(
            "noscript",
            tag(
                "p", f"This table needs JavaScript; the order by {first} is also in the table under the map."
            ),
        ),
        scroll(tag("table", id="experts", class_="plain numbers sortable"), "All experts"),
        more("experts"),
    )


def _coverage_table(charts: Sequence[Chart], n: int) -> Html:
    mean, worst = charts
    head = ("Metric", f"best {n} experts", "in the worst layer")
    rows = [
        (a.name, f"{100 * a.y[n - 1]:.1f} %", f"{100 * b.y[n - 1]:.1f} %")
        for a, b in zip(mean.series, worst.series, strict=True)
    ]
    return table(head, rows, class_="plain numbers", id="coverage-table")


def _mean_and_worst(mean: float, worst: float) -> str:
    return f"{100 * mean:.1f} ({100 * worst:.1f})"


def _model_row(model: ModelResult, evaluation: Evaluation) -> tuple[object, ...]:
    q = model.overall
    rerouted = MEASURES["rerouted"](q)
    return (
        model.name,
        min_to_max(model.experts),
        model.top_k,
        model.provenance.get("method", ""),
        data_of(model, evaluation.domains),
        f"{q.tokens:,}",
        f"{q.cross_entropy:.4f}",
        f"{q.perplexity:.4g}",
        f"{q.kl:.4f}",
        f"{100 * q.agreement:.1f} %",
        "\N{EN DASH}" if isnan(rerouted) else f"{100 * rerouted:.1f} %",
    )


def _heat_cell(share: float) -> Html:
    return tag("td", f"{100 * share:.0f}", class_=f"q{step(share)}")
