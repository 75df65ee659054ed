"""The trace page as a file: self-contained, small at any size, and safe against whatever texts and names hold."""

from __future__ import annotations

import base64
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.made_up_trace import made_up_trace
from moe_surgery.errors import InvalidInputError
from moe_surgery.quality.routing_trace import ModelTrace, Trace
from moe_surgery.report.markup import display_name
from moe_surgery.report.trace_figures import BUCKETS, agreement, by_weight_lost, weight_lost
from moe_surgery.report.trace_pack import LEVELS, pack_routes
from moe_surgery.report.trace_page import PAGE_BYTES, build_trace_page
from tests.report.parsed_page import HOSTILE, LOADING, Page

PLANS = (("law-8.json", 8), ("code-2.json", 2))


def tokens_of(page: Page) -> int:
    return sum(a.get("role") == "option" for _, a in page.elements)


def read_routes(model: ModelTrace, packed: str, tokens: int, levels: int) -> list[list[dict[int, float]]]:
    """[layer][token] -> weight by expert, strongest first; byte by byte, as the format is described."""
    raw = list(zlib.decompress(base64.b64decode(packed)))
    layers = len(model.kept)
    slots = [int((row[0] >= 0).sum()) for row in model.experts]
    first, raw = raw[: layers * tokens], raw[layers * tokens :]
    count = sum(slots) * tokens
    if levels == 15:
        nibbles = [half for byte in raw[: (count + 1) // 2] for half in (byte & 15, byte >> 4)]
        weights, raw = nibbles[:count], raw[(count + 1) // 2 :]
    else:
        weights, raw = raw[:count], raw[count:]
    gaps, values = iter(raw), iter(weights)
    result: list[list[dict[int, float]]] = []
    for layer in range(layers):
        result.append([])
        for token in range(tokens):
            expert, routes = -1, []
            for _ in range(slots[layer]):
                while (byte := next(gaps)) == 255:
                    expert += 255
                expert += byte + 1
                routes.append((expert, (next(values) / levels) ** 2))
            routes.insert(0, routes.pop(first[layer * tokens + token]))
            result[-1].append(dict(routes))
    assert next(gaps, None) is None
    return result


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (7, 3), (300, 4), (1024, 5)])
def test_packed_routes_come_back(experts: int, top_k: int, levels: int) -> None:
    trace = made_up_trace(3, experts, 21, top_k, seed=experts)
    [model] = trace.models
    # A layer that chooses fewer.
    if top_k > 1:
        model.experts[1, :, -1] = -1
        model.weights[1, :, -1] = 0
    for tokens in (21, 20):
        read = read_routes(model, pack_routes(model, tokens, levels), tokens, levels)
        for layer, rows in enumerate(read):
            for token, routes in enumerate(rows):
                chosen = [e for e in model.experts[layer, token].tolist() if e >= 0]
                assert next(iter(routes)) == chosen[0]
                assert sorted(routes) == sorted(chosen)
                exact = dict(zip(chosen, model.weights[layer, token].tolist(), strict=False))
                for expert, weight in routes.items():
                    assert abs(weight**0.5 - exact[expert] ** 0.5) <= 0.5001 / levels


def test_figures_are_those_of_a_count_by_hand() -> None:
    trace = made_up_trace(4, 16, 50, 4, PLANS)
    full = trace.models[0]
    for model in trace.models[1:]:
        lost, common = weight_lost(trace, model), agreement(full, model)
        for layer in range(4):
            for token in range(50):
                pairs = zip(full.experts[layer, token], full.weights[layer, token], strict=True)
                gone = sum(float(w) for e, w in pairs if e not in model.kept[layer])
                assert lost[layer, token] == pytest.approx(gone, abs=1e-6)
                shared = set(full.experts[layer, token]) & set(model.experts[layer, token])
                assert common[layer, token] == pytest.approx(len(shared - {-1}) / 4)
        rows = by_weight_lost(lost, model.kl)
        assert len(rows) == len(BUCKETS)
        assert sum(count for count, _ in rows) == 50
        total = sum(count * kl for count, kl in rows if kl is not None)
        assert total == pytest.approx(model.kl.sum())


def test_tokens_are_counted_by_what_they_lose() -> None:
    lost = np.array([[0, 0.1, 0.2, 0.9, 1], [0, 0.1, 0.1, 0.1, 1.0]])
    kl = np.array([1.0, 2, 3, 4, 5])
    assert by_weight_lost(lost, kl) == [(1, 1.0), (1, 2.0), (1, 3.0), (1, 4.0), (1, 5.0)]


def test_the_page_loads_nothing_and_forbids_it() -> None:
    parsed = Page(build_trace_page(made_up_trace(2, 16, 30, 4, PLANS)))
    [policy] = [a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    for name, attributes in parsed.elements:
        assert name not in ("link", "iframe", "object", "embed", "base", "form", "img", "image", "use")
        for key in attributes.keys() & LOADING:
            assert (attributes[key] or "").startswith("#")
        assert not [k for k in attributes if k.startswith("on") or k == "style"]
    for _, attributes, body in parsed.raw:
        if attributes.get("id") != "data":
            allowed = body.replace("http://www.w3.org/2000/svg", "")
            assert not re.search(
                r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|innerHTML|eval\(|outerHTML", allowed
            )


@pytest.mark.parametrize("name", HOSTILE)
def test_texts_and_names_stay_words(name: str) -> None:
    def made(word: str) -> str:
        trace = made_up_trace(2, 8, 12, 2, [(word, 4)])
        models = tuple(replace(m, predicted_texts=(word,) * 12) for m in trace.models)
        models = (models[0], replace(models[1], provenance={"method": word, "domains": [word], "seed": word}))
        return build_trace_page(
            replace(
                trace, checkpoint=word, identity=word, model_type=word, texts=(word,) * 12, models=models
            ),
            word,
        )

    honest, page = Page(made("t")), made(name)
    parsed = Page(page)
    assert {t for t, _ in parsed.elements} == {t for t, _ in honest.elements}
    assert len(parsed.elements) == len(honest.elements)
    assert {k for _, a in parsed.elements for k in a} == {k for _, a in honest.elements for k in a}
    assert parsed.data["models"][1]["name"] == display_name(name)
    assert not [c for c in page if not c.isprintable() and c != "\n"]


def test_without_script_the_text_and_the_tables_are_there() -> None:
    trace = made_up_trace(2, 16, 40, 4, PLANS)
    page = build_trace_page(trace, "Two <plans>")
    parsed = Page(page)
    assert tokens_of(parsed) == 40
    assert "Each token is routed to a few experts in every layer." in parsed.words
    assert "<h1>Two &lt;plans&gt;</h1>" in page
    shades = [a.get("class", "") or "" for _, a in parsed.elements if a.get("role") == "option"]
    kl = trace.models[1].kl
    assert shades[int(kl.argmax())].split()[0] == "q23"
    assert [("made" in s) for s in shades] == [i >= trace.prompt_tokens for i in range(40)]
    for model in trace.models[1:]:
        assert f"{model.kl.mean():.4f}" in parsed.words
        assert f"{model.kl.max():.4f}" in parsed.words
    links = [a["href"] for t, a in parsed.elements if t == "a"]
    assert links[0] == f"#t{int(kl.argmax())}"
    # Without a plan there is nothing to compare: strongest experts of layer 0.
    alone = Page(build_trace_page(replace(trace, models=trace.models[:1])))
    assert 'id="compare' not in "".join(str(a) for _, a in alone.elements)
    strongest = trace.models[0].experts[0, :, 0].tolist()
    top = max(sorted(set(strongest)), key=strongest.count)
    classes = [a.get("class", "") or "" for _, a in alone.elements if a.get("role") == "option"]
    assert [("s0" in c.split()) for c in classes] == [e == top for e in strongest]


def test_an_ordinary_page_is_small_and_its_weights_fine() -> None:
    page = build_trace_page(made_up_trace(24, 32, 500, 4, PLANS))
    assert len(page) < 800_000
    assert Page(page).data["levels"] == 255


def test_the_largest_models_fit_with_thousands_of_tokens(large_trace: Trace, large_page: str) -> None:
    """Routes grow with the tokens: at this rate 2,000 fit, with 300 kB for everything else."""
    tokens = len(large_trace.tokens)
    assert (large_trace.layers, large_trace.num_experts) == (94, 512)
    assert large_page.count('role="option"') == tokens
    assert len(large_page.encode()) < PAGE_BYTES
    assert len(pack_routes(large_trace.models[0], tokens, 15)) * 2000 / tokens < PAGE_BYTES - 300_000


def test_what_does_not_fit_is_left_out_and_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_surgery.report.trace_page.PAGE_BYTES", 90_000)
    trace = made_up_trace(24, 64, 600, 8, [("law", 32)])
    page = build_trace_page(trace)
    assert len(page) <= 90_000
    parsed = Page(page)
    shown = tokens_of(parsed)
    assert 20 < shown < 600
    assert f"the first {shown} of 600 tokens" in parsed.words
    assert len(parsed.data["texts"]) == len(parsed.data["models"][1]["kl"]) == shown
    # Figures are still of the whole text.
    assert f"{trace.models[1].kl.mean():.4f}" in parsed.words
    monkeypatch.setattr("moe_surgery.report.trace_page.PAGE_BYTES", 20_000)
    with pytest.raises(InvalidInputError, match="would exceed 20,000 bytes; trace fewer plans"):
        build_trace_page(trace)


def test_a_trace_of_one_token_has_a_page() -> None:
    trace = made_up_trace(1, 1, 1, 1)
    assert isinstance(trace, Trace)
    assert tokens_of(Page(build_trace_page(trace))) == 1
