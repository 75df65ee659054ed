"""Questions with one right answer: answered greedily, compared exactly."""

from __future__ import annotations

from collections.abc import Sequence

from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.text import Text
from moe_surgery.runtime.until import generate_until

__all__ = ["answer_line", "exact_match"]

BATCH_PROMPTS = 32


def answer_line(model: CausalLM, text: Text, prompts: Sequence[str], max_new_tokens: int = 24) -> list[str]:
    """The first line of each prompt's greedy continuation, without the blanks around it.

    Raises UsageError for an empty prompt and for one that leaves no space in the model's context.
    """
    lines = []
    for first in range(0, len(prompts), BATCH_PROMPTS):
        ids = [text.encode(prompt) for prompt in prompts[first : first + BATCH_PROMPTS]]
        found = generate_until(model, text, ids, until=("\n",), max_new_tokens=max_new_tokens)
        lines += [continuation.text.strip() for continuation in found]
    return lines


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of `answers` that equal the expected ones."""
    return sum(a == e for a, e in zip(answers, expected, strict=True)) / len(expected)
