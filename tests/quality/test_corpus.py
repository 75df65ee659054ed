"""Texts as passages: what is read, how it is split and bounded, and what is said of bad files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.errors import InvalidInputError, MoeSurgeryError, OutputError, UsageError
from moe_surgery.quality import text_files as module
from moe_surgery.quality.corpus import Corpus, Passage, batches, open_corpus, text_files
from moe_surgery.runtime.text import Text
from tests.quality.conftest import SENTENCES, conversation, write_lines
from tests.support.sums import arithmetic

CONVERSATIONS = {
    "one answer": [("user", "What is 3 + 4?"), ("assistant", "7")],
    "two answers": [("user", "Hi."), ("assistant", "Hello."), ("user", "And?"), ("assistant", "So.\nThere.")],
    "a system message": [("system", "Be short."), ("user", "Why?"), ("assistant", "Because.")],
    "an empty answer": [("user", "Say nothing."), ("assistant", "")],
    "nothing but an answer": [("assistant", "I begin.")],
}


def opened(
    text: Text,
    *paths: Path,
    domains: tuple[str, ...] = (),
    format: str | None = None,
    context: int = 4096,
    max_tokens: int | None = None,
) -> Corpus:
    files = text_files(paths, domains, format)
    return open_corpus(files, text, context=context, max_tokens=max_tokens)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    """The same tokenizer and template in transformers' hands."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(resolve("example:tiny"), local_files_only=True)


def encoded(tokenizer, text: str) -> tuple[int, ...]:  # type: ignore[no-untyped-def]
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def rendered(tokenizer, messages: list[dict[str, str]], prompt: bool) -> tuple[int, ...]:  # type: ignore[no-untyped-def]
    result = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return encoded(tokenizer, result)


def messages(name: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in CONVERSATIONS[name]]


# --- formats


def test_a_text_file_is_one_text(text: Text, texts: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    [passage] = opened(text, texts / "sums.txt")
    whole = (texts / "sums.txt").read_text()
    assert passage == Passage("sums", encoded(tokenizer, whole), None)


def test_lines_of_json_are_texts_or_strings_and_blank_lines_nothing(
    text: Text,
    tmp_path: Path,
    tokenizer,  # type: ignore[no-untyped-def]
) -> None:
    lines = [json.dumps({"text": SENTENCES[0], "id": 3}), "", json.dumps(SENTENCES[1]), "  ", '""']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    results = [passage.tokens for passage in opened(text, tmp_path / "x.jsonl")]
    assert results == [encoded(tokenizer, s) for s in SENTENCES[:2]]


def test_line_breaks_and_characters_of_any_width_arrive_as_they_are(text: Text, tmp_path: Path) -> None:
    result = "one\r\ntwo\rthree\u2028four\x0bfive \N{SNOWMAN}\N{GRINNING FACE}\n\nend"
    (tmp_path / "x.txt").write_bytes(result.encode())
    [document] = opened(text, tmp_path / "x.txt").documents()
    assert document.text == result


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", '{"messages": []', "text"),
        ("a.py", "x = 1", "text"),
        ("a.jsonl", '\n\n{"messages": [{"role": "user", "content": "x"}]}\n', "chat"),
        ("a.jsonl", '{"text": "x"}\n{"messages": []}\n', "jsonl"),
        ("a.jsonl", '"messages"\n', "jsonl"),
        ("a.jsonl", "", "jsonl"),
    ],
)
def test_the_format_is_guessed_from_name_and_first_line(
    name: str, content: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    assert [f.format for f in text_files([tmp_path / name])] == [expected]
    assert [f.format for f in text_files([tmp_path / name], format="text")] == ["text"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_what_the_template_makes_of_it_and_its_answer_is_found(
    name: str,
    text: Text,
    tmp_path: Path,
    tokenizer,  # type: ignore[no-untyped-def]
) -> None:
    result = messages(name)
    write_lines(tmp_path / "x.jsonl", [{"messages": result}])
    [passage] = opened(text, tmp_path / "x.jsonl")
    assert passage.tokens == rendered(tokenizer, result, prompt=False)
    requested = "<|startoftext|><|start|>assistant<|message|>"  # transformers renders no empty conversation
    before = rendered(tokenizer, result[:-1], prompt=True) if result[:-1] else encoded(tokenizer, requested)
    assert passage.answer == len(before)
    assert tokenizer.decode(passage.tokens[passage.answer :]) == result[-1]["content"] + "<|end|>"


def test_a_conversation_without_an_answer_ends_with_an_open_turn(
    text: Text,
    tmp_path: Path,
    tokenizer,  # type: ignore[no-untyped-def]
) -> None:
    write_lines(tmp_path / "x.jsonl", [conversation("Why?", None)])
    [passage] = opened(text, tmp_path / "x.jsonl")
    question = [{"role": "user", "content": "Why?"}]
    assert passage == Passage("x", rendered(tokenizer, question, prompt=True), None)


def test_a_split_conversation_keeps_every_token_on_its_side(text: Text, tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", [conversation("What is it? " * 4, "It is what it is. " * 4)])
    [whole] = opened(text, tmp_path / "x.jsonl")
    assert whole.answer is not None
    for context in (1, 7, len(whole.tokens) - 1):
        pieces = list(opened(text, tmp_path / "x.jsonl", context=context))
        assert tuple(t for p in pieces for t in p.tokens) == whole.tokens
        sides = [folder >= p.answer for p in pieces for folder in range(len(p.tokens))]  # type: ignore[operator]
        assert sides == [folder >= whole.answer for folder in range(len(whole.tokens))]


def test_prompts_leave_the_last_answer_open(text: Text, tmp_path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    requested = [messages("two answers"), messages("two answers")[:3], messages("one answer")]
    write_lines(tmp_path / "x.jsonl", [{"messages": m} for m in requested])
    expected = [requested[0][:3], requested[0][:3], requested[2][:1]]
    results = list(opened(text, tmp_path / "x.jsonl", domains=("law",)).prompts())
    assert results == [("law", rendered(tokenizer, m, prompt=True)) for m in expected]


# --- domains, bounds, hashes


def test_domains_are_the_files_own_names_or_one_for_all_or_one_for_each(texts: Path) -> None:
    paths = [texts / "sums.txt", texts / "words.jsonl"]
    assert [f.domain for f in text_files(paths)] == ["sums", "words"]
    assert [f.domain for f in text_files(paths, ["all of it"])] == ["all of it"] * 2
    assert [f.domain for f in text_files(paths, ["b", "a"])] == ["b", "a"]
    with pytest.raises(UsageError, match="3 names for 2 `texts`"):
        text_files(paths, ["a", "b", "c"])
    for name in ("", "a,b", "a:b", "a/b", "a\nb"):
        with pytest.raises(UsageError, match="a domain is a name"):
            text_files(paths, [name])


def test_passages_come_file_by_file_with_their_domains_every_time(text: Text, texts: Path) -> None:
    corpus = opened(text, texts / "words.jsonl", texts / "sums.txt", texts / "talk.jsonl")
    assert corpus.domains == ["words", "sums", "talk"]
    first = list(corpus)
    assert [p.domain for p in first] == ["words"] * 3 + ["sums"] + ["talk"] * 6
    output = json.dumps(corpus.texts)
    assert list(corpus) == first
    assert json.dumps(corpus.texts) == output


def test_a_long_text_is_split_and_counted_once(text: Text, texts: Path) -> None:
    [whole] = opened(text, texts / "sums.txt")
    corpus = opened(text, texts / "sums.txt", texts / "words.jsonl", context=20)
    pieces = [p.tokens for p in corpus if p.domain == "sums"]
    assert all(len(p) == 20 for p in pieces[:-1])
    assert tuple(t for p in pieces for t in p) == whole.tokens
    longer = sum(len(text.encode(s)) > 20 for s in SENTENCES)
    assert longer
    assert corpus.split == 1 + longer
    cut = opened(text, texts / "sums.txt", context=20, max_tokens=20)
    assert [p.tokens for p in cut] == [whole.tokens[:20]]
    assert cut.split == 0  # nothing beyond the first passage was read


def test_a_long_file_is_read_in_blocks_that_end_with_a_line(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 100)
    result = arithmetic(random.Random(3), 1000) + "The last line has no end"
    (tmp_path / "long.txt").write_text(result)
    corpus = opened(text, tmp_path / "long.txt", context=16)
    blocks = [document.text or "" for document in corpus.documents()]
    assert len(blocks) > 5
    assert "".join(blocks) == result
    assert all(block.endswith("\n") for block in blocks[:-1])
    assert all(len(block) < 200 for block in blocks)
    pieces = [p.tokens for p in corpus]
    assert max(map(len, pieces)) <= 16
    assert text.decode([t for p in pieces for t in p]) == result
    assert corpus.split == 1


@pytest.mark.parametrize("most", [1, 30, 10**6])
def test_tokens_are_bounded_for_each_domain(most: int, text: Text, texts: Path) -> None:
    paths = (texts / "words.jsonl", texts / "sums.txt", texts / "sums.txt")
    domains = ("a", "b", "a")
    free = list(opened(text, *paths, domains=domains))
    corpus = opened(text, *paths, domains=domains, max_tokens=most)
    stored = list(corpus)
    for domain in ("a", "b"):
        everything = [t for p in free if p.domain == domain for t in p.tokens]
        assert [t for p in stored if p.domain == domain for t in p.tokens] == everything[:most]
        assert sum(int(str(output["tokens"])) for output in corpus.texts[domain]) == min(
            most, len(everything)
        )
    assert all(p.tokens for p in stored)


def test_texts_are_listed_with_the_hashes_of_their_bytes(text: Text, texts: Path) -> None:
    corpus = opened(text, texts / "sums.txt", texts / "talk.jsonl", domains=("x",))
    tokens = [0, 0]
    for passage in corpus:
        tokens[passage.answer is not None] += len(passage.tokens)
    assert corpus.texts == {
        "x": [
            {
                "name": name,
                "xxh3_128": xxhash.xxh3_128_hexdigest((texts / name).read_bytes()),
                "tokens": count,
            }
            for name, count in zip(("sums.txt", "talk.jsonl"), tokens, strict=True)
        ]
    }


# --- bad input


BAD: dict[str, tuple[str, bytes, str | None, str]] = {
    "an empty text": ("x.txt", b"", None, "contains no text"),
    "no line": ("x.jsonl", b"\n \n", None, "contains no text"),
    "empty lines only": ("x.jsonl", b'{"text": ""}\n', None, "contains no text"),
    "a text that is no UTF-8": ("x.txt", b"fine\n" * 9 + b"\xff\n", None, "not UTF-8"),
    "a line that is no UTF-8": ("x.jsonl", b'"fine"\n"fine"\n"\xff"\n', None, "line 3: not UTF-8"),
    "a first line that is no UTF-8": ("x.jsonl", b'"\xe9t\xe9"\n', None, "line 1: not UTF-8"),
    "a line that is not JSON": ("x.jsonl", b'"fine"\n\n{"text": \n', None, "line 3: not JSON"),
    "deep nesting": ("x.jsonl", b'"fine"\n' + b"[" * 200_000 + b"\n", None, "line 2: not JSON"),
    "a number": ("x.jsonl", b'"fine"\n17\n', None, 'line 2: expected {"text": "..."}, got 17'),
    "another key": ("x.jsonl", b'{"body": "x"}\n', None, "line 1: expected"),
    "a text that is none": ("x.jsonl", b'{"text": null}\n', None, "line 1: expected"),
    "half a character": ("x.jsonl", b'"fine"\n"\\ud800"\n', None, "line 2: the text is not Unicode"),
    "no messages": ("x.jsonl", b'{"text": "x"}\n', "chat", 'line 1: expected {"messages": [...]}'),
    "an empty conversation": ("x.jsonl", b'{"messages": []}\n', None, "line 1: expected"),
    "a message that is a text": ("x.jsonl", b'{"messages": ["x"]}\n', None, "line 1: message 1: expected {"),
    "a message without content": (
        "x.jsonl",
        b'{"messages": [{"role": "user"}]}\n',
        None,
        "line 1: message 1: has neither content nor tool_calls",
    ),
    "a role that the template does not know": (
        "x.jsonl",
        json.dumps(conversation("fine", "x")).encode()
        + b'\n{"messages": [{"role": "cook", "content": "x"}]}\n',
        None,
        "line 2: ",
    ),
    "a conversation with half a character": (
        "x.jsonl",
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n',
        None,
        "line 1: the text is not Unicode",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_text_is_named_with_its_line(case: str, text: Text, tmp_path: Path) -> None:
    name, content, format, complaint = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError) as caught:
        list(opened(text, tmp_path / name, format=format))
    result = str(caught.value)
    assert result.startswith(f"{tmp_path / name}: ")
    assert complaint in result
    assert "\n" not in result


def test_a_late_line_that_is_not_a_utf8_has_its_own_number(text: Text, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'"some words of a line"\n' * 1000 + b'"\xff"\n')
    with pytest.raises(InvalidInputError, match="line 1001: not UTF-8"):
        list(opened(text, tmp_path / "x.jsonl"))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
@pytest.mark.parametrize("kind", ["nothing", "folder", "pipe", "dangling link"])
def test_what_is_not_a_file_is_refused_at_once(kind: str, name: str, text: Text, tmp_path: Path) -> None:
    path = tmp_path / name
    expected: type[MoeSurgeryError] = OutputError
    if kind == "folder":
        path.mkdir()
        expected = InvalidInputError
    elif kind == "pipe":
        os.mkfifo(path)
        expected = InvalidInputError
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "gone")
    with pytest.raises(expected, match=str(path)):
        opened(text, path)


def test_prompts_need_conversations(text: Text, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"words\.jsonl: line 1: answers are generated for conv"):
        list(opened(text, texts / "words.jsonl").prompts())
    write_lines(
        tmp_path / "x.jsonl", [conversation("x", None), {"messages": messages("nothing but an answer")}]
    )
    with pytest.raises(InvalidInputError, match=r"x\.jsonl: line 2: an answer without a question"):
        list(opened(text, tmp_path / "x.jsonl").prompts())
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(InvalidInputError, match=r"none\.jsonl: contains no text"):
        list(opened(text, tmp_path / "none.jsonl", format="chat").prompts())


def test_bounds_below_one_and_no_files_are_refused(text: Text, texts: Path) -> None:
    with pytest.raises(UsageError, match="`max_tokens` 0: must be at least 1"):
        opened(text, texts / "sums.txt", max_tokens=0)
    with pytest.raises(UsageError, match="no texts"):
        opened(text)


# --- batches


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_batches_lose_nothing_keep_the_order_and_their_bound(lengths: list[int], most: int) -> None:
    passages = [Passage("x", (number,) * length) for number, length in enumerate(lengths)]
    groups = list(batches(iter(passages), most))
    assert [p for group in groups for p in group] == passages
    sizes = [sum(len(p.tokens) for p in group) for group in groups]
    assert all(groups)
    assert all(size <= most or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    for size, following in zip(sizes, groups[1:], strict=False):  # no group could have taken one more
        assert size + len(following[0].tokens) > most


def test_a_text_given_twice_to_a_domain_is_refused_by_its_bytes(text: Text, tmp_path: Path) -> None:
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("The same words.")
    other.write_text("The same words.")
    with pytest.raises(UsageError, match=r"other\.txt: domain 'd' already has this text"):
        open_corpus(text_files([one, other], ["d"]), text, context=64)
    assert open_corpus(text_files([one, other], ["d", "e"]), text, context=64).domains == ["d", "e"]
