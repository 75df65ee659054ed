"""Questions of the embedded model's domains: their answers are right, and held-out ones stay out of texts."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from moe_surgery.examples import skills
from moe_surgery.examples.skills import (
    DOMAINS,
    Question,
    documents,
    draw_questions,
    is_held_out,
    number_in_words,
)

COUNTRIES = Path(skills.__file__).parent / "countries.csv"
# Written down by hand.
NUMBERS = {
    0: "zero", 7: "seven", 10: "ten", 13: "thirteen", 20: "twenty", 47: "forty-seven", 90: "ninety",
    100: "one hundred", 101: "one hundred and one", 219: "two hundred and nineteen", 612: "six hundred and twelve",
    740: "seven hundred and forty", 999: "nine hundred and ninety-nine",
}  # fmt: skip


def right_answer(domain: str, question: str) -> str:
    """The answer, worked out from the question's text alone."""
    if domain == "arithmetic":
        found = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", question)
        assert found
        a, b = int(found[1]), int(found[3])
        return str(a + b if found[2] == "+" else a - b)
    if domain == "spelling":
        found = re.fullmatch(r"Spell ([A-Z]+) backwards\.", question)
        assert found
        return "".join(reversed(found[1]))
    if domain == "python":
        return repr(eval(question.removeprefix("What is the value of ").removesuffix("?")))
    if domain == "numbers":
        words = {number_in_words(n): str(n) for n in range(1000)}
        asked = question.removeprefix("How do you write ")
        if asked.endswith(" in words?"):
            return number_in_words(int(asked.removesuffix(" in words?")))
        return words[asked.removesuffix(" in digits?")]
    with COUNTRIES.open(newline="") as file:
        (row,) = [
            row for row in csv.DictReader(file) if question.removesuffix("?").endswith(f" {row['country']}")
        ]
    (key,) = [key for key in row if key in question or (key == "capital" and "capital" in question)]
    return row[key]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("held_out", [True, False])
def test_answers_are_right(domain: str, held_out: bool) -> None:
    questions = draw_questions(domain, 150, 3, held_out=held_out)
    assert len({q.text for q in questions}) == 150
    for question in questions:
        assert question.answer == right_answer(domain, question.text), question.text
        assert is_held_out(domain, question) == (held_out and domain != "facts")


def test_numbers_in_words() -> None:
    assert {n: number_in_words(n) for n in NUMBERS} == NUMBERS
    assert len({number_in_words(n) for n in range(1000)}) == 1000


def test_every_fact_has_one_answer() -> None:
    with COUNTRIES.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["country"] for row in rows}) == len(rows)
    assert all(value for row in rows for value in row.values())


@pytest.mark.parametrize("domain", [d for d in DOMAINS if d != "facts"])
def test_texts_state_no_held_out_answer(domain: str) -> None:
    texts = "\n".join(documents(domain, 60, seed=5))
    asked = re.findall(r"Question: (.*)\nAnswer: (.*)\n", texts)
    assert len(asked) == 60 * 8
    for text, answer in asked:
        assert not is_held_out(domain, Question(text, answer))
        assert answer == right_answer(domain, text)
    # The running text says the same things in other words.
    statements = {
        "arithmetic": (r"(\d+ [+-] \d+) = \d+", "What is {}?"),
        "spelling": (r"The word ([A-Z]+) has", "Spell {} backwards."),
        "numbers": (r"The number (\d+) is", "How do you write {} in words?"),
        "python": (r">>> (?!add|same|larger|smaller)(.*)", "What is the value of {}?"),
    }
    pattern, question = statements[domain]
    stated = re.findall(pattern, texts)
    assert bool(stated) == (domain != "python")
    for what in stated:
        assert not is_held_out(domain, Question(question.format(what), ""))


def test_the_same_seed_draws_the_same() -> None:
    for domain in DOMAINS:
        assert draw_questions(domain, 20, 1, held_out=True) == draw_questions(domain, 20, 1, held_out=True)
        assert documents(domain, 2, seed=1) == documents(domain, 2, seed=1) != documents(domain, 2, seed=2)
