"""The page's header: what was measured, and where plans and evaluations come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moe_surgery.quality.evaluation import Evaluation
from moe_surgery.report.content import plan_method
from moe_surgery.report.markup import Html, display_name, table, tag
from moe_surgery.report.parts import min_to_max, scroll
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import Statistics
from moe_surgery.version import __version__

__all__ = ["header"]


def header(
    heading: str,
    statistics: Statistics,
    plans: Sequence[tuple[str, Plan]],
    evaluations: Sequence[tuple[str, Evaluation]],
) -> Html:
    """Title, what was measured, and how the plans were made."""
    domains = statistics.domains
    facts = (
        f"{statistics.layers} layers of {statistics.experts} experts, top-{statistics.top_k}; "
        f"{_many(sum(statistics.tokens.values()), 'token')} in {_many(len(domains), 'domain')}."
    )
    origin = tag(
        "dl",
        tag("dt", "Model type"),
        tag("dd", statistics.model_type),
        tag("dt", "Checkpoint"),
        tag("dd", tag("code", statistics.identity)),
        tag("dt", "Tokens"),
        tag("dd", "; ".join(f"{display_name(d)} {statistics.tokens[d]:,}" for d in domains)),
        *_facts("Plans", (f"{display_name(name)}: {plan_method(plan)}" for name, plan in plans)),
        *_facts("Evaluations", (f"{display_name(name)}: {len(e.models)} models" for name, e in evaluations)),
        *_facts("Settings", [_settings(statistics.settings)] if statistics.settings else []),
        tag("dt", "Made by"),
        tag("dd", f"moe-surgery {__version__}"),
        class_="facts",
    )
    rows = [
        (domain, f"{statistics.tokens[domain]:,}", *_texts(statistics.texts.get(domain, [])))
        for domain in domains
    ]
    texts = [
        tag("h2", "Texts"),
        scroll(table(("Domain", "Tokens", "Texts", "xxh3-128"), rows, class_="plain texts"), "Texts"),
    ]
    if plans:
        plan_rows = [
            (
                name,
                min_to_max([len(kept) for kept in plan.layers]),
                plan_method(plan),
                Html("<br>".join(_provenance(plan)) or "not recorded"),
            )
            for name, plan in plans
        ]
        head = ("Plan", "Experts per layer", "Method", "Provenance")
        texts += [tag("h2", "Plans"), scroll(table(head, plan_rows, class_="plain plans"), "Plans")]
    if evaluations:
        evaluation_rows = [
            (
                name,
                e.checkpoint,
                Html("<br>".join(tag("span", line) for line in _texts_read(e))),
                _settings(e.settings),
            )
            for name, e in evaluations
        ]
        head = ("Evaluation", "Full model", "Texts", "Settings")
        texts += [
            tag("h2", "Evaluations"),
            scroll(table(head, evaluation_rows, class_="plain"), "Evaluations"),
        ]
    links = [("map", "Experts"), ("overlap", "Overlap"), ("coverage", "Coverage")]
    links += [("evaluation", "Evaluation")] if evaluations else []
    links += [("table", "Table")]
    nav = tag(
        "nav", *(tag("a", name, href=f"#{anchor}-section") for anchor, name in links), aria_label="Sections"
    )
    about = tag("details", tag("summary", "Texts, plans and evaluations in full"), *texts)
    return tag("header", tag("h1", heading), tag("p", facts, class_="lead"), origin, about, nav)


def _facts(name: str, lines: Iterable[str]) -> list[Html]:
    """A term and its lines; nothing without lines."""
    body = Html("<br>".join(tag("span", line) for line in lines))
    return [tag("dt", name), tag("dd", body)] if body else []


def _texts(listed: Sequence[object]) -> tuple[Html, Html]:
    """Names and hashes of a domain's texts, one per line."""
    entries = [t for t in listed if isinstance(t, dict)]
    names = (tag("span", t.get("name", "")) for t in entries)
    hashes = (tag("code", t.get("xxh3_128", "")) for t in entries)
    return Html("<br>".join(names)), Html("<br>".join(hashes))


def _provenance(plan: Plan) -> list[Html]:
    """A plan's provenance, one entry per line, without texts."""
    return [
        tag("span", tag("b", key), ": ", _settings(value) if isinstance(value, dict) else _value(value))
        for key, value in plan.provenance.items()
        if key != "texts"
    ]


def _settings(settings: Mapping[str, object]) -> str:
    """Settings that are set, in one line."""
    return "; ".join(
        f"{display_name(key)} {_value(value)}" for key, value in settings.items() if value is not None
    )


def _texts_read(evaluation: Evaluation) -> list[str]:
    """The texts of an evaluation, one line per domain."""
    return [
        f"{display_name(domain)}: "
        + ", ".join(display_name(t.get("name", "")) for t in listed if isinstance(t, dict))
        for domain, listed in evaluation.texts.items()
        if isinstance(listed, list)
    ]


def _value(value: object) -> str:
    return display_name(", ".join(map(str, value)) if isinstance(value, list) else value)


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
