"""The exported tokenizer, compared with the tokenizers library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.make_tokenizer import CONTROL_LISTED, make_tokenizer
from moe_surgery.checkpoint.local_file import LocalFolder
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.errors import InvalidInputError, OutputError
from moe_surgery.export.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, Tokenizer, read_tokenizer

TINY = resolve("example:tiny")
CONFIG = json.loads((TINY / "config.json").read_text())
Json = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, tmp_path)
    return tmp_path


def edited(folder: Path, edit: Callable[[Json], object], name: str = "tokenizer.json") -> Tokenizer:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))
    return read_tokenizer(LocalFolder(folder), CONFIG, 2048)


def test_the_embedded_models_tokenizer() -> None:
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(TINY / "tokenizer.json"))
    got = read_tokenizer(LocalFolder(TINY), CONFIG, 2048)
    size = library.get_vocab_size()
    unused = [f"[PAD{i}]" for i in range(size, 2048)]
    assert unused  # as in llama.cpp's converter
    assert [t.decode() for t in got.tokens] == [library.id_to_token(i) for i in range(size)] + unused
    added = library.get_added_tokens_decoder()
    assert got.kinds[:size] == [CONTROL if i in added else NORMAL for i in range(size)]
    assert got.kinds[size:] == [UNUSED] * len(unused)
    merges = json.loads((TINY / "tokenizer.json").read_text())["model"]["merges"]
    assert [m.decode().split(" ") for m in got.merges] == merges
    assert got.pre_tokenizer == "gpt-2"
    assert got.special == {"bos": 0, "eos": 2, "padding": 1}
    assert got.adds == {"bos": False, "eos": False}
    assert got.chat_template == (TINY / "chat_template.jinja").read_text()


def test_a_tokenizer_of_gpt_oss_kind(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 4096)
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    got = read_tokenizer(LocalFolder(tmp_path), {}, 4096)
    assert got.pre_tokenizer == "gpt-4o"
    first = 4096 - 1090
    for number, (token, kind) in enumerate(zip(got.tokens, got.kinds, strict=True)):
        expected = library.id_to_token(number)
        if number < first:
            assert (token.decode(), kind) == (expected, NORMAL)
        elif number - first < CONTROL_LISTED:
            assert (token.decode(), kind) == (expected, CONTROL)
        else:
            assert (token.decode(), kind, expected) == (f"[PAD{number}]", UNUSED, None)
    assert got.special == {"bos": first, "eos": first + 4, "padding": first + 1}


def test_merges_as_pairs_and_as_joined_strings_are_the_same(folder: Path) -> None:
    expected = read_tokenizer(LocalFolder(folder), CONFIG, 2048).merges

    def join(content: Json) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]

    assert edited(folder, join).merges == expected


def test_escapes_in_tokens_are_undone(folder: Path) -> None:
    expected = read_tokenizer(LocalFolder(folder), CONFIG, 2048)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=True))
    assert b"\\u0120" in (folder / "tokenizer.json").read_bytes()
    assert read_tokenizer(LocalFolder(folder), CONFIG, 2048) == expected
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=3))
    assert read_tokenizer(LocalFolder(folder), CONFIG, 2048) == expected


def test_an_added_token_that_is_no_control_token(folder: Path) -> None:
    def edit(content: Json) -> None:
        content["added_tokens"][3] |= {"content": "two words", "special": False}

    got = edited(folder, edit)
    assert (got.tokens[3], got.kinds[3]) == (b"two words", USER_DEFINED)


def test_a_vocabulary_smaller_than_the_models_is_filled_up(folder: Path) -> None:
    got = read_tokenizer(LocalFolder(folder), CONFIG, 2050)
    assert got.tokens[2048:] == [b"[PAD2048]", b"[PAD2049]"]
    assert got.kinds[2048:] == [UNUSED, UNUSED]


def test_roles_fall_back_on_the_models_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    config = {"bos_token_id": 7, "eos_token_id": [5, 1], "pad_token_id": None}
    assert read_tokenizer(LocalFolder(folder), config, 2048).special == {"bos": 7, "eos": 5}


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        (["Sequence"], (False, False)),
        (["SpecialToken", "Sequence"], (True, False)),
        (["Sequence", "SpecialToken"], (False, True)),
        (["SpecialToken", "Sequence", "SpecialToken"], (True, True)),
    ],
)
def test_tokens_put_around_a_text(folder: Path, single: list[str], expected: tuple[bool, bool]) -> None:
    template = {"type": "TemplateProcessing", "single": [{kind: {"id": "A"}} for kind in single]}

    def edit(content: Json) -> None:
        content["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}

    got = edited(folder, edit).adds
    assert (got["bos"], got["eos"]) == expected


def test_the_template_file_comes_before_the_settings(folder: Path) -> None:
    def edit(content: Json) -> None:
        content["chat_template"] = "from the settings"

    got = edited(folder, edit, "tokenizer_config.json")
    assert got.chat_template == (TINY / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert read_tokenizer(LocalFolder(folder), CONFIG, 2048).chat_template == "from the settings"

    def several(content: Json) -> None:
        content["chat_template"] = [{"name": n, "template": n + "!"} for n in ("tools", "default")]

    assert edited(folder, several, "tokenizer_config.json").chat_template == "default!"
    (folder / "tokenizer_config.json").unlink()
    assert read_tokenizer(LocalFolder(folder), CONFIG, 2048).chat_template is None


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"tokenizer\.json: not found; copy .* `tokenizer=False`"):
        read_tokenizer(LocalFolder(tmp_path), CONFIG, 2048)


def _set(path: str, value: object) -> Callable[[Json], None]:
    *keys, last = path.split(".")

    def edit(content: Json) -> None:
        for key in keys:
            content = content[key]
        content[last] = value

    return edit


REFUSED: dict[str, tuple[Callable[[Json], object], str]] = {
    "unigram": (_set("model.type", "Unigram"), "model.type is the string 'Unigram'"),
    "byte fallback": (_set("model.byte_fallback", True), "only byte-level BPE is supported"),
    "normalizer": (_set("normalizer", {"type": "NFC"}), "unsupported normalizer"),
    "other pattern": (
        _set("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "x"}}),
        "unsupported pre-tokenizer (supported: gpt-2, gpt-4o)",
    ),
    "prefix space": (_set("pre_tokenizer.add_prefix_space", True), "unsupported pre-tokenizer"),
    "no splitting": (_set("pre_tokenizer.use_regex", False), "unsupported pre-tokenizer"),
    "no pre-tokenizer": (_set("pre_tokenizer", None), "unsupported pre-tokenizer"),
    "post-processor": (_set("post_processor", {"type": "BertProcessing"}), "unsupported post-processor"),
    "vocabulary": (_set("model.vocab", {}), "vocabulary or merges are missing"),
    "merges": (_set("model.merges", []), "vocabulary or merges are missing"),
    "merge of three": (_set("model.merges", [["a", "b", "c"]]), "neither a pair of strings nor one string"),
    "merge of one": (_set("model.merges", ["ab"]), "not of two tokens"),
    "merge with a space": (_set("model.merges", [["a b", "c"]]), "not of two tokens"),
    "merge of numbers": (_set("model.merges", [1]), "neither a pair of strings nor one string"),
    "vocabulary list": (_set("model.vocab", ["a"]), "expected an object"),
    "token number": (_set("model.vocab", {"a": -1}), "expected a token and its number"),
    "fraction": (_set("model.vocab", {"a": 1.5}), "expected a comma"),
    "same number": (_set("model.vocab", {"a": 9, "b": 9}), "token 9 is listed twice"),
    "same text": (_set("added_tokens", [{"id": 5, "content": "er"}]), "two tokens have the same text"),
    "added token": (_set("added_tokens", [{"id": "5", "content": "x"}]), "not a token"),
    "added tokens": (_set("added_tokens", 5), "not a token"),
    "model": (_set("model", 5), "expected an object"),
    "too many": (_set("model.vocab.beyond", 2048), "token 2048 exceeds the model's vocabulary of 2048"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_llama_cpp_cannot_have_is_refused(folder: Path, how: str) -> None:
    edit, expected = REFUSED[how]
    with pytest.raises(InvalidInputError) as caught:
        edited(folder, edit)
    assert expected in str(caught.value)
    assert str(folder / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)
