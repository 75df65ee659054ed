"""The page of the largest models in headless Chromium."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_surgery.report.figures import subject_of
from moe_surgery.report.page import build_report
from moe_surgery.selection.statistics import Statistics
from tests.report.browser import ENTER, KEYS, OVERFLOW, Browser, column, focus_heading, ready
from tests.report.inputs import made_up, plan_of


@pytest.fixture(scope="module")
def large() -> Statistics:
    return made_up(94, 512, ["code", "law"], top_k=8)


@pytest.fixture(scope="module")
def large_page(large: Statistics, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("large") / "report.html"
    file.write_text(build_report(large, [("eighth.json", plan_of(large, "reap", 64, ["law"]))]))
    return file


def test_a_page_of_94_layers_of_512_experts_is_used(
    chromium: Browser, large_page: Path, large: Statistics
) -> None:
    assert large_page.stat().st_size < 3_000_000
    chromium.open(large_page, 1280, 900)
    ready(chromium)
    assert chromium.complaints() == []
    assert chromium.run("return document.getElementsByTagName('*').length") < 8000
    printed = subject_of(large).views
    metrics = chromium.run("return JSON.parse(document.getElementById('data').textContent).metrics")
    assert "reap" in metrics

    # The map: one stop of the Tab key, a cell for every expert, blank where the plan drops it.
    chromium.choose("map-view", 2)
    chromium.choose("map-metric", metrics.index("reap"))
    alpha = chromium.run(
        "const c = document.querySelector('#map canvas');"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3)"
    )
    kept = plan_of(large, "reap", 64, ["law"]).layers
    assert {i for i, a in enumerate(alpha) if a} == {512 * n + e for n, row in enumerate(kept) for e in row}
    chromium.choose("map-plan", 1)
    chromium.run("document.querySelector('#map canvas').focus()")
    for key in ("end", "down", "left"):
        chromium.press(KEYS[key])
    view = printed[2]
    words = chromium.run("return document.getElementById('map-readout').innerText")
    assert "Layer 1, expert 510 on law" in words
    result = re.search(r"reap\s+([\d.]+) \((\d+)", words)
    assert result is not None
    assert float(result[1]) == pytest.approx(
        view.scores["reap"][1, 510], abs=0.005 * view.scores["reap"][1].max()
    )
    assert int(result[2]) == view.ranks("reap")[1, 510]
    # Its colour is the score's share of the layer's largest.
    colour, palette = chromium.run(
        "const c = document.querySelector('#map canvas'), rects = [...document.querySelectorAll('.scale rect')];"
        "return [[...c.getContext('2d').getImageData(510, 1, 1, 1).data].slice(0, 3),"
        "rects.map((r) => getComputedStyle(r).fill.match(/\\d+/g).map(Number))]"
    )
    assert abs(palette.index(colour) - 23 * view.relative("reap")[1, 510]) <= 0.7
    # Larger cells scroll, and the cell in focus comes into view.
    chromium.choose("map-zoom", 3)
    chromium.press(KEYS["home"])
    chromium.press(KEYS["end"])
    box, cursor = chromium.run(
        "return ['.scroll', '.cursor'].map((s) => { const m = document.getElementById('map');"
        "const b = (s === '.scroll' ? m.parentElement : m.querySelector(s)).getBoundingClientRect();"
        "return [b.left, b.right]; })"
    )
    assert box[0] <= cursor[0] < cursor[1] <= box[1]
    assert chromium.run(OVERFLOW) == 0

    # The table: sorted over all pages.
    chromium.choose("table-view", 2)
    focus_heading(chromium, "experts", "reap")
    chromium.press(ENTER)
    pages = [column(chromium, "experts", name) for name in ("Layer", "Expert")]
    chromium.run("document.getElementById('experts-next').click()")
    pages = [
        a + column(chromium, "experts", name) for a, name in zip(pages, ("Layer", "Expert"), strict=True)
    ]
    got = [view.scores["reap"][int(n), int(e)] for n, e in zip(*pages, strict=True)]
    assert len(set(zip(*pages, strict=True))) == 80
    top = sorted(view.scores["reap"].ravel(), reverse=True)[:80]
    assert got == pytest.approx(top, abs=0.005 * top[0])
    assert (
        chromium.run("return document.getElementById('experts-count').textContent")
        == "rows 41 to 80 of 48,128"
    )
    assert chromium.complaints() == []
