"""The index of a sweep in headless Chromium: figures follow the chosen texts, headings sort."""

from __future__ import annotations

from pathlib import Path

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.pipeline.sweep.index_page import write_pages
from moe_surgery.pipeline.sweep.state import Entry, State
from tests.report.browser import Browser, column, sort_state

KL = {"": {"a-4": 0.5, "a-8": 0.25, "<b>-4": 0.75}, "law": {"a-4": 0.1, "a-8": 0.3, "<b>-4": 0.2}}


def test_the_index_of_a_sweep_is_sorted_and_shows_the_figures_of_the_chosen_texts(
    chromium: Browser, tmp_path: Path
) -> None:
    state = State("model", "gpt_oss", "a" * 32, "b" * 32, 32, 4, 10_000_000)
    for name in ("a-4", "a-8", "<b>-4", "a-16"):
        ranking, _, n = name.rpartition("-")
        figures = {
            texts: {"tokens": 9, "cross_entropy": 1.0, "perplexity": None, "kl": kl[name], "agreement": 0.5}
            for texts, kl in KL.items()
            if name in kl
        }
        nbytes = 100_000 * int(n)
        state.variants[name] = Entry(
            name, ranking, int(n), 4, "mxfp4", 100, 50, nbytes, 10_000, None, figures
        )
    write_pages(state, tmp_path, FileOps())
    chromium.open(tmp_path / "index.html", 1280, 900)
    assert chromium.complaints() == []
    assert column(chromium, "variants", "Variant") == list(state.variants)
    assert column(chromium, "variants", "Size") == ["400.00 kB", "800.00 kB", "400.00 kB", "1.60 MB"]
    assert column(chromium, "variants", "KL") == ["0.5000", "0.2500", "0.7500", "\N{EN DASH}"]
    chromium.choose("sweep-domain", 1)
    assert column(chromium, "variants", "KL") == ["0.1000", "0.3000", "0.2000", "\N{EN DASH}"]
    chromium.run(
        "[...document.querySelectorAll('#variants thead button')].find((b) => b.textContent === 'KL').click()"
    )
    assert sort_state(chromium, "variants")["KL"] == "ascending"
    assert column(chromium, "variants", "Variant") == ["a-4", "<b>-4", "a-8", "a-16"]
    links = chromium.run(
        "return [...document.querySelectorAll('#variants a')].map((a) => a.getAttribute('href'))"
    )
    assert links == ["a-4/", "%3Cb%3E-4/", "a-8/", "a-16/"]
