"""The page's header: what was measured, and where plans and evaluations come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moe_surgery.quality.evaluation import Evaluation
from moe_surgery.report.content import plan_method
from moe_surgery.report.figures import Subject
from moe_surgery.report.fit import Detail
from moe_surgery.report.markup import Html, display_name, table, tag
from moe_surgery.report.parts import min_to_max, scroll
from moe_surgery.selection.plan import Plan
from moe_surgery.version import __version__

__all__ = ["header"]


def header(
    heading: str,
    subject: Subject,
    detail: Detail,
    plans: Sequence[tuple[str, Plan]],
    evaluations: Sequence[tuple[str, Evaluation]],
) -> Html:
    """Title, what was measured, and how the plans were made."""
    domains = subject.domains
    counts = [n for n in subject.tokens.values() if n is not None]
    top_k = f", top-{subject.top_k}" if subject.top_k else ""
    tokens = f"{_many(sum(counts), 'token')} in " if len(counts) == len(domains) else ""
    what = _many(len(domains), "domain" if subject.measured else "ranking")
    facts = f"{subject.layers} layers of {subject.experts} experts{top_k}; {tokens}{what}."
    notice = detail.words(subject)
    origin = tag(
        "dl",
        *_facts("Source", [subject.source] if subject.source else []),
        *_facts("Model type", [subject.model_type] if subject.model_type else []),
        *_facts("Checkpoint", [tag("code", subject.identity)] if subject.identity else []),
        *_facts("Tokens", [_tokens(subject)] if counts else []),
        *_facts("Rankings", [] if subject.measured else ["; ".join(map(display_name, domains))]),
        *_facts("Plans", (f"{display_name(name)}: {plan_method(plan)}" for name, plan in plans)),
        *_facts("Evaluations", (f"{display_name(name)}: {len(e.models)} models" for name, e in evaluations)),
        *_facts("Settings", [_settings(subject.settings)] if subject.settings else []),
        tag("dt", "Made by"),
        tag("dd", f"moe-surgery {__version__}"),
        class_="facts",
    )
    texts = _texts_table(subject) if subject.texts else []
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
    links = [("map", "Experts")]
    links += [("overlap", "Overlap")] if len(subject.views) > 1 else []
    links += [("coverage", "Coverage")] if subject.kinds else []
    links += [("evaluation", "Evaluation")] if evaluations else []
    links += [("table", "Table")]
    nav = tag(
        "nav", *(tag("a", name, href=f"#{anchor}-section") for anchor, name in links), aria_label="Sections"
    )
    about = (
        tag("details", tag("summary", "Texts, plans and evaluations in full"), *texts) if texts else Html("")
    )
    limits = tag("p", notice, class_="notice") if notice else Html("")
    return tag("header", tag("h1", heading), tag("p", facts, class_="lead"), limits, origin, about, nav)


def _tokens(subject: Subject) -> str:
    known = ((domain, count) for domain, count in subject.tokens.items() if count is not None)
    return "; ".join(f"{display_name(domain)} {count:,}" for domain, count in known)


def _texts_table(subject: Subject) -> list[Html]:
    rows = [
        (domain, "" if count is None else f"{count:,}", *_texts(subject.texts.get(domain, [])))
        for domain, count in subject.tokens.items()
    ]
    head = ("Domain", "Tokens", "Texts", "xxh3-128")
    return [tag("h2", "Texts"), scroll(table(head, rows, class_="plain texts"), "Texts")]


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
