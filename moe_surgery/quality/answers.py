"""A model's own answers to conversations, kept in a file, so that an interrupted run goes on."""

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

__all__ = ["Answers", "generate_answers"]

TOGETHER = 4
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Answers:
    """Passages of prompt and answer, read anew from their file (a line of JSON each) every time."""

    file: Path

    def __iter__(self) -> Iterator[Passage]:
        """Raises InvalidInputError for a damaged file."""
        for number, line in enumerate(_whole_lines(self.file), 1):
            if number == 1:
                continue  # says which job the file belongs to
            try:
                said = json.loads(line)
                yield Passage(said["domain"], tuple(said["tokens"]), said["answer"])
            except (ValueError, KeyError, TypeError):
                raise InvalidInputError(
                    f"{printable_path(self.file)}: line {number} is damaged; remove the file to start anew"
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

    `stop_tokens`: the model's unless given. A file that an interrupted run of the same `job` left is
    continued. Prompts that leave no room in the corpus's context are skipped; returns the answers and
    the number skipped. `progress` is told each answered prompt. Raises UsageError where there is
    nothing to answer, OutputError where the file cannot be written.
    """
    if new_tokens < 1:
        raise UsageError(f"`generate` {new_tokens}: must be at least 1")
    fits, skipped = _fitting(corpus, new_tokens)
    if not fits:
        raise UsageError(
            f"`generate` {new_tokens}: no prompt leaves room for it in a context of {corpus.context} tokens"
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
            for first in range(start, len(fits), TOGETHER):
                batch = fits[first : first + TOGETHER]
                found = generate(
                    model, [p for _, p in batch], max_new_tokens=new_tokens, stop_tokens=stop_tokens
                )
                for (domain, prompt), answer in zip(batch, found.tokens, strict=True):
                    said = {"domain": domain, "tokens": [*prompt, *answer], "answer": len(prompt)}
                    print(json.dumps(said), file=out)
                out.flush()
                if progress:
                    progress(len(batch))
    except OSError as error:
        raise OutputError(f"{printable_path(file)}: cannot write: {error.strerror}") from error
    return Answers(file), skipped


def _fitting(corpus: Corpus, new_tokens: int) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
    """Prompts with their domains that leave room for an answer, and how many leave none in the context.

    `max_tokens` of the corpus bounds prompts and answers of a domain together.
    """
    fits: list[tuple[str, tuple[int, ...]]] = []
    skipped = 0
    left: dict[str, int | None] = dict.fromkeys(corpus.domains, corpus.max_tokens)
    for domain, prompt in corpus.prompts():
        needed, room = len(prompt) + new_tokens, left[domain]
        if needed > corpus.context:
            skipped += 1
        elif room is None or needed <= room:
            fits.append((domain, prompt))
            left[domain] = None if room is None else room - needed
        else:
            left[domain] = 0
    return fits, skipped


def _finished(file: Path, job: str, wanted: int) -> tuple[int, int] | None:
    """Answers in the file of an interrupted run and where they end in bytes; None for another job's.

    Answers of a group that is not whole do not count: what was generated beside an answer may show in
    its last bits, and so in its tokens.
    """
    if not file.exists():
        return None
    lines = list(_whole_lines(file))
    try:
        if json.loads(lines[0]).get("job") != job:
            return None
    except (ValueError, IndexError, AttributeError):
        return None
    done = len(lines) - 1
    if done < wanted:
        done -= done % TOGETHER
    return done, sum(len(line.encode()) for line in lines[: 1 + done])


def _whole_lines(file: Path) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8", newline="\n") as opened:
            for line in opened:
                if line.endswith("\n"):  # a killed run may leave half a line
                    yield line
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{printable_path(file)}: cannot read: {error}") from None
