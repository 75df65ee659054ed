"""Files of questions with their answers, and whether a reply is right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.text import describe_value
from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.examples import skills
from moe_surgery.quality.conversation import Conversation, conversation, describe_row
from moe_surgery.quality.text_files import rows
from moe_surgery.selection.arguments import PathLike

__all__ = ["EXAMPLE", "KINDS", "Question", "QuestionFile", "read_questions"]

KINDS = ("exact", "number", "regex", "choice")
EXAMPLE = "example:"
EXAMPLE_QUESTIONS, EXAMPLE_SEED = 100, 0
OUR_KEYS = ("prompt", "kind", "answer", "choices", "until", "domain", "id")
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt or a conversation, and what answers it.

    `kind` is one of `KINDS`; `answers` are the accepted texts, numbers or patterns, for a choice the right one of
    `choices`. A reply ends before the first of `until`. `where` is the file and line, `name` what results call it.
    """

    where: str
    name: str
    domain: str
    kind: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    prompt: str | None = None
    chat: Conversation | None = None
    until: tuple[str, ...] = ()

    def accepts(self, reply: str) -> bool:
        """Whether a generated reply is right.

        exact: it is one of the answers, blanks around it apart. number: its last number equals one of them.
        regex: one of them is found in it.
        """
        if self.kind == "number":
            found = _last_number(reply)
            return found is not None and found in [Decimal(a) for a in self.answers]
        if self.kind == "regex":
            return any(re.search(pattern, reply) for pattern in self.answers)
        return reply.strip() in [a.strip() for a in self.answers]


@dataclass(frozen=True, slots=True)
class QuestionFile:
    """The questions of one file; `digest` is the XXH3-128 of what they ask and accept."""

    name: str
    digest: str
    questions: tuple[Question, ...]


def read_questions(files: PathLike | Sequence[PathLike]) -> tuple[QuestionFile, ...]:
    """The questions of each file, or of `example:DOMAIN`: what the embedded model is asked.

    Files have rows of JSON, as `rows` reads them: `prompt` or `messages`, `answer`, and optionally `kind`,
    `choices`, `until`, `domain` (default: the file's name) and `id`. Raises InvalidInputError naming file and line,
    OutputError for a file that cannot be read, UsageError for an unknown example or a file named twice.
    """
    listed = [files] if isinstance(files, (str, Path)) or not isinstance(files, Iterable) else list(files)
    read: list[QuestionFile] = []
    for file in listed:
        name = str(file)
        if name.startswith(EXAMPLE):
            questions = tuple(_example(name.removeprefix(EXAMPLE)))
        else:
            questions = tuple(_questions(Path(file)))
            if not questions:
                raise InvalidInputError(f"{printable_path(Path(file))}: contains no question")
        digest = xxhash.xxh3_128_hexdigest(repr(questions).encode())
        if digest in [other.digest for other in read]:
            raise UsageError(f"`answers` {name}: named twice; its questions would count twice")
        read.append(QuestionFile(Path(name).name, digest, questions))
    return tuple(read)


def _example(domain: str) -> Iterator[Question]:
    if domain not in skills.DOMAINS:
        raise UsageError(f"`answers` {EXAMPLE}{domain}: choose one of {', '.join(skills.DOMAINS)}")
    asked = skills.draw_questions(domain, EXAMPLE_QUESTIONS, EXAMPLE_SEED, held_out=True)
    for number, question in enumerate(asked, 1):
        name = f"{EXAMPLE}{domain}: {number}"
        yield Question(name, name, domain, "exact", (question.answer,), prompt=question.prompt, until=("\n",))


def _questions(path: Path) -> Iterator[Question]:
    shown = printable_path(path)
    domain = path.name.removesuffix(".gz").partition(".")[0]
    for where, row in rows(path):
        yield _question(row, where, path.name + where.removeprefix(shown), domain)


def _question(row: object, where: str, name: str, domain: str) -> Question:
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise InvalidInputError(
            f'{where}: expected {{"prompt": "...", "answer": ...}} or {{"messages": [...], "answer": ...}}, '
            f"got {describe_row(row)}"
        )
    prompt, chat = row.get("prompt"), None
    if "messages" in row:
        chat = conversation({k: v for k, v in row.items() if k not in OUR_KEYS}, where)
        if chat.messages[-1]["role"] == "assistant":
            raise InvalidInputError(
                f"{where}: the last message is the assistant's; leave it out, and give 'answer' instead"
            )
    elif not isinstance(prompt, str) or not prompt:
        raise InvalidInputError(f"{where}: prompt is {describe_value(prompt)}, not a text")
    kind, answers, choices = _expected(row, where)
    if "id" in row:
        if not isinstance(row["id"], (str, int)) or isinstance(row["id"], bool):
            raise InvalidInputError(f"{where}: id is {describe_value(row['id'])}, not a string")
        name = str(row["id"])
    if "domain" in row:
        domain = row["domain"]
        if not isinstance(domain, str) or not domain or not domain.isprintable():
            raise InvalidInputError(f"{where}: domain is {describe_value(domain)}, not a name")
    until: tuple[str, ...] = ("\n",) if chat is None else ()
    if "until" in row:
        until = _texts(row["until"], f"{where}: until")
    return Question(where, name, domain, kind, answers, choices, prompt, chat, until)


def _expected(row: dict[str, object], where: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Kind, accepted answers and choices."""
    if row.get("answer") is None:
        raise InvalidInputError(f"{where}: has no 'answer'")
    answer, choices = row["answer"], row.get("choices")
    some = answer[0] if isinstance(answer, list) and answer else answer
    guessed = "choice" if choices is not None else "number" if _is_number(some) else "exact"
    kind = row.get("kind", guessed)
    if kind not in KINDS:
        raise InvalidInputError(f"{where}: kind is {describe_value(kind)}; choose one of {', '.join(KINDS)}")
    if (kind == "choice") != (choices is not None):
        raise InvalidInputError(f"{where}: 'choices' belong to kind 'choice', which is {kind!r}")
    if kind == "choice":
        listed = _texts(choices, f"{where}: choices")
        if len(listed) < 2 or len(set(listed)) < len(listed):
            raise InvalidInputError(f"{where}: choices: expected two or more different ones")
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(listed):
            return "choice", (listed[answer],), listed
        if isinstance(answer, str) and answer in listed:
            return "choice", (answer,), listed
        raise InvalidInputError(
            f"{where}: answer is {describe_value(answer)}; expected one of the choices or its index, "
            f"0 to {len(listed) - 1}"
        )
    if kind == "number":
        return kind, _numbers(answer, f"{where}: answer"), ()
    answers = _texts(answer, f"{where}: answer")
    if kind == "regex":
        for pattern in answers:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InvalidInputError(f"{where}: answer is no regular expression: {error}") from None
    return str(kind), answers, ()


def _texts(value: object, where: str) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(text, str) and text for text in listed):
        wrong = next((text for text in listed if not isinstance(text, str) or not text), value)
        raise InvalidInputError(f"{where} is {describe_value(wrong)}; expected a text or a list of them")
    return tuple(listed)


def _numbers(value: object, where: str) -> tuple[str, ...]:
    numbers = []
    for item in value if isinstance(value, list) else [value]:
        text = str(item).strip().replace(",", "") if isinstance(item, str) or _is_number(item) else ""
        if _last_number(text) is None or NUMBER.fullmatch(text) is None:
            raise InvalidInputError(f"{where} is {describe_value(item)}, not a number")
        numbers.append(text)
    if not numbers:
        raise InvalidInputError(f"{where} is an empty list, not a number")
    return tuple(numbers)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None
