"""tokenizer.json, tokenizer_config.json and the chat template as GGUF metadata.

llama.cpp's "gpt2" tokenizer: byte-level BPE over the strings of the vocabulary, with one of llama.cpp's
pre-tokenizers selected by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.writer import Metadata
from moe_surgery.checkpoint.source import Folder, read_optional
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import describe_value
from moe_surgery.errors import InvalidInputError, OutputError
from moe_surgery.export.json_walk import STRING, JsonWalk
from moe_surgery.families.model_spec import ModelSpec

__all__ = ["TOKENIZER_NAME", "Tokenizer", "add_tokenizer", "find_tokenizer", "read_tokenizer"]

TOKENIZER_NAME: Final = "tokenizer.json"
SETTINGS_NAME: Final = "tokenizer_config.json"
TEMPLATE_NAME: Final = "chat_template.jinja"
MAX_BYTES: Final = 200_000_000
MAX_TEMPLATE_BYTES: Final = 10_000_000

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

O200K_PATTERN: Final = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""The pre-tokenizer of gpt-4o and gpt-oss (o200k_base of tiktoken)."""

_ENTRY: Final = re.compile(rb"(" + STRING + rb")[ \t\n\r]*:[ \t\n\r]*(0|[1-9][0-9]{0,8})")
_PAIR: Final = re.compile(
    rb"\[[ \t\n\r]*(" + STRING + rb")[ \t\n\r]*,[ \t\n\r]*(" + STRING + rb")[ \t\n\r]*\]"
)
_JOINED_PAIR: Final = re.compile(STRING)


@dataclass(slots=True)
class Tokenizer:
    """A tokenizer in llama.cpp's terms; texts are UTF-8.

    `tokens[i]` is token i, `kinds[i]` its type in llama.cpp; `special` maps "bos", "eos" and "padding"
    to token numbers; `adds` says whether bos and eos are added to a text.
    """

    pre_tokenizer: str
    tokens: list[bytes]
    kinds: list[int]
    merges: list[bytes]
    special: Mapping[str, int] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(default_factory=dict)
    chat_template: str | None = None


def find_tokenizer(checkpoint: Checkpoint, model: ModelSpec) -> Tokenizer:
    """The tokenizer next to the shards, or one folder up if the layout has it there."""
    files = checkpoint.files
    if TOKENIZER_NAME in model.layout.parent_side_files and not files.is_file(TOKENIZER_NAME):
        parent = files.folder(os.pardir)
        files = parent if parent is not None and parent.is_file(TOKENIZER_NAME) else files
    return read_tokenizer(files, model.hub_config, model.dimensions["vocabulary"])


def read_tokenizer(folder: Folder, config: Mapping[str, object], vocabulary: int) -> Tokenizer:
    """The tokenizer in `folder` for a model of `vocabulary` rows; `config` is the model's config.json.

    Raises OutputError where tokenizer.json is missing, InvalidInputError where it is malformed, has
    tokens beyond the vocabulary, or is of a kind that llama.cpp does not support.
    """
    where = printable_path(folder.path / TOKENIZER_NAME)
    raw = read_optional(folder, TOKENIZER_NAME, limit=MAX_BYTES, what="a tokenizer")
    if raw is None:
        raise OutputError(
            f"{where}: not found; copy the model's {TOKENIZER_NAME} there, "
            "or pass `tokenizer=False` to export without a tokenizer"
        )
    settings = _settings(folder)
    return _Reader(raw, where).tokenizer(vocabulary, settings, config, _template(folder, settings))


def add_tokenizer(metadata: Metadata, tokenizer: Tokenizer) -> None:
    """Append the tokenizer.* keys of `tokenizer` to `metadata`."""
    metadata.text("tokenizer.ggml.model", "gpt2")
    metadata.text("tokenizer.ggml.pre", tokenizer.pre_tokenizer)
    metadata.texts("tokenizer.ggml.tokens", tokenizer.tokens)
    metadata.i32s("tokenizer.ggml.token_type", tokenizer.kinds)
    metadata.texts("tokenizer.ggml.merges", tokenizer.merges)
    for name, number in tokenizer.special.items():
        metadata.u32(f"tokenizer.ggml.{name}_token_id", number)
    for name, adds in tokenizer.adds.items():
        metadata.flag(f"tokenizer.ggml.add_{name}_token", adds)
    if tokenizer.chat_template is not None:
        metadata.text("tokenizer.chat_template", tokenizer.chat_template)


class _Reader:
    """Reads tokenizer.json in one pass: vocabulary and merges item by item, the rest parsed."""

    def __init__(self, raw: bytes, where: str) -> None:
        self._walk = JsonWalk(raw, where)
        self._where = where
        self._parts: dict[str, object] = {}
        self._model: dict[str, object] = {}
        self._vocabulary: dict[int, bytes] = {}
        self._merges: list[bytes] = []
        self._walk.document(lambda at: self._walk.members(at, self._part))

    def tokenizer(
        self,
        vocabulary: int,
        settings: Mapping[str, object],
        config: Mapping[str, object],
        chat_template: str | None,
    ) -> Tokenizer:
        self._check_model()
        added = self._added()
        tokens, kinds = self._tokens(added, vocabulary)
        numbers = {content: number for number, (content, _) in added.items()}
        special = _special(numbers, settings, config, vocabulary)
        return Tokenizer(
            self._pre_tokenizer(), tokens, kinds, self._merges, special, self._adds(), chat_template
        )

    def _part(self, key: str, at: int) -> int:
        if key == "model":
            return self._walk.members(at, self._model_part)
        return self._walk.value(at, lambda value: self._parts.update({key: value}))

    def _model_part(self, key: str, at: int) -> int:
        if key == "vocab":
            return self._entries(at)
        if key == "merges":
            return self._walk.elements(at, self._merge)
        return self._walk.value(at, lambda value: self._model.update({key: value}))

    def _entries(self, at: int) -> int:
        """The members of "vocab", which are many: key and value are matched together."""
        walk, raw, vocabulary = self._walk, self._walk.raw, self._vocabulary
        if raw[at : at + 1] != b"{":
            walk.fail(at, "expected an object")
        at = walk.space(at + 1)
        while match := _ENTRY.match(raw, at):
            number = int(match[2])
            if number in vocabulary:
                walk.fail(at, f"token {number} is listed twice")
            vocabulary[number] = walk.text(match[1])
            at = walk.space(match.end())
            if raw[at : at + 1] == b"}":
                return at + 1
            if raw[at : at + 1] != b",":
                walk.fail(at, "expected a comma")
            at = walk.space(at + 1)
        if not vocabulary and raw[at : at + 1] == b"}":
            return at + 1
        walk.fail(at, "expected a token and its number")

    def _merge(self, at: int) -> int:
        walk = self._walk
        if match := _PAIR.match(walk.raw, at):
            left, right = walk.text(match[1]), walk.text(match[2])
        elif match := _JOINED_PAIR.match(walk.raw, at):
            left, _, right = walk.text(match[0]).partition(b" ")
        else:
            walk.fail(at, "a merge is neither a pair of strings nor one string")
        if not left or not right or b" " in left + right:
            walk.fail(at, "a merge is not of two tokens without spaces")
        self._merges.append(left + b" " + right)
        return match.end()

    def _check_model(self) -> None:
        kind = self._model.get("type", "BPE")
        if kind != "BPE" or self._model.get("byte_fallback"):
            self._refuse(f"model.type is {describe_value(kind)}, but only byte-level BPE is supported")
        if not self._vocabulary or not self._merges:
            self._refuse("vocabulary or merges are missing")
        if self._parts.get("normalizer") is not None:
            self._refuse("unsupported normalizer (llama.cpp has none)")

    def _added(self) -> dict[int, tuple[bytes, bool]]:
        """Added tokens: number -> content and whether it is special."""
        added: dict[int, tuple[bytes, bool]] = {}
        listed = self._parts.get("added_tokens") or []
        for token in listed if isinstance(listed, list) else [None]:
            entry = token if isinstance(token, dict) else {}
            number, content = entry.get("id"), entry.get("content")
            if type(number) is not int or not isinstance(content, str) or not content:
                raise InvalidInputError(
                    f"{self._where}: added_tokens holds {describe_value(token)}, not a token"
                )
            added[number] = content.encode(), bool(entry.get("special")) or _looks_special(content)
        return added

    def _tokens(
        self, added: Mapping[int, tuple[bytes, bool]], vocabulary: int
    ) -> tuple[list[bytes], list[int]]:
        highest = max([*self._vocabulary, *added])
        if highest >= vocabulary:
            raise InvalidInputError(
                f"{self._where}: token {highest} exceeds the model's vocabulary of {vocabulary}; "
                "the tokenizer belongs to a different model"
            )
        tokens, kinds = [], []
        for number in range(vocabulary):
            if number in added:
                content, special = added[number]
                kind = CONTROL if special else USER_DEFINED
            elif number in self._vocabulary:
                content, kind = self._vocabulary[number], NORMAL
            else:
                content, kind = b"[PAD%d]" % number, UNUSED
            tokens.append(content)
            kinds.append(kind)
        if len(set(tokens)) < len(tokens):
            raise InvalidInputError(f"{self._where}: two tokens have the same text")
        return tokens, kinds

    def _pre_tokenizer(self) -> str:
        """llama.cpp's name of the pre-tokenizer."""
        spec = self._parts.get("pre_tokenizer")
        steps = spec.get("pretokenizers") if isinstance(spec, dict) and "pretokenizers" in spec else [spec]
        if isinstance(steps, list) and steps and all(isinstance(s, dict) for s in steps):
            *before, last = steps
            splits = last.get("use_regex", True)
            if last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
                if splits and not before:
                    return "gpt-2"
                if not splits and [_pattern(s) for s in before] == [O200K_PATTERN]:
                    return "gpt-4o"
        self._refuse("unsupported pre-tokenizer (supported: gpt-2, gpt-4o)")

    def _adds(self) -> dict[str, bool]:
        """Whether a beginning and an end token are added to a text."""
        spec = self._parts.get("post_processor")
        steps = spec.get("processors", [spec]) if isinstance(spec, dict) else []
        templates = [s for s in steps if isinstance(s, dict) and s.get("type") == "TemplateProcessing"]
        unknown = [
            s
            for s in steps
            if not isinstance(s, dict) or s.get("type") not in ("ByteLevel", "TemplateProcessing")
        ]
        if unknown or len(templates) > 1:
            self._refuse("unsupported post-processor (supported: one token before and one after a text)")
        single = templates[0].get("single") if templates else []
        items = [next(iter(i), "") for i in single if isinstance(i, dict)] if isinstance(single, list) else []
        first, _, last = "+".join(items).partition("Sequence")
        if {first, last} - {"", "SpecialToken+", "+SpecialToken"}:
            self._refuse("unsupported post-processor (supported: one token before and one after a text)")
        return {"bos": bool(first), "eos": bool(last)}

    def _refuse(self, problem: str) -> NoReturn:
        raise InvalidInputError(
            f"{self._where}: {problem}; pass `tokenizer=False` to export without a tokenizer"
        )


def _looks_special(content: str) -> bool:
    """Control tokens that some files do not mark as special; the rule of llama.cpp's converter."""
    return content.startswith("<|") and content.endswith("|>")


def _pattern(step: Mapping[str, object]) -> object:
    """The regular expression of a Split step whose matches are isolated."""
    pattern = step.get("pattern")
    if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    return pattern.get("Regex") if isinstance(pattern, dict) else None


def _special(
    numbers: Mapping[bytes, int],
    settings: Mapping[str, object],
    config: Mapping[str, object],
    vocabulary: int,
) -> dict[str, int]:
    """Token ids by role, from tokenizer_config.json, else from config.json."""
    special: dict[str, int] = {}
    for name, role in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = settings.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        number = numbers.get(content.encode()) if isinstance(content, str) else None
        if number is None:
            listed = config.get(f"{name}_token_id")
            number = listed[0] if isinstance(listed, list) and listed else listed  # type: ignore[assignment]
        if type(number) is int and 0 <= number < vocabulary:
            special[role] = number
    return special


def _settings(folder: Folder) -> Mapping[str, object]:
    where = printable_path(folder.path / SETTINGS_NAME)
    raw = read_optional(folder, SETTINGS_NAME, limit=MAX_BYTES, what="a tokenizer's settings")
    settings = {} if raw is None else parse_json(raw, where=where, allow_floats=True)
    if not isinstance(settings, dict):
        raise InvalidInputError(f"{where}: not a JSON object")
    return settings


def _template(folder: Folder, settings: Mapping[str, object]) -> str | None:
    """The chat template: a separate file takes precedence, as in transformers; None where there is none."""
    raw = read_optional(folder, TEMPLATE_NAME, limit=MAX_TEMPLATE_BYTES, what="a chat template")
    if raw is not None:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            where = printable_path(folder.path / TEMPLATE_NAME)
            raise InvalidInputError(f"{where}: not UTF-8 at byte {error.start}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        by_name = {e.get("name"): e.get("template") for e in template if isinstance(e, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
