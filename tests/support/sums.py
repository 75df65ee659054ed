"""Small sums with their answers, as the embedded model knows them."""

from __future__ import annotations

import random

from moe_surgery.examples.skills import draw_question

__all__ = ["arithmetic"]


def arithmetic(rng: random.Random, characters: int) -> str:
    """Questions and answers, at least `characters` long."""
    lines = ""
    while len(lines) < characters:
        question = draw_question("arithmetic", rng)
        lines += f"{question.prompt} {question.answer}\n"
    return lines
