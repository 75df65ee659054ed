"""The page in headless Chromium: in the dark, on a phone, in print, without script."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_surgery.report.page import build_report
from tests.report.browser import CONTRAST, KEYS, OVERFLOW, Browser, column, ready
from tests.report.inputs import evaluation_of, made_up, plan_of


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_word_stands_out_from_what_is_behind_it(chromium: Browser, page: Path, dark: bool) -> None:
    chromium.open(page, 1280, 900, dark=dark)
    back = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    assert chromium.run(CONTRAST) == []


@pytest.mark.parametrize("experts", [8, 32, 128])
def test_a_phone_scrolls_the_map_but_not_the_page(chromium: Browser, page_file: Path, experts: int) -> None:
    statistics = made_up(6, experts, ["a", "a-very-long-name-of-a-domain-without-a-place-to-break-it" * 3])
    plan = plan_of(statistics, "reap", 2)
    page_file.write_text(
        build_report(statistics, [("p" * 200, plan)], [("e" * 200, evaluation_of(statistics))], "t" * 300)
    )
    chromium.open(page_file, 360, 800)
    assert chromium.run(OVERFLOW) == 0
    chromium.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert chromium.run(OVERFLOW) == 0
    upcast = chromium.run(
        "const m = document.getElementById('map').parentElement; return m.scrollWidth > m.clientWidth"
    )
    assert upcast is (experts > 8)
    # Moving by keys brings the cell into its box.
    chromium.run("document.querySelector('[data-at=\"0,0\"]').focus()")
    chromium.press(KEYS["end"])
    seen = chromium.run(
        "const e = document.activeElement, c = e.getBoundingClientRect();"
        "return [c.left >= 0, c.right <= innerWidth, e.dataset.at]"
    )
    assert seen == [True, True, f"0,{experts - 1}"]


def test_forty_domains_fit_phone_and_paper(chromium: Browser, page_file: Path) -> None:
    statistics = made_up(6, 32, [f"domain number {i}" for i in range(40)])
    page_file.write_text(build_report(statistics, [("p", plan_of(statistics, "reap", 8))]))
    chromium.open(page_file, 320, 800)
    ready(chromium)
    assert chromium.run(OVERFLOW) == 0
    chromium.choose("coverage-compare", 1)
    chromium.choose("coverage-view", 7)
    # One domain stands out; the others are grey.
    legend = "return [...document.querySelectorAll('#coverage-legend li')].map((l) => l.textContent.trim())"
    assert chromium.run(legend) == ["all domains", sorted(statistics.data)[6]]
    assert chromium.run("return document.querySelectorAll('#coverage .muted').length") == 2 * 39
    chromium.run("dispatchEvent(new Event('beforeprint'))")
    chromium.command("Emulation.setEmulatedMedia", media="print")
    chromium.size(718, 1000)
    right = chromium.run("return document.getElementById('overlap').getBoundingClientRect().right")
    assert right <= 718
    assert chromium.complaints() == []


def test_print_hides_controls_and_opens_everything(chromium: Browser, page: Path) -> None:
    chromium.open(page, 1280, 900)
    before = len(column(chromium, "experts", "Layer"))
    chromium.command("Emulation.setEmulatedMedia", media="print")
    hidden = chromium.run(
        "return [...document.querySelectorAll('.controls, nav, .readout, .more button')]"
        ".filter((e) => e.getClientRects().length).length"
    )
    assert hidden == 0
    assert chromium.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    chromium.run("dispatchEvent(new Event('beforeprint'))")
    assert chromium.run("return [...document.querySelectorAll('details')].every((d) => d.open)")
    assert len(column(chromium, "experts", "Layer")) == 24 * 32
    chromium.size(718, 1000)  # an A4 page between its margins
    assert chromium.run(OVERFLOW) <= 0
    tables = (
        "return [...document.querySelectorAll('.scroll')]"
        ".filter((s) => s.firstElementChild.getBoundingClientRect().right > innerWidth + 1)"
        ".map((s) => s.getAttribute('aria-label'))"
    )
    assert chromium.run(tables) == []
    chromium.run("dispatchEvent(new Event('afterprint'))")
    assert not chromium.run("return [...document.querySelectorAll('details')].some((d) => d.open)")
    assert len(column(chromium, "experts", "Layer")) == before
    assert chromium.pdf().startswith(b"%PDF")


def test_without_script_the_page_still_says_the_essentials(chromium: Browser, page: Path) -> None:
    chromium.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(page, 1280, 900)
        chromium.command("Emulation.setScriptExecutionDisabled", value=False)
        seen = chromium.run(
            "const seen = (s) => [...document.querySelectorAll(s)].filter((e) => e.getClientRects().length).length;"
            "return {map: seen('#map rect:not(.cursor)'), charts: seen('.chart'),"
            "controls: seen('.controls'), models: seen('#models tbody tr')}"
        )
        assert seen == {"map": 24 * 32, "charts": 6, "controls": 0, "models": 1 + 4 * (2 * 5 + 3)}
    finally:
        chromium.command("Emulation.setScriptExecutionDisabled", value=False)
