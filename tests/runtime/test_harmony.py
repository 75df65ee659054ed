"""Output in the harmony format, parsed token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from moe_surgery.runtime.harmony import Header, Piece, Reply, ToolCall
from moe_surgery.runtime.text import Text
from tests.support.harmony import write_harmony

OPEN = "<|start|>system<|message|>x<|end|><|start|>user<|message|>2+2?<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{"a": 1}<|call|>'


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(write_harmony(tmp_path_factory.mktemp("harmony")))


def reply(answer: str = "", reasoning: str = "", *calls: tuple[str, str]) -> Reply:
    return Reply(answer, reasoning, tuple(ToolCall(*call) for call in calls))


CASES: dict[str, tuple[str, str, Reply]] = {
    "reasoning and answer": (
        OPEN,
        "<|channel|>analysis<|message|>2+2 is 4<|end|><|start|>assistant<|channel|>final<|message|>four<|return|>",
        reply("four", "2+2 is 4"),
    ),
    "an answer alone": (OPEN, "<|channel|>final<|message|>four<|return|>", reply("four")),
    "cut in the answer": (
        OPEN,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>fo",
        reply("fo", "Hm."),
    ),
    "cut in the reasoning": (OPEN, "<|channel|>analysis<|message|>2+2", reply("", "2+2")),
    "cut in a header": (OPEN, "<|channel|>analysis<|message|>2+2<|end|><|start|>assist", reply("", "2+2")),
    "cut in a channel": (
        OPEN,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>fi",
        reply("", "Hm."),
    ),
    "nothing": (OPEN, "", reply()),
    "a call": (
        OPEN,
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant" + CALL,
        reply("", "Look.", ("functions.clock", '{"a": 1}')),
    ),
    "a call named behind the role": (
        OPEN,
        " to=functions.clock<|channel|>commentary json<|message|>{}<|call|>",
        reply("", "", ("functions.clock", "{}")),
    ),
    "a built-in tool": (
        OPEN,
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        reply("", "", ("python", "print(1)")),
    ),
    "two calls": (
        OPEN,
        CALL + "<|start|>assistant" + CALL.replace("clock", "bell"),
        reply("", "", ("functions.clock", '{"a": 1}'), ("functions.bell", '{"a": 1}')),
    ),
    "a preamble": (
        OPEN,
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL,
        reply("I look.", "", ("functions.clock", '{"a": 1}')),
    ),
    "reasoning twice": (
        OPEN,
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>",
        reply("", "a\nb"),
    ),
    "another role continues": (
        OPEN,
        "<|channel|>final<|message|>four<|end|><|start|>user<|message|>And 3+3?<|end|>",
        reply("four"),
    ),
    "no channel": (OPEN + "<|message|>", "four<|end|>", reply("four")),
    "an open turn without a header": (OPEN, "four is the answer", reply("four is the answer")),
    "an open turn and one short word": (OPEN, "to", reply("to")),
    "a space before the answer": (OPEN, " to be", reply(" to be")),
    "a prompt that opens the reasoning": (
        OPEN + "<|channel|>analysis<|message|>Let me",
        " see.<|end|><|start|>assistant<|channel|>final<|message|>four<|return|>",
        reply("four", " see."),
    ),
    "a prompt that ends in a channel": (
        OPEN + "<|channel|>",
        "final<|message|>four<|return|>",
        reply("four"),
    ),
    "no marker behind the channel": (OPEN, "<|channel|>final The answer is 4", reply("The answer is 4")),
    "no marker behind the role": (
        OPEN + "<|channel|>final<|message|>",
        "a<|end|><|start|>assistant The rest.",
        reply("a\nThe rest."),
    ),
    "no end before a channel": (
        OPEN,
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>four",
        reply("four", "Hm."),
    ),
    "text between messages": (OPEN, "<|channel|>final<|message|>a<|end|>b", reply("a\nb")),
    "a raw prompt": ("2 + 2 =", " 4, assistant final", reply(" 4, assistant final")),
    "a raw prompt and markers": ("2 + 2 =", " 4<|end|><|start|>user<|message|>x", reply(" 4userx")),
    "a raw prompt within a question": (
        "<|start|>user<|message|>2 + 2",
        " is?<|end|><|start|>assistant<|channel|>final<|message|>4",
        reply(" is?assistantfinal4"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_reply_is_split(case: str, text: Text) -> None:
    prompt, generated, expected = CASES[case]
    assert text.split(text.encode(prompt), text.encode(generated)) == expected


def test_pieces_say_where_they_belong(text: Text) -> None:
    parser = text.parser(text.encode(OPEN))
    generated = "<|channel|>analysis<|message|>one two<|end|><|start|>assistant" + CALL
    result = [piece for token in text.encode(generated) for piece in parser.push(token)] + parser.flush()
    analysis = Header("assistant", "analysis")
    call = Header("assistant", "commentary", "functions.clock", "json")
    assert result[0] == Piece(analysis, result[0].text, True)
    assert {(p.header, p.first) for p in result[1:]} == {(analysis, False), (call, True), (call, False)}
    assert [p.header for p in result if p.first] == [analysis, call]


@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["analysis", "final", "commentary"]), st.text(min_size=1, max_size=30)),
        max_size=4,
    ),
    role=st.booleans(),
)
def test_messages_of_any_text_arrive_whole_and_in_whole_characters(
    text: Text, parts: list[tuple[str, str]], role: bool
) -> None:
    tokens: list[int] = []
    for number, (channel, content) in enumerate(parts):
        before = "<|start|>assistant" if number else ""
        after = "<|end|>" if number + 1 < len(parts) else "<|return|>"
        tokens += text.encode(f"{before}<|channel|>{channel}<|message|>")
        tokens += text.encode(content) + text.encode(after)
    parser = text.parser(text.encode(OPEN if role else OPEN.removesuffix("assistant")))
    pieces: list[Piece] = [] if role else [p for t in text.encode("assistant") for p in parser.push(t)]
    pieces += [p for t in tokens for p in parser.push(t)] + parser.flush()
    whole = "".join(content for _, content in parts)
    assert whole.count("\ufffd") == sum(p.text.count("\ufffd") for p in pieces)
    parsed: list[tuple[str | None, str]] = []
    for piece in pieces:
        if piece.first:
            parsed.append((piece.header.channel, piece.text))
        else:
            parsed[-1] = (parsed[-1][0], parsed[-1][1] + piece.text)
    assert parsed == parts


@given(
    prompt=st.sampled_from([OPEN, OPEN + "<|message|>", "<|start|>"]),
    tokens=st.lists(st.integers(0, 2049) | st.sampled_from([3, 4, 5, 6, 2048, 2049]), max_size=60),
)
def test_any_tokens_lose_no_text_of_a_message(text: Text, prompt: str, tokens: list[int]) -> None:
    """Even for a broken model, text after a message's marker is in some piece, up to its end."""
    parser = text.parser(text.encode(prompt))
    pieces = [p for t in tokens for p in parser.push(t)] + parser.flush()
    assert all(p.text for p in pieces)
    parsed = "".join(p.text for p in pieces)
    bodies: list[list[int]] = []
    inside = prompt.endswith("<|message|>")
    for token in tokens:
        if token == 4:
            inside = True
        if token <= 7 or token >= 2048:
            inside = inside and token in (0, 1, 4, 7)
            bodies.append([])
        elif inside:
            bodies = bodies or [[]]
            bodies[-1].append(token)
    at = 0
    for body in filter(None, bodies):
        parts = text.decode(body).strip("\ufffd")  # beside a marker characters may be cut
        assert parts in parsed[at:]
        at = parsed.index(parts, at)


def test_a_model_without_markers_only_answers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<|start|>": 0, "assistant": 1, "final": 2}
    Tokenizer(WordLevel(words, unk_token="final")).save(str(tmp_path / "tokenizer.json"))
    text = Text(tmp_path)
    assert text.split([0, 1], [2, 1]) == reply(text.decode([2, 1]))
