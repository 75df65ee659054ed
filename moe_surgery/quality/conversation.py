"""Rows of chat data sets as conversations: messages, tools, and other arguments of a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moe_surgery.checkpoint.text import describe_value, printable
from moe_surgery.errors import InvalidInputError

__all__ = ["Conversation", "answer_start", "common_length", "conversation", "describe_row"]

Row = Mapping[str, object]

VARIABLES = ("reasoning_effort", "builtin_tools", "model_identity", "enable_thinking", "thinking")
"""Keys of a row that are arguments of the chat template; so are those in its `chat_template_kwargs`."""
CONTENTS = ("functions", "system")
"""Keys of a row with content for the model: refused if the template does not use them."""
OURS = ("messages", "conversation", "add_generation_prompt", "continue_final_message", "chat_template")
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row as arguments of transformers' `apply_chat_template`.

    `variables` must be read by the template; `also` has the row's other keys (an id, a source), which
    are passed if the template reads a variable of that name.
    """

    messages: tuple[Row, ...]
    tools: list[object] | None = None
    documents: list[object] | None = None
    variables: Row = field(default_factory=dict)
    also: Row = field(default_factory=dict)

    def question(self) -> Conversation:
        """The conversation without its last message if that is the assistant's, else itself."""
        if self.messages[-1]["role"] != "assistant":
            return self
        return replace(self, messages=self.messages[:-1])


def conversation(row: object, where: str) -> Conversation:
    """A row `{"messages": [...], ...}`; nulls count as absent.

    `tools` and `documents` may be JSON in a string. Raises InvalidInputError, starting with `where`
    and naming the key, for anything else.
    """
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        raise InvalidInputError(f'{where}: expected {{"messages": [...]}}, got {describe_row(row)}')
    messages = tuple(_message(m, f"{where}: message {n}") for n, m in enumerate(row["messages"], 1))
    others = {key: value for key, value in row.items() if key != "messages" and value is not None}
    arguments = _parsed(others.pop("chat_template_kwargs", {}), f"{where}: chat_template_kwargs")
    if not isinstance(arguments, dict):
        raise InvalidInputError(
            f"{where}: chat_template_kwargs is {describe_value(arguments)}, not an object"
        )
    variables = {key: others.pop(key) for key in (*VARIABLES, *CONTENTS) if key in others}
    for key, value in arguments.items():
        if key in OURS:
            raise InvalidInputError(f"{where}: chat_template_kwargs may not set '{key}'")
        if value is not None:
            if key in others and key in ("tools", "documents"):
                raise InvalidInputError(
                    f"{where}: '{key}' is both in the row and in its chat_template_kwargs"
                )
            (others if key in ("tools", "documents") else variables)[key] = value
    if "builtin_tools" in variables:
        variables["builtin_tools"] = _parsed(variables["builtin_tools"], f"{where}: builtin_tools")
    return Conversation(
        messages,
        _objects(others.pop("tools", None), f"{where}: tools"),
        _objects(others.pop("documents", None), f"{where}: documents"),
        variables,
        others,
    )


def answer_start(render: Callable[[Conversation, bool], str], chat: Conversation) -> int:
    """The character at which the last message of `chat`, the assistant's, begins in `render(chat, False)`.

    `render` gives a conversation's text, with an open turn or without. Templates may write earlier
    messages differently once an answer follows (they leave reasoning out), so that the question with an
    open turn does not begin the text: the turn is then found in the text with another answer.
    """
    question = chat.question()
    whole = render(chat, False)
    another = replace(chat, messages=(*question.messages, {"role": "assistant", "content": "\N{SNOWMAN}"}))
    if not question.messages:  # templates may look at the first message
        return common_length(whole, render(another, False))
    opened = render(question, True)
    start = common_length(whole, opened)
    if start == len(opened):
        return start
    opening = opened[common_length(opened, render(question, False)) :]
    altered = render(another, False)
    turn = altered.rfind(opening) if opening else -1
    if start < turn <= common_length(whole, altered):
        start = turn + common_length(whole[turn:], opening)
    return start


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """The length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def describe_row(row: object) -> str:
    """What `row` is, with its keys if it is an object."""
    if not isinstance(row, dict) or not row:
        return describe_value(row)
    names = ", ".join(f"'{printable(str(key))}'" for key in list(row)[:8])
    return f"an object with {names}" + (" and more" if len(row) > 8 else "")


def _message(value: object, where: str) -> Row:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise InvalidInputError(
            f'{where}: expected {{"role": "...", "content": "..."}}, got {describe_row(value)}'
        )
    content, calls = value.get("content"), value.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(c, dict) for c in calls)):
        raise InvalidInputError(f"{where}: tool_calls is {describe_value(calls)}, not a list of objects")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise InvalidInputError(
                    f"{where}: content has a part of {describe_value(kind)}; only text is read"
                )
    elif content is None:
        if not calls and not value.get("function_call") and not any(value.get(key) for key in REASONING):
            raise InvalidInputError(f"{where}: has neither content nor tool_calls")
    elif not isinstance(content, str):
        raise InvalidInputError(f"{where}: content is {describe_value(content)}, not a string")
    return {key: item for key, item in value.items() if key != "tool_calls" or item}


def _parsed(value: object, where: str) -> object:
    """`value`, parsed if it is a string of JSON."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        parsed: object = json.loads(value)
        return parsed
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where}: not JSON: {error}") from None


def _objects(value: object, where: str) -> list[object] | None:
    parsed = _parsed(value, where)
    if parsed is None:
        return None
    if not isinstance(parsed, list):
        raise InvalidInputError(f"{where}: expected a list of objects, got {describe_value(parsed)}")
    items = [_parsed(item, where) for item in parsed]
    for item in items:
        if not isinstance(item, dict):
            raise InvalidInputError(f"{where}: expected a list of objects, got {describe_value(item)} in it")
    return items
