"""A model with its experts on disk has the bits of the same model in memory, whatever fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from benchmarks.layout import Shape as FullShape  # noqa: E402
from benchmarks.make_checkpoint import make_checkpoint  # noqa: E402
from moe_surgery import generate, inspect, load_model, plan_random  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.residency.device_slots import DeviceSlots  # noqa: E402
from moe_surgery.runtime.residency.pool import FEWEST_SLOTS  # noqa: E402
from moe_surgery.runtime.sampling import Sampling  # noqa: E402
from moe_surgery.runtime.speculation.speculate import speculate  # noqa: E402
from moe_surgery.runtime.view import view  # noqa: E402
from tests.kernels.native_cases import needs_native  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.runtime.residency.conftest import load_resident  # noqa: E402
from tests.support.checkpoints import Shape  # noqa: E402

TINY = "example:tiny"
ALL = 128  # experts of the embedded model


def check_same_bits(one: CausalLM, other: CausalLM, batch: int = 1, prompt: int = 30, steps: int = 8) -> None:
    """Equal logits from a prompt, padded where there are several, and from the steps after it."""
    random = torch.Generator().manual_seed(prompt)
    vocabulary = one.config.vocab_size
    ids = torch.randint(0, vocabulary, (batch, prompt + steps), generator=random)
    mask = torch.ones(batch, prompt, dtype=torch.int64)
    mask[1:, :3] = 0
    caches = [model.new_cache(batch, prompt + steps) for model in (one, other)]
    assert torch.equal(*(m(ids[:, :prompt], c, mask) for m, c in zip((one, other), caches, strict=True)))
    for i in range(prompt, prompt + steps):
        token = ids[:, i : i + 1]
        assert torch.equal(*(m(token, c) for m, c in zip((one, other), caches, strict=True)))


@pytest.fixture(scope="module")
def whole() -> CausalLM:
    return load_model(TINY)


@needs_native
@pytest.mark.parametrize("experts", [FEWEST_SLOTS, 3, 5, 8, 33, 100, ALL])
def test_bits_are_those_of_the_model_in_memory(whole: CausalLM, experts: int) -> None:
    model = load_resident(TINY, experts)
    check_same_bits(model, whole)
    check_same_bits(model, whole, batch=3)
    assert len(model.pool.resident) <= experts


@needs_native
def test_with_two_slots_every_step_reads_every_expert(whole: CausalLM) -> None:
    model = load_resident(TINY, FEWEST_SLOTS)
    cache, expected = model.new_cache(1, 20), whole.new_cache(1, 20)
    for token in range(20):
        before = model.pool.counts.copy()
        ids = torch.tensor([[token]])
        assert torch.equal(model(ids, cache), whole(ids, expected))
        counts = model.pool.counts.since(before)
        assert (counts.total("there"), counts.total("missed")) == (0, 16)  # 4 layers, 4 experts a token


@needs_native
@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_any_layout_and_any_number_of_shards(tmp_path: Path, layout: str, shards: int) -> None:
    shape = Shape(layers=3, experts=5, top_k=2, vocabulary=40)
    folder = write_lively(tmp_path / "model", shape, layout, shards=shards)
    for experts in (2, 7, 15):
        check_same_bits(load_resident(folder, experts), load_model(folder), batch=2)


@needs_native
def test_a_long_prompt_reads_each_expert_once(whole: CausalLM) -> None:
    model = load_resident(TINY, 4)
    ids = torch.randint(0, model.config.vocab_size, (1, 480), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(ids), whole(ids))
    counts = model.pool.counts
    read = counts.total("missed") + counts.total("ahead") + counts.total("wrong")
    assert counts.total("there") == 0
    assert 80 < read <= ALL
    assert counts.total("nbytes") == read * model.pool.files.nbytes


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_compute_dtypes(dtype: torch.dtype) -> None:
    check_same_bits(load_resident(TINY, 9, dtype=dtype), load_model(TINY, dtype=dtype), batch=2)


def test_the_reference_backend_differs_by_rounding() -> None:
    options: dict[str, Any] = {"backend": "reference", "dtype": torch.float32}
    ids = torch.arange(30)[None]
    logits = load_resident(TINY, 6, **options)(ids)
    torch.testing.assert_close(logits, load_model(TINY, **options)(ids), rtol=1e-4, atol=1e-4)


@needs_native
def test_plans_and_views(whole: CausalLM) -> None:
    plan = plan_random(8, 0, inspect(TINY))
    pruned = view(whole, plan)
    check_same_bits(load_resident(TINY, 6, plan=plan), pruned, batch=2)
    model = load_resident(TINY, 40, residency=plan)
    check_same_bits(view(model, plan), pruned)
    check_same_bits(model, whole)


@needs_native
@pytest.mark.parametrize("experts", [4, 40])
def test_drafts_with_the_resident_experts_change_nothing(whole: CausalLM, experts: int) -> None:
    plan = plan_random(8, 0, inspect(TINY))
    model = load_resident(TINY, experts, residency=plan)
    prompts = [[5, 6, 7, 8], [9, 10]]
    sampling = Sampling(temperature=0.0)
    expected = generate(whole, prompts, max_new_tokens=12, sampling=sampling, stop_tokens=())
    found = speculate(
        model,
        view(model, plan),
        prompts,
        draft_length=3,
        max_new_tokens=12,
        sampling=sampling,
        stop_tokens=(),
    )
    assert found.tokens == expected.tokens


@needs_native
def test_slots_of_a_device(whole: CausalLM) -> None:
    """With tensors on the CPU in place of another device's."""
    model = load_resident(TINY, 20)
    for capacity in (1, 10, ALL):
        model.device_slots = DeviceSlots(model.pool, torch.device("cpu"), capacity)
        check_same_bits(model, whole)


@pytest.mark.slow
@needs_native
def test_layers_of_full_width(tmp_path: Path) -> None:
    shape = FullShape(2, 32, 4, 2880, 2880, 64, 8, 64, 512, 128, 4096, 32.0)
    make_checkpoint(tmp_path / "model", shape, 3)
    whole = load_model(tmp_path / "model")
    for experts in (2, 5, 20, 64):
        check_same_bits(load_resident(tmp_path / "model", experts), whole, prompt=12, steps=6)
