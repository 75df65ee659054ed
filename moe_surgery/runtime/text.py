"""Text to tokens and back, with the checkpoint's own tokenizer and chat template."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moe_surgery.checkpoint.checkpoint import open_folder
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.source import Folder, read_optional, read_small
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.errors import InvalidInputError, OutputError, UsageError
from moe_surgery.families.model_config import token_ids
from moe_surgery.runtime.harmony import Harmony, Markers, Reply
from moe_surgery.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from moe_surgery.runtime.chat_template import ChatTemplate

__all__ = ["Text", "TextStream"]

MAX_BYTES = 200_000_000
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class Text:
    """The text side of a checkpoint: tokenizer.json, chat template, stop tokens.

    `stop_tokens` are those of generation_config.json, empty where it names none.
    """

    def __init__(self, path: str | os.PathLike[str] | Folder) -> None:
        """Raises OutputError where the tokenizer is missing, InvalidInputError where it is broken,
        UsageError where the tokenizers package is not installed."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UsageError("text needs the tokenizers package: pip install 'moe-surgery[torch]'") from None
        self._files = open_folder(path)
        self._folder = self._files.path
        file = self._folder / "tokenizer.json"
        raw = read_optional(self._files, file.name, limit=MAX_BYTES, what="a tokenizer")
        if raw is None:
            raise OutputError(
                f"{printable_path(file)}: not found; copy the model's tokenizer.json there to use text"
            )
        try:
            self._tokenizer = Tokenizer.from_str(raw.decode())
        except Exception as error:  # the package raises bare Exceptions
            raise InvalidInputError(f"{printable_path(file)}: not a tokenizer: {str(error)[:200]}") from None
        self._settings = self._json("tokenizer_config.json")
        self._templates: dict[str, ChatTemplate] = {}
        self.stop_tokens = token_ids(self._json("generation_config.json").get("eos_token_id"))

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written out in `text` become those tokens.

        Raises UsageError for lone surrogates, which represent bytes that are not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not Unicode at character {error.start}") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token adds to those before it, special tokens written out.

        Empty for a token that ends within a character; the token that completes it has the character.
        """
        stream = TextStream(_Verbatim(self._tokenizer))
        added = [stream.push(token) for token in tokens]
        if added:
            added[-1] += stream.flush()
        return added

    def parser(self, prompt: Sequence[int]) -> Harmony:
        """A parser of the tokens generated after `prompt` into reasoning, answer and tool calls."""
        return Harmony(self, self._markers(), prompt)

    def split(self, prompt: Sequence[int], tokens: Sequence[int]) -> Reply:
        """All `tokens` generated after `prompt`, parsed."""
        parser = self.parser(prompt)
        return Reply.of([*(p for token in tokens for p in parser.push(token)), *parser.flush()])

    def _markers(self) -> Markers | None:
        names = ("start", "message", "end", "channel", "constrain", "call", "return")
        start, message, end, *others = (self._tokenizer.token_to_id(f"<|{name}|>") for name in names)
        if start is None or message is None or end is None:
            return None
        return Markers(start, message, end, *others)

    def special_token(self, name: str) -> int | None:
        """The id of the tokenizer's "bos", "eos", "pad", ... token; None where its settings name none."""
        written = self._special_tokens().get(f"{name}_token")
        token: int | None = None if written is None else self._tokenizer.token_to_id(written)
        return token

    def same_tokens(self, other: Text) -> bool:
        """Whether both tokenizers have the same vocabulary."""
        ours, others = (t._tokenizer.get_vocab(with_added_tokens=True) for t in (self, other))
        return bool(ours == others)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        prompt: bool = True,
        tools: Sequence[object] | None = None,
        documents: Sequence[object] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """`messages` rendered by the checkpoint's chat template, as transformers' `apply_chat_template` does for
        the same arguments; `variables` are its keyword arguments.

        With `prompt` the text ends where the model's answer begins. The template runs in a sandbox, because it
        comes from an untrusted checkpoint. Raises OutputError where there is no template, InvalidInputError
        where it fails, and for tools, documents, variables, tool calls or reasoning that it does not use.
        """
        template = self._template(with_tools=bool(tools))
        arguments = {"tools": tools, "documents": documents, **(variables or {})}
        for key, value in arguments.items():
            if value and not template.takes(key):
                raise InvalidInputError(f"the model's chat template does not read {key!r}; leave it out")
        for number, message in enumerate(messages, 1):
            if unread := template.unread(message):
                raise InvalidInputError(
                    f"message {number}: the model's chat template does not read {unread!r}; leave it out"
                )
        try:
            return template.render(
                messages, prompt=prompt, tools=tools, documents=documents, variables=variables
            )
        except Exception as error:
            raise self._failed(error) from None

    def template_source(self, name: str = "default") -> str:
        """The chat template called `name`, as Jinja. Raises as `chat`, UsageError for an unknown name."""
        sources = self._sources()
        if name not in sources:
            raise UsageError(f"`chat_template` {name}: choose one of {', '.join(sources)}")
        return sources[name]

    def reads(self, name: str) -> bool:
        """Whether the chat template reads a variable `name`. Raises like `chat`."""
        return self._template(with_tools=False).takes(name)

    def _template(self, *, with_tools: bool) -> ChatTemplate:
        sources = self._sources()
        name = "tool_use" if with_tools and "tool_use" in sources else "default"
        if name not in sources:
            raise InvalidInputError(
                f"{printable_path(self._folder)}: several chat templates, none of them named 'default'"
            )
        if name not in self._templates:
            try:
                from moe_surgery.runtime.chat_template import ChatTemplate
            except ImportError:
                raise UsageError("chat needs the jinja2 package: pip install 'moe-surgery[chat]'") from None
            try:
                self._templates[name] = ChatTemplate(sources[name], self._special_tokens())
            except Exception as error:
                raise self._failed(error) from None
        return self._templates[name]

    def _failed(self, error: Exception) -> InvalidInputError:
        message = str(error)[:200] or type(error).__name__
        return InvalidInputError(f"{printable_path(self._folder)}: chat template: {message}")

    def _sources(self) -> dict[str, str]:
        """The templates by name. A file goes before the tokenizer's settings, as in transformers."""
        file, extra = self._folder / TEMPLATE_NAME, self._files.folder(TEMPLATE_FOLDER)
        templates = {"default": _source(self._files, file.name)} if self._files.is_file(file.name) else {}
        if extra is not None:
            names = sorted(n for n in extra.listing() if n.endswith(".jinja"))
            templates |= {n.removesuffix(".jinja"): _source(extra, n) for n in names}
        if templates:
            return templates
        setting = self._settings.get("chat_template")
        if isinstance(setting, str):
            return {"default": setting}
        if isinstance(setting, list):
            named = [t for t in setting if isinstance(t, dict)]
            templates = {
                str(t.get("name")): t["template"] for t in named if isinstance(t.get("template"), str)
            }
        if not templates:
            raise OutputError(
                f"{printable_path(file)}: not found; this model has no chat template; give it a plain prompt"
            )
        return templates

    def _special_tokens(self) -> dict[str, str]:
        """The special tokens by name, which templates read as variables."""
        settings = dict(self._settings)
        if "added_tokens_decoder" not in settings:  # as older versions saved tokenizers
            settings |= self._json("special_tokens_map.json")
        tokens = {}
        for name in SPECIAL_TOKENS:
            value = settings.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[name] = value
        return tokens

    def _json(self, name: str) -> dict[str, object]:
        raw = read_optional(self._files, name, limit=MAX_BYTES, what="a config")
        if raw is None:
            return {}
        value = parse_json(raw, where=printable_path(self._folder / name), allow_floats=True)
        return value if isinstance(value, dict) else {}


class _Verbatim:
    """A tokenizer as `TextStream` uses it, with special tokens written out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))


def _source(folder: Folder, name: str) -> str:
    with folder.open(name) as source:
        raw = read_small(source, limit=MAX_BYTES, what="a chat template")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{source.where}: not UTF-8 at byte {error.start}") from None
