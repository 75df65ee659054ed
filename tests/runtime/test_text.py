"""Text in and out: whole characters only, the checkpoint's own chat template, and no trust in it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from moe_surgery.errors import InvalidInputError, MoeSurgeryError, OutputError, UsageError
from moe_surgery.runtime.text import Text, TextStream

MANY_BYTES = "naïve \N{EN DASH} 日本語のテキスト 🙂👩‍👩‍👧 \U0001f468🏽 مرحبا \ufffd Ω \t\n\r end"
USER = [{"role": "user", "content": "Hi"}]


def streamed(text: Text, tokens: Sequence[int]) -> list[str]:
    stream = TextStream(text)
    return [*(stream.push(token) for token in tokens), stream.flush()]


@given(text=st.text(max_size=60))
@example(text=MANY_BYTES)
@example(text=MANY_BYTES * 12)
@example(text="🙂" * 100)
def test_a_stream_of_any_text_is_that_text(tiny_text: Text, text: str) -> None:
    tokens = tiny_text.encode(text)
    assert tiny_text.decode(tokens) == text
    assert "".join(streamed(tiny_text, tokens)) == text


@given(tokens=st.lists(st.integers(0, 2047), max_size=200))
def test_a_stream_of_any_tokens_is_what_they_decode_to(tiny_text: Text, tokens: list[int]) -> None:
    assert "".join(streamed(tiny_text, tokens)) == tiny_text.decode(tokens)


def test_a_stream_never_shows_part_of_a_character(tiny_text: Text) -> None:
    tokens = tiny_text.encode("🙂 日本 é")
    pieces = streamed(tiny_text, tokens)
    assert len(tokens) > len("🙂 日本 é")  # some characters take several tokens
    assert not any("\ufffd" in piece for piece in pieces)


def test_incomplete_characters_come_at_the_end(tiny_text: Text) -> None:
    tokens = tiny_text.encode("a🙂")[:-1]
    *pieces, last = streamed(tiny_text, tokens)
    assert "".join(pieces) == "a"
    assert last == tiny_text.decode(tokens)[1:] != ""


def test_special_tokens_are_encoded_but_not_decoded(tiny_text: Text) -> None:
    tokens = tiny_text.encode("<|start|>user")
    assert len(tokens) == 1 + len(tiny_text.encode("user"))
    assert tiny_text.decode(tokens) == "user"


def test_the_stop_tokens_are_those_of_the_generation_config(tiny_text: Text) -> None:
    assert tiny_text.stop_tokens == (2, 1)


def test_text_that_is_no_unicode_is_refused(tiny_text: Text) -> None:
    with pytest.raises(UsageError, match="the text is not Unicode at character 2"):
        tiny_text.encode("ab\udcffc")


# --- chat templates


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """The embedded model's text files, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    return tmp_path


def test_the_embedded_template_frames_each_message(tiny_text: Text) -> None:
    conversation = [*USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "So?"}]
    assert tiny_text.chat(conversation) == (
        "<|startoftext|><|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>Hello<|end|>"
        "<|start|>user<|message|>So?<|end|><|start|>assistant<|message|>"
    )


def test_transformers_makes_the_same_prompt_and_tokens(tiny: Path, tiny_text: Text) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    assert tiny_text.chat(USER) == reference.apply_chat_template(
        USER, add_generation_prompt=True, tokenize=False
    )
    assert tiny_text.encode(MANY_BYTES) == reference(MANY_BYTES, add_special_tokens=False).input_ids


def test_a_template_in_the_tokenizers_config_is_used(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    settings = {"chat_template": "{{ bos_token }}|{{ messages[0].content | tojson }}", "bos_token": "<b>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Text(folder).chat([{"role": "user", "content": 'é"'}]) == '<b>|"é\\""'


def test_a_template_may_use_what_transformers_offers(folder: Path) -> None:
    source = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(source + "{{ strftime_now('%%') }}")
    assert Text(folder).chat([*USER, {"role": "system", "content": ""}]) == "user%"


ESCAPES = {
    "class": "{{ ''.__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "globals of a helper": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ cycler.__init__.__globals__ }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "changing the messages": "{{ messages.append(1) }}",
    "a generator's frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}",
    "an endless range": "{{ range(10 ** 9)|list }}",
}


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES)
def test_a_template_cannot_leave_its_sandbox(folder: Path, source: str) -> None:
    (folder / "chat_template.jinja").write_text("before" + source)
    with pytest.raises(InvalidInputError) as caught:
        Text(folder).chat(USER)
    assert str(caught.value).startswith(f"{folder}: chat template: ")
    assert "\n" not in str(caught.value)


FAILING = {
    "its own refusal": ("{{ raise_exception('no tools here') }}", "chat template: no tools here"),
    "bad syntax": ("{% for %}", "chat template: "),
    "an unknown filter": ("{{ 1|nope }}", "chat template: No filter named 'nope'"),
    "a number by zero": ("{{ 1 // 0 }}", "chat template: "),
    "no text": (b"caf\xe9", "chat_template.jinja: not UTF-8 at byte 3"),
}


@pytest.mark.parametrize(("source", "expected"), FAILING.values(), ids=FAILING)
def test_a_template_that_fails_is_one_line(folder: Path, source: str | bytes, expected: str) -> None:
    raw = source.encode() if isinstance(source, str) else source
    (folder / "chat_template.jinja").write_bytes(raw)
    with pytest.raises(InvalidInputError) as caught:
        Text(folder).chat(USER)
    assert expected in str(caught.value)


def test_an_unknown_role_is_refused_by_the_embedded_template(tiny_text: Text) -> None:
    with pytest.raises(InvalidInputError, match="chat template: unknown role: alien"):
        tiny_text.chat([{"role": "alien", "content": ""}])


def test_a_model_without_a_template_says_to_use_a_prompt(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(OutputError, match=r"chat_template.jinja: not found; .* give it a plain prompt"):
        Text(folder).chat(USER)


# --- files that are missing or broken

BROKEN: dict[str, tuple[str, bytes | None, type[MoeSurgeryError], str]] = {
    "no tokenizer": ("tokenizer.json", None, OutputError, "tokenizer.json: not found; copy the model's"),
    "no JSON": ("tokenizer.json", b"{", InvalidInputError, "tokenizer.json: not a tokenizer: "),
    "no tokenizer's JSON": ("tokenizer.json", b"[]", InvalidInputError, "tokenizer.json: not a tokenizer: "),
    "no text": ("tokenizer.json", b"\xff", InvalidInputError, "tokenizer.json: not a tokenizer: "),
    "settings": ("tokenizer_config.json", b"{", InvalidInputError, "tokenizer_config.json: not valid JSON"),
    "deep settings": ("tokenizer_config.json", b"[" * 10**5, InvalidInputError, "nested deeper than"),
    "stop tokens": ("generation_config.json", b"nope", InvalidInputError, "generation_config.json: not val"),
}


@pytest.mark.parametrize(("name", "raw", "error", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(
    folder: Path, name: str, raw: bytes | None, error: type[MoeSurgeryError], expected: str
) -> None:
    if raw is None:
        os.unlink(folder / name)
    else:
        (folder / name).write_bytes(raw)
    with pytest.raises(error) as caught:
        Text(folder)
    assert expected in str(caught.value)


@pytest.mark.parametrize("value", [None, "2", [None, True, -1, 1 << 70], {}])
def test_stop_tokens_that_are_no_tokens_are_none(folder: Path, value: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    if value == [None, True, -1, 1 << 70]:
        with pytest.raises(InvalidInputError, match="not a 64-bit integer"):
            Text(folder)
    else:
        assert Text(folder).stop_tokens == ()
