"""Continuations end where they should."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from moe_surgery.runtime.generate import generate  # noqa: E402
from moe_surgery.runtime.load import load_model  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.runtime.until import generate_until  # noqa: E402

PROMPTS = ("Question: What is 2 + 3?\nAnswer:", "The number 12 is written", "Spell", "def add(a, b):\n")
NEW = 24


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model("example:tiny", dtype=torch.float32, backend="reference")


@pytest.fixture(scope="module")
def text() -> Text:
    return Text("example:tiny")


@pytest.fixture(scope="module")
def whole(model: CausalLM, text: Text) -> list[list[int]]:
    return generate(model, [text.encode(prompt) for prompt in PROMPTS], max_new_tokens=NEW).tokens


@pytest.mark.parametrize("until", [(), ("\n",), ("e", "zz"), (" t", "5\n", "."), ("Question:", "\n\n")])
def test_continuations_are_the_greedy_ones_up_to_the_first_end(
    until: tuple[str, ...], model: CausalLM, text: Text, whole: list[list[int]]
) -> None:
    prompts = [text.encode(prompt) for prompt in PROMPTS]
    found = generate_until(model, text, prompts, until=until, max_new_tokens=NEW)
    for tokens, continuation in zip(whole, found, strict=True):
        ended = [n for n in range(1, len(tokens) + 1) if any(u in text.decode(tokens[:n]) for u in until)]
        stopped = tokens[-1] in model.config.eos_token_ids
        assert continuation.tokens == tokens[: ended[0] if ended else len(tokens)]
        assert continuation.finished == bool(ended or stopped)
        full = text.decode(tokens)
        at = min((full.index(u) for u in until if u in text.decode(continuation.tokens)), default=len(full))
        assert continuation.text == full[:at]


def test_a_special_token_written_out_stops(model: CausalLM, text: Text) -> None:
    (prompt,) = [text.encode(PROMPTS[0])]
    (found,) = generate_until(
        model, text, [prompt], until=("<|return|>",), stop_tokens=(), max_new_tokens=NEW
    )
    (whole,) = generate(model, [prompt], max_new_tokens=NEW, stop_tokens=text.encode("<|return|>")).tokens
    assert found.tokens == whole
