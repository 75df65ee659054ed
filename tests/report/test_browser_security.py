"""The page in headless Chromium: nothing that comes from files runs, and nothing is loaded."""

from __future__ import annotations

from pathlib import Path

from moe_surgery.report.page import build_report
from tests.report.browser import HOSTILE, Browser
from tests.report.inputs import evaluation_of, made_up, plan_of


def test_hostile_names_run_nothing(chromium: Browser, page_file: Path) -> None:
    statistics = made_up(2, 4, [HOSTILE, "b"])
    plan = plan_of(statistics, "reap", 2)
    page_file.write_text(
        build_report(statistics, [(HOSTILE, plan)], [(HOSTILE, evaluation_of(statistics))], "safe")
    )
    chromium.open(page_file, 1280, 900)
    for control in ("map-view", "table-view", "coverage-view", "evaluation-domain"):
        chromium.choose(control, 1)
    chromium.run("document.querySelector('[data-at=\"1,1\"]').focus()")
    assert chromium.run("return [document.title, document.images.length, document.scripts.length]") == [
        "safe",
        0,
        3,
    ]
    assert chromium.complaints() == []


def test_the_policy_stops_whatever_would_load(chromium: Browser, page: Path) -> None:
    chromium.open(page, 1280, 900)
    chromium.run("const i = new Image(); i.src = 'http://example.org/x.png'; document.body.append(i);")
    chromium.run(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s);"
    )
    chromium.driver.execute_async_script("setTimeout(arguments[0], 100)")
    result = " ".join(chromium.complaints())
    assert "img-src" in result or "default-src" in result
    assert "script-src" in result
    assert chromium.run("return document.title") != "1"
