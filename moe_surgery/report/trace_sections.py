"""The trace page's header and sections, as shown before (or without) the script."""

from __future__ import annotations

import numpy as np

from moe_surgery.quality.routing_trace import ModelTrace, Trace
from moe_surgery.report.content import plan_method
from moe_surgery.report.markup import Html, display_name, table, tag
from moe_surgery.report.palette import SERIES_LIGHT, step
from moe_surgery.report.parts import choice, controls, min_to_max, scroll, section
from moe_surgery.report.svg import scale_bar
from moe_surgery.report.trace_content import inline_html, names, running_text
from moe_surgery.report.trace_figures import BUCKETS, by_weight_lost, strongest, weight_lost
from moe_surgery.selection.plan import Plan
from moe_surgery.version import __version__

__all__ = ["compare_section", "text_section", "trace_header"]

TOP_TOKENS = 20
CONTEXT_TOKENS = 6
# Lines are in blocks of at least as many tokens: a browser lays out a changed block, not the whole text.
PARAGRAPH_TOKENS = 100
EXPERT_STYLES = len(SERIES_LIGHT)


def trace_header(heading: str, trace: Trace, tokens: int, levels: int) -> Html:
    """Title, and what was traced."""
    total = len(trace.tokens)
    facts = (
        f"{total:,} tokens through {trace.layers} layers of {trace.num_experts} experts, "
        f"top-{trace.top_k}{'' if len(trace.models) == 1 else ', full and pruned'}."
    )
    generated = total - trace.prompt_tokens
    lines = [("Model type", trace.model_type), ("Checkpoint", f"{display_name(trace.checkpoint)}")]
    lines += [("Identity", trace.identity)]
    lines += [("Tokens", f"{trace.prompt_tokens:,} of the prompt, {generated:,} generated")]
    if tokens < total:
        lines += [("Shown", f"the first {tokens:,} of {total:,} tokens; figures of plans are for all")]
    lines += [
        (f"Plan {name}", f"{min_to_max([len(k) for k in m.kept])} experts per layer; {_method(trace, m)}")
        for name, m in zip(names(trace)[1:], trace.models[1:], strict=True)
    ]
    computed = "; ".join(
        f"{key} {trace.settings[key]}" for key in ("backend", "device", "dtype") if key in trace.settings
    )
    lines += [("Computed by", computed)] if computed else []
    lines += [("Weights", f"rounded to {levels + 1} levels; exact ones: --json")]
    lines += [("Made by", f"moe-surgery {__version__}")]
    terms = [part for name, value in lines for part in (tag("dt", name), tag("dd", value))]
    return tag(
        "header",
        tag("h1", heading),
        tag("p", facts, class_="lead"),
        tag("details", tag("summary", "Model, plans and settings"), tag("dl", *terms, class_="facts")),
        class_="trace",
    )


def _method(trace: Trace, model: ModelTrace) -> str:
    return plan_method(Plan(trace.model_type, trace.num_experts, model.kept, provenance=model.provenance))


def text_section(trace: Trace, tokens: int) -> Html:
    """The text, coloured, with its controls and the place for one token's path."""
    shown = names(trace)
    plans = shown[1:]
    words = (
        "Each token is routed to a few experts in every layer. Colour the text by the strongest expert of a layer, or "
        "pick one expert to see where it fires. Pick a token, by click or with the arrow keys, to see its path."
    )
    if plans:
        words += (
            " With a plan: KL divergence of the next token's distribution from the full model's, and the share of "
            "routing weight on experts that the plan removes."
        )
    modes = ["Expert", "KL divergence", "Weight lost", "Agreement"] if plans else ["Expert"]
    fields = [
        choice("mode", "Colour by", modes) if plans else "",
        choice("plan", "Plan", plans) if plans else "",
        choice("run", "Routes of", shown) if plans else "",
        choice("a", "Between", shown) if plans else "",
        choice("b", "and", shown) if plans else "",
        choice("span", "Over", ["all layers", "one layer"]) if plans else "",
        choice("layer", "Layer", map(str, range(trace.layers))),
        choice("expert", "Expert", ["strongest of each token"]),
        Html('<label class="check"><input type="checkbox" id="numbers"><span>Numbers</span></label>'),
    ]
    classes, legend = _first_colours(trace, tokens)
    paragraphs: list[Html] = []
    spans: list[str] = []
    for i in range(tokens):
        extra = " made" if i >= trace.prompt_tokens else ""
        name = f"{classes[i]}{extra}".strip()
        attribute = f' class="{name}"' if name else ""
        shown_text, line_break = running_text(trace.texts[i])
        spans.append(f'<span role="option" id="t{i}"{attribute}>{shown_text}</span>{line_break}')
        if (line_break and len(spans) >= PARAGRAPH_TOKENS) or i == tokens - 1:
            paragraphs.append(tag("div", Html("".join(spans)), role="none"))
            spans = []
    text = tag(
        "div", *paragraphs, id="text", class_="tokens", role="listbox", tabindex="0",
        aria_label="Tokens", aria_describedby="keys",
    )  # fmt: skip
    reading = tag(
        "div",
        legend,
        tag("div", id="strip", class_="strip", hidden=""),
        text,
        tag("p", id="readout", class_="line", aria_live="polite"),
        tag(
            "p",
            "Arrow keys, Page Up and Down, Home and End move between tokens; n and p go to the next and previous "
            "token of the expert, or with a value above 0.",
            id="keys",
            class_="hint",
            hidden="",
        ),
        class_="reading",
    )
    token = tag("div", id="token", class_="one", role="region", aria_label="The picked token", hidden="")
    return section("text", "Text", words, controls(*fields), tag("div", reading, token, class_="split"))


def _first_colours(trace: Trace, tokens: int) -> tuple[list[str], Html]:
    """Each token's class and the legend of the first view: KL with a plan, else layer 0's strongest experts."""
    if len(trace.models) > 1:
        kl = trace.models[1].kl[:tokens]
        top = float(kl.max())
        classes = [f"q{step(float(np.sqrt(x / top))) if top > 0 else 0}" for x in kl]
        return classes, _key(f"KL with {names(trace)[1]}, nats (square-root scale)", "0", f"{top:.3g}", "")
    first = trace.models[0].experts[0, :tokens, 0].tolist()
    named = strongest(first, EXPERT_STYLES)
    style = {expert: f"e s{i}" for i, (expert, _) in enumerate(named)}
    items = [
        tag("li", tag("i", class_=f"e s{i}"), f"expert {expert} ({count})")
        for i, (expert, count) in enumerate(named)
    ]
    if rest := len(first) - sum(count for _, count in named):
        items.append(tag("li", f"others ({rest})"))
    return [style.get(expert, "") for expert in first], _key("", "0", "", Html("".join(items)))


def _key(label: str, low: str, high: str, items: Html | str) -> Html:
    scale = tag(
        "p", tag("span", label, id="scale-label"), " ",
        tag("span", tag("span", low, id="scale-low"), scale_bar(), tag("span", high, id="scale-high")),
        id="scale", class_="key", hidden=None if label else "",
    )  # fmt: skip
    return Html(scale + tag("ul", items, id="experts", class_="legend", hidden=None if items else ""))


def compare_section(trace: Trace, tokens: int) -> Html:
    """What each plan costs: a summary, KL by weight lost, and the tokens that change most."""
    full, plans = trace.models[0], trace.models[1:]
    shown = names(trace)[1:]
    lost = [weight_lost(trace, plan) for plan in plans]
    summary = [
        (
            name,
            min_to_max([len(k) for k in plan.kept]),
            f"{plan.kl.mean():.4f}",
            f"{plan.kl.max():.4f}",
            _percent(np.mean([a == b for a, b in zip(plan.predicted, full.predicted, strict=True)])),
            f"{int((share > 0).any(axis=0).sum()):,} of {len(trace.tokens):,}",
            _percent(share.mean()),
        )
        for name, plan, share in zip(shown, plans, lost, strict=True)
    ]
    head: tuple[str, ...] = ("Plan", "Experts per layer", "Mean KL", "Largest KL", "Same top-1")
    head += ("Tokens that lose an expert", "Routing weight lost")
    buckets = [by_weight_lost(share, plan.kl) for share, plan in zip(lost, plans, strict=True)]
    bucket_head = ["Weight lost (mean of layers)"]
    for name in shown:
        bucket_head += [f"{name}: tokens", "mean KL"]
    bucket_rows: list[list[object]] = []
    for i, (_, label) in enumerate(BUCKETS):
        row: list[object] = [label]
        for counted in buckets:
            count, kl = counted[i]
            row += [f"{count:,}", "\u2013" if kl is None else f"{kl:.4f}"]
        bucket_rows.append(row)
    parts: list[object] = [
        scroll(table(head, summary, class_="plain numbers"), "Plans compared"),
        tag("h3", "KL divergence by routing weight lost"),
        scroll(table(bucket_head, bucket_rows, class_="plain numbers", id="buckets"), "KL by weight lost"),
    ]
    tops = [
        tag(
            "div",
            tag("h3", f"Largest KL with {name}"),
            scroll(_top_tokens(trace, plan, share, tokens), f"Tokens of largest KL with {name}"),
            class_="panel",
        )
        for name, plan, share in zip(shown, plans, lost, strict=True)
    ]
    parts.append(tag("div", *tops, class_="panels wide"))
    words = (
        "KL(full || plan) of the next token, in nats, after each token. A token also suffers from what earlier tokens "
        "lost: attention reads their hidden states."
    )
    return section(
        "compare", "What the plan changes" if len(plans) == 1 else "What the plans change", words, *parts
    )


def _top_tokens(trace: Trace, plan: ModelTrace, lost: np.ndarray, tokens: int) -> Html:
    full = trace.models[0]
    rows = []
    for i in np.argsort(-plan.kl[:tokens], kind="stable")[:TOP_TOKENS].tolist():
        before = Html("".join(map(inline_html, trace.texts[max(0, i - CONTEXT_TOKENS) : i])))
        link = tag("a", inline_html(trace.texts[i]), href=f"#t{i}")
        rows.append(
            (
                tag("span", tag("span", before, class_="before"), link, class_="snippet"),
                f"{plan.kl[i]:.4f}",
                _percent(lost[:, i].mean()),
                tag("code", inline_html(trace.texts[i + 1])) if i + 1 < len(trace.tokens) else "\u2013",
                _prediction(full, i),
                _prediction(plan, i),
            )
        )
    head = ("Token", "KL", "Weight lost", "Next token", "Full model predicts", "With the plan")
    return table(head, rows, class_="plain numbers tops")


def _prediction(model: ModelTrace, i: int) -> Html:
    return tag(
        "span", tag("code", inline_html(model.predicted_texts[i])), f" {_percent(model.probability[i])}"
    )


def _percent(share: float | np.floating) -> str:
    return f"{100 * float(share):.1f} %"
