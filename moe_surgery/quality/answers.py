"""A model's own answers to conversations, kept in a file, so that an interrupted run can resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.errors import InvalidInputError, OutputError, UsageError
from moe_surgery.quality.corpus import Corpus, Passage
from moe_surgery.runtime.generate import generate
from moe_surgery.runtime.model import CausalLM

__all__ = ["Answers", "generate_answers", "whole_lines"]

BATCH_PROMPTS = 4
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Answers:
    """Passages of prompt and answer, read from their file (a line of JSON each) on every iteration."""

    file: Path

    def __iter__(self) -> Iterator[Passage]:
        """Raises InvalidInputError for a damaged file."""
        for number, line in enumerate(whole_lines(self.file), 1):
            if number == 1:
                continue  # the job that the file belongs to
            try:
                entry = json.loads(line)
                yield Passage(entry["domain"], tuple(entry["tokens"]), entry["answer"])
            except (ValueError, KeyError, TypeError):
                raise InvalidInputError(
                    f"{printable_path(self.file)}: line {number} is damaged; delete the file to start over"
                ) from None


def generate_answers(
    model: CausalLM,
    corpus: Corpus,
    new_tokens: int,
    file: Path,
    *,
    job: str,
    stop_tokens: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> tuple[Answers, int]:
    """Greedy answers of at most `new_tokens` to all conversations of `corpus`, appended to `file`.

    `stop_tokens`: the model's unless given. The file of an interrupted run of the same `job` is
    continued. Prompts that leave no space in the corpus's context are skipped; returns the answers and
    the number skipped. `progress` is called with each batch of answered prompts.
    Raises UsageError if there is nothing to answer, OutputError if the file cannot be written.
    """
    if new_tokens < 1:
        raise UsageError(f"`generate` {new_tokens}: must be at least 1")
    fits, skipped = _fitting(corpus, new_tokens)
    if not fits:
        raise UsageError(
            f"`generate` {new_tokens}: no prompt leaves space for it in a context of {corpus.context} tokens"
            + ("" if corpus.max_tokens is None else f" and `max_tokens` {corpus.max_tokens}")
        )
    done = _finished(file, job, len(fits))
    try:
        with open(file, "r+" if done is not None else "w", encoding="utf-8") as out:
            if done is None:
                print(json.dumps({"job": job}), file=out, flush=True)
            else:
                out.seek(done[1])
                out.truncate()
            start = 0 if done is None else done[0]
            if progress:
                progress(min(start, len(fits)))
            for first in range(start, len(fits), BATCH_PROMPTS):
                batch = fits[first : first + BATCH_PROMPTS]
                generated = generate(
                    model, [p for _, p in batch], max_new_tokens=new_tokens, stop_tokens=stop_tokens
                )
                for (domain, prompt), answer in zip(batch, generated.tokens, strict=True):
                    entry = {"domain": domain, "tokens": [*prompt, *answer], "answer": len(prompt)}
                    print(json.dumps(entry), file=out)
                out.flush()
                if progress:
                    progress(len(batch))
    except OSError as error:
        raise OutputError(f"{printable_path(file)}: cannot write: {error.strerror}") from error
    return Answers(file), skipped


def _fitting(corpus: Corpus, new_tokens: int) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
    """Prompts with their domains with space for an answer, and the number of those without.

    `max_tokens` of the corpus bounds prompts and answers of a domain together.
    """
    fits: list[tuple[str, tuple[int, ...]]] = []
    skipped = 0
    remaining: dict[str, int | None] = dict.fromkeys(corpus.domains, corpus.max_tokens)
    for domain, prompt in corpus.prompts():
        needed, budget = len(prompt) + new_tokens, remaining[domain]
        if needed > corpus.context:
            skipped += 1
        elif budget is None or needed <= budget:
            fits.append((domain, prompt))
            remaining[domain] = None if budget is None else budget - needed
        else:
            remaining[domain] = 0
    return fits, skipped


def _finished(file: Path, job: str, wanted: int) -> tuple[int, int] | None:
    """Answers in the file of an interrupted run and where they end in bytes; None for another job's.

    Answers of an incomplete batch do not count: the other sequences of a batch can affect the last bits
    of an answer, and so its tokens.
    """
    if not file.exists():
        return None
    lines = list(whole_lines(file))
    try:
        if json.loads(lines[0]).get("job") != job:
            return None
    except (ValueError, IndexError, AttributeError):
        return None
    done = len(lines) - 1
    if done < wanted:
        done -= done % BATCH_PROMPTS
    return done, sum(len(line.encode()) for line in lines[: 1 + done])


def whole_lines(file: Path) -> Iterator[str]:
    """The lines of `file` that end: a killed run may leave half of one. Raises InvalidInputError if it cannot be
    read."""
    try:
        with open(file, encoding="utf-8", newline="\n") as opened:
            for line in opened:
                if line.endswith("\n"):
                    yield line
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{printable_path(file)}: cannot read: {error}") from None
