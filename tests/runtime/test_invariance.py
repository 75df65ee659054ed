"""A token's logits have the same bits however its text was fed to the model: in short steps, and in long ones, with
the native backend; in any with another made invariant."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery import Plan, load_model  # noqa: E402
from moe_surgery.kernels.interface import SHORT_STEP  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from tests.kernels.native_cases import native, needs_native  # noqa: E402
from tests.runtime.conftest import SMALL, WINDOW  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402

pytestmark = needs_native

LENGTH = SHORT_STEP
LONG = 110
PLAN = Plan("gpt_oss", SMALL.experts, ((4, 0, 2), (1,), (3, 2)))
_loaded: dict[tuple[object, ...], CausalLM] = {}


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invariance") / request.param
    return write_lively(folder, SMALL, request.param, edit_config=lambda c: c.update(sliding_window=WINDOW))


def model_of(
    folder: Path, dtype: torch.dtype, plan: Plan | None = None, threads: int = 1, backend: str = "native"
) -> CausalLM:
    key = folder, dtype, plan is None, threads, backend
    if key not in _loaded:
        _loaded[key] = load_model(folder, dtype=dtype, plan=plan, backend=backend)
        if backend == "native":
            _loaded[key].backend = native("", threads)
    return _loaded[key]


def in_pieces(model: CausalLM, ids: torch.Tensor, cuts: list[int], rollback: int) -> torch.Tensor:
    cache = model.new_cache(ids.shape[0], ids.shape[1] + 20, rollback=rollback)
    return torch.cat([model(ids[:, a:b], cache) for a, b in pairwise(cuts)], dim=1)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 3),
    steps=st.lists(st.integers(1, 16), min_size=1, max_size=LENGTH),
    rollback=st.integers(0, WINDOW),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    viewed=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
)
def test_chunks_of_any_size_give_the_bits_of_one_token_at_a_time(
    folder: Path,
    seed: int,
    batch: int,
    steps: list[int],
    rollback: int,
    dtype: torch.dtype,
    viewed: bool,
    threads: int,
) -> None:
    plan = PLAN if viewed else None
    ids = torch.randint(0, SMALL.vocabulary, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))
    one_by_one = in_pieces(model_of(folder, dtype, plan), ids, [*range(LENGTH + 1)], 16)
    cuts = [0]
    while cuts[-1] < LENGTH:
        cuts.append(min(LENGTH, cuts[-1] + steps[len(cuts) % len(steps)]))
    result = in_pieces(model_of(folder, dtype, plan, threads), ids, cuts, rollback)
    assert torch.equal(result, one_by_one)
    alone = in_pieces(model_of(folder, dtype, plan), ids[:1], [0, LENGTH], rollback)
    assert torch.equal(alone, one_by_one[:1])


@settings(max_examples=10)
@given(seed=st.integers(0, 99), back=st.integers(1, WINDOW), pads=st.integers(1, 9))
def test_padding_and_rolling_back_change_no_bit(folder: Path, seed: int, back: int, pads: int) -> None:
    model = model_of(folder, torch.float32)
    ids = torch.randint(0, SMALL.vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    expected = model(ids)
    cache = model.new_cache(1, LENGTH + 20, rollback=WINDOW)
    model(ids[:, : LENGTH - back], cache)
    wrong = (ids[:, LENGTH - back :] + 1) % SMALL.vocabulary
    model(wrong, cache)
    cache.truncate(LENGTH - back)
    assert torch.equal(model(ids[:, LENGTH - back :], cache), expected[:, LENGTH - back :])
    padded = torch.cat((torch.zeros(1, pads, dtype=torch.int64), ids[:, pads:]), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :pads] = 0
    assert torch.equal(model(padded, None, mask)[:, pads:], model(ids[:, pads:]))


@st.composite
def long_cuts(draw: st.DrawFn) -> list[int]:
    """From 0 to LONG in steps of more than SHORT_STEP tokens."""
    cuts = [0]
    while LONG - cuts[-1] > 2 * SHORT_STEP + 1:
        cuts.append(cuts[-1] + draw(st.integers(SHORT_STEP + 1, LONG - cuts[-1] - SHORT_STEP - 1)))
    return [*cuts, LONG]


@settings(max_examples=10)
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 3),
    cuts=long_cuts(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    viewed=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
)
def test_long_steps_of_any_size_give_the_same_bits(
    folder: Path, seed: int, batch: int, cuts: list[int], dtype: torch.dtype, viewed: bool, threads: int
) -> None:
    plan = PLAN if viewed else None
    model = model_of(folder, dtype, plan)
    ids = torch.randint(0, SMALL.vocabulary, (batch, LONG), generator=torch.Generator().manual_seed(seed))
    whole = model(ids)
    assert torch.equal(in_pieces(model_of(folder, dtype, plan, threads), ids, cuts, 16), whole)
    assert torch.equal(model(ids[:1]), whole[:1])
    assert torch.equal(model(ids, logits_to_keep=1)[:, 0], whole[:, -1])
    padded, mask = ids.clone(), torch.ones_like(ids)
    mask[:, :7] = 0
    assert torch.equal(model(padded, None, mask)[:, 7:], model(ids[:, 7:]))
    # and what short steps give, up to rounding
    if dtype == torch.float32:
        short = in_pieces(model, ids[:1], [*range(0, LONG, SHORT_STEP), LONG], 16)
        assert (short - whole[:1]).abs().median() < 1e-3


@pytest.mark.parametrize("tokens", [32, 512, 2048, 2049, 3000, 4096])
def test_no_part_of_a_long_prompt_is_short(folder: Path, tokens: int) -> None:
    model = model_of(folder, torch.float32)
    chunks = model._chunks(model.new_cache(1, 4096), 1, tokens)
    assert [a for a, _ in chunks] + [tokens] == [0] + [b for _, b in chunks]
    assert all(SHORT_STEP < b - a <= 2048 for a, b in chunks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedded_model_too(tiny: Path, dtype: torch.dtype) -> None:
    model = model_of(tiny, dtype)
    ids = torch.randint(0, 2048, (2, 150), generator=torch.Generator().manual_seed(0))
    expected = in_pieces(model, ids, [*range(151)], 16)
    for step in (2, 5, 16, SHORT_STEP):
        assert torch.equal(in_pieces(model, ids, [*range(0, 150, step), 150], 16), expected), step
    expected = model(ids)
    for cuts in ([0, 50, 100, 150], [0, 32, 150], [0, 80, 150]):
        assert torch.equal(in_pieces(model, ids, cuts, 16), expected), cuts


# --- any backend, one token at a time

INVARIANT = "reference-invariant"


@settings(max_examples=5)
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 3),
    steps=st.lists(st.integers(1, 16), min_size=1, max_size=LENGTH),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    viewed=st.booleans(),
)
def test_an_invariant_backend_gives_the_bits_of_one_token_at_a_time(
    folder: Path, seed: int, batch: int, steps: list[int], dtype: torch.dtype, viewed: bool
) -> None:
    plan = PLAN if viewed else None
    model = model_of(folder, dtype, plan, backend=INVARIANT)
    ids = torch.randint(0, SMALL.vocabulary, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))
    one_by_one = in_pieces(model, ids, [*range(LENGTH + 1)], 16)
    cuts = [0]
    while cuts[-1] < LENGTH:
        cuts.append(min(LENGTH, cuts[-1] + steps[len(cuts) % len(steps)]))
    assert torch.equal(in_pieces(model, ids, cuts, WINDOW), one_by_one)
    assert torch.equal(in_pieces(model, ids[:1], [0, LENGTH], WINDOW), one_by_one[:1])
    # and what the backend computes otherwise, up to rounding
    plain = in_pieces(model_of(folder, dtype, plan, backend="reference"), ids, [0, LENGTH], WINDOW)
    if dtype == torch.float32:
        torch.testing.assert_close(one_by_one, plain, rtol=0, atol=1e-4)


def test_padding_changes_no_bit_of_an_invariant_backend(folder: Path) -> None:
    model = model_of(folder, torch.float32, backend=INVARIANT)
    ids = torch.randint(0, SMALL.vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    assert torch.equal(model(padded, None, mask)[:, 5:], model(ids))
