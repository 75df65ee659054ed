"""Questions with one right answer: answered greedily, compared exactly."""

from __future__ import annotations

from collections.abc import Sequence

from moe_surgery.runtime.generate import generate
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.text import Text

__all__ = ["answer_line", "exact_match"]

BATCH_PROMPTS = 32


def answer_line(model: CausalLM, text: Text, prompts: Sequence[str], max_new_tokens: int = 24) -> list[str]:
    """The first line of each prompt's greedy continuation, without the blanks around it.

    Raises UsageError for an empty prompt and for one that leaves no space in the model's context.
    """
    stops = (*model.config.eos_token_ids, text.encode("\n")[-1])
    lines = []
    for first in range(0, len(prompts), BATCH_PROMPTS):
        ids = [text.encode(prompt) for prompt in prompts[first : first + BATCH_PROMPTS]]
        generated = generate(model, ids, max_new_tokens=max_new_tokens, stop_tokens=stops)
        lines += [_first_line(text.decode([t for t in row if t not in stops])) for row in generated.tokens]
    return lines


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of `answers` that equal the expected ones."""
    return sum(a == e for a, e in zip(answers, expected, strict=True)) / len(expected)


def _first_line(text: str) -> str:
    return text.strip().split("\n", maxsplit=1)[0].strip()
