"""Chat templates, rendered as transformers' `apply_chat_template` does, in a sandbox: they are untrusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["ChatTemplate"]

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The keys of a message's reasoning; transformers fills the first two."""
CONTENTS = ("tool_calls", "function_call")
"""The other keys of a message."""
WHOLESALE = {"tojson", "items", "dictsort", "string", "pprint"}


class _Sandbox(ImmutableSandboxedEnvironment):
    """Raises where jinja2's own sandbox renders an empty string."""

    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        raise SecurityError(f"may not look at {attribute!r}")


class _Generation(Extension):
    """`{% generation %}` blocks, which mark an answer for training: rendered as their contents."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_contents"), [], [], body).set_lineno(line)

    def _contents(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)`, without the rest of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name in the namespace
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Parts(list[Any]):
    """Content as a list of parts, for templates that take it apart."""

    def __str__(self) -> str:
        raise TemplateError("it takes a message's content as one string, and this is a list of parts")

    __repr__ = __str__


class ChatTemplate:
    """One compiled template.

    `tokens` are the tokenizer's special tokens by name (`bos_token`, ...).
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Raises jinja2's TemplateError for bad syntax."""
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.globals.update(
            raise_exception=_raise, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
        )
        environment.filters["tojson"] = _to_json
        self._tokens = dict(tokens)
        tree = environment.parse(source)
        self._template = environment.from_string(source)
        self.variables = frozenset(meta.find_undeclared_variables(tree)) - set(environment.globals)
        """Names that the template reads from its arguments."""
        self._names = {a.attr for a in tree.find_all(nodes.Getattr)} | {
            c.value for c in tree.find_all(nodes.Const) if isinstance(c.value, str)
        }
        self._wholesale = _reads_whole_messages(tree)

    def takes(self, name: str) -> bool:
        """Whether a caller may set the variable `name`: the template reads it, and it is not set here."""
        return name in self.variables and name not in {"messages", "add_generation_prompt", *self._tokens}

    def unread(self, message: Mapping[str, object]) -> str | None:
        """A key of `message` that the template never mentions, so that it would be lost."""
        if self._wholesale:
            return None
        for key in CONTENTS:
            if message.get(key) and key not in self._names:
                return key
        if self._names.isdisjoint(REASONING[:2]):
            return next((key for key in REASONING if message.get(key)), None)
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        prompt: bool,
        tools: Sequence[object] | None = None,
        documents: Sequence[object] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The rendered text. Raises whatever the template raises: it is a program."""
        values = {
            **self._tokens,
            "tools": tools,
            "documents": documents,
            **(variables or {}),
            "messages": [_message(m) for m in messages],
            "add_generation_prompt": prompt,
        }
        return self._template.render(values)


def _message(message: Mapping[str, object]) -> dict[str, object]:
    """As transformers passes it: without nulls, reasoning under both names that templates read."""
    values = {key: value for key, value in message.items() if value is not None}
    reasoning = next((values[key] for key in REASONING if key in values), None)
    if reasoning is not None:
        values = {"thinking": reasoning, **values, "reasoning_content": reasoning}
    if isinstance(values.get("content"), list):
        values["content"] = _Parts(values["content"])  # type: ignore[call-overload]
    return values


def _reads_whole_messages(tree: nodes.Template) -> bool:
    """Whether a message goes into a filter as a whole, as in `message | tojson`."""
    names = {"messages"}
    for loop in tree.find_all(nodes.For):
        if isinstance(loop.target, nodes.Name) and any(
            n.name == "messages" for n in _with_itself(loop.iter, nodes.Name)
        ):
            names.add(loop.target.name)
    return any(
        f.name in WHOLESALE and isinstance(f.node, nodes.Name) and f.node.name in names
        for f in tree.find_all(nodes.Filter)
    )


def _with_itself(node: nodes.Node, kind: type[nodes.Name]) -> list[nodes.Name]:
    return [*([node] if isinstance(node, kind) else []), *node.find_all(kind)]


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"may not set {name!r} in a namespace")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's filter without its HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
