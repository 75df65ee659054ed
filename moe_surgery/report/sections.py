"""The page's sections: heading, how to read the figure, controls, initial view."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from moe_surgery.quality.evaluation import Evaluation, ModelResult
from moe_surgery.report.charts import coverage_charts, evaluation_charts
from moe_surgery.report.content import ALL_TEXTS, data_of
from moe_surgery.report.curves import MEASURES
from moe_surgery.report.figures import View, overlap, plan_coverage
from moe_surgery.report.markup import Html, table, tag
from moe_surgery.report.palette import step
from moe_surgery.report.parts import choice, controls, min_to_max, more, panel, scroll, section, slider
from moe_surgery.report.svg import Chart, heat_map, legend, scale_bar
from moe_surgery.selection.metrics import METRICS
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import Statistics

__all__ = [
    "coverage_section",
    "evaluation_section",
    "experts_section",
    "first_overlap",
    "map_section",
    "overlap_section",
]

FIRST_METRIC = "frequency"

METRIC_TEXTS = {
    "frequency": "how often the router chose the expert",
    "gate": "sum of its routing weights g",
    "ean_sum": "sum of its output norms |f|",
    "ean_mean": "mean of |f| over the tokens that chose it",
    "weighted_ean": "sum of g |f|",
    "reap": "mean of g |f| over the tokens that chose it",
    "ean_ca": "norm of its mean output",
}


def map_section(statistics: Statistics, views: Sequence[View], plans: Sequence[tuple[str, Plan]]) -> Html:
    """The heat map, and its layers as lists of experts."""
    view = views[0]
    orders = view.orders[FIRST_METRIC]
    kept = plans[0][1].layers if plans else None
    label = (
        f"Heat map: {FIRST_METRIC} of {statistics.experts} experts in {statistics.layers} layers, {view.name}"
    )
    fields = controls(
        choice("map-view", "Domain", [v.name for v in views]),
        choice("map-metric", "Metric", METRICS),
        choice("map-plan", "Mark experts kept by", [*(name for name, _ in plans), "no plan"])
        if plans
        else "",
        choice("map-scale", "Colour scale", ["per layer", "over all layers"]),
    )
    key = [
        tag(
            "span",
            tag("span", "0", id="scale-low"),
            scale_bar(),
            tag("span", "largest of the layer", id="scale-high"),
        )
    ]
    if plans:
        dot = tag(
            "svg", tag("path", class_="rim rim2", d="M8 8h0"), tag("path", class_="dot dot2", d="M8 8h0"),
            width=16, height=16, viewBox="0 0 16 16", aria_hidden="true",
        )  # fmt: skip
        key.append(tag("span", dot, "kept by the plan", id="map-key"))
    rows = [(layer, " ".join(map(str, row))) for layer, row in enumerate(orders)]
    lists = tag(
        "details",
        tag("summary", "The map as a table: the experts of each layer, best first"),
        scroll(
            table(("Layer", "Experts, best first"), rows, id="orders", class_="plain orders"),
            "Experts, best first",
        ),
    )
    return section(
        "map",
        "Which experts the texts use",
        "Each row is a layer, each cell an expert; the stronger the colour, the higher the score on the chosen "
        "domain. A row with a few strong cells relies on a few experts, an even row on many.",
        fields,
        tag(
            "figure",
            scroll(heat_map(view.relative(FIRST_METRIC), kept, label), "Heat map", focus=False),
            tag("figcaption", tag("div", *key, class_="key")),
        ),
        tag("div", tag("p", "Hover over a cell, or focus the map and use the arrow keys."),
            id="map-readout", class_="readout", hidden=""),
        lists,
        tag("p", Html("<br>".join(tag("b", m) + tag("span", f": {METRIC_TEXTS[m]}") for m in METRICS)), class_="terms"),
    )  # fmt: skip


def overlap_section(statistics: Statistics, views: Sequence[View]) -> Html:
    """How much the best experts of two domains overlap."""
    if len(views) == 1:
        return tag("div", hidden="", id="overlap-section")
    n = max(1, statistics.experts // 4)
    names = [v.name for v in views]
    matrix = first_overlap(views, FIRST_METRIC, n)
    rows = [(a, *(_heat_cell(matrix[i][j]) for j in range(len(names)))) for i, a in enumerate(names)]
    grid = table(("", *names), (row[:1] for row in rows), class_="matrix", id="overlap")
    body = "".join(tag("tr", tag("th", row[0], scope="row"), *row[1:]) for row in rows)
    grid = Html(grid[: grid.index("<tbody>")] + f"<tbody>{body}</tbody></table>")
    fields = controls(
        choice("overlap-metric", "Metric", METRICS),
        slider("overlap-n", "Best experts per layer", statistics.experts, n),
    )
    return section(
        "overlap",
        "How much domains overlap",
        "The share of a layer's best experts for one domain that are also among its best for the other; mean over "
        "layers. If it is low, a plan for one domain drops experts that the other uses.",
        fields,
        tag("figure", scroll(grid, "Overlap"),
            tag("figcaption", f"Percent. The best {n} of {statistics.experts} experts by {FIRST_METRIC}; "
                f"random choice would give {100 * n / statistics.experts:.0f}.", id="overlap-caption")),
    )  # fmt: skip


def first_overlap(views: Sequence[View], metric: str, n: int) -> list[list[float]]:
    """Mean overlap of the n best experts, for all pairs of views."""
    layers = len(views[0].layers)
    return [
        [float(overlap(a.orders[metric], b.orders[metric])[n - 1]) / (n * layers) for b in views]
        for a in views
    ]


def coverage_section(
    statistics: Statistics, views: Sequence[View], plans: Sequence[tuple[str, Plan]]
) -> Html:
    """The share of routing weight in the best experts."""
    charts = coverage_charts(views, plans)
    n = max(1, statistics.experts // 2)
    compare = ["metrics", "domains"] if len(views) > 1 else ["metrics"]
    fields = controls(
        choice("coverage-compare", "Compare", compare),
        choice("coverage-view", "Domain", [v.name for v in views]),
        choice("coverage-metric", "Metric", METRICS) if len(views) > 1 else "",
        choice("coverage-kind", "Share of", ["routing weight", "routes"]),
        slider("coverage-n", "Experts kept", statistics.experts, n),
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
        rows = [
            (name, *(_mean_and_worst(*plan_coverage(plan, v.carried("weight"))) for v in views))
            for name, plan in plans
        ]
        parts += [
            tag("h3", "Routing weight that each plan keeps"),
            tag("p", "Percent for each domain: mean over layers (worst layer)."),
            scroll(
                table(("Plan", *(v.name for v in views)), rows, class_="plain numbers"), "Coverage of plans"
            ),
        ]
    return section(
        "coverage",
        "How much the best experts cover",
        "The share of routing weight (or of routes) that goes to the best experts of each layer, on average and in "
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


def experts_section() -> Html:
    """The table of all experts, which the script fills."""
    fields = controls(id_="table-controls")
    return section(
        "table",
        "All experts in numbers",
        "One row per expert. Click a heading to sort by it, click again to reverse the order.",
        fields,
        tag(
            "noscript",
            tag("p", "This table needs JavaScript; the order of experts is also in the table under the map."),
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
