"""A plan shown to the full checkpoint gives the model that surgery by that plan writes, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery import Plan, load_model, prune  # noqa: E402
from moe_surgery.errors import PlanMismatchError  # noqa: E402
from moe_surgery.kernels import select_backend  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from tests.runtime.conftest import SMALL  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Kept = tuple[tuple[int, ...], ...]


def plans(experts: int, layers: int) -> st.SearchStrategy[Kept]:
    """The same number of experts in each layer, in any order."""
    return st.integers(1, experts).flatmap(
        lambda n: st.tuples(*[st.permutations(range(experts)).map(lambda p: tuple(p[:n]))] * layers)
    )


def check_same_bits(
    one: CausalLM, other: CausalLM, vocabulary: int, length: int = 20, steps: int = 6
) -> None:
    """Equal logits from a prefill and the greedy decode steps after it."""
    ids = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(length))
    caches = [model.new_cache(2, length + steps) for model in (one, other)]
    for _ in range(steps + 1):
        logits, expected = one(ids, caches[0]), other(ids, caches[1])
        assert torch.equal(logits, expected)
        ids = logits[:, -1:].argmax(-1)


@given(kept=plans(SMALL.experts, SMALL.layers), dtype=st.sampled_from(DTYPES))
@settings(max_examples=12)
def test_a_view_has_the_bits_of_the_pruned_checkpoint(
    small: Path, backend: str, tmp_path_factory: pytest.TempPathFactory, kept: Kept, dtype: torch.dtype
) -> None:
    plan, out = Plan("gpt_oss", SMALL.experts, kept), tmp_path_factory.mktemp("views") / "out"
    prune(small, out, plan)
    view = load_model(small, dtype=dtype, plan=plan, backend=backend)
    check_same_bits(view, load_model(out, dtype=dtype, backend=backend), SMALL.vocabulary)


@pytest.mark.parametrize("count", [1, 3, 8, 31, 32])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_view_of_the_embedded_model_has_the_bits_of_the_pruned_one(
    tiny: Path, backend: str, tmp_path: Path, count: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(count)
    kept = tuple(tuple(int(e) for e in rng.permutation(32)[:count]) for _ in range(4))
    plan = Plan("gpt_oss", 32, kept)
    prune(tiny, tmp_path / "out", plan)
    pruned = load_model(tmp_path / "out", dtype=dtype, backend=backend)
    view = load_model(tiny, dtype=dtype, plan=plan, backend=backend)
    check_same_bits(view, pruned, 2048, length=70, steps=3)


@pytest.mark.parametrize("layout", ["bf16", "original"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_views_of_other_layouts_have_the_bits_of_the_pruned_checkpoint(
    layout: str, backend: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = write_lively(tmp_path / "source", SMALL, layout)
    plan = Plan("gpt_oss", SMALL.experts, ((4, 1, 2), (0, 2, 3), (3, 1, 0)))
    prune(source, tmp_path / "out", plan)
    pruned = load_model(tmp_path / "out", dtype=dtype, backend=backend)
    check_same_bits(load_model(source, dtype=dtype, plan=plan, backend=backend), pruned, SMALL.vocabulary)


def test_a_plan_may_set_the_top_k(small: Path, small_model: CausalLM, tmp_path: Path) -> None:
    plan = Plan("gpt_oss", SMALL.experts, ((0, 1, 2),) * SMALL.layers, top_k=1)
    prune(small, tmp_path / "out", plan)
    backend = small_model.backend.name
    one = load_model(small, dtype=torch.float32, plan=plan, backend=backend)
    pruned = load_model(tmp_path / "out", dtype=torch.float32, backend=backend)
    check_same_bits(one, pruned, SMALL.vocabulary)
    ids = torch.arange(20)[None]
    two = load_model(small, dtype=torch.float32, plan=replace(plan, top_k=None), backend=backend)
    assert (one(ids) - two(ids)).abs().max() > 0.01
    assert (two(ids) - small_model(ids)).abs().max() > 0.01


@pytest.mark.parametrize("seed", range(4))
def test_layers_may_keep_different_numbers_of_experts(tiny: Path, seed: int) -> None:
    pytest.importorskip("transformers")
    from tests.support.oracle import FullModel

    rng = np.random.default_rng(seed)
    counts = [[1, 32, 5, 2], [31, 3, 8, 1], [4, 4, 2, 9], [2, 1, 1, 3]][seed]
    kept = tuple(tuple(int(e) for e in rng.permutation(32)[:n]) for n in counts)
    ids = torch.from_numpy(rng.integers(0, 2048, (1, 80)))
    expected = FullModel(tiny, ids).logits(kept)
    for backend, tolerance in {"reference": 1e-4, select_backend(torch.device("cpu")).name: 2e-3}.items():
        view = load_model(tiny, dtype=torch.float32, plan=Plan("gpt_oss", 32, kept), backend=backend)
        torch.testing.assert_close(view(ids), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "plan",
    [
        Plan("gpt_oss", SMALL.experts + 1, ((0,),) * SMALL.layers),
        Plan("gpt_oss", SMALL.experts, ((0,),) * (SMALL.layers + 1)),
        Plan("other", SMALL.experts, ((0,),) * SMALL.layers),
    ],
)
def test_a_plan_for_another_model_is_refused(small: Path, plan: Plan) -> None:
    with pytest.raises(PlanMismatchError, match="the plan is for"):
        load_model(small, plan=plan)
