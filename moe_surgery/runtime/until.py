"""Continuations of prompts that end at given texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

from moe_surgery.runtime.generate import stream
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.sampling import Sampling
from moe_surgery.runtime.text import Text, TextStream

__all__ = ["Continuation", "cut", "generate_until"]


@dataclass(slots=True)
class Continuation:
    """What a model adds to a prompt.

    `tokens` are all that were generated, those that ended it included; `text` ends before them. `finished` is
    False where only the limit of new tokens ended it.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of `until` in it."""
    for end in until:
        text = text.split(end, 1)[0]
    return text


def generate_until(
    model: CausalLM,
    text: Text,
    prompts: Sequence[Sequence[int]],
    *,
    until: Sequence[str] = (),
    max_new_tokens: int = 256,
    stop_tokens: Sequence[int] | None = None,
    sampling: Sampling | None = None,
) -> list[Continuation]:
    """Continue `prompts` (token ids, of any lengths), each until a stop token or one of the texts `until`.

    A special token written out in `until` is a stop token. `stop_tokens` default to the checkpoint's.
    Raises UsageError for an empty prompt and for one that leaves no space in the model's context.
    """
    stops = set(model.config.eos_token_ids if stop_tokens is None else stop_tokens)
    stops |= {ids[0] for end in until if len(ids := text.encode(end)) == 1 and not text.decode(ids)}
    ends = [end for end in until if end]
    longest = max(map(len, ends), default=0)
    rows = [Continuation() for _ in prompts]
    texts = [TextStream(text) for _ in prompts]
    steps = stream(
        model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=sorted(stops)
    )
    with closing(steps):  # type: ignore[type-var]
        for step in steps:
            for row, decoded, token in zip(rows, texts, step.tokens.tolist(), strict=True):
                if row.finished:
                    continue
                row.tokens.append(token)
                if token in stops:
                    row.finished = True
                    continue
                added = decoded.push(token)
                tail = row.text[max(0, len(row.text) - longest) :] + added
                row.text += added
                row.finished = any(end in tail for end in ends)
            if all(row.finished for row in rows):
                break
    for row, decoded in zip(rows, texts, strict=True):
        row.text = cut(row.text + decoded.flush(), ends)
    return rows
