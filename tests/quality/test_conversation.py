"""Rows of chat data sets become the tokens that transformers' `apply_chat_template` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("jinja2")
pytest.importorskip("transformers")

import transformers

from moe_surgery.errors import InvalidInputError
from moe_surgery.quality.conversation import conversation
from moe_surgery.quality.corpus import Corpus, open_corpus, text_files
from moe_surgery.quality.prompts import prompts_of
from moe_surgery.runtime.text import Text
from tests.quality.conftest import write_lines
from tests.support.harmony import TEMPLATE, write_harmony

Row = dict[str, Any]

WEATHER: Row = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": " The weather <now> & then. ",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Où?"},
                "unit": {"enum": ["°C", "°F"], "default": "°C"},
                "days": {"type": "array", "items": {"type": "integer"}, "nullable": True},
                "wind": {"type": "object", "properties": {"low": {"type": "number"}}, "required": ["low"]},
                "odd": {"type": ["string", "null"]},
            },
            "required": ["place"],
        },
    },
}
CLOCK: Row = {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}}
ASK = {"role": "user", "content": "Is it warm?"}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}
CALLING = {"role": "assistant", "thinking": "Ask the tool.", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": '{"t": 21}'}
ANSWER = {"role": "assistant", "thinking": "21 is warm.", "content": "Yes."}

ROWS: dict[str, Row] = {
    "a question": {"messages": [ASK]},
    "an answer with reasoning": {"messages": [ASK, ANSWER]},
    "reasoning by its other name": {
        "messages": [ASK, {"role": "assistant", "reasoning_content": "Hm.", "content": "Yes."}]
    },
    "a developer's message": {"messages": [{"role": "developer", "content": "Be brief."}, ASK, ANSWER]},
    "tools": {"messages": [ASK], "tools": [WEATHER, CLOCK]},
    "a call": {"messages": [ASK, CALLING], "tools": [WEATHER]},
    "a call without the key content": {
        "messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}],
        "tools": [WEATHER],
    },
    "a call and an empty content": {"messages": [ASK, {**CALLING, "content": ""}], "tools": [WEATHER]},
    "a call, its result, an answer": {"messages": [ASK, CALLING, TOLD, ANSWER], "tools": [WEATHER]},
    "a result to answer": {"messages": [ASK, CALLING, TOLD], "tools": [WEATHER]},
    "two turns": {"messages": [ASK, ANSWER, ASK, ANSWER]},
    "arguments as a string": {
        "messages": [
            ASK,
            {**CALLING, "tool_calls": [{"function": {"name": "clock", "arguments": '{"a": "<b>"}'}}]},
        ],
        "tools": [CLOCK],
    },
    "effort": {"messages": [ASK, ANSWER], "reasoning_effort": "high"},
    "built-in tools": {"messages": [ASK], "builtin_tools": ["browser", "python"]},
    "identity": {"messages": [ASK], "model_identity": "You are a <test> & 'more'."},
    "documents": {"messages": [ASK], "documents": [{"title": "One", "text": "Zürich is warm."}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]},
    "nulls": {
        "messages": [{**ASK, "tool_calls": None, "thinking": None}],
        "tools": None,
        "documents": None,
        "reasoning_effort": None,
        "chat_template_kwargs": None,
    },
    "no tools": {"messages": [ASK, {**ANSWER, "tool_calls": []}], "tools": []},
    "an id": {"messages": [ASK, {**ANSWER, "weight": 1}], "id": 17, "source": "somewhere", "prompt": "x"},
}
EFFORT_IN_KWARGS = {"reasoning_effort": "low", "builtin_tools": ["python"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_harmony(tmp_path_factory.mktemp("harmony"))


@pytest.fixture(scope="module")
def harmony(folder: Path) -> Text:
    return Text(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path):  # type: ignore[no-untyped-def]
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def corpus(text: Text, file: Path, rows: list[Any]) -> Corpus:
    write_lines(file, rows)
    return open_corpus(text_files([file], format="chat"), text, context=10**6)


def expected(theirs: Any, row: Row, *, answered: bool = True) -> list[int]:
    """What transformers makes of `row`; without `answered` its last answer is left open."""
    messages = row["messages"]
    closed = messages[-1]["role"] == "assistant"
    if closed and not answered:
        messages = messages[:-1]
    given = {k: row.get(k) for k in ("tools", "documents")}
    others = ("reasoning_effort", "builtin_tools", "model_identity")
    given |= {k: row[k] for k in others if row.get(k) is not None}
    ids = theirs.apply_chat_template(
        messages, add_generation_prompt=not (closed and answered), return_dict=False, **given
    )
    return list(ids)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_the_tokens_of_transformers(name: str, harmony: Text, theirs: Any, tmp_path: Path) -> None:
    row = ROWS[name]
    results = corpus(harmony, tmp_path / "x.jsonl", [row])
    [passage] = results
    assert list(passage.tokens) == expected(theirs, row)
    opened = expected(theirs, row, answered=False)
    assert [list(tokens) for _, tokens in results.prompts()] == [opened]
    assert prompts_of(results, 1) == {"x": [opened]}


@pytest.mark.parametrize("name", [n for n, r in ROWS.items() if r["messages"][-1]["role"] == "assistant"])
def test_an_answer_begins_where_its_turn_was_opened(
    name: str, harmony: Text, theirs: Any, tmp_path: Path
) -> None:
    """Also where the template leaves earlier reasoning out once an answer follows."""
    [passage] = corpus(harmony, tmp_path / "x.jsonl", [ROWS[name]])
    assert passage.answer is not None
    before = theirs.decode(passage.tokens[: passage.answer])
    after = theirs.decode(passage.tokens[passage.answer :])
    assert before.endswith("<|start|>assistant")
    last = ROWS[name]["messages"][-1]
    if thought := last.get("thinking") or last.get("reasoning_content"):
        assert after.startswith(f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant")
    assert after.endswith("<|call|>" if last.get("tool_calls") else "final<|message|>Yes.<|return|>")


def test_an_answer_begins_within_a_turn_that_the_template_opens_further(tmp_path: Path) -> None:
    """Where the open turn names the final channel, reasoning belongs to the answer all the same."""
    source = TEMPLATE.replace(
        '{{ open("assistant") }}{% endif -%}', '{{ open("assistant", "final") + "<|message|>" }}{% endif -%}'
    )
    assert source != TEMPLATE
    text = Text(write_harmony(tmp_path / "model", source))
    [passage] = corpus(text, tmp_path / "x.jsonl", [ROWS["a call, its result, an answer"]])
    assert passage.answer is not None
    before = text.encode("<|start|>assistant<|channel|>")
    assert list(passage.tokens[: passage.answer][-len(before) :]) == before
    assert text.decode(passage.tokens[passage.answer :]) == "analysis21 is warm.assistantfinalYes."


def test_tools_may_be_json_in_strings(harmony: Text, theirs: Any, tmp_path: Path) -> None:
    plain = {"messages": [ASK], "tools": [WEATHER, CLOCK], "builtin_tools": ["python"]}
    rows = [
        {**plain, "tools": json.dumps(plain["tools"]), "builtin_tools": '["python"]'},
        {**plain, "tools": [json.dumps(tool) for tool in plain["tools"]]},
    ]
    for passage in corpus(harmony, tmp_path / "x.jsonl", rows):
        assert list(passage.tokens) == expected(theirs, plain)


def test_chat_template_kwargs_are_the_templates_arguments(harmony: Text, theirs: Any, tmp_path: Path) -> None:
    row = {"messages": [ASK, ANSWER], "tools": [WEATHER]}
    given = [{**EFFORT_IN_KWARGS}, json.dumps(EFFORT_IN_KWARGS), {**EFFORT_IN_KWARGS, "model_identity": None}]
    for kwargs in given:
        [passage] = corpus(harmony, tmp_path / "x.jsonl", [{**row, "chat_template_kwargs": kwargs}])
        assert list(passage.tokens) == expected(theirs, {**row, **EFFORT_IN_KWARGS})
    moved = {"messages": row["messages"], "chat_template_kwargs": {"tools": [WEATHER]}}
    [passage] = corpus(harmony, tmp_path / "x.jsonl", [moved])
    assert list(passage.tokens) == expected(theirs, row)


words = st.text(st.characters(codec="utf-8"), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
schemas = st.fixed_dictionaries(
    {"type": st.sampled_from(["string", "integer", "boolean", "array", "object"])},
    optional={"description": words, "enum": st.lists(words, min_size=1, max_size=2), "default": values},
)
tools = st.builds(
    lambda name, about, fields: {
        "type": "function",
        "function": {"name": name, "description": about, "parameters": {"properties": fields}},
    },
    words,
    words,
    st.dictionaries(words, schemas, max_size=2),
)
turns = st.one_of(
    st.builds(lambda t: [{"role": "user", "content": t}], words),
    st.builds(
        lambda t, think: [{"role": "assistant", "content": t, "thinking": think}], words, st.none() | words
    ),
    st.builds(
        lambda name, arguments, result: [
            {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
            {"role": "tool", "content": result},
        ],
        words,
        values,
        words,
    ),
)
rows = st.fixed_dictionaries(
    {
        "messages": st.lists(turns, min_size=1, max_size=4).map(
            lambda some: [m for turn in some for m in turn]
        )
    },
    optional={
        "tools": st.lists(tools, max_size=2),
        "reasoning_effort": st.sampled_from(["low", "medium", "high"]),
        "builtin_tools": st.lists(st.sampled_from(["browser", "python"]), max_size=2),
        "model_identity": words.filter(bool),
    },
)


@given(row=rows)
def test_any_row_is_the_tokens_of_transformers(harmony: Text, theirs: Any, row: Row) -> None:
    requested = conversation(json.loads(json.dumps(row)), "x")
    closed = row["messages"][-1]["role"] == "assistant"
    recorded = harmony.chat(
        requested.messages,
        prompt=not closed,
        tools=requested.tools,
        documents=None,
        variables=requested.variables,
    )
    assert harmony.encode(recorded) == expected(theirs, row)


# --- templates that read less


PLAIN = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
UNREAD: dict[str, tuple[Row, str]] = {
    "tools": ({"messages": [ASK], "tools": [CLOCK]}, "the model's chat template does not read 'tools'"),
    "documents": ({"messages": [ASK], "documents": [{"text": "x"}]}, "does not read 'documents'"),
    "effort": ({"messages": [ASK], "reasoning_effort": "low"}, "does not read 'reasoning_effort'"),
    "built-in tools": ({"messages": [ASK], "builtin_tools": ["python"]}, "does not read 'builtin_tools'"),
    "identity": ({"messages": [ASK], "model_identity": "I."}, "does not read 'model_identity'"),
    "functions": ({"messages": [ASK], "functions": [CLOCK]}, "does not read 'functions'"),
    "a system prompt": ({"messages": [ASK], "system": "Be brief."}, "does not read 'system'"),
    "arguments": ({"messages": [ASK], "chat_template_kwargs": {"mood": 1}}, "does not read 'mood'"),
    "a call": (
        {"messages": [ASK, CALLING]},
        "message 2: the model's chat template does not read 'tool_calls'",
    ),
    "an old call": (
        {"messages": [ASK, {"role": "assistant", "function_call": {"name": "f"}}]},
        "message 2: the model's chat template does not read 'function_call'",
    ),
    "reasoning": (
        {"messages": [ASK, ANSWER]},
        "message 2: the model's chat template does not read 'thinking'",
    ),
    "parts": ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "this is a list of parts"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_the_template_does_not_read_is_refused(case: str, tmp_path: Path) -> None:
    """transformers leaves it out and says nothing."""
    row, complaint = UNREAD[case]
    text = Text(write_harmony(tmp_path / "model", PLAIN))
    with pytest.raises(InvalidInputError) as caught:
        list(corpus(text, tmp_path / "x.jsonl", [{"messages": [ASK]}, row]))
    recorded = str(caught.value)
    assert recorded.startswith(f"{tmp_path / 'x.jsonl'}: line 2: ")
    assert complaint in recorded
    assert "\n" not in recorded


def test_templates_that_write_messages_whole_read_all_of_them(tmp_path: Path) -> None:
    source = "{% for m in messages[-2:] %}{{ m | tojson }}{% endfor %}"
    text = Text(write_harmony(tmp_path / "model", source))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    row = {"messages": [ASK, CALLING]}
    [passage] = corpus(text, tmp_path / "x.jsonl", [row])
    assert list(passage.tokens) == expected(theirs, row)


def test_other_keys_are_variables_where_the_template_reads_them(tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text = Text(write_harmony(tmp_path / "model", source))
    expected = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    row = {"messages": [ASK], "mood": "calm", "bos_token": "no", "add_generation_prompt": "no"}
    [passage] = corpus(text, tmp_path / "x.jsonl", [row])
    ids = expected.apply_chat_template([ASK], mood="calm", return_dict=False, add_generation_prompt=True)
    assert list(passage.tokens) == ids


def test_a_template_for_tools_beside_the_default(tmp_path: Path) -> None:
    folder = write_harmony(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "default", "template": PLAIN},
        {"name": "tool_use", "template": PLAIN + "{{ tools | tojson }}"},
    ]
    settings["unk_token"] = {"__type": "AddedToken", "content": "<|reserved|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for row in ({"messages": [ASK]}, {"messages": [ASK], "tools": [CLOCK]}):
        [passage] = corpus(Text(folder), tmp_path / "x.jsonl", [row])
        assert list(passage.tokens) == expected(theirs, row)


BAD: dict[str, tuple[Any, str]] = {
    "tools in broken JSON": ({"messages": [ASK], "tools": "[{"}, "tools: not JSON"),
    "tools that are a word": ({"messages": [ASK], "tools": '"clock"'}, "tools: expected a list of objects"),
    "one tool": ({"messages": [ASK], "tools": CLOCK}, "tools: expected a list of objects, got an object"),
    "a tool's name": ({"messages": [ASK], "tools": [3]}, "tools: expected a list of objects, got 3 in it"),
    "calls in a string": (
        {"messages": [ASK, {**CALLING, "tool_calls": "[]"}]},
        "message 2: tool_calls is the string '[]', not a list of objects",
    ),
    "content that is a number": ({"messages": [{"role": "user", "content": 7}]}, "message 1: content is 7"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "message 1: has neither content nor"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "message 1: content has a part of the string 'image'; only text is read",
    ),
    "no role": ({"messages": [{"from": "human", "value": "x"}]}, "got an object with 'from', 'value'"),
    "arguments that are a list": ({"messages": [ASK], "chat_template_kwargs": [1]}, "not an object"),
    "the program's own argument": (
        {"messages": [ASK], "chat_template_kwargs": {"add_generation_prompt": True}},
        "chat_template_kwargs may not set 'add_generation_prompt'",
    ),
    "tools twice": (
        {"messages": [ASK], "tools": [CLOCK], "chat_template_kwargs": {"tools": [CLOCK]}},
        "'tools' is both in the row and in its chat_template_kwargs",
    ),
    "no messages": ({"conversations": []}, "got an object with 'conversations'"),
    "the template's own refusal": (
        {"messages": [ASK], "reasoning_effort": "utmost"},
        "no such effort: utmost",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_with_its_key(case: str, harmony: Text, tmp_path: Path) -> None:
    row, complaint = BAD[case]
    with pytest.raises(InvalidInputError) as caught:
        list(corpus(harmony, tmp_path / "x.jsonl", [{"messages": [ASK]}, row]))
    recorded = str(caught.value)
    assert recorded.startswith(f"{tmp_path / 'x.jsonl'}: line 2: ")
    assert complaint in recorded
    assert "\n" not in recorded
