"""Building blocks of the page's sections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_surgery.report.markup import Html, tag
from moe_surgery.report.svg import Chart, line_chart

__all__ = ["choice", "controls", "min_to_max", "more", "panel", "scroll", "section", "several", "slider"]


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


def several(name: str, label: str, options: Sequence[str]) -> Html:
    """`choice`, or nothing if there is nothing to choose from."""
    return choice(name, label, options) if len(options) > 1 else Html("")


def slider(name: str, label: str, most: int, value: int, *, least: int = 1) -> Html:
    slide = Html(f'<input type="range" id="{name}" min="{least}" max="{most}" value="{value}">')
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
    """The rows shown, and buttons for other pages of the table `what` or all rows."""

    def button(name: str, label: str) -> Html:
        return tag("button", label, id=f"{what}-{name}", type="button", hidden="")

    count = tag("span", id=f"{what}-count", role="status")
    return tag(
        "p",
        button("previous", "Previous"),
        count,
        button("next", "Next"),
        button("more", "Show all"),
        class_="more",
    )


def min_to_max(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"
