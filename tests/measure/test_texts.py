"""Texts come by domain from JSON lines; what is no text is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from moe_surgery.errors import InvalidInputError, OutputError, UsageError
from moe_surgery.measure.texts import prompts_of, read_texts
from moe_surgery.runtime.text import Text


def write(file: Path, *texts: str) -> Path:
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return file


def test_a_folder_stands_for_its_files_and_each_for_its_domain(tmp_path: Path) -> None:
    write(tmp_path / "code.jsonl", "def f():", "import os")
    law = write(tmp_path / "law.jsonl", "§ 1\n")
    (tmp_path / "notes.txt").write_text("no texts")
    assert read_texts([tmp_path]) == {"code": ["def f():", "import os"], "law": ["§ 1\n"]}
    assert read_texts([law, law]) == {"law": ["§ 1\n", "§ 1\n"]}


BROKEN = {
    "no JSON": b'{"text": "a"}\n{"text"\n',
    "no object": b'{"text": "a"}\n["text"]\n',
    "no text": b'{"text": "a"}\n{"texts": "a"}\n',
    "no string": b'{"text": "a"}\n{"text": 3}\n',
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
def test_a_line_that_is_no_text_is_named(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(raw)
    with pytest.raises(InvalidInputError) as caught:
        read_texts([file])
    assert str(caught.value) == f'{file}: line 2 is no JSON object with a string "text"'


def test_files_without_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \.jsonl file"):
        read_texts([tmp_path])
    write(tmp_path / "empty.jsonl")
    with pytest.raises(UsageError, match="there is no text"):
        read_texts([tmp_path])
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(InvalidInputError, match=r"latin\.jsonl: not UTF-8 at byte 13"):
        read_texts([tmp_path / "latin.jsonl"])
    with pytest.raises(OutputError, match=r"nowhere\.jsonl"):
        read_texts([tmp_path / "nowhere.jsonl"])


def test_prompts_are_the_beginnings_of_texts_long_enough() -> None:
    text = Text("example:tiny")
    long, short = "Question: What is 7 + 5?\nAnswer: 7 + 5 = 12.\n", "a"
    found = prompts_of({"math": [long, short, long, long], "other": [short]}, text, 8, 2)
    assert found == {"math": [text.encode(long)[:8]] * 2}
    with pytest.raises(UsageError, match="no text has 8 tokens"):
        prompts_of({"other": [short]}, text, 8, 2)
