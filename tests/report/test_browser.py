"""The page in headless Chromium: it works by mouse and keyboard."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_surgery.report.figures import subject_of
from moe_surgery.report.page import build_report
from moe_surgery.selection.ranking import load_ranking
from moe_surgery.selection.shipped import RANKINGS
from moe_surgery.selection.statistics import Statistics
from tests.report.browser import (
    CELL,
    ENTER,
    FOCUS,
    KEYS,
    SPACE,
    TAB,
    Browser,
    column,
    focus_heading,
    sort_state,
)
from tests.report.conftest import Real


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
