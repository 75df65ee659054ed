"""A round of speculative decoding by experts of the draft (views of the target) and tokens drafted."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from moe_surgery.errors import MoeSurgeryError
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.speculation.speculate import Speculation
from moe_surgery.runtime.step_bytes import weight_bytes
from moe_surgery.runtime.text import Text

ROUNDS = 12
PROMPT = "Question: What is 17 + 26?\nAnswer: 43.\nQuestion: What is 35 + 48?\nAnswer:"


@pytest.fixture(scope="module")
def prompt(checkpoint: str) -> list[int]:
    try:
        return Text(checkpoint).encode(PROMPT)
    except MoeSurgeryError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("length", [1, 4, 8], ids="{} drafted".format)
@pytest.mark.parametrize("experts", [4, 16, None], ids=["4 experts", "16 experts", "all experts"])
def test_round(benchmark, target: CausalLM, shown: CausalLM, prompt: list[int], length: int) -> None:
    """Drafting, checking, and taking back what was refused. All experts: every drafted token is accepted."""
    benchmark.group = f"speculation round, {length} drafted"
    new = (ROUNDS + 2) * (length + 1)  # more than can come of the rounds
    run = Speculation(target, shown, [prompt], draft_length=length, max_new_tokens=new, stop_tokens=())
    rounds = iter(run)
    next(rounds)  # reads the prompt
    next(rounds)  # sets up what later ones use
    benchmark.pedantic(next, args=(rounds,), rounds=ROUNDS)
    added = weight_bytes(shown, shared_with=target)
    benchmark.extra_info.update(run.statistics.as_dict(), draft_weight_bytes_added=added)
