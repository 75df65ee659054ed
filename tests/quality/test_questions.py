"""Files of questions, and what counts as a right reply."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.errors import InvalidInputError, OutputError, UsageError
from moe_surgery.examples.skills import DOMAINS, draw_trained
from moe_surgery.quality.questions import Question, read_questions

ROOT = Path(__file__).resolve().parents[2]


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "asked.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def one(tmp_path: Path, **row: object) -> Question:
    """The question of a row; a prompt unless there are messages."""
    base = {} if "messages" in row else {"prompt": "Q"}
    (question,) = read_questions(write(tmp_path, {**base, **row}))[0].questions
    return question


def test_the_documented_rows_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "choosing-experts.md").read_text()
    (block,) = re.findall(r"^```json\n(.*?)^```", page, flags=re.M | re.S)
    path = tmp_path / "doc.jsonl"
    path.write_text(block)
    (file,) = read_questions(path)
    number, exact, regex, choice = file.questions
    assert [q.kind for q in file.questions] == ["number", "exact", "regex", "choice"]
    assert [q.domain for q in file.questions] == ["doc", "doc", "doc", "chemistry"]
    assert [q.until for q in file.questions] == [("\n",), ("\n", ","), (), ("\n",)]
    assert number.name == "doc.jsonl: line 1"
    assert number.accepts("2 + 3 = 5")
    assert exact.accepts(" Paris. ")
    assert not exact.accepts("paris")
    assert regex.accepts("The answer is No.")
    assert not regex.accepts("Not sure")
    assert (choice.choices, choice.answers) == (("oak", "iron", "silk"), ("iron",))


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("5", 5),
        ("it is 12 apples", 12),
        ("10-5=5", 5),
        ("3 - 5 = -2", -2),
        ("\N{MINUS SIGN}7", -7),
        ("$1,234.50.", "1234.5"),
        (".5", "0.5"),
        ("5.0", 5),
        ("2e3", 2000),
        ("none", None),
        ("v2", None),
    ],
)
def test_the_last_number_of_a_reply_counts(tmp_path: Path, reply: str, number: object) -> None:
    if number is None:
        assert not one(tmp_path, answer=2).accepts(reply)
    else:
        assert one(tmp_path, answer=number, kind="number").accepts(reply)
        assert not one(tmp_path, answer=99).accepts(reply)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_any_number_is_found_as_it_is_written(value: Decimal) -> None:
    question = Question("", "", "", "number", (str(value),))
    for written in (str(value), f"{value:,}", f"so the result is {value}."):
        assert question.accepts(written)


def test_a_choice_is_named_by_text_or_index(tmp_path: Path) -> None:
    assert one(tmp_path, choices=["a", "b"], answer=1).answers == ("b",)
    assert one(tmp_path, choices=["1", "0"], answer="1").answers == ("1",)


def test_rows_are_named_and_sorted_by_domain(tmp_path: Path) -> None:
    question = one(tmp_path, answer="x", id=7, domain="law", until="END", source="elsewhere")
    assert (question.name, question.domain, question.until) == ("7", "law", ("END",))
    chat = one(tmp_path, messages=[{"role": "user", "content": "hi"}], answer="x")
    assert chat.chat is not None
    assert chat.until == ()


USER = [{"role": "user", "content": "hi"}]
WRONG = [
    ({"answer": "x"}, 'expected {"prompt"'),
    ({"prompt": "Q", "messages": USER, "answer": "x"}, 'expected {"prompt"'),
    ([1], 'expected {"prompt"'),
    ({"prompt": "", "answer": "x"}, "prompt is the string ''"),
    ({"prompt": "Q"}, "has no 'answer'"),
    ({"prompt": "Q", "answer": None}, "has no 'answer'"),
    ({"prompt": "Q", "answer": {}}, "answer is an object"),
    ({"prompt": "Q", "answer": []}, "answer is an array of 0"),
    ({"prompt": "Q", "answer": ["x", ""]}, "answer is the string ''"),
    ({"prompt": "Q", "answer": "x", "kind": "fuzzy"}, "choose one of exact, number, regex, choice"),
    ({"prompt": "Q", "answer": "x", "kind": "number"}, "not a number"),
    ({"prompt": "Q", "answer": True}, "answer is true"),
    ({"prompt": "Q", "answer": float("nan")}, "not a number"),
    ({"prompt": "Q", "answer": "(", "kind": "regex"}, "no regular expression"),
    ({"prompt": "Q", "answer": "x", "kind": "choice"}, "'choices' belong to kind 'choice'"),
    ({"prompt": "Q", "answer": "x", "kind": "exact", "choices": ["x", "y"]}, "'choices' belong"),
    ({"prompt": "Q", "answer": "z", "choices": ["x", "y"]}, "one of the choices or its index, 0 to 1"),
    ({"prompt": "Q", "answer": 2, "choices": ["x", "y"]}, "one of the choices or its index"),
    ({"prompt": "Q", "answer": "x", "choices": ["x"]}, "two or more different"),
    ({"prompt": "Q", "answer": "x", "choices": ["x", "x"]}, "two or more different"),
    ({"prompt": "Q", "answer": "x", "until": 3}, "until is 3"),
    ({"prompt": "Q", "answer": "x", "domain": 3}, "domain is 3"),
    ({"prompt": "Q", "answer": "x", "id": []}, "id is an array"),
    ({"messages": [], "answer": "x"}, 'expected {"messages"'),
    (
        {"messages": [*USER, {"role": "assistant", "content": "x"}], "answer": "x"},
        "last message is the assistant's",
    ),
    ("{not json", "not JSON"),
]


@pytest.mark.parametrize(("row", "complaint"), WRONG)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, row: object, complaint: str) -> None:
    path = write(tmp_path, {"prompt": "Q", "answer": "x"}, row)
    with pytest.raises(InvalidInputError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}: line 2")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_files_without_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="contains no question"):
        read_questions(write(tmp_path))
    with pytest.raises(OutputError, match=r"missing\.jsonl"):
        read_questions(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="named twice"):
        read_questions(["example:facts", "example:facts"])
    with pytest.raises(UsageError, match="choose one of arithmetic"):
        read_questions("example:law")


def test_the_examples_were_not_trained_on() -> None:
    import random

    rng = random.Random(1)
    for domain in DOMAINS:
        (file,) = read_questions(f"example:{domain}")
        assert len({q.prompt for q in file.questions}) == 100
        assert all(q.domain == domain and q.accepts(f" {q.answers[0]}") for q in file.questions)
        if domain != "facts":
            trained = {draw_trained(domain, rng).prompt for _ in range(2000)}
            assert trained.isdisjoint(q.prompt for q in file.questions)
