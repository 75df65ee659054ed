"""Cross-entropy is the mean surprise at each token, given those before it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from moe_surgery import load_model  # noqa: E402
from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.quality.loss import cross_entropy  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model("example:tiny", dtype=torch.float32)


@pytest.mark.parametrize("length", [2, 3, 40])
def test_it_is_the_mean_over_tokens_of_the_negative_log_likelihood(model: CausalLM, length: int) -> None:
    tokens = torch.randint(0, 2048, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    expected = 0.0
    for seen in range(1, length):
        logits = model(torch.tensor([tokens[:seen]]))[0, -1].double()
        expected += float(logits.logsumexp(0) - logits[tokens[seen]]) / (length - 1)
    assert cross_entropy(model, tokens) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tokens", [[], [5]])
def test_fewer_than_two_tokens_have_no_loss(model: CausalLM, tokens: list[int]) -> None:
    with pytest.raises(UsageError, match="a loss needs at least two tokens"):
        cross_entropy(model, tokens)


def test_more_tokens_than_the_context_are_refused(model: CausalLM) -> None:
    with pytest.raises(UsageError, match="a context of 4097 tokens; this model supports 1 to 4096"):
        cross_entropy(model, [0] * 4098)
