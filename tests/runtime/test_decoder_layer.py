"""One decoder layer against transformers' hidden states before and after it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

from moe_surgery.kernels.reference.attention import attention, visible
from moe_surgery.runtime.decoder_layer import attention_block, decoder_layer, moe_block, route
from moe_surgery.runtime.load import load_model
from moe_surgery.runtime.model import CausalLM
from tests.runtime.conftest import SMALL, WINDOW
from tests.support import oracle

TOKENS = 4 * WINDOW


@pytest.fixture(scope="module")
def model(small: Path) -> CausalLM:
    return load_model(small, dtype=torch.float32, backend="reference")


@pytest.fixture(scope="module")
def states(small: Path) -> list[torch.Tensor]:
    """transformers' hidden states [1, tokens, hidden] before each layer and, normed, after the last."""
    ids = torch.randint(0, SMALL.vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return list(oracle.load_model(small)(ids, output_hidden_states=True).hidden_states)


def attend_with(sinks: torch.Tensor, window: int | None):
    """Attention of one text to itself."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        positions = torch.arange(q.shape[2])[None]
        return attention(q, k, v, sinks, visible(positions, positions, window))

    return attend


@pytest.mark.parametrize("number", range(SMALL.layers))
def test_a_layer_is_the_one_of_transformers(model: CausalLM, states: list[torch.Tensor], number: int) -> None:
    layer, backend, config = model.layers[number], model.backend, model.config
    window = config.sliding_windows[number]
    assert (window is None) == (number == 1)  # sliding and full layers are both covered
    cos, sin = model.rope(torch.arange(TOKENS)[None], backend)
    attend = attend_with(layer.sinks, window)
    x = decoder_layer(backend, config, layer, states[number], cos, sin, attend)
    if number == SMALL.layers - 1:
        x = backend.rms_norm(x, model.norm, config.rms_norm_eps)
    torch.testing.assert_close(x, states[number + 1], rtol=1e-4, atol=1e-4)

    # It is the sum of its parts, and the block names the experts that the router chose.
    between = attention_block(backend, config, layer, states[number], cos, sin, attend)
    after, ids, _ = moe_block(backend, config, layer, between)
    assert torch.equal(ids, route(backend, config, layer, between[0])[1])
    assert number == SMALL.layers - 1 or torch.equal(after, x)
