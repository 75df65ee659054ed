"""The page as a file: self-contained, and safe against whatever names files hold."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.report.content import packed
from moe_surgery.report.figures import subject_of
from moe_surgery.report.fit import Detail, fit, packed_size
from moe_surgery.report.markup import display_name, embedded_json, number, tag, text
from moe_surgery.report.page import build_report
from moe_surgery.selection.metrics import PROFILED_METRICS
from moe_surgery.selection.statistics import Statistics
from tests.report.inputs import evaluation_of, made_up, plan_of
from tests.report.parsed_page import HOSTILE, LOADING, Page
from tests.report.unpack import orders_of


def full_page(statistics: Statistics, title: str | None = None) -> str:
    return build_report(
        statistics,
        [("plan.json", plan_of(statistics, "reap", 2, [statistics.domains[0]]))],
        [("cuts.json", evaluation_of(statistics))],
        title,
    )


def test_the_page_loads_nothing_and_forbids_it() -> None:
    page = full_page(made_up(2, 8, ["code", "law"]))
    parsed = Page(page)
    [policy] = [a["content"] for t, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert all(
        re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules.pop(k)) for k in ("style-src", "script-src")
    )
    assert not rules
    for name, attributes in parsed.elements:
        assert name not in ("link", "iframe", "object", "embed", "base", "form", "img", "image", "use")
        for key in attributes.keys() & LOADING:
            assert key == "href", (name, key)
            assert (attributes[key] or "").startswith("#")
        assert not [k for k in attributes if k.startswith("on") or k == "style"]
    for _, attributes, body in parsed.raw:
        if attributes.get("id") not in ("data", "packed"):
            allowed = body.replace("http://www.w3.org/2000/svg", "")  # a name, which nothing loads
            assert not re.search(
                r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|innerHTML|eval\(|outerHTML", allowed
            )
    assert "http" not in re.sub(r"<script.*?</script>", "", page.replace("http-equiv", ""), flags=re.S)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_files_stay_names(name: str) -> None:
    honest = Page(full_page(made_up(2, 8, ["a", "b"]), "t"))
    statistics = made_up(2, 8, [name, "b"])
    statistics.identity = name
    statistics.texts[name][0] |= {"name": name, "xxh3_128": name}
    plan = plan_of(statistics, "reap", 2, [name])
    plan = replace(plan, provenance={**plan.provenance, name: name, "seed": name, "domains": [name]})
    evaluation = evaluation_of(statistics)
    models = tuple(
        replace(m, name=name, provenance={**m.provenance, "method": name}) if m.kind != "full" else m
        for m in evaluation.models
    )
    page = build_report(statistics, [(name, plan)], [(name, replace(evaluation, models=models))], title=name)
    parsed = Page(page)
    assert {t for t, _ in parsed.elements} == {t for t, _ in honest.elements}
    assert [t for t, _ in parsed.elements].count("script") == 3
    assert {k for _, a in parsed.elements for k in a} == {k for _, a in honest.elements for k in a}
    assert {view["name"] for view in parsed.data["views"][1:]} == {display_name(name), "b"}
    assert parsed.data["plans"][0]["name"] == display_name(name)
    assert display_name(name) in parsed.words
    assert not [c for c in page if not c.isprintable() and c != "\n"]


def test_embedded_json_holds_no_markup_and_comes_back_whole() -> None:
    value = {"a": [*HOSTILE, "]]>", "é"], "b": [1, 2.5, None]}
    result = embedded_json(value)
    assert result.isascii()
    assert not set("<>&") & set(result)
    assert json.loads(result) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        embedded_json(float("nan"))


def test_markup_escapes_all_but_markup() -> None:
    assert (
        tag("a", "<b>", title='"x"', class_="c", id=None)
        == '<a title="&quot;x&quot;" class="c">&lt;b&gt;</a>'
    )
    assert tag("p", tag("b", "&")) == "<p><b>&amp;</b></p>"
    assert text("a\u202eb") == "a\\u202eb"
    assert len(display_name("x" * 10**6)) < 100
    assert (number(123456.789), number(0.000123456), number(3.0), number(float("inf"))) == (
        123460,
        0.00012346,
        3,
        None,
    )


def test_without_script_the_first_view_and_the_tables_are_there() -> None:
    statistics = made_up(3, 8, ["code", "law"])
    plan = plan_of(statistics, "frequency", 2)
    page = build_report(statistics, [("plan.json", plan)], [("cuts.json", evaluation_of(statistics))])
    assert len(re.findall(r'<rect class="q\d+" x="\d+" y="\d+" width="\d+" height="\d+"/>', page)) == 24
    [dots] = re.findall(r'<path d="([^"]*)" class="dot dot2"', page)
    assert dots.count("M") == sum(map(len, plan.layers))
    orders = re.search(r'id="orders".*?</table>', page, re.S)
    assert orders is not None
    rows = re.findall(r"<td>([\d ]+)</td>", orders[0])
    total = sum(np.stack([s.count for s in layers]) for layers in statistics.data.values())
    for row, counts in zip(rows, total, strict=True):
        assert [int(e) for e in row.split()] == sorted(range(8), key=lambda e: (-counts[e], e))
    for chart in ("Mean over layers", "Worst layer", "KL divergence from the full model", "Cross-entropy"):
        assert f'aria-label="{chart}' in page
    assert page.count('<tr><th scope="row">random-') == 4 * 3


@pytest.mark.parametrize(
    ("layers", "experts", "domains"),
    [(24, 32, 8), (24, 32, 40), (48, 128, 8), (61, 256, 4), (94, 512, 1)],
)
def test_a_page_stays_below_3_mb_and_uses_what_it_may(layers: int, experts: int, domains: int) -> None:
    statistics = made_up(layers, experts, [f"domain {i}" for i in range(domains)], top_k=8)
    page = build_report(statistics, [("plan.json", plan_of(statistics, "reap", experts // 4))])
    assert len(page.encode()) < 3_000_000
    data = Page(page).data
    if data["levels"] is None:
        assert data["metrics"] == list(PROFILED_METRICS)
    elif data["metrics"] != list(PROFILED_METRICS):  # what was left out would not have fitted
        assert len(page) * (len(data["metrics"]) + 1) / len(data["metrics"]) > 2_900_000
    assert ('class="notice"' in page) is (data["levels"] is not None)


def test_what_is_left_out_is_a_matter_of_size_and_wish() -> None:
    subject = subject_of(made_up(4, 64, [f"domain {i}" for i in range(6)]))
    full = Detail(subject.metrics, None, 64)
    sizes = []
    for available in (packed_size(subject, full), 150_000, 50_000, 15_000, 0):
        detail = fit(subject, available)
        size = len(embedded_json(packed(subject, detail)))
        assert size <= packed_size(subject, detail) + 200
        assert packed_size(subject, detail) <= max(available, 15_000)
        sizes.append(packed_size(subject, detail))
    assert sizes == sorted(sizes, reverse=True)
    assert fit(subject, packed_size(subject, full)) == full
    assert fit(subject, 0) == Detail(("frequency",), 255, 16)
    # The most important first, in the usual order on the page.
    wanted = ("ean_ca", "gate")
    assert fit(subject, 0, wanted).metrics == ("ean_ca",)
    assert fit(subject, 10**9, wanted).metrics == ("gate", "ean_ca")
    words = Detail(("frequency",), 255, 16).words(subject)
    assert (
        "this page has frequency, not gate, ean_sum, ean_mean, weighted_ean, reap, ean_ca, lists the" in words
    )
    assert "the best 16 of 64 experts in each layer, and rounds scores to 0.4 %" in words
    assert full.words(subject) == ""


def test_metrics_and_domains_are_chosen() -> None:
    statistics = made_up(2, 8, ["code", "law", "prose"])
    data = Page(build_report(statistics, metrics=["reap", "gate"], domains=["law", "code"])).data
    assert data["metrics"] == ["gate", "reap"]
    assert [v["name"] for v in data["views"]] == ["all domains", "code", "law"]
    with pytest.raises(UsageError, match=r"`metrics` speed: the source has frequency, gate"):
        build_report(statistics, metrics=["speed"])
    with pytest.raises(InvalidInputError, match="domain 'poetry' is not in these statistics"):
        build_report(statistics, domains=["poetry"])
    with pytest.raises(UsageError, match="41 domains: a report shows at most 40; choose with `domains`"):
        build_report(made_up(1, 4, [f"d{i}" for i in range(41)]))


def test_what_is_of_another_checkpoint_is_refused() -> None:
    statistics, other = made_up(2, 8, ["x"]), made_up(2, 8, ["x"])
    other.identity = "0" * 32
    with pytest.raises(PlanMismatchError, match=r"e\.json: belongs to checkpoint 0{32}"):
        build_report(statistics, [], [("e.json", evaluation_of(other))])
    with pytest.raises(PlanMismatchError, match=r"e\.json: is of gpt_oss with 9 experts"):
        build_report(statistics, [], [("e.json", replace(evaluation_of(statistics), num_experts=9))])


def test_routes_that_nobody_counted_are_left_out() -> None:
    statistics = made_up(2, 8, ["x", "y"])
    evaluation = evaluation_of(statistics, ("reap",), seeds=1)
    uncounted = [
        replace(m, kind="checkpoint", domains={d: replace(q, rerouted=()) for d, q in m.domains.items()})
        for m in evaluation.models[1:]
    ]
    page = build_report(
        statistics, [], [("e", replace(evaluation, models=(evaluation.models[0], *uncounted)))]
    )
    [shown_evaluation] = Page(page).data["evaluations"]
    for line in shown_evaluation["lines"]:
        assert line["points"]["rerouted"] == [[], [], []]
        assert len(line["points"]["kl"][0]) == 4
    assert [m[-1][0][-1] for m in shown_evaluation["models"][1:]] == [None] * len(uncounted)


def test_damaged_evaluations_are_refused() -> None:
    statistics = made_up(2, 8, ["x"])
    evaluation = evaluation_of(statistics)
    quality = evaluation.models[1].domains["x"]
    for broken in (replace(quality, rerouted=(0.1,)), replace(quality, kl=float("inf"))):
        bad = replace(evaluation.models[1], domains={"x": broken})
        with pytest.raises(InvalidInputError, match=r"e\.json: figures of .* on 'x' are damaged"):
            build_report(
                statistics, [], [("e.json", replace(evaluation, models=(evaluation.models[0], bad)))]
            )
    stray = replace(evaluation.models[1], domains={"y": quality})
    with pytest.raises(InvalidInputError, match=r"domain 'y' has no figures of the full model"):
        build_report(statistics, [], [("e.json", replace(evaluation, models=(evaluation.models[0], stray)))])


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (1, 2), (5, 3), (36, 128)])
def test_any_size_of_model_has_a_page(layers: int, experts: int) -> None:
    statistics = made_up(layers, experts, ["x"])
    page = build_report(
        statistics, [("p", plan_of(statistics, "reap", 1))], [("e", evaluation_of(statistics))]
    )
    packed = Page(page).packed
    assert len(base64.b64decode(packed["scores"][0][0])) == 4 * layers * experts
    orders = orders_of(packed["orders"][0][0], layers, experts, experts)
    assert all(sorted(row) == list(range(experts)) for row in orders)
