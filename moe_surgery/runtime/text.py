"""Text to tokens and back, with the checkpoint's own tokenizer and chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.locate import locate
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.errors import InvalidInputError, OutputError, UsageError
from moe_surgery.runtime.config import token_ids

__all__ = ["Text", "TextStream"]

MAX_BYTES = 200_000_000
TEMPLATE_NAME = "chat_template.jinja"


class Text:
    """The text side of a checkpoint: tokenizer.json, chat template, stop tokens.

    `stop_tokens` are those of generation_config.json, empty where it names none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OutputError where the tokenizer is missing, InvalidInputError where it is broken,
        UsageError where the tokenizers package is not installed."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UsageError("text needs the tokenizers package: pip install 'moe-surgery[torch]'") from None
        place = locate(path)
        self._folder = place if place.is_dir() else place.parent
        file = self._folder / "tokenizer.json"
        if not file.is_file():
            raise OutputError(
                f"{printable_path(file)}: not found; copy the model's tokenizer.json there to use text"
            )
        raw = read_small_file(file, limit=MAX_BYTES, what="a tokenizer")
        try:
            self._tokenizer = Tokenizer.from_str(raw.decode())
        except Exception as error:  # the package raises bare Exceptions
            raise InvalidInputError(f"{printable_path(file)}: not a tokenizer: {str(error)[:200]}") from None
        self._settings = self._json("tokenizer_config.json")
        self.stop_tokens = token_ids(self._json("generation_config.json").get("eos_token_id"))

    def encode(self, text: str) -> list[int]:
        """Token numbers; special tokens written out in `text` become those tokens.

        Raises UsageError for a text with lone surrogates, which bytes that are no UTF-8 become.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not Unicode at character {error.start}") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def same_tokens(self, other: Text) -> bool:
        """Whether both tokenizers give every token the same number."""
        mine, theirs = (t._tokenizer.get_vocab(with_added_tokens=True) for t in (self, other))
        return bool(mine == theirs)

    def chat(self, messages: Sequence[Mapping[str, str]], *, prompt: bool = True) -> str:
        """`messages` ({"role", "content"}) as the checkpoint's chat template writes them.

        With `prompt` an answer is left open for the model to give. The template runs in a sandbox: it
        comes with the checkpoint, from a stranger. Raises OutputError where there is no template,
        InvalidInputError where it fails.
        """
        source = self._template()
        try:
            from jinja2.exceptions import SecurityError, TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UsageError("--chat needs the jinja2 package: pip install 'moe-surgery[chat]'") from None

        class Sandbox(ImmutableSandboxedEnvironment):
            """Refuses what it would otherwise show as nothing."""

            def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
                raise SecurityError(f"may not look at {attribute!r}")

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.filters["tojson"] = _to_json
        special = {k: v for k, v in self._settings.items() if k.endswith("_token") and isinstance(v, str)}
        try:
            template = environment.from_string(source)
            return template.render(messages=list(messages), add_generation_prompt=prompt, **special)
        except Exception as error:
            said = str(error)[:200] or type(error).__name__
            raise InvalidInputError(f"{printable_path(self._folder)}: chat template: {said}") from None

    def _template(self) -> str:
        file = self._folder / TEMPLATE_NAME
        if file.is_file():
            raw = read_small_file(file, limit=MAX_BYTES, what="a chat template")
            try:
                return raw.decode()
            except UnicodeDecodeError as error:
                raise InvalidInputError(f"{printable_path(file)}: not UTF-8 at byte {error.start}") from None
        template = self._settings.get("chat_template")
        if not isinstance(template, str):
            raise OutputError(
                f"{printable_path(file)}: not found; this model has no chat template, use --prompt"
            )
        return template

    def _json(self, name: str) -> dict[str, object]:
        file: Path = self._folder / name
        if not file.is_file():
            return {}
        raw = read_small_file(file, limit=MAX_BYTES, what="a config")
        value = parse_json(raw, where=printable_path(file), allow_floats=True)
        return value if isinstance(value, dict) else {}


class TextStream:
    """Turns tokens into text as they come, holding back what is not yet a whole character."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly empty."""
        self._tokens.append(token)
        whole = self._text.decode(self._tokens)
        if whole.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new = whole[len(self._shown) :]
        # Tokens before the last complete text no longer matter: keep decoding short.
        if len(self._tokens) > 64 and new:
            self._tokens, self._shown = [token], self._text.decode([token])
        else:
            self._shown = whole
        return new

    def flush(self) -> str:
        """Whatever is left, incomplete characters included."""
        return self._text.decode(self._tokens)[len(self._shown) :]


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _to_json(value: object, **options: object) -> str:
    return json.dumps(value, ensure_ascii=False, **options)  # type: ignore[arg-type]
