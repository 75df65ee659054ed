"""Prompts for benchmarks: the beginnings of texts, and conversations up to the answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moe_surgery.errors import UsageError
from moe_surgery.quality.corpus import Corpus, Document

__all__ = ["check_prompts", "prompts_of"]


def prompts_of(corpus: Corpus, tokens: int, most: int | None = None) -> dict[str, list[list[int]]]:
    """Up to `most` prompts of each domain of `corpus`, as token ids.

    The first `tokens` tokens of a text (shorter texts are left out), or a conversation without its
    answer. Raises UsageError if no prompt is left, InvalidInputError naming a broken line.
    """
    by_domain: dict[str, list[list[int]]] = {domain: [] for domain in corpus.domains}
    for document in corpus.documents():
        prompts = by_domain[document.domain]
        if (most is None or len(prompts) < most) and (ids := _prompt(corpus, document, tokens)):
            prompts.append(ids)
    if not any(by_domain.values()):
        raise UsageError(f"`texts`: none has {tokens} tokens; pass longer ones or a smaller `prompt_tokens`")
    return {domain: prompts for domain, prompts in by_domain.items() if prompts}


def check_prompts(
    prompts: Mapping[str, Sequence[Sequence[int]]], max_new_tokens: int, contexts: Iterable[int]
) -> None:
    """Raise UsageError unless each prompt and `max_new_tokens` more fit into models of these contexts."""
    most = min(contexts)
    for domain, some in prompts.items():
        if (longest := max(map(len, some), default=0)) + max_new_tokens > most:
            raise UsageError(
                f"`texts`: a prompt of '{domain}' has {longest} tokens; with `max_new_tokens` "
                f"{max_new_tokens} that exceeds the models' {most}"
            )


def _prompt(corpus: Corpus, document: Document, tokens: int) -> list[int]:
    if document.chat is not None:
        question = document.chat.question()
        return corpus.encode_chat(question, document.where) if question.messages else []
    ids = corpus.tokenizer.encode(document.text or "")
    return ids[:tokens] if len(ids) >= tokens else []
