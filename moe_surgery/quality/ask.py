"""Questions put to several models: replies are generated, choices are scored."""

from __future__ import annotations

import logging
from collections import Counter as Counted
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_surgery.errors import UsageError
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.quality.accuracy import Accuracy, compare
from moe_surgery.quality.candidates import Candidate
from moe_surgery.quality.conversation import common_length
from moe_surgery.quality.corpus import Corpus, Passage
from moe_surgery.quality.layers import LayerModel
from moe_surgery.quality.likelihood import BATCH_TOKENS, log_likelihoods
from moe_surgery.quality.questions import Question, QuestionFile
from moe_surgery.quality.replies import Reply, ReplyFile, choose
from moe_surgery.quality.resume import job_digest
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.text import Text
from moe_surgery.runtime.until import cut, generate_until
from moe_surgery.version import __version__

__all__ = ["MAX_NEW_TOKENS", "Answered", "Encoded", "Respondent", "ask", "encode_questions"]

MAX_NEW_TOKENS = 256
MOST_PROMPTS = 32
CHOICE_QUESTIONS = 64
log = logging.getLogger("moe_surgery")


@dataclass(frozen=True, slots=True)
class Respondent:
    """A model to ask. `key` identifies it in a file of replies.

    `candidate` is the model layer by layer, for choices; `load` has it all in memory, for replies.
    """

    name: str
    key: str
    candidate: Candidate
    load: Callable[[], CausalLM]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A question as tokens: the prompt, or for a choice the passage of each one."""

    prompt: tuple[int, ...] = ()
    choices: tuple[Passage, ...] = ()


def encode_questions(
    questions: Sequence[Question], text: Text, *, context: int, max_new_tokens: int
) -> list[Encoded]:
    """All questions as tokens. Raises InvalidInputError or UsageError naming file and line for one that the
    chat template does not take, or that does not fit `context` with its answer."""
    if max_new_tokens < 1:
        raise UsageError(f"`max_new_tokens` {max_new_tokens}: must be at least 1")
    corpus = Corpus((), text, context, None, {})
    encoded = []
    for question in questions:
        if question.choices:
            passages = tuple(_choice(corpus, question, choice) for choice in question.choices)
            encoded.append(Encoded(choices=passages))
            needed = max(len(passage.tokens) for passage in passages)
        else:
            encoded.append(Encoded(tuple(_prompt(corpus, question))))
            needed = len(encoded[-1].prompt) + max_new_tokens
        if needed > context:
            also = "" if question.choices else f" with `max_new_tokens` {max_new_tokens}"
            raise UsageError(f"{question.where}: takes {needed} tokens{also}; the context is {context}")
    return encoded


def _prompt(corpus: Corpus, question: Question) -> list[int]:
    if question.chat is not None:
        return corpus.encode_chat(question.chat, question.where)
    return corpus.encode(question.prompt or "", question.where)


def _choice(corpus: Corpus, question: Question, choice: str) -> Passage:
    """The question with a choice as its answer: the assistant's message, or after the prompt and a space."""
    if question.chat is not None:
        message = {"role": "assistant", "content": choice}
        answered = replace(question.chat, messages=(*question.chat.messages, message))
        tokens, start = corpus.encode_answered(answered, question.where)
        return Passage(question.domain, tuple(tokens), start)
    prompt = question.prompt or ""
    space = "" if prompt[-1].isspace() or choice[0].isspace() else " "
    stem = prompt.rstrip() or prompt  # blanks belong to the word after them
    tokens = corpus.encode(prompt + space + choice, question.where)
    start = common_length(tokens, corpus.encode(stem, question.where))
    return Passage(question.domain, tuple(tokens), max(1, start))


@dataclass(frozen=True, slots=True)
class Answered:
    """The replies of models to all questions of `files`; `replies[0]` are the full model's."""

    files: tuple[QuestionFile, ...]
    encoded: list[Encoded]
    replies: list[list[Reply]]

    @property
    def questions(self) -> dict[str, list[dict[str, object]]]:
        """The files of each domain: {"name", "xxh3_128", "questions"}."""
        listed: dict[str, list[dict[str, object]]] = {}
        for file in self.files:
            for domain, count in Counted(q.domain for q in file.questions).items():
                entry = {"name": file.name, "xxh3_128": file.digest, "questions": count}
                listed.setdefault(domain, []).append(entry)
        return listed

    def accuracies(self) -> list[dict[str, Accuracy]]:
        """Each model's accuracy by domain, beside the full model's."""
        return [self._accuracy(replies) for replies in self.replies]

    def _accuracy(self, replies: Sequence[Reply]) -> dict[str, Accuracy]:
        by_domain: dict[str, list[tuple[str, bool, bool]]] = {}
        for question, reply, full in zip(_all(self.files), replies, self.replies[0], strict=True):
            by_domain.setdefault(question.domain, []).append((question.name, reply.right, full.right))
        return {domain: compare(*zip(*rows, strict=True)) for domain, rows in by_domain.items()}

    def passages(self) -> list[Passage]:
        """Each question followed by the full model's reply, or by the right choice."""
        found = []
        for question, tokens, reply in zip(_all(self.files), self.encoded, self.replies[0], strict=True):
            if question.choices:
                found.append(tokens.choices[question.choices.index(question.answers[0])])
            else:
                found.append(Passage(question.domain, (*tokens.prompt, *reply.tokens), len(tokens.prompt)))
        return found


def ask(
    files: tuple[QuestionFile, ...],
    text: Text,
    model: LayerModel | CausalLM,
    respondents: Sequence[Respondent],
    *,
    context: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    stop_tokens: Sequence[int] | None = None,
    file: Path | None = None,
    job: object = None,
    progress: OnProgress | None = None,
) -> Answered:
    """Put all questions of `files` to each of `respondents`, of which the first is the full model.

    `model` gives the layers of candidates that are views. Decoding is greedy. Finished batches are appended to
    `file`; what a run of the same `job` left there is not asked again, so that another model costs only its own
    replies. Replies that the limit ended are reported as a warning on the logger "moe_surgery". Raises as
    `encode_questions` and `ReplyFile`.
    """
    questions = _all(files)
    encoded = encode_questions(questions, text, context=context, max_new_tokens=max_new_tokens)
    settings = [job, [f.digest for f in files], max_new_tokens, batch_tokens, stop_tokens, __version__]
    kept = ReplyFile(file, job_digest(settings))
    done = kept.read(questions)
    counter = Counter(progress, "answer", len(questions) * len(respondents), "prompts")
    groups = _batches(questions, encoded, max_new_tokens, batch_tokens)

    def missing(respondent: Respondent, group: Sequence[int]) -> bool:
        if any((respondent.key, index) not in done for index in group):
            return True
        counter.advance(len(group))
        return False

    def finish(respondent: Respondent, group: Sequence[int], replies: Sequence[Reply]) -> None:
        new = dict(zip(group, replies, strict=True))
        kept.append(respondent.name, respondent.key, questions, new)
        done.update({(respondent.key, index): reply for index, reply in new.items()})
        counter.advance(len(group))

    for group in (g for g in groups if questions[g[0]].choices):
        asked = [r for r in respondents if missing(r, group)]
        if asked:
            scored = _choices(model, asked, questions, encoded, group, batch_tokens)
            for respondent, replies in zip(asked, scored, strict=True):
                finish(respondent, group, replies)
    for respondent in respondents:
        open_groups = [g for g in groups if not questions[g[0]].choices and missing(respondent, g)]
        if open_groups:
            loaded = respondent.load()
            for group in open_groups:
                replies = _generate(loaded, text, questions, encoded, group, max_new_tokens, stop_tokens)
                finish(respondent, group, replies)
    given = [[done[r.key, index] for index in range(len(questions))] for r in respondents]
    for respondent, replies in zip(respondents, given, strict=True):
        if unfinished := sum(not reply.finished for reply in replies):
            log.warning(
                "%s: %d of %d replies were cut off at %d tokens; raise `max_new_tokens` to let them end",
                respondent.name,
                unfinished,
                len(replies),
                max_new_tokens,
            )
    return Answered(files, encoded, given)


def _all(files: Sequence[QuestionFile]) -> list[Question]:
    return [question for file in files for question in file.questions]


def _batches(
    questions: Sequence[Question], encoded: Sequence[Encoded], max_new_tokens: int, batch_tokens: int
) -> list[list[int]]:
    """Indices of questions that are asked together: choices, or prompts of like length that end alike."""
    choices = [i for i, q in enumerate(questions) if q.choices]
    groups = [choices[a : a + CHOICE_QUESTIONS] for a in range(0, len(choices), CHOICE_QUESTIONS)]
    by_end: dict[tuple[str, ...], list[int]] = {}
    for index, question in enumerate(questions):
        if not question.choices:
            by_end.setdefault(_ends(question), []).append(index)
    for indices in by_end.values():
        indices.sort(key=lambda i: -len(encoded[i].prompt))
        while indices:
            longest = len(encoded[indices[0]].prompt) + max_new_tokens
            size = max(1, min(MOST_PROMPTS, batch_tokens // longest))
            groups.append(indices[:size])
            del indices[:size]
    return groups


def _ends(question: Question) -> tuple[str, ...]:
    """Where generation stops; a conversation's answer may follow reasoning, and is cut afterwards."""
    return () if question.chat is not None else question.until


def _choices(
    model: LayerModel | CausalLM,
    respondents: Sequence[Respondent],
    questions: Sequence[Question],
    encoded: Sequence[Encoded],
    group: Sequence[int],
    batch_tokens: int,
) -> list[list[Reply]]:
    passages = [passage for index in group for passage in encoded[index].choices]
    found = log_likelihoods(model, [r.candidate for r in respondents], passages, batch_tokens=batch_tokens)
    replies = []
    for likelihoods in found:
        scores = iter(likelihoods)
        replies.append(
            [choose(questions[i], [next(scores).log_probability for _ in encoded[i].choices]) for i in group]
        )
    return replies


def _generate(
    model: CausalLM,
    text: Text,
    questions: Sequence[Question],
    encoded: Sequence[Encoded],
    group: Sequence[int],
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None,
) -> list[Reply]:
    prompts = [encoded[index].prompt for index in group]
    continuations = generate_until(
        model,
        text,
        prompts,
        until=_ends(questions[group[0]]),
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
    )
    replies = []
    for index, prompt, found in zip(group, prompts, continuations, strict=True):
        question, judged = questions[index], found.text
        if question.chat is not None:
            judged = cut(text.split(prompt, found.tokens).answer, question.until)
        judged = judged.strip()
        replies.append(Reply(question.accepts(judged), judged, tuple(found.tokens), found.finished))
    return replies
