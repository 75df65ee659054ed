"""Another top-k than the model's: the logits are transformers' with `num_experts_per_tok` set."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import Plan, load_model, plan_keeping, plan_random, prune, verify  # noqa: E402
from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.runtime.generate import generate  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.view import view  # noqa: E402
from tests.runtime.conftest import SMALL  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.checkpoints import load_config  # noqa: E402

TINY_TOP_KS = (1, 3, 6, 32)
TOLERANCE = {"reference": 1e-4, "native": 2e-3}


@cache
def expected_logits(folder: Path, tokens: torch.Tensor, top_k: int) -> torch.Tensor:
    reference = oracle.load_model(folder, num_experts_per_tok=top_k)
    assert {layer.mlp.router.top_k for layer in reference.model.layers} == {top_k}
    return oracle.logits_of(reference, tokens)


def check(model: CausalLM, tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Close at every token with the reference; with activations rounded to 16 bits at the median one."""
    backend = model.backend.name
    worst = (model(tokens) - expected).abs().amax(dim=-1).flatten()
    assert (worst.max() if backend == "reference" else worst.median()) <= TOLERANCE[backend]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 2048, (1, 90), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("top_k", TINY_TOP_KS)
def test_the_embedded_model_with_another_top_k(
    top_k: int, tiny: Path, tiny_model: CausalLM, tokens: torch.Tensor
) -> None:
    backend, expected = tiny_model.backend.name, expected_logits(tiny, tokens, top_k)
    usual = tiny_model(tokens)
    assert (expected - usual).abs().max() > 0.1
    loaded = load_model(tiny, dtype=torch.float32, backend=backend, top_k=top_k)
    assert {layer.top_k for layer in loaded.layers} == {top_k}
    check(loaded, tokens, expected)
    viewed = view(tiny_model, None, top_k)
    planned = load_model(
        tiny, dtype=torch.float32, plan=Plan("gpt_oss", 32, (tuple(range(32)),) * 4, top_k), backend=backend
    )
    by_layer = load_model(tiny, dtype=torch.float32, backend=backend, top_k=top_k, one_layer=True)
    for other in (viewed, planned, by_layer):
        assert torch.equal(other(tokens), loaded(tokens))
    assert torch.equal(tiny_model(tokens), usual)


@pytest.mark.parametrize("top_k", range(1, SMALL.experts + 1))
def test_every_top_k_in_prefill_and_in_steps(top_k: int, small: Path, backend: str) -> None:
    model = load_model(small, dtype=torch.float32, backend=backend, top_k=top_k)
    prompt = torch.randint(0, SMALL.vocabulary, (1, 12), generator=torch.Generator().manual_seed(top_k))
    result = generate(model, [prompt[0].tolist()], max_new_tokens=8, stop_tokens=()).tokens[0]
    whole = torch.cat((prompt, torch.tensor([result])), dim=1)
    expected = expected_logits(small, whole, top_k)
    torch.testing.assert_close(model(whole), expected, rtol=0, atol=TOLERANCE[backend])
    chosen = expected[0, prompt.shape[1] - 1 : -1].gather(1, torch.tensor(result)[:, None])[:, 0]
    best = expected[0, prompt.shape[1] - 1 : -1].max(dim=-1).values
    assert ((best - chosen) <= 2 * TOLERANCE[backend]).all()


@pytest.mark.parametrize(("kept", "top_k"), [(8, 1), (8, 6), (8, 8), (3, 2), (1, 1)])
def test_a_pruned_checkpoint_has_it_in_its_config(
    kept: int, top_k: int, tiny: Path, backend: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    result = prune(tiny, tmp_path / "out", lambda m: plan_random(kept, 3, m), top_k=top_k)
    assert result.program.top_k == top_k
    config = load_config(tmp_path / "out")
    assert (config["num_experts_per_tok"], config["experts_per_token"]) == (top_k, top_k)
    expected = oracle.logits_of(oracle.load_model(tmp_path / "out"), tokens)
    pruned = load_model(tmp_path / "out", dtype=torch.float32, backend=backend)
    check(pruned, tokens, expected)
    plan = result.program.plan
    assert plan.top_k == top_k
    for viewed in (
        load_model(tiny, dtype=torch.float32, plan=plan, backend=backend),
        load_model(tiny, dtype=torch.float32, plan=plan.with_top_k(1), top_k=top_k, backend=backend),
    ):
        assert torch.equal(viewed(tokens), pruned(tokens))
    found = verify(tmp_path / "out", source=tiny)
    assert (found.problems, found.notes) == ((), ())


def test_a_view_keeps_the_top_k_of_the_model_it_is_of(small: Path) -> None:
    model = load_model(small, top_k=4)
    plan = Plan("gpt_oss", SMALL.experts, ((0, 1, 2, 3, 4), (4, 3, 2, 1), (2, 0, 1)))
    assert [layer.top_k for layer in view(model, plan).layers] == [4, 4, 3]
    assert [layer.top_k for layer in view(model, plan, 5).layers] == [5, 4, 3]
    assert [layer.top_k for layer in view(model, plan.with_top_k(1)).layers] == [1, 1, 1]


@pytest.mark.parametrize("top_k", [0, -1, 6])
def test_a_top_k_outside_the_experts_is_refused(top_k: int, small: Path, tmp_path: Path) -> None:
    plan = Plan("gpt_oss", SMALL.experts, ((0, 1, 2),) * SMALL.layers)
    with pytest.raises(
        UsageError, match=rf"`top_k` {top_k}: .*small has 5 experts in a layer; choose 1 to 5"
    ):
        load_model(small, top_k=top_k)
    message = rf"^`top_k` {top_k}: the plan keeps 3 experts in a layer; choose 1 to 3$"
    for call in (
        lambda: plan.with_top_k(top_k),
        lambda: load_model(small, plan=plan, top_k=top_k),
        lambda: prune(small, tmp_path / "out", plan, top_k=top_k),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    with pytest.raises(UsageError, match="choose 1 to 5"):
        prune(small, tmp_path / "out", lambda m: plan_keeping(None, m), top_k=top_k)
    assert list(tmp_path.iterdir()) == []


def test_a_top_k_above_what_a_plan_keeps_is_refused_though_the_model_has_as_many(small: Path) -> None:
    plan = Plan("gpt_oss", SMALL.experts, ((0, 1, 2),) * SMALL.layers)
    with pytest.raises(UsageError, match=r"`top_k` 4: the plan keeps 3 experts in a layer; choose 1 to 3"):
        load_model(small, plan=plan, top_k=4)
