"""A pruned checkpoint computes the same as the full model with routing restricted to the kept experts.

The full model is transformers' own, with the router bias of dropped experts at minus infinity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from moe_surgery import Plan, identify_model, prune
from moe_surgery.checkpoint.checkpoint import Checkpoint
from tests.support.checkpoints import (
    Shape,
    assert_same_tensors,
    kept_tensors,
    load_config,
    load_tensors,
    make_config,
    to_bf16,
    to_original,
    write_folder,
)

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.support.oracle import FullModel, load_model, logits_of  # noqa: E402

pytestmark = pytest.mark.xdist_group("transformers")

TINY = Shape(
    layers=4,
    experts=32,
    top_k=4,
    hidden=160,
    intermediate=160,
    heads=8,
    kv_heads=2,
    head_dim=32,
    vocabulary=2048,
)
COUNTS = (1, 2, 3, 4, 5, 8, 13, 31, 32)
LENGTH = 80  # the sliding window is 64
TOLERANCE = 1e-4


def plan_of(count: int) -> Plan:
    """`count` random experts in random order, others in every layer."""
    rng = np.random.default_rng([7, count])
    layers = tuple(
        tuple(int(e) for e in rng.choice(TINY.experts, count, replace=False)) for _ in range(TINY.layers)
    )
    return Plan("gpt_oss", TINY.experts, layers)


def plan_all(count: int) -> Plan:
    return Plan("gpt_oss", count, (tuple(range(count)),) * TINY.layers)


@pytest.fixture(scope="session")
def tiny() -> Path:
    with Checkpoint.open("example:tiny") as checkpoint:
        assert identify_model(checkpoint).experts == TINY.experts
        return checkpoint.path


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(0, TINY.vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def full(tiny: Path, tokens: torch.Tensor) -> FullModel:
    return FullModel(tiny, tokens)


@pytest.fixture(scope="session")
def tiny_bf16(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "bf16"
    prune(tiny, out, plan_all(TINY.experts), store="bf16")
    return out


@pytest.fixture(scope="session")
def tiny_original(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "hub" / "original"
    tensors = to_original(load_tensors(tiny), TINY)
    return write_folder(folder, tensors, make_config(TINY, "original"), shards=3)


def check_logits(folder: Path, plan: Plan, full: FullModel, tokens: torch.Tensor) -> None:
    got = logits_of(load_model(folder), tokens)
    torch.testing.assert_close(got, full.logits(plan.layers), rtol=0, atol=TOLERANCE)


# The ways from example:tiny to a pruned checkpoint: (source, dtype, storage of the result).
ROUTES = {
    "keep": ("tiny", "keep", "mxfp4"),
    "bf16": ("tiny", "bf16", "bf16"),
    "mxfp4": ("tiny", "mxfp4", "mxfp4"),
    "bf16, then keep": ("tiny_bf16", "keep", "bf16"),
    "bf16, then mxfp4": ("tiny_bf16", "mxfp4", "mxfp4"),
}


@pytest.mark.parametrize(
    ("route", "count"),
    [
        pytest.param(route, count, marks=() if route == "keep" or count in (1, 5, 31) else pytest.mark.slow)
        for route in ROUTES
        for count in COUNTS
    ],
)
def test_logits_are_those_of_the_full_model_routing_to_the_kept_experts(
    route: str,
    count: int,
    full: FullModel,
    tokens: torch.Tensor,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    source, dtype, storage = ROUTES[route]
    plan, out = plan_of(count), tmp_path / "out"
    prune(request.getfixturevalue(source), out, plan, store=dtype)

    config = load_config(out)
    top_k = min(TINY.top_k, count)
    assert config["num_local_experts"] == count
    assert (config["num_experts_per_tok"], config["experts_per_token"]) == (top_k, top_k)
    assert ("quantization_config" in config) == (storage == "mxfp4")
    check_logits(out, plan, full, tokens)


def test_the_reference_tells_plans_apart(full: FullModel) -> None:
    every = full.logits(plan_all(TINY.experts).layers)
    for count in COUNTS[:-1]:
        assert (full.logits(plan_of(count).layers) - every).abs().max() > 100 * TOLERANCE
    assert torch.equal(full.logits(plan_of(32).layers), every)


@pytest.mark.parametrize("dtype", ["keep", "bf16", "mxfp4"])
def test_the_original_layout_gives_the_tensors_of_the_hub_layout(
    dtype: str,
    tiny: Path,
    tiny_original: Path,
    full: FullModel,
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    plan = plan_of(6)
    run: Callable[..., object] = partial(prune, plan=plan, store=dtype, max_shard_size=300_000)
    run(tiny, tmp_path / "hub")
    run(tiny_original, tmp_path / "original")
    got = load_tensors(tmp_path / "original")
    assert_same_tensors(got, load_tensors(tmp_path / "hub"))
    expected = kept_tensors(load_tensors(tiny), plan.layers)
    assert_same_tensors(got, to_bf16(expected) if dtype == "bf16" else expected)
    # Its config.json is rewritten, so the whole model is compared too.
    check_logits(tmp_path / "original", plan, full, tokens)


@pytest.mark.parametrize("dtype", ["keep", "mxfp4"])
def test_a_model_that_transformers_saved_again_gives_the_tensors_of_the_first(
    dtype: str, tiny: Path, full: FullModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    load_model(tiny, torch.bfloat16).save_pretrained(tmp_path / "saved")
    plan = plan_of(5)
    prune(tmp_path / "saved", tmp_path / "out", plan, store=dtype)
    expected = kept_tensors(load_tensors(tiny), plan.layers)
    assert_same_tensors(load_tensors(tmp_path / "out"), expected if dtype == "mxfp4" else to_bf16(expected))
    check_logits(tmp_path / "out", plan, full, tokens)
