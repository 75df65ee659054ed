"""Building blocks of the page's sections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_surgery.report.markup import Html, tag
from moe_surgery.report.svg import Chart, line_chart

__all__ = ["choice", "controls", "min_to_max", "more", "panel", "scroll", "section", "slider"]


def section(name: str, heading: str, words: str, *content: object) -> Html:
    return tag(
        "section", tag("h2", heading, id=f"{name}-heading"), tag("p", words, class_="words"), *content,
        id=f"{name}-section", aria_labelledby=f"{name}-heading",
    )  # fmt: skip


def controls(*fields: object, id_: str | None = None) -> Html:
    """A group of controls, hidden until the script enables them."""
    shown_fields = (f for f in fields if f)
    label = "Choose what is shown"
    return tag("div", *shown_fields, class_="controls", role="group", aria_label=label, id=id_, hidden="")


def choice(name: str, label: str, options: Iterable[str]) -> Html:
    listed = (tag("option", o, value=i) for i, o in enumerate(options))
    return tag("label", tag("span", label), tag("select", *listed, id=name))


def slider(name: str, label: str, most: int, value: int) -> Html:
    slide = Html(f'<input type="range" id="{name}" min="1" max="{most}" value="{value}">')
    return tag("label", tag("span", label, ": ", tag("output", value, id=f"{name}-value")), slide)


def scroll(content: Html, label: str, *, focus: bool = True) -> Html:
    """A scrollable box, for content wider than a phone."""
    return tag(
        "div", content, class_="scroll", role="region", aria_label=label, tabindex="0" if focus else None
    )


def panel(chart: Chart) -> Html:
    heading = tag("h3", chart.title, ", ", tag("span", chart.y_label, class_="unit"))
    return tag("div", heading, line_chart(chart), class_="panel")


def more(what: str) -> Html:
    """The number of rows shown, and a button for all."""
    button = tag("button", "Show all", id=f"{what}-more", type="button", hidden="")
    return tag("p", tag("span", id=f"{what}-count"), button, class_="more")


def min_to_max(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"
