"""What benchmarks of decoding and speculation count, beside counts made otherwise. Nothing here is a time."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")


from moe_surgery import inspect, load_model, plan_random, prune  # noqa: E402
from moe_surgery.bench.decode import (  # noqa: E402
    DecodeRun,
    decode_figures,
    measure_decoding,
)
from moe_surgery.bench.speculation import measure_speculation, speculation_figures  # noqa: E402
from moe_surgery.bench.speculation_costs import (  # noqa: E402
    StepTime,
    break_even_rows,
    costs_of,
    measure_costs,
)
from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.runtime.decode_cost import bytes_per_token  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.speculation.draft_length import Costs  # noqa: E402
from moe_surgery.runtime.speculation.speculate import speculate  # noqa: E402
from moe_surgery.runtime.step_bytes import model_step_bytes, usable_bytes, weight_bytes  # noqa: E402
from moe_surgery.runtime.view import view  # noqa: E402
from tests.support.checkpoints import Shape, write_checkpoint  # noqa: E402

SHAPE = Shape(layers=2, experts=6, top_k=2, vocabulary=30)
PROMPTS = {"one": [[1, 2, 3], [4, 5, 6, 7]], "two": [[8, 9], [3, 3, 3], [10, 11]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("measure") / "model", SHAPE)


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalLM:
    return load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def draft(folder: Path, model: CausalLM) -> CausalLM:
    return view(model, plan_random(3, 0, inspect(folder)), 1)


# --- bytes


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("top_k", [1, 2])
def test_step_bytes_are_those_counted_from_the_configuration(tokens: int, top_k: int) -> None:
    from dataclasses import replace

    tiny = load_model("example:tiny")
    counted = bytes_per_token(replace(tiny.config, num_experts_per_tok=top_k), 32, tokens, 0)
    assert model_step_bytes(view(tiny, None, top_k), tokens) == pytest.approx(counted.step, rel=1e-9)


@pytest.mark.parametrize("tokens", [1, 5])
def test_step_bytes_of_narrow_experts_are_those_counted_from_the_configuration(
    tokens: int, tmp_path: Path
) -> None:
    shape = Shape(layers=2, experts=5, hidden=64, intermediate=96, top_k=2)
    model = load_model(write_checkpoint(tmp_path / "narrow", shape))
    counted = bytes_per_token(model.config, 5, tokens, 0)
    assert model_step_bytes(model, tokens) == pytest.approx(counted.step, rel=1e-9)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_view_shows_the_bytes_that_the_pruned_checkpoint_holds(
    folder: Path, model: CausalLM, tmp_path: Path, count: int
) -> None:
    plan = plan_random(count, 0, inspect(folder))
    prune(folder, tmp_path / "out", plan)
    pruned = load_model(tmp_path / "out")
    assert usable_bytes(view(model, plan)) == weight_bytes(pruned) == usable_bytes(pruned)


# --- decoding


def test_every_model_and_batch_has_its_turn_in_every_round(model: CausalLM, draft: CausalLM) -> None:
    models = {"full": model, "pruned": draft}
    runs = list(measure_decoding(models, batches=[1, 3], depth=5, steps=4, rounds=2))
    seen = sorted((r.number, r.model, r.batch) for r in runs)
    assert seen == [(i, name, b) for i in range(2) for name in models for b in (1, 3)]
    assert all(len(r.step_seconds) == 4 and r.prompt_tokens == 5 * r.batch for r in runs)
    figures = decode_figures(runs, models)
    assert [(f.model, f.batch, f.experts, f.top_k) for f in figures] == [
        (name, b, n, k) for b in (1, 3) for name, n, k in (("full", 6, 2), ("pruned", 3, 1))
    ]
    assert all(f.ratio is not None and f.ratio.low == f.ratio.high == 1 for f in figures if f.model == "full")


def test_figures_follow_from_the_runs(model: CausalLM, draft: CausalLM) -> None:
    def run(name: str, number: int, *seconds: float) -> DecodeRun:
        return DecodeRun(name, 2, number, 20, 0.5, 0.6, seconds, 100, 1000 + number, 1e6 * (1 + number))

    runs = [
        run("full", 0, 1.0, 3.0),
        run("pruned", 0, 0.5, 0.5),
        run("full", 1, 2.0, 2.0),
        run("pruned", 1, 1.0, 3.0),
        run("full", 2, 4.0, 4.0),  # interrupted before the other's turn
    ]
    full, pruned = decode_figures(runs, {"full": model, "pruned": draft})
    assert (full.decode_rate.median, full.decode_rate.low, full.decode_rate.high) == (1.0, 0.5, 1.0)
    assert full.prefill_rate.median == 40
    assert (full.latency, full.latency_p95, full.memory_bytes, full.rounds) == (2.5, 4.0, 1002, 3)
    assert pruned.ratio is not None
    assert (pruned.ratio.low, pruned.ratio.high, pruned.rounds) == (1.0, 4.0, 2)
    # Weights, and keys and values of two sequences at 11 positions: 2 layers, 2 heads of 8, 4 bytes.
    read = model_step_bytes(model, 2) + 2 * 2 * 11 * 2 * 2 * 8 * 4
    assert full.bytes_per_token == read / 2
    # Of each round's own bandwidth: its median step takes 2, 2 and 4 seconds.
    assert full.bandwidth_share == pytest.approx(read / 2 / 2e6)


def test_a_context_that_just_fits_runs(tmp_path: Path) -> None:
    short = {"max_position_embeddings": 64}
    model = load_model(write_checkpoint(tmp_path / "short", SHAPE, edit_config=lambda c: c.update(short)))
    context = 64 - 2  # a step, and the token after it
    assert len(list(measure_decoding({"full": model}, depth=context, steps=1, rounds=1))) == 1


def test_what_was_interrupted_before_anything_came_has_no_figures(model: CausalLM) -> None:
    assert decode_figures([], {"full": model}) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batches": [0]}, "`batches` 0: must be at least 1"),
        ({"rounds": 0}, "`rounds` 0: must be at least 1"),
        ({"depth": 131072, "steps": 9}, "need 131082 tokens; these models support"),
    ],
)
def test_numbers_out_of_range_are_refused(model: CausalLM, options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        list(measure_decoding({"full": model}, **options))  # type: ignore[arg-type]


# --- speculation


def test_every_prompt_runs_at_every_length(model: CausalLM, draft: CausalLM) -> None:
    runs = list(measure_speculation(model, draft, PROMPTS, lengths=[1, 3], max_new_tokens=9))
    assert sorted((r.domain, r.length) for r in runs) == sorted(
        (d, n) for d, some in PROMPTS.items() for _ in some for n in (1, 3)
    )
    assert all(r.tokens == 9 and not r.differs and r.plain_seconds > 0 for r in runs)
    figures = speculation_figures(runs)
    assert [(f.domain, f.length, f.prompts) for f in figures] == [
        (d, n, p) for d, p in (("one", 2), ("two", 3), ("all", 5)) for n in (1, 3)
    ]
    # Acceptance is that of the same prompts speculated on by hand.
    alone = [
        speculate(model, draft, [p], draft_length=3, max_new_tokens=9, stop_tokens=()).statistics
        for p in PROMPTS["two"]
    ]
    accepted, tried = sum(sum(s.accepted) for s in alone), sum(sum(s.tried) for s in alone)
    assert figures[3].acceptance == accepted / tried
    assert figures[3].differing_prompts == 0


def test_costs_cover_all_lengths_and_caches_stay_as_they_were(model: CausalLM, draft: CausalLM) -> None:
    times = list(measure_costs(model, draft, lengths=[1, 4], batch=2, depth=6, rounds=2))
    kinds = [("plain", 1), ("draft", 1), ("draft", 2), ("check", 2), ("check", 5)]
    assert sorted((t.kind, t.tokens) for t in times) == sorted(2 * kinds)
    costs = costs_of(times)
    assert costs is not None
    assert len(costs.target) == 5
    assert min(costs.draft, *costs.target) > 0
    a, b = costs.target[1], costs.target[4]
    assert costs.target[2] == pytest.approx(a + (b - a) / 3)


def test_costs_of_what_was_measured_until_an_interrupt() -> None:
    steps = [("plain", 1, 1.0), ("draft", 1, 0.25), ("draft", 2, 0.5), ("check", 2, 2.0), ("check", 5, 3.0)]
    times = [StepTime(*step) for step in steps]
    assert [costs_of(times[:n]) for n in range(4)] == [None] * 4
    assert costs_of(times[:4]) == Costs(0.25, [1.0, 2.0], 0.25)
    some = costs_of(times[:4])
    assert some is not None
    assert [row.length for row in break_even_rows(some, [1, 4])] == [1]
    assert costs_of([*times, StepTime("plain", 1, 2.0), StepTime("plain", 1, 9.0)]) == Costs(
        0.25, [2.0, 2.0, pytest.approx(2 + 1 / 3), pytest.approx(2 + 2 / 3), 3.0], 0.25
    )


def test_break_even_rows_say_what_a_round_costs() -> None:
    rows = break_even_rows(Costs(0.1, [1.0, 1.0, 1.0, 5.0]), [2, 3])
    first, second = rows
    assert (first.draft_seconds, first.target_seconds, first.plain_seconds) == (0.2, 1.0, 1.0)
    assert first.break_even is not None
    # 1 + a + a^2 tokens for the cost of 1.2 plain steps.
    assert 1 + first.break_even + first.break_even**2 == pytest.approx(1.2)
    assert first.most_speed_up == pytest.approx(3 / 1.2)
    assert second.break_even is None
