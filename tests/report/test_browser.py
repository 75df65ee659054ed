"""The page in headless Chromium: it works by mouse and keyboard, on a phone, in print, in the dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_surgery.report.figures import subject_of
from moe_surgery.report.page import build_report
from moe_surgery.selection.ranking import load_ranking
from moe_surgery.selection.shipped import RANKINGS
from moe_surgery.selection.statistics import Statistics
from tests.report.browser import Browser
from tests.report.conftest import Real
from tests.report.inputs import evaluation_of, made_up, plan_of

KEYS = {
    "right": "\ue014",
    "left": "\ue012",
    "down": "\ue015",
    "up": "\ue013",
    "home": "\ue011",
    "end": "\ue010",
}
TAB, ENTER, SPACE = "\ue004", "\ue007", "\ue00d"
HOSTILE = "</script><img src=x onerror=document.title=1>"

# Text that a person must read: its colour against the first background behind it that is not clear.
CONTRAST = """
const rgb = (c) => {
  const m = c.match(/[\\d.]+/g).map(Number);
  return m.length > 3 && m[3] === 0 ? null : m.slice(0, 3);
};
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const lum = (c) => 0.2126 * linear(c[0] / 255) + 0.7152 * linear(c[1] / 255) + 0.0722 * linear(c[2] / 255);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c) return c;
  }
  return [255, 255, 255];
};
const poor = [];
const words = "h1, h2, h3, p, dt, dd, th, td, a, summary, label > span, button, select, li, figcaption, caption, " +
  "svg text, .unit";
for (const e of document.querySelectorAll(words)) {
  if (!e.textContent.trim() || !e.getClientRects().length) continue;
  const style = getComputedStyle(e), ink = rgb(e instanceof SVGElement ? style.fill : style.color);
  const [low, high] = [lum(ink), lum(behind(e))].sort((a, b) => a - b);
  const contrast = (high + 0.05) / (low + 0.05);
  if (contrast < 4.5) poor.push([e.tagName, e.textContent.slice(0, 30), style.color, contrast]);
}
return poor;
"""
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
FOCUS = (
    "const e = document.activeElement; return [e.dataset.at || null, e.getAttribute('aria-label'), e.tagName]"
)
CELL = (
    "return [...document.querySelectorAll('#map [role=gridcell]')].map((c) => c.getAttribute(arguments[0]))"
)


@pytest.fixture
def statistics() -> Statistics:
    return made_up(24, 32, ["chemistry", "code", "law", "maths"])


@pytest.fixture
def page(statistics: Statistics, page_file: Path) -> Path:
    plans = [
        ("law-8.json", plan_of(statistics, "reap", 8, ["law"])),
        ("all-16.json", plan_of(statistics, "gate", 16)),
    ]
    page_file.write_text(build_report(statistics, plans, [("cuts.json", evaluation_of(statistics))]))
    return page_file


def column(browser: Browser, table: str, name: str) -> list[str]:
    return browser.run(
        "const t = document.getElementById(arguments[0]);"
        "const i = [...t.tHead.rows[0].cells].findIndex((c) => c.textContent === arguments[1]);"
        "return [...t.tBodies[0].rows].map((r) => r.cells[i].textContent)",
        table,
        name,
    )


def sort_state(browser: Browser, table: str) -> dict[str, str]:
    return browser.run(
        "return Object.fromEntries([...document.querySelectorAll('#' + arguments[0] + ' thead th')]"
        ".map((c) => [c.textContent, c.getAttribute('aria-sort')]))",
        table,
    )


def focus_heading(browser: Browser, table: str, name: str) -> None:
    browser.run(
        "[...document.querySelectorAll('#' + arguments[0] + ' thead button')]"
        ".find((b) => b.textContent === arguments[1]).focus()",
        table,
        name,
    )


def test_the_real_checkpoints_page_opens_without_complaint(
    chromium: Browser, real: Real, page_file: Path
) -> None:
    name, plan = real.plans[0]
    page_file.write_text(build_report(real.statistics, real.plans, [("cuts.json", real.evaluation)]))
    chromium.open(page_file, 1280, 900)
    assert chromium.complaints() == []
    printed = chromium.run("return JSON.parse(document.getElementById('data').textContent).views")
    assert [v["name"] for v in printed] == ["all domains", "arithmetic", "code", "prose"]
    # The map says what the statistics say.
    labels = chromium.run(CELL, "aria-label")
    counts = sum(layers[2].count for layers in real.statistics.data.values())
    assert labels[2 * 32 + 5].startswith(f"layer 2, expert 5: frequency {counts[5]:,}, ")
    kept = {(n, e) for n, row in enumerate(plan.layers) for e in row}
    assert {(i // 32, i % 32) for i, label in enumerate(labels) if label.endswith(", kept")} == kept
    # The models are the evaluation's.
    assert column(chromium, "models", "Model") == ["full", *(n for n, _ in real.plans)]
    assert column(chromium, "models", "KL") == [f"{m.overall.kl:.4f}" for m in real.evaluation.models]
    chromium.choose("evaluation-domain", 2)
    results = [m.domains["code"] for m in real.evaluation.models]
    assert column(chromium, "models", "Agreement") == [f"{100 * q.agreement:.1f} %" for q in results]
    titles = chromium.run(
        "return [...document.querySelectorAll('#evaluation title')].map((t) => t.textContent)"
    )
    assert any(t.startswith("random, 8 experts: ") and t.endswith(" (median of 2)") for t in titles)
    assert name in chromium.run("return document.querySelector('header').textContent")


def test_arrow_keys_move_one_focus_across_the_map(chromium: Browser, page: Path) -> None:
    chromium.open(page, 1280, 900)
    tabbable = "return document.querySelectorAll('#map [tabindex=\"0\"]').length"
    chromium.run("document.getElementById('map-scale').focus()")
    chromium.press(TAB)
    assert chromium.run(FOCUS)[0] == "0,0"
    way = [
        *("right", "0,1", "down", "1,1", "left", "1,0", "left", "1,0", "end", "1,31"),
        *("right", "1,31", "up", "0,31", "up", "0,31", "home", "0,0"),
    ]
    for key, at in zip(way[::2], way[1::2], strict=True):
        chromium.press(KEYS[key])
        assert chromium.run(FOCUS)[0] == at
        assert chromium.run(tabbable) == 1
        layer, expert = at.split(",")
        assert f"Layer {layer}, expert {expert}" in chromium.run(
            "return document.getElementById('map-readout').textContent"
        )
    # Focus is seen: a frame stands where the cell is.
    frame, cell = chromium.run(
        "return ['.cursor', '[data-at=\"0,0\"]'].map((s) => { const b = document.querySelector('#map ' + s);"
        "return [b.x.baseVal.value, b.y.baseVal.value, b.getAttribute('visibility')]; })"
    )
    assert frame[2] == "visible"
    assert (frame[0], frame[1]) == (cell[0] - 1, cell[1] - 1)
    # The map is one stop for the Tab key.
    chromium.press(TAB)
    assert chromium.run(FOCUS)[2] == "SUMMARY"
    roles = chromium.run(
        "return [...new Set([...document.querySelectorAll('#map [role]')].map((e) => e.getAttribute('role')))]"
    )
    assert {"row", "gridcell"} <= set(roles)


def test_domain_metric_and_plan_change_the_cells(
    chromium: Browser, page: Path, statistics: Statistics
) -> None:
    chromium.open(page, 1280, 900)
    printed = subject_of(statistics).views
    before = chromium.run(CELL, "class")
    chromium.choose("map-view", 3)
    chromium.choose("map-metric", 5)
    after, labels = chromium.run(CELL, "class"), chromium.run(CELL, "aria-label")
    assert before != after
    scores, ranks = printed[3].scores["reap"], printed[3].ranks("reap")
    for layer in range(24):
        top = scores[layer].max()
        for expert in range(32):
            i = 32 * layer + expert
            shade = int(after[i].removeprefix("q"))
            assert abs(shade - 23 * scores[layer, expert] / top) <= 0.51
            result = re.fullmatch(
                r"layer \d+, expert \d+: reap ([\d.]+), (\d+)\w\w of 32, (?:not )?kept", labels[i]
            )
            assert result is not None
            assert float(result[1]) == pytest.approx(scores[layer, expert], rel=1e-3)
            assert int(result[2]) == ranks[layer, expert]
    dots = "return document.querySelector('#map .dot').getAttribute('d').split('M').length - 1"
    assert chromium.run(dots) == 24 * 8
    chromium.choose("map-plan", 1)
    assert chromium.run(dots) == 24 * 16
    chromium.choose("map-plan", 2)
    assert chromium.run(dots) == 0
    assert "kept" not in chromium.run(CELL, "aria-label")[0]
    best_first = chromium.run("return document.querySelector('#orders tbody td').textContent")
    assert [int(e) for e in best_first.split()] == printed[3].orders["reap"][0].tolist()
    assert chromium.complaints() == []


def test_pointing_at_a_cell_shows_its_numbers(chromium: Browser, page: Path, statistics: Statistics) -> None:
    chromium.open(page, 1280, 900)
    x, y = chromium.run(
        "const c = document.querySelector('[data-at=\"3,7\"]');"
        "c.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const b = c.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]"
    )
    chromium.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    output = chromium.run("return document.getElementById('map-readout').innerText")
    assert "Layer 3, expert 7 on all domains" in output
    assert f"{sum(int(s[3].count[7]) for s in statistics.data.values()):,}" in output


def test_tables_sort_by_click_and_by_key_and_say_so(chromium: Browser, page: Path) -> None:
    chromium.open(page, 1280, 900)
    chromium.run("document.getElementById('experts-more').click()")
    assert len(column(chromium, "experts", "Layer")) == 24 * 32
    assert set(sort_state(chromium, "experts").values()) == {"none"}
    focus_heading(chromium, "experts", "reap")
    chromium.press(ENTER)
    values = [float(v.replace(",", "")) for v in column(chromium, "experts", "reap")]
    assert values == sorted(values, reverse=True)
    assert sort_state(chromium, "experts")["reap"] == "descending"
    chromium.press(SPACE)
    values = [float(v.replace(",", "")) for v in column(chromium, "experts", "reap")]
    assert values == sorted(values)
    state = sort_state(chromium, "experts")
    assert state.pop("reap") == "ascending"
    assert set(state.values()) == {"none"}
    focus_heading(chromium, "models", "KL")
    chromium.press(ENTER)
    chromium.run("document.getElementById('models-more').click()")
    values = [float(v) for v in column(chromium, "models", "KL")]
    assert values == sorted(values)
    assert values[0] == 0
    assert len(values) == 1 + 4 * (2 * 5 + 3)
    chromium.choose("table-kept", 1)
    chromium.choose("table-layer", 1)
    assert column(chromium, "experts", "Kept") == ["kept"] * 8


def test_overlap_coverage_and_evaluation_follow_their_controls(
    chromium: Browser, page: Path, statistics: Statistics
) -> None:
    chromium.open(page, 1280, 900)
    printed = subject_of(statistics).views
    chromium.choose("overlap-metric", 5)
    chromium.choose("overlap-n", 12)
    cells = chromium.run(
        "return [...document.querySelectorAll('#overlap tbody tr')]"
        ".map((r) => [...r.cells].slice(1).map((c) => c.textContent))"
    )
    for a, row in enumerate(cells):
        for b, cell in enumerate(row):
            common = [
                len(set(x[:12].tolist()) & set(y[:12].tolist()))
                for x, y in zip(printed[a].orders["reap"], printed[b].orders["reap"], strict=True)
            ]
            assert abs(float(cell) - 100 * sum(common) / (12 * 24)) <= 0.51
    chromium.choose("coverage-compare", 1)
    chromium.choose("coverage-metric", 0)
    chromium.choose("coverage-kind", 1)
    chromium.choose("coverage-n", 4)
    results = column(chromium, "coverage-table", "best 4 experts")
    for view, cell in zip(printed, results, strict=True):
        stored = [sorted(r / r.sum(), reverse=True)[:4] for r in view.scores["frequency"]]
        assert float(cell.removesuffix(" %")) == pytest.approx(100 * sum(map(sum, stored)) / 24, abs=0.06)
    names = "return [...document.querySelectorAll('#evaluation-legend li')].map((l) => l.textContent.trim())"
    assert chromium.run(names) == ["frequency, all domains", "reap, all domains", "random"]
    chromium.choose("evaluation-domain", 3)
    assert chromium.run(names) == ["frequency, law", "reap, law", "random"]
    chromium.choose("evaluation-set", 0)
    assert len(chromium.run(names)) == 2 * 5 + 1
    # No two lines look alike.
    looks = chromium.run(
        "return [...document.querySelectorAll('#evaluation-legend li')].map((l) =>"
        "[l.querySelector('.line').getAttribute('class'), l.querySelector('.mark').getAttribute('d')].join())"
    )
    assert len(set(looks)) == len(looks)
    assert chromium.complaints() == []


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


@pytest.fixture(scope="module")
def large() -> Statistics:
    return made_up(94, 512, ["code", "law"], top_k=8)


@pytest.fixture(scope="module")
def large_page(large: Statistics, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("large") / "report.html"
    file.write_text(build_report(large, [("eighth.json", plan_of(large, "reap", 64, ["law"]))]))
    return file


def ready(browser: Browser) -> None:
    """Wait until the page has unpacked its data."""
    browser.driver.execute_async_script(
        "const done = arguments[0];"
        "(function look() { 'unpacked' in document.body.dataset ? done() : setTimeout(look, 20); })()"
    )


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


def test_domains_share_experts_layer_by_layer(chromium: Browser, page: Path, statistics: Statistics) -> None:
    chromium.open(page, 1280, 900)
    chromium.choose("overlap-metric", 1)
    chromium.choose("overlap-n", 5)
    domains = subject_of(statistics).views[1:]
    best = [[set(row[:5].tolist()) for row in v.orders["gate"]] for v in domains]
    counts = [[sum(e in rows[n] for rows in best) for e in range(32)] for n in range(24)]
    for least in (4, 3):
        chromium.choose("shared-least", least)
        heading = "In all 4" if least == 4 else "In 3 or more"
        shared = column(chromium, "shared", heading)
        assert [int(x) for x in shared] == [sum(c >= least for c in row) for row in counts]
        assert column(chromium, "shared", "In one") == [str(row.count(1)) for row in counts]
        assert column(chromium, "shared", "In none") == [str(row.count(0)) for row in counts]
        listed = column(chromium, "shared", heading.replace("In", "Experts in"))
        assert [[int(e) for e in x.split()] for x in listed] == [
            [e for e in range(32) if row[e] >= least] for row in counts
        ]
    lone = column(chromium, "shared", "Experts in one")[0]
    for part in filter(None, lone.split(" and ")[0].split("; ")):
        name, experts = part.split(": ")
        of = [v.domain for v in domains].index(name)
        assert all(int(e) in best[of][0] and counts[0][int(e)] == 1 for e in experts.split())
    chromium.choose("overlap-a", 2)
    chromium.choose("overlap-b", 4)
    titles = chromium.run(
        "return [...document.querySelectorAll('#overlap-layers title')].map((t) => t.textContent)"
    )
    pairs = [t for t in titles if t.startswith("code and maths, layer ")]
    assert pairs
    for title in pairs:
        layer, share = re.fullmatch(r"code and maths, layer (\d+): (\d+) %", title).groups()  # type: ignore[union-attr]
        assert int(share) == 20 * len(best[1][int(layer)] & best[3][int(layer)])
    assert chromium.complaints() == []


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


def test_rankings_have_a_page_without_scores(chromium: Browser, page_file: Path) -> None:
    names = [f"published:{name}" for name in RANKINGS]
    page_file.write_text(build_report(names))
    chromium.open(page_file, 800, 900)
    assert chromium.complaints() == []
    orders = {name: load_ranking(name).layers for name in names}
    chromium.choose("overlap-n", 8)
    cells = chromium.run(
        "return [...document.querySelectorAll('#overlap tbody tr')]"
        ".map((r) => [...r.cells].slice(1).map((c) => c.textContent))"
    )
    for a, row in zip(names, cells, strict=True):
        for b, cell in zip(names, row, strict=True):
            both = [len({*x[:8]} & {*y[:8]}) for x, y in zip(orders[a], orders[b], strict=True)]
            assert abs(float(cell) - 100 * sum(both) / (8 * 24)) <= 0.51
    law = orders["published:law"]
    assert column(chromium, "experts", "law")[:32] == [str(law[0].index(e) + 1) for e in range(32)]
    chromium.choose("map-view", RANKINGS.index("law"))
    labels = chromium.run(CELL, "aria-label")
    assert re.match(rf"layer 0, expert {law[0][0]}: ranking 1st of 32", labels[law[0][0]])
    assert chromium.run("return document.getElementById('coverage-section')") is None
