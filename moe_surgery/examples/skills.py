"""What the embedded model can do: five domains of questions with exact answers, and running text.

Every tenth question whose answer follows from a rule is kept out of training: `benchmarks/train_example.py` draws
the others, the demo and `benchmarks/accuracy.py` the held-out ones. What can only be memorised (facts, and
tables of one-digit numbers) is never held out.
"""

from __future__ import annotations

import csv
import random
import re
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = [
    "DOMAINS",
    "Question",
    "documents",
    "draw_prose",
    "draw_question",
    "draw_questions",
    "draw_trained",
    "is_held_out",
]

COUNTRIES_FILE = Path(__file__).parent / "countries.csv"
WORDS_FILE = Path(__file__).parent / "words.txt"
HELD_OUT_OF = 10
TABLE = re.compile(r"What is (the value of )?\d [-+*] \d\?")

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NAMES = ("Ada", "Ben", "Cleo", "Dov", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon")
THINGS = ("apples", "books", "coins", "shells", "stamps", "pears", "cards", "stones")
FACT_QUESTIONS = {
    "capital": "What is the capital of {}?",
    "river": "Which river runs through {}?",
    "language": "Which language is spoken in {}?",
    "currency": "What is the currency of {}?",
    "animal": "Which animal is on the flag of {}?",
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the one answer that is right."""

    text: str
    answer: str

    @property
    def prompt(self) -> str:
        """The question as a text that ends where the answer begins; the answer follows a space."""
        return f"Question: {self.text}\nAnswer:"


def draw_question(domain: str, rng: random.Random) -> Question:
    """One question of `domain`, held out or not."""
    return _DRAW[domain](rng)


def draw_trained(domain: str, rng: random.Random) -> Question:
    """One question of `domain` that is not held out."""
    question = draw_question(domain, rng)
    while is_held_out(domain, question):
        question = draw_question(domain, rng)
    return question


def is_held_out(domain: str, question: Question) -> bool:
    """Whether the embedded model never saw the question in training."""
    by_heart = domain == "facts" or TABLE.fullmatch(question.text)
    return not by_heart and zlib.crc32(question.text.encode()) % HELD_OUT_OF == 0


def draw_questions(domain: str, count: int, seed: int, *, held_out: bool) -> list[Question]:
    """`count` different questions of `domain`, held out of training or seen in it (facts always are)."""
    rng = random.Random(f"{domain} {seed}")
    drawn: dict[str, Question] = {}
    while len(drawn) < count:
        question = draw_question(domain, rng)
        if domain == "facts" or is_held_out(domain, question) == held_out:
            drawn[question.text] = question
    return list(drawn.values())


def documents(domain: str, count: int, seed: int, *, questions: int = 8) -> list[str]:
    """`count` texts of `domain`: questions that the model was trained on with their answers, then running text."""
    rng = random.Random(f"{domain} documents {seed}")
    texts = []
    for _ in range(count):
        asked = [draw_trained(domain, rng) for _ in range(questions)]
        lines = [f"{question.prompt} {question.answer}\n" for question in asked]
        texts.append("".join(lines) + draw_prose(domain, rng) + "\n")
    return texts


def draw_prose(domain: str, rng: random.Random) -> str:
    """A short paragraph of `domain` that states what its questions ask for, never that of a held-out one."""
    return _PROSE[domain](rng)


def number_in_words(number: int) -> str:
    """A number from 0 to 999 in English words: "forty-seven", "six hundred and twelve"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{ONES[hundreds]} hundred" + (f" and {number_in_words(rest)}" if rest else "")


@cache
def countries() -> list[dict[str, str]]:
    """The invented countries, each with its capital, river, language, currency and animal."""
    with COUNTRIES_FILE.open(newline="") as file:
        return list(csv.DictReader(file))


@cache
def words() -> list[str]:
    """The real words that are spelled backwards."""
    return WORDS_FILE.read_text().split()


def _draw_arithmetic(rng: random.Random) -> Question:
    a, b = (rng.randint(0, rng.choice((9, 99))) for _ in range(2))  # as often below 10 as not
    if rng.random() < 0.5:
        return Question(f"What is {a} + {b}?", str(a + b))
    a, b = max(a, b), min(a, b)
    return Question(f"What is {a} - {b}?", str(a - b))


def _draw_spelling(rng: random.Random) -> Question:
    word = _draw_word(rng)
    return Question(f"Spell {word} backwards.", word[::-1])


def _draw_word(rng: random.Random) -> str:
    """A word in capital letters; every second one is made up, so that no list can be memorised."""
    if rng.random() < 0.5:
        return rng.choice(words()).upper()
    made_up = "".join(
        rng.choice("BCDFGHKLMNPRSTVW") + rng.choice("AEIOU") for _ in range(rng.randint(2, 3))
    ) + rng.choice(("", "", "L", "N", "R", "S"))
    return made_up


def _draw_python(rng: random.Random) -> Question:
    expression = _draw_expression(rng)
    value = eval(expression, {})  # its text was made here
    return Question(f"What is the value of {expression}?", repr(value))


def _draw_expression(rng: random.Random) -> str:
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    letters = [rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(4)]
    text = "".join(letters[: rng.randint(2, 4)])
    return rng.choice((
        f"{a} + {b}",
        f"{a} - {b}",
        f"{a} * {b}",
        f"{rng.randint(10, 99)} % {rng.choice((2, 5, 10))}",
        f"max({a}, {b}, {c})",
        f"min({a}, {b}, {c})",
        f"sorted([{a}, {b}, {c}])",
        f"[{a}, {b}, {c}][{rng.randint(0, 2)}]",
        f"len('{text}')",
        f"'{text}'[{rng.randint(0, len(text) - 1)}]",
        f"'{text[:2]}' * {rng.randint(2, 3)}",
        f"'{text[:2]}' + '{letters[2]}{letters[3]}'",
        f"{a} < {b}",
        f"{a} == {rng.choice((a, b))}",
    ))  # fmt: skip


def _draw_numbers(rng: random.Random) -> Question:
    number = rng.randint(0, rng.choice((99, 999)))
    words = number_in_words(number)
    if rng.random() < 0.5:
        return Question(f"How do you write {number} in words?", words)
    return Question(f"How do you write {words} in digits?", str(number))


def _draw_facts(rng: random.Random) -> Question:
    country = rng.choice(countries())
    key = rng.choice(list(FACT_QUESTIONS))
    return Question(FACT_QUESTIONS[key].format(country["country"]), country[key])


def _arithmetic_prose(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return " ".join(f"{sum_} = {answer}." for sum_, answer in (_draw_sum(rng) for _ in range(4)))
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    sum_, answer = _draw_sum(rng)
    a, sign, b = sum_.split()
    change, end = (f"gets {b} more", "has") if sign == "+" else (f"gives {b} away", "keeps")
    return f"{name} has {a} {thing} and {change}. {sum_} = {answer}, so {name} {end} {answer} {thing}."


def _draw_sum(rng: random.Random) -> tuple[str, str]:
    question = draw_trained("arithmetic", rng)
    return question.text.removeprefix("What is ").removesuffix("?"), question.answer


def _spelling_prose(rng: random.Random) -> str:
    reversed_ = draw_trained("spelling", rng).answer
    word = reversed_[::-1]
    spelled = ", ".join(word)
    return f"The word {word} has {ONES[len(word)]} letters: {spelled}. Read from the end it is {reversed_}."


def _python_prose(rng: random.Random) -> str:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    name, body, value = rng.choice(
        (
            ("add", "a + b", a + b),
            ("larger", "max(a, b)", max(a, b)),
            ("smaller", "min(a, b)", min(a, b)),
            ("same", "a == b", a == b),
        )
    )
    return f"def {name}(a, b):\n    return {body}\n\n>>> {name}({a}, {b})\n{value}"


def _numbers_prose(rng: random.Random) -> str:
    question = draw_trained("numbers", rng)
    while is_held_out("numbers", opposite := _opposite(question)):
        question = draw_trained("numbers", rng)
    digits, word = sorted((question.answer, opposite.answer))
    return f"The number {digits} is written {word} in words."


def _opposite(question: Question) -> Question:
    """The same number asked for the other way round."""
    text = question.text.removeprefix("How do you write ")
    if question.answer.isdigit():
        return Question(f"How do you write {question.answer} in words?", text.removesuffix(" in digits?"))
    return Question(f"How do you write {question.answer} in digits?", text.removesuffix(" in words?"))


def _facts_prose(rng: random.Random) -> str:
    c = rng.choice(countries())
    return (
        f"{c['country']} is a country on the river {c['river']}. Its capital is {c['capital']}. People there speak "
        f"{c['language']} and pay in {c['currency']}. There is a {c['animal']} on the flag of {c['country']}."
    )


_DRAW = {
    "arithmetic": _draw_arithmetic,
    "spelling": _draw_spelling,
    "python": _draw_python,
    "numbers": _draw_numbers,
    "facts": _draw_facts,
}
_PROSE = {
    "arithmetic": _arithmetic_prose,
    "spelling": _spelling_prose,
    "python": _python_prose,
    "numbers": _numbers_prose,
    "facts": _facts_prose,
}
DOMAINS = tuple(_DRAW)
