"""The trace page in headless Chromium: pick a layer, an expert and a token, by mouse and keyboard, at any width."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.made_up_trace import made_up_trace
from moe_surgery.quality.routing_trace import ModelTrace, Trace
from moe_surgery.report.trace_figures import agreement, weight_lost
from moe_surgery.report.trace_page import build_trace_page
from tests.report.browser import CONTRAST, HOSTILE, KEYS, OVERFLOW, TAB, Browser

LAYERS, EXPERTS, TOKENS, TOP_K = 6, 16, 120, 4
# Once the page is unpacked, and nothing is left to write after a choice.
SETTLED = """
const done = arguments[arguments.length - 1], text = document.getElementById("text");
const look = () => (text.dataset.ready && !document.querySelector("[aria-busy]") ? done() : setTimeout(look, 5));
look();
"""
CLASSES = "return [...document.querySelectorAll('#text span')].map((s) => s.className)"
CHIPS = """
return [...document.querySelectorAll("#path tbody tr")].map((row) => [...row.cells].slice(1).map((cell) =>
  [...cell.children].map((chip) => [chip.dataset.at, chip.textContent, chip.className])));
"""


def words(browser: Browser, element: str) -> str:
    return browser.run("return document.getElementById(arguments[0]).innerText", element)


def settled(browser: Browser) -> Browser:
    browser.driver.execute_async_script(SETTLED)
    return browser


def colours(browser: Browser) -> list[str]:
    """The colour class of every token."""
    settled(browser)
    return [" ".join(w for w in c.split() if w not in ("made", "on", "n")) for c in browser.run(CLASSES)]


def shade(share: float) -> str:
    return f"q{round(min(max(share, 0.0), 1.0) * 23)}"


def picked(browser: Browser) -> int:
    return int(
        browser.run("return document.getElementById('text').getAttribute('aria-activedescendant').slice(1)")
    )


@pytest.fixture(scope="module")
def trace() -> Trace:
    return made_up_trace(LAYERS, EXPERTS, TOKENS, TOP_K, [("law-8.json", 8), ("code-3.json", 3)])


@pytest.fixture(scope="module")
def file(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.html"
    path.write_text(build_trace_page(trace))
    return path


@pytest.fixture
def page(chromium: Browser, file: Path) -> Browser:
    return settled(chromium.open(file, 1280, 900))


def weights_of(model: ModelTrace, layer: int, expert: int) -> list[float]:
    """Of each token, 0 where it is not chosen."""
    chosen = model.experts[layer] == expert
    return (model.weights[layer] * chosen).sum(axis=1).tolist()


def test_an_expert_is_seen_where_it_fires(page: Browser, trace: Trace) -> None:
    page.choose("mode", 0)
    page.choose("layer", 3)
    for model, run in ((trace.models[0], 0), (trace.models[1], 1)):
        page.choose("run", run)
        page.choose("expert", 2)
        weights = weights_of(model, 3, 2)
        top = max(weights)
        for colour, weight in zip(colours(page), weights, strict=True):
            assert bool(colour) is (weight > 0)
            if colour:
                assert abs(int(colour[1:]) - 23 * weight / top) <= 0.7
        fires = sum(w > 0 for w in weights)
        assert f"Layer 3, expert 2 fires for {fires} of {TOKENS} tokens" in words(page, "scale-label")
        assert f"2 ({fires} tokens)" in words(page, "expert").split("\n")
    assert page.complaints() == []


def test_the_text_is_coloured_by_the_strongest_expert(page: Browser, trace: Trace) -> None:
    page.choose("mode", 0)
    page.choose("layer", 5)
    strongest = trace.models[0].experts[5, :, 0].tolist()
    order = sorted(set(strongest), key=lambda e: (-strongest.count(e), e))
    expected = [f"e s{order.index(e)}" if e in order[:8] else "" for e in strongest]
    assert colours(page) == expected
    key = words(page, "experts")
    assert re.findall(r"expert (\d+) \((\d+)\)", key) == [
        (str(e), str(strongest.count(e))) for e in order[:8]
    ]
    page.choose("numbers", True)
    settled(page)
    assert page.run("return [...document.querySelectorAll('#text span')].map((s) => s.dataset.n)") == [
        str(e) for e in strongest
    ]
    page.run("document.querySelector('#experts button').click()")
    assert page.run("return document.getElementById('expert').value") == str(order[0])
    assert [bool(c) for c in colours(page)] == [w > 0 for w in weights_of(trace.models[0], 5, order[0])]


def test_a_plans_cost_is_seen_token_by_token(page: Browser, trace: Trace) -> None:
    for plan, model in enumerate(trace.models[1:]):
        page.choose("plan", plan)
        page.choose("mode", 1)
        assert colours(page) == [shade(float(np.sqrt(x / model.kl.max()))) for x in model.kl]
        page.choose("mode", 2)
        lost = weight_lost(trace, model)
        check_shades(colours(page), lost.mean(axis=0))
        page.choose("span", 1)
        page.choose("layer", 4)
        check_shades(colours(page), lost[4])
        page.choose("span", 0)
    page.choose("mode", 3)
    check_shades(colours(page), agreement(trace.models[1], trace.models[2]).mean(axis=0))
    page.choose("a", 0)
    check_shades(colours(page), agreement(trace.models[0], trace.models[2]).mean(axis=0))


def check_shades(classes: list[str], shares: np.ndarray) -> None:
    """Up to the rounding of weights on the page."""
    assert all(abs(int(c[1:]) - 23 * x) <= 0.7 for c, x in zip(classes, shares, strict=True))


def test_a_token_shows_its_path(page: Browser, trace: Trace) -> None:
    page.choose("plan", 1)
    page.run("document.getElementById('t37').click()")
    settled(page)
    assert picked(page) == 37
    kept = trace.models[2].kept
    for layer, (full, pruned) in enumerate(page.run(CHIPS)):
        for model, chips in ((trace.models[0], full), (trace.models[2], pruned)):
            chosen = [e for e in model.experts[layer, 37].tolist() if e >= 0]
            assert [c[0] for c in chips] == [f"{layer},{e}" for e in chosen]
            for (_, label, _), weight in zip(chips, model.weights[layer, 37].tolist(), strict=False):
                number = label.split()[1]
                assert weight < 0.01 if number == "<1" else abs(100 * weight - int(number)) < 1
        lost = [int(c[0].split(",")[1]) not in kept[layer] for c in full]
        assert [("lost" in c[2].split()) for c in full] == lost
        ours = {c[0] for c in full}
        assert [("fresh" in c[2].split()) for c in pruned] == [c[0] not in ours for c in pruned]
    shown = words(page, "token")
    assert f"token 37, id {trace.tokens[37]}" in shown
    for model in trace.models:
        assert f"{100 * model.probability[37]:.0f} %" in shown
    assert f"{float(trace.models[1].kl[37]):.4g}" in shown
    # From the path to the text: a click on an expert picks it.
    layer, expert = page.run(CHIPS)[2][0][1][0].split(",")
    page.run("document.querySelectorAll('#path tbody tr')[2].cells[1].children[1].click()")
    assert page.run("return ['mode', 'layer', 'expert'].map((i) => document.getElementById(i).value)") == [
        "0",
        layer,
        expert,
    ]


def test_keys_move_through_the_text(page: Browser, trace: Trace) -> None:
    page.run("document.getElementById('numbers').focus()")
    page.press(TAB)
    page.press(TAB) if page.run("return document.activeElement.id") != "text" else None
    assert page.run("return document.activeElement.id") == "text"
    page.press(KEYS["home"])
    for key, at in (("right", 1), ("right", 2), ("left", 1), ("end", TOKENS - 1), ("right", TOKENS - 1)):
        page.press(KEYS[key])
        assert picked(page) == at
        assert page.run("return document.querySelectorAll('[aria-selected=true], .on').length") == 1
        assert words(page, "readout").startswith(f"Token {at} ")
    page.press(KEYS["home"], KEYS["down"])
    lines = page.run(
        "return [0, arguments[0]].map((i) => document.getElementById('t' + i).getBoundingClientRect().top)",
        picked(page),
    )
    assert lines[1] > lines[0]
    page.press(KEYS["up"])
    assert picked(page) == 0
    # To the next token of an expert.
    page.choose("mode", 0)
    page.choose("layer", 1)
    page.choose("expert", 5)
    fires = [i for i, w in enumerate(weights_of(trace.models[0], 1, 5)) if w > 0 and i > 0]
    page.press("n")
    assert picked(page) == fires[0]
    page.press("n")
    assert picked(page) == fires[1]
    page.press("p")
    assert picked(page) == fires[0]
    # In view, wherever it is.
    page.press(KEYS["end"])
    seen = page.run(
        "const b = document.getElementById('text').getBoundingClientRect(),"
        "c = document.querySelector('.on').getBoundingClientRect();"
        "return c.top >= b.top - 1 && c.bottom <= b.bottom + 1"
    )
    assert seen
    assert page.complaints() == []


def test_a_link_in_the_table_picks_its_token(page: Browser, trace: Trace) -> None:
    link = "return document.querySelectorAll('.tops')[1].querySelectorAll('a')[2]"
    page.run(f"({link.removeprefix('return ')}).click()")
    third = int(np.argsort(-trace.models[2].kl, kind="stable")[2])
    page.driver.execute_async_script(
        "const [token, done] = arguments, text = document.getElementById('text');"
        "const look = () => text.getAttribute('aria-activedescendant') === token ? done() : setTimeout(look, 5);"
        "look();",
        f"t{third}",
    )
    assert f"token {third}, id {trace.tokens[third]}" in words(page, "token")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_word_stands_out_from_what_is_behind_it(chromium: Browser, file: Path, dark: bool) -> None:
    settled(chromium.open(file, 1280, 900, dark=dark))
    script = CONTRAST.replace('"svg text, .unit"', '"svg text, .tokens span, .chip, .hint, code"')
    assert script != CONTRAST
    assert chromium.run(script) == []
    chromium.choose("mode", 0)
    settled(chromium)
    assert chromium.run(script) == []


@pytest.mark.parametrize("width", [320, 800, 1600])
def test_the_page_never_scrolls_sideways(
    chromium: Browser, large_page: str, page_file: Path, width: int
) -> None:
    long = made_up_trace(3, 8, 30, 2, [("a-plan-of-a-very-long-name-without-a-place-to-break" * 3, 4)])
    page_file.write_text(build_trace_page(long, "t" * 300))
    settled(chromium.open(page_file, width, 900))
    for mode in range(4):
        chromium.choose("mode", mode)
        assert chromium.run(OVERFLOW) == 0
    chromium.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert chromium.run(OVERFLOW) == 0


def test_the_largest_model_is_picked_through(
    chromium: Browser, large_trace: Trace, large_page: str, page_file: Path
) -> None:
    page_file.write_text(large_page)
    settled(chromium.open(page_file, 1280, 900))
    chromium.choose("layer", 93)
    expert = int(large_trace.models[0].experts[93, 7, 1])
    chromium.choose("expert", expert)
    assert [bool(c) for c in colours(chromium)] == [
        w > 0 for w in weights_of(large_trace.models[0], 93, expert)
    ]
    chromium.run("document.getElementById('t7').click()")
    settled(chromium)
    rows = chromium.run(CHIPS)
    assert len(rows) == 94
    for layer in (0, 50, 93):
        places = [f"{layer},{e}" for e in large_trace.models[0].experts[layer, 7]]
        assert rows[layer][0][0][0] == places[0]
        assert sorted(c[0] for c in rows[layer][0]) == sorted(places)
    assert chromium.complaints() == []


def test_print_shows_all_of_the_text_and_no_controls(page: Browser) -> None:
    page.run("dispatchEvent(new Event('beforeprint'))")
    page.command("Emulation.setEmulatedMedia", media="print")
    page.size(718, 1000)  # an A4 page between its margins
    hidden = page.run(
        "return [...document.querySelectorAll('.controls, #keys')].filter((e) => e.getClientRects().length).length"
    )
    assert hidden == 0
    assert page.run("const t = document.getElementById('text'); return t.scrollHeight <= t.clientHeight + 1")
    assert page.run("return [...document.querySelectorAll('details')].every((d) => d.open)")
    assert page.run(OVERFLOW) <= 0
    wide = (
        "return [...document.querySelectorAll('.scroll table, #path')]"
        ".filter((t) => t.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert page.run(wide) == 0
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.pdf().startswith(b"%PDF")


def test_hostile_texts_run_nothing(chromium: Browser, page_file: Path) -> None:
    from dataclasses import replace

    trace = made_up_trace(2, 4, 10, 2, [(HOSTILE, 2)])
    models = tuple(replace(m, predicted_texts=(HOSTILE,) * 10) for m in trace.models)
    page_file.write_text(build_trace_page(replace(trace, texts=(HOSTILE,) * 10, models=models), "safe"))
    settled(chromium.open(page_file, 1280, 900))
    for mode in range(4):
        chromium.choose("mode", mode)
    chromium.run("document.getElementById('t3').click()")
    assert HOSTILE in words(chromium, "token")
    assert chromium.run("return [document.title, document.images.length, document.scripts.length]") == [
        "safe",
        0,
        2,
    ]
    assert chromium.complaints() == []


def test_a_browser_that_cannot_unpack_shows_the_first_view(chromium: Browser, file: Path) -> None:
    script = chromium.command(
        "Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream"
    )
    try:
        chromium.open(file, 1280, 900)
        assert "cannot unpack" in words(chromium, "readout")
        assert len(chromium.run(CLASSES)) == TOKENS
        assert chromium.run("return document.querySelector('.controls').hidden")
        assert chromium.complaints() == []
    finally:
        chromium.command("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])
