"""Greedy speculation gives the target's own tokens, whatever drafts; what it counts adds up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from moe_surgery import Plan, inspect, load_model, plan_random, prune  # noqa: E402
from moe_surgery.runtime.generate import generate  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.sampling import Sampling  # noqa: E402
from moe_surgery.runtime.speculation.draft_length import AdaptiveLength, Costs  # noqa: E402
from moe_surgery.runtime.speculation.speculate import Speculation, speculate  # noqa: E402
from moe_surgery.runtime.speculation.statistics import Round, SpeculationStatistics  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.runtime.view import view  # noqa: E402
from tests.kernels.native_cases import needs_native  # noqa: E402
from tests.runtime.conftest import SMALL, WINDOW  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.runtime.speculation.support import arithmetic, program  # noqa: E402
from tests.support.pairwise import pairwise_cover  # noqa: E402

NEW = 16
ONE, MANY = "one", "many"


@pytest.fixture(scope="module")
def prompts(tiny_text: Text) -> list[list[int]]:
    """Of 5 to 120 tokens: the embedded model's window is 64."""
    texts = [arithmetic(1, 2), program(300), "import os\n", arithmetic(2, 5), "The "]
    return [tiny_text.encode(text) for text in texts]


@pytest.fixture(scope="module")
def expected(tiny_model: CausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """What the target generates from each prompt alone."""
    return [
        generate(tiny_model, [prompt], max_new_tokens=NEW, stop_tokens=()).tokens[0] for prompt in prompts
    ]


@pytest.fixture(scope="module")
def drafts(
    tiny: Path, tiny_model: CausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int, int], CausalLM]:
    """Drafts by kind, experts and top-k; pruned checkpoints are written once."""
    folder = tmp_path_factory.mktemp("drafts")

    def make(kind: str, experts: int, top_k: int) -> CausalLM:
        plan = plan_random(experts, 0, inspect(tiny))
        if kind == "view":
            return view(tiny_model, plan, top_k)
        if not (out := folder / str(experts)).exists():
            prune(tiny, out, plan)
        return view(load_model(out, dtype=torch.float32), None, top_k)

    return make


KINDS = ("checkpoint", "view")
CASES = pairwise_cover(KINDS, (1, 8, 31), (1, 4), (1, 4, AdaptiveLength()), (ONE, MANY))
MORE_CASES = pairwise_cover(
    KINDS, (1, 4, 8, 16, 31), (1, 2, 4), (*range(1, 9), AdaptiveLength()), (ONE, MANY)
)


@pytest.mark.parametrize(
    ("kind", "experts", "top_k", "length", "batch"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES if case not in CASES)],
)
def test_greedy_output_is_the_targets_own(
    tiny_model: CausalLM,
    prompts: list[list[int]],
    expected: list[list[int]],
    drafts: Callable[[str, int, int], CausalLM],
    kind: str,
    experts: int,
    top_k: int,
    length: int | AdaptiveLength,
    batch: str,
) -> None:
    draft = drafts(kind, experts, top_k)
    alone = experts % len(prompts)
    rows = slice(None) if batch == MANY else slice(alone, alone + 1)
    result = speculate(
        tiny_model, draft, prompts[rows], draft_length=length, max_new_tokens=NEW, stop_tokens=()
    )
    assert result.tokens == expected[rows]


def test_a_batch_accepts_different_numbers(
    tiny_model: CausalLM, prompts: list[list[int]], tiny: Path
) -> None:
    draft = view(tiny_model, plan_random(16, 0, inspect(tiny)))
    rounds: list[Round] = []
    speculate(tiny_model, draft, prompts, max_new_tokens=NEW, stop_tokens=(), callback=rounds.append)
    assert any(len(set(r.accepted)) > 2 for r in rounds)


@pytest.mark.parametrize(("length", "rows"), [(1, slice(1)), (3, slice(2)), (8, slice(1))])
def test_an_identical_draft_is_accepted_whole(
    tiny: Path, tiny_model: CausalLM, prompts: list[list[int]], length: int, rows: slice
) -> None:
    other = load_model(tiny, dtype=torch.float32, backend=tiny_model.backend.name)
    for draft in (tiny_model, other, view(tiny_model, plan_random(32, 0, inspect(tiny)))):
        result = speculate(
            tiny_model, draft, prompts[rows], draft_length=length, max_new_tokens=NEW, stop_tokens=()
        )
        assert result.statistics.acceptance == 1
        steps = -(-(NEW - 1) // (length + 1))
        assert result.statistics.target_steps == steps
        assert result.statistics.drafted == result.statistics.accepted


def test_log_probabilities_are_those_of_plain_decoding(
    tiny_model: CausalLM, prompts: list[list[int]]
) -> None:
    draft = view(tiny_model, None, 1)
    plain = generate(tiny_model, prompts, max_new_tokens=NEW, stop_tokens=())
    result = speculate(tiny_model, draft, prompts, max_new_tokens=NEW, stop_tokens=())
    for got, expected in zip(result.log_probabilities, plain.log_probabilities, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


# --- the small model: windows of 6, quick enough for many cases

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8], list(range(20))]


def small_draft(model: CausalLM, kept: int) -> CausalLM:
    return view(model, Plan("gpt_oss", SMALL.experts, (tuple(range(kept)),) * SMALL.layers))


def half_slow(*factors: Sequence[Any]) -> list[Any]:
    """All combinations, every other one marked slow: each value still meets each backend."""
    return [
        pytest.param(*case, marks=[pytest.mark.slow] if sum(places) % 2 else [])
        for places, case in zip(
            itertools.product(*(range(len(values)) for values in factors)),
            itertools.product(*factors),
            strict=True,
        )
    ]


LENGTHS = (1, WINDOW - 1, WINDOW, 3 * WINDOW, AdaptiveLength(max_length=12))


@pytest.mark.parametrize(("length", "kept"), half_slow(LENGTHS, (1, 4)))
def test_drafts_longer_than_the_window_change_nothing(
    small_model: CausalLM, kept: int, length: int | AdaptiveLength
) -> None:
    plain = generate(small_model, PROMPTS, max_new_tokens=28, stop_tokens=())
    draft = small_draft(small_model, kept)
    result = speculate(small_model, draft, PROMPTS, draft_length=length, max_new_tokens=28, stop_tokens=())
    assert result.tokens == plain.tokens


@pytest.mark.parametrize("sampling", [None, Sampling(1.0, top_k=20, seed=7)])
@pytest.mark.parametrize("length", [1, 4, AdaptiveLength()])
def test_each_sequence_ends_with_its_own_stop_token_and_leaves_the_rest_alone(
    quick_model: CausalLM, sampling: Sampling | None, length: int | AdaptiveLength
) -> None:
    free = generate(quick_model, PROMPTS, max_new_tokens=30, stop_tokens=()).tokens
    stops = (free[0][2], free[2][7], free[3][0])
    settings: dict[str, Any] = {"max_new_tokens": 30, "stop_tokens": stops, "sampling": sampling}
    result = speculate(quick_model, small_draft(quick_model, 4), PROMPTS, draft_length=length, **settings)
    for tokens, log_probabilities in zip(result.tokens, result.log_probabilities, strict=True):
        assert not set(tokens[:-1]) & set(stops)
        assert len(tokens) == len(log_probabilities)
        assert len(tokens) == 30 or tokens[-1] in stops
    if sampling is None:
        assert result.tokens == generate(quick_model, PROMPTS, **settings).tokens


@pytest.mark.parametrize(("new", "length"), half_slow((1, 2, 3, 9), (1, 4, 8)))
def test_exactly_as_many_tokens_come_as_were_asked_for(small_model: CausalLM, new: int, length: int) -> None:
    for draft in (small_model, small_draft(small_model, 1)):
        result = speculate(
            small_model, draft, PROMPTS, draft_length=length, max_new_tokens=new, stop_tokens=()
        )
        assert result.tokens == generate(small_model, PROMPTS, max_new_tokens=new, stop_tokens=()).tokens


@pytest.mark.parametrize(("kept", "length"), half_slow((1, 4, 5), (1, 5, 12)))
def test_the_models_whole_context_can_be_used(tmp_path: Path, kept: int, length: int) -> None:
    folder = write_lively(
        tmp_path / "short",
        SMALL,
        edit_config=lambda c: c.update(sliding_window=WINDOW, max_position_embeddings=48),
    )
    model = load_model(folder, dtype=torch.float32)
    plain = generate(model, PROMPTS, max_new_tokens=99, stop_tokens=())
    result = speculate(
        model, small_draft(model, kept), PROMPTS, draft_length=length, max_new_tokens=99, stop_tokens=()
    )
    assert result.tokens == plain.tokens
    assert [len(t) for t in result.tokens] == [28] * 4


def test_a_run_can_be_followed_round_by_round(quick_model: CausalLM) -> None:
    settings: dict[str, Any] = {"draft_length": 3, "max_new_tokens": 25, "stop_tokens": ()}
    draft = small_draft(quick_model, 3)
    whole = speculate(quick_model, draft, PROMPTS, **settings)
    run = Speculation(quick_model, draft, PROMPTS, **settings)
    seen: list[list[int]] = [[] for _ in PROMPTS]
    counted = SpeculationStatistics()
    for done in run:
        for tokens, new in zip(seen, done.tokens, strict=True):
            tokens += new
        assert run.tokens == seen
        counted.add(done)
        assert done.target_seconds > 0
    assert seen == whole.tokens
    assert run.log_probabilities == whole.log_probabilities
    for name in ("drafted", "tried", "accepted", "tokens", "target_steps", "sequence_steps"):
        assert getattr(counted, name) == getattr(run.statistics, name) == getattr(whole.statistics, name)


def test_the_same_seed_gives_the_same_tokens(quick_model: CausalLM) -> None:
    def run(seed: int) -> list[list[int]]:
        sampling = Sampling(1.0, seed=seed)
        draft = small_draft(quick_model, 3)
        settings: dict[str, Any] = {"sampling": sampling, "draft_length": AdaptiveLength(), "stop_tokens": ()}
        return speculate(quick_model, draft, PROMPTS, max_new_tokens=20, **settings).tokens

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_counts_add_up(quick_model: CausalLM) -> None:
    rounds: list[Round] = []
    draft = small_draft(quick_model, 4)
    result = speculate(
        quick_model,
        draft,
        PROMPTS,
        draft_length=3,
        max_new_tokens=25,
        stop_tokens=(),
        callback=rounds.append,
    )
    s, later = result.statistics, rounds[1:]
    assert rounds[0].first
    assert s.tokens == sum(map(len, result.tokens)) - len(PROMPTS)
    assert s.target_steps == len(later) == len(s.target_seconds) == len(s.draft_seconds)
    pairs = [pair for r in later for pair in zip(r.drafted, r.accepted, strict=True)]
    for position in range(3):
        assert s.drafted[position] == sum(n > position for n, _ in pairs)
        assert s.tried[position] == sum(n > position <= a for n, a in pairs)
        assert s.accepted[position] == sum(a > position for _, a in pairs)
    # A round gives each running sequence what it accepted and one more.
    assert s.tokens == sum(s.accepted) + s.sequence_steps
    assert s.tokens_per_target_step == s.tokens / s.sequence_steps
    assert 0 < (s.acceptance or 0) < 1


def test_runs_add_up(quick_model: CausalLM) -> None:
    draft = small_draft(quick_model, 4)

    def run(prompts: list[list[int]], length: int) -> SpeculationStatistics:
        return speculate(
            quick_model, draft, prompts, draft_length=length, max_new_tokens=20, stop_tokens=()
        ).statistics

    one, other = run(PROMPTS[:2], 2), run(PROMPTS[2:], 4)
    total = SpeculationStatistics()
    total.merge(one)
    total.merge(other)
    assert total.tokens == one.tokens + other.tokens
    assert total.drafted == [a + b for a, b in itertools.zip_longest(one.drafted, other.drafted, fillvalue=0)]
    assert total.target_steps == one.target_steps + other.target_steps


def test_caches_take_the_bytes_of_their_columns(quick_model: CausalLM) -> None:
    length, new = 5, 30
    result = speculate(
        quick_model,
        small_draft(quick_model, 1),
        PROMPTS,
        draft_length=length,
        max_new_tokens=new,
        stop_tokens=(),
    )
    context = 20 + new - 1 + length
    token_bytes = 2 * len(PROMPTS) * SMALL.kv_heads * SMALL.head_dim * 4
    s = result.statistics
    # Rings hold the window and what may be rolled back: `length` tokens, two more for the draft.
    assert s.target_cache_bytes == token_bytes * (context + 2 * (WINDOW + length))
    assert s.draft_cache_bytes == token_bytes * (context + 2 * (WINDOW + length + 2))


# --- drafting rules


class Counting(CausalLM):
    calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
        self.calls += 1
        return super().__call__(*arguments, **options)


def counted(model: CausalLM) -> Counting:
    counting = copy(model)
    counting.__class__ = Counting
    assert isinstance(counting, Counting)
    return counting


def test_the_target_runs_once_a_round_and_the_draft_once_a_token(quick_model: CausalLM) -> None:
    target, draft = counted(quick_model), counted(quick_model)
    result = speculate(target, draft, PROMPTS[:1], draft_length=4, max_new_tokens=21, stop_tokens=())
    assert result.statistics.target_steps == 4
    assert target.calls == 1 + 4  # the prompt, then five tokens a round
    assert draft.calls == 1 + 4 * 4


def test_a_draft_that_is_never_sure_drafts_nothing(quick_model: CausalLM) -> None:
    unsure = AdaptiveLength(confidence=1.0)
    result = speculate(
        quick_model, quick_model, PROMPTS, draft_length=unsure, max_new_tokens=9, stop_tokens=()
    )
    assert sum(result.statistics.drafted) == 0
    assert result.statistics.acceptance is None
    assert result.statistics.tokens_per_target_step == 1
    assert result.tokens == generate(quick_model, PROMPTS, max_new_tokens=9, stop_tokens=()).tokens


def test_costs_decide_how_much_is_drafted(quick_model: CausalLM) -> None:
    def longest(draft_cost: float) -> int:
        costs = Costs(draft_cost, [1.0] * 9)
        rule = AdaptiveLength(max_length=8, confidence=0.0, costs=costs, acceptance=1.0)
        run = speculate(
            quick_model, quick_model, PROMPTS, draft_length=rule, max_new_tokens=40, stop_tokens=()
        )
        return max(i + 1 for i, n in enumerate(run.statistics.drafted) if n)

    assert longest(0.01) == 8
    assert longest(10.0) == 1


# --- rounding


@pytest.mark.parametrize(
    ("backend", "experts", "length", "batch"),
    [
        *(
            pytest.param("native", *case, marks=needs_native)
            for case in [(4, 3, MANY), (16, 1, ONE), (16, 8, MANY), (31, 4, ONE)]
        ),
        ("reference-invariant", 8, 4, ONE),
        pytest.param("reference-invariant", 16, 3, MANY, marks=pytest.mark.slow),
    ],
)
def test_bf16_is_exact_where_a_token_does_not_depend_on_the_others(
    tiny: Path, prompts: list[list[int]], backend: str, experts: int, length: int, batch: str
) -> None:
    target = load_model(tiny, dtype=torch.bfloat16, backend=backend)
    draft = view(target, plan_random(experts, 0, inspect(tiny)))
    # The reference takes token by token in plain PyTorch: fewer tokens and short prompts.
    new, rows = (NEW, prompts) if backend == "native" else (6, [prompts[0], prompts[2]])
    if batch == ONE:
        rows = rows[1:2] if backend == "native" else rows[:1]
    # Padded alike: whether a prompt is read in a long step, with other rounding, depends on the longest of a batch.
    plain = generate(target, rows, max_new_tokens=new, stop_tokens=()).tokens
    result = speculate(target, draft, rows, draft_length=length, max_new_tokens=new, stop_tokens=())
    assert result.tokens == plain
