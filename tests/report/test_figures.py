"""The figures' numbers against plain loops."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest

from moe_surgery.errors import InvalidInputError, PlanMismatchError
from moe_surgery.report.content import content, packed
from moe_surgery.report.curves import MEASURES, Line, lines, ranked_for_domain
from moe_surgery.report.figures import check_plan, common, coverage, plan_coverage, subject_of
from moe_surgery.report.fit import Detail
from moe_surgery.report.palette import (
    DARK,
    LIGHT,
    SERIES_DARK,
    SERIES_LIGHT,
    ink_on,
    luminance,
    sequential,
    step,
)
from moe_surgery.selection.metrics import PROFILED_METRICS
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import Statistics
from tests.report.inputs import evaluation_of, made_up, plan_of
from tests.report.unpack import bits_of, orders_of, scores_of, shares_of

DOMAINS = ("code", "law", "prose")


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return made_up(3, 8, DOMAINS, seed=1)


def best(statistics: Statistics, metric: str, domain: str | None, layer: int) -> list[int]:
    """Experts of a layer, best first, ties by number: straight from the statistics."""
    parts = [statistics.data[d][layer] for d in statistics.domains if domain in (None, d)]
    scores = []
    for e in range(statistics.experts):
        n = sum(int(p.count[e]) for p in parts)
        mean = sum(p.output[e] for p in parts) / n if n else np.zeros(statistics.hidden)
        sums = {
            name: sum(float(getattr(p, name)[e]) for p in parts) for name in ("gate", "norm", "weighted_norm")
        }
        scores.append(
            {
                "frequency": n,
                "gate": sums["gate"],
                "ean_sum": sums["norm"],
                "ean_mean": sums["norm"] / n if n else 0,
                "weighted_ean": sums["weighted_norm"],
                "reap": sums["weighted_norm"] / n if n else 0,
                "ean_ca": float(np.sqrt((mean * mean).sum())),
            }[metric]
        )
    return sorted(range(statistics.experts), key=lambda e: (-scores[e], e))


@pytest.mark.parametrize("metric", PROFILED_METRICS)
def test_orders_overlap_and_coverage_are_what_loops_find(statistics: Statistics, metric: str) -> None:
    printed = subject_of(statistics).views
    assert [v.domain for v in printed] == [None, *DOMAINS]
    for view in printed:
        orders = [best(statistics, metric, view.domain, layer) for layer in range(3)]
        assert view.orders[metric].tolist() == orders
        for layer, order in enumerate(orders):
            assert [order.index(e) + 1 for e in range(8)] == view.ranks(metric)[layer].tolist()
        for kind in ("weight", "routes"):
            stored = []
            for layer, order in enumerate(orders):
                total = [
                    sum(
                        float(s[layer].gate[e] if kind == "weight" else s[layer].count[e])
                        for d, s in statistics.data.items()
                        if view.domain in (None, d)
                    )
                    for e in range(8)
                ]
                stored.append([sum(total[e] for e in order[:n]) / sum(total) for n in range(1, 9)])
            mean, worst = coverage(view.orders[metric], view.shares[kind])
            np.testing.assert_allclose(mean, np.mean(stored, axis=0), rtol=1e-12)
            np.testing.assert_allclose(worst, np.min(stored, axis=0), rtol=1e-12)
            assert mean[-1] == pytest.approx(1)
    for n in range(1, 9):
        pairs = common(printed, metric, n)
        for i, a in enumerate(printed):
            for j, b in enumerate(printed):
                sets = [
                    set(best(statistics, metric, a.domain, x)[:n])
                    & set(best(statistics, metric, b.domain, x)[:n])
                    for x in range(3)
                ]
                assert pairs[i, j] == sum(map(len, sets))


def test_a_domain_is_not_mixed_with_its_answers() -> None:
    statistics = made_up(2, 4, ["law", "law:answer"])
    _, law, _ = subject_of(statistics).views
    assert law.scores["frequency"].tolist() == [s.count.tolist() for s in statistics.data["law"]]


def test_a_plan_carries_what_its_experts_carry(statistics: Statistics) -> None:
    plan = Plan("gpt_oss", 8, ((0, 1), (5,), (2, 3, 4)))
    for view in subject_of(statistics).views:
        shares = []
        for layer, kept in enumerate(plan.layers):
            gate = sum(s[layer].gate for d, s in statistics.data.items() if view.domain in (None, d))
            shares.append(sum(float(gate[e]) for e in kept) / float(gate.sum()))
        assert plan_coverage(plan, view.shares["weight"]) == pytest.approx((np.mean(shares), min(shares)))


def test_a_layer_without_routes_carries_nothing() -> None:
    statistics = made_up(2, 4, ["x"])
    layer = statistics.data["x"][1]
    layer.count[:], layer.gate[:] = 0, 0
    [view] = subject_of(statistics).views
    assert view.shares["routes"][1].tolist() == [0] * 4
    mean, worst = coverage(view.orders["frequency"], view.shares["weight"])
    assert (mean[-1], worst[-1]) == (0.5, 0)


@pytest.mark.parametrize(("levels", "listed"), [(None, 8), (4095, 8), (255, 8), (255, 6), (255, 1)])
def test_the_page_carries_the_orders_and_the_scores(
    statistics: Statistics, levels: int | None, listed: int
) -> None:
    subject = subject_of(statistics)
    metrics = ("gate", "reap")
    detail = Detail(metrics, levels, listed)
    data, plan = packed(subject, detail), plan_of(statistics, "reap", 3, ["law"])
    for m, metric in enumerate(metrics):
        for v, view in enumerate(subject.views):
            orders = orders_of(data["orders"][m][v], 3, 8, listed)
            assert orders == view.orders[metric][:, :listed].tolist()
            for row, order, true in zip(
                scores_of(data["scores"][m][v], orders, 8, levels), orders, view.scores[metric], strict=True
            ):
                error = 1e-6 if levels is None else 1 / levels
                np.testing.assert_allclose(row, true[order], rtol=0, atol=error * true.max())
            for kind in ("weight", "routes"):
                expected = np.concatenate(coverage(view.orders[metric], view.shares[kind]))
                np.testing.assert_allclose(shares_of(data["coverage"][kind][m][v]), expected, atol=1e-5)
    assert (data["peak"] is None) is (levels is not None)
    [described] = content(subject, detail, [("p", plan)], [])["plans"]
    flags = bits_of(described["kept"])
    assert [[e for e in range(8) if flags[8 * n + e] == "1"] for n in range(3)] == [
        list(kept) for kept in plan.layers
    ]


def test_lines_group_models_by_method_and_domains_and_pool_seeds(statistics: Statistics) -> None:
    evaluation = evaluation_of(statistics, ("frequency", "reap"), seeds=3)
    result = lines(evaluation)
    every = tuple(sorted(DOMAINS))
    assert {(line.method, line.domains) for line in result} == {
        *((m, d) for m in ("frequency", "reap") for d in (every, ("code",), ("law",), ("prose",))),
        ("random", None),
    }
    [drawn] = [line for line in result if line.method == "random"]
    for measure, value in MEASURES.items():
        for domain in (None, "law"):
            for point in drawn.points(measure, domain):
                values = [
                    value(m.overall if domain is None else m.domains[domain])
                    for m in evaluation.models
                    if m.provenance.get("method") == "random" and m.experts == (point.experts,) * 3
                ]
                assert len(values) == point.models == 3
                assert (point.middle, point.low, point.high) == (median(values), min(values), max(values))
    assert {line.domains for line in ranked_for_domain(result, "law", evaluation.domains)} == {("law",), None}
    assert {line.domains for line in ranked_for_domain(result, None, evaluation.domains)} == {every, None}
    # Prompts and answers are of their domain; more domains than were evaluated still are all of them.
    answers = [Line("reap", ("law:answer", "law:prompt"), ()), Line("reap", ("code:answer",), ())]
    assert ranked_for_domain(answers, "law", ["law"]) == answers[:1]
    assert ranked_for_domain([Line("reap", ("a", "b", "c"), ()), Line("reap", ("a",), ())], None, ["a", "b"])[
        0
    ].domains == ("a", "b", "c")
    # Where none is for the texts, all are shown.
    assert ranked_for_domain(answers, "prose", ["law"]) == answers


@pytest.mark.parametrize("dark", [False, True])
def test_the_palette_keeps_its_order_in_grey_and_its_numbers_readable(dark: bool) -> None:
    colours = sequential(dark)
    grey = [luminance(c) for c in colours]
    assert grey == sorted(grey, reverse=not dark)
    # Even to the eye: the cube root of luminance is roughly lightness.
    steps = np.abs(np.diff(np.cbrt(grey)))
    assert steps.min() > 0.4 * steps.max()
    assert min(contrast(c, ink_on(c)) for c in colours) >= 4.5
    assert (step(-1), step(0), step(1), step(7)) == (0, 0, len(colours) - 1, len(colours) - 1)


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_lines_stand_out_from_their_page() -> None:
    assert min(contrast(c, LIGHT) for c in SERIES_LIGHT) >= 4.5
    assert min(contrast(c, DARK) for c in SERIES_DARK) >= 4.5


def test_statistics_that_cannot_be_shown_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="have no domain"):
        subject_of(Statistics("gpt_oss", "a", 4, 8, 2))
    damaged = made_up(2, 4, ["x"])
    damaged.data["x"][1].norm[2] = np.nan
    with pytest.raises(InvalidInputError, match="ean_sum is not finite"):
        subject_of(damaged)


def test_a_plan_of_another_checkpoint_is_refused(statistics: Statistics) -> None:
    subject = subject_of(statistics)
    check_plan(plan_of(statistics, "reap", 2), subject, "p.json")
    with pytest.raises(
        PlanMismatchError, match=r"p\.json: is for gpt_oss with 2 layers of 8 experts.*3 layers of 8"
    ):
        check_plan(Plan("gpt_oss", 8, ((0,), (1,))), subject, "p.json")
    other = made_up(3, 8, DOMAINS)
    other.identity = "0" * 32
    with pytest.raises(PlanMismatchError, match=r"p\.json: belongs to checkpoint 0{32}"):
        check_plan(plan_of(other, "reap", 2), subject, "p.json")
