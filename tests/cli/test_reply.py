"""`moe-surgery generate --chat`: the answer, and the reasoning apart from it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from moe_surgery.runtime.text import Text
from tests.support.command import Ended, call
from tests.support.harmony import TEMPLATE, write_scripted

Capture = pytest.CaptureFixture[str]
START = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant"
OPENED = START + "<|channel|>analysis<|message|>H"
THOUGHT, SAID = "k,2日🙂", "fo \x1b[31mur"
SCRIPT = f"{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{SAID}<|return|>"
ESCAPED = SAID.replace("\x1b", "\\x1b")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted(tmp_path_factory.mktemp("scripted") / "model", OPENED, SCRIPT)


def asked(capsys: Capture, model: Path | str, *options: str) -> Ended:
    return call(capsys, "generate", model, "--chat", "2+2?", *options)


def test_the_answer_is_on_stdout_and_the_reasoning_beside_it(capsys: Capture, model: Path) -> None:
    ended = asked(capsys, model)
    assert (ended.code, ended.out) == (0, ESCAPED + "\n")
    first, last = ended.err.splitlines()
    assert first == f"reasoning: {THOUGHT}"
    assert " new tokens at " in last


@pytest.mark.parametrize("options", [["--reasoning", "hide"], ["-q"]])
def test_the_reasoning_can_be_hidden(options: list[str], capsys: Capture, model: Path) -> None:
    ended = asked(capsys, model, *options)
    assert (ended.code, ended.out) == (0, ESCAPED + "\n")
    assert "2日" not in ended.err


def test_json_has_both_and_the_whole_text_as_before(capsys: Capture, model: Path) -> None:
    ended = asked(capsys, model, "--json")
    assert (ended.code, ended.err) == (0, "")
    results = ended.json()
    assert results["text"] == Text(model).decode(results["tokens"]) == f"{THOUGHT}assistantfinal{SAID}"
    assert (results["answer"], results["reasoning"], results["tool_calls"]) == (SAID, THOUGHT, [])


def test_an_answer_that_is_cut_off_is_reasoning_alone(capsys: Capture, model: Path) -> None:
    ended = asked(capsys, model, "--max-new-tokens", "2")
    assert ended.out == "\n"
    assert ended.err.startswith("reasoning: ")
    results = asked(capsys, model, "--max-new-tokens", "2", "--json").json()
    assert results["answer"] == ""
    assert THOUGHT.startswith(results["reasoning"])
    assert results["reasoning"] == results["text"] != ""


def test_speculation_shows_the_same(capsys: Capture, model: Path) -> None:
    ended = asked(capsys, model, "--draft", str(model))
    assert ended.out == ESCAPED + "\n"
    assert ended.err.splitlines()[0] == f"reasoning: {THOUGHT}"


def test_calls_are_shown_with_their_tool(capsys: Capture, tmp_path: Path) -> None:
    script = "<|channel|>commentary to=bell <|constrain|>json<|message|>{1}<|return|>"
    folder = write_scripted(tmp_path / "model", START, script)
    assert asked(capsys, folder).out == "to=bell: {1}\n"
    assert asked(capsys, folder, "--json").json()["tool_calls"] == [{"recipient": "bell", "content": "{1}"}]


def test_a_raw_prompt_is_not_split(capsys: Capture, model: Path) -> None:
    ended = call(capsys, "generate", model, "--prompt", "H")
    assert ended.out == f"{THOUGHT}assistantfinal{ESCAPED}\n"


@pytest.mark.parametrize("no_color", [False, True])
def test_the_reasoning_is_dimmed_on_a_terminal(
    no_color: bool, model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process once; what NO_COLOR changes is seen in this one."""
    ours, reference = pty.openpty()
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
        with os.fdopen(reference, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            ended = asked(capsys, model)
        code, out = ended.code, ended.out
    else:
        command = [sys.executable, "-m", "moe_surgery", "generate", str(model), "--chat", "2+2?"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=reference)
        os.close(reference)
        out = process.communicate()[0].decode()
        code = process.returncode
    result = b""
    try:
        while piece := os.read(ours, 4096):
            result += piece
    except OSError:  # the other side is closed
        pass
    finally:
        os.close(ours)
    assert (code, out) == (0, ESCAPED + "\n")
    printed = result.decode()
    dimmed = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", printed, re.DOTALL)).strip()
    assert dimmed == ("" if no_color else f"reasoning: {THOUGHT}")
    assert re.sub(r"\x1b\[\d+m", "", printed).startswith(f"reasoning: {THOUGHT}")
    assert "\x1b[31m" not in printed


# --- effort


def test_the_effort_reaches_the_template(capsys: Capture, tmp_path: Path) -> None:
    source = TEMPLATE.replace('{{ open("assistant") }}{% endif -%}', '{{ open("assistant") }}{% endif -%}H')
    assert source != TEMPLATE
    folder = write_scripted(tmp_path / "model", source, "i<|return|>")
    text = Text(folder)
    for effort in (None, "low", "medium", "high"):
        options = [] if effort is None else ["--reasoning-effort", effort]
        results = asked(capsys, folder, "--json", *options).json()
        variables = {} if effort is None else {"reasoning_effort": effort}
        expected = text.encode(text.chat([{"role": "user", "content": "2+2?"}], variables=variables))
        assert results["prompt_tokens"] == len(expected)
    lengths = {
        len(text.encode(text.chat([{"role": "user", "content": "x"}], variables={"reasoning_effort": e})))
        for e in ("low", "medium", "high")
    }
    assert len(lengths) > 1  # or the numbers above would prove nothing


def test_an_effort_that_nobody_reads_is_one_line(capsys: Capture, model: Path) -> None:
    for source in (str(model), "example:tiny"):
        ended = asked(capsys, source, "--reasoning-effort", "low")
        assert (ended.code, ended.out) == (2, "")
        assert ended.error == (
            f"moe-surgery: --reasoning-effort low: the chat template of {source} does not support it"
        )
    ended = call(capsys, "generate", "example:tiny", "--prompt", "x", "--reasoning-effort", "low")
    assert (ended.code, ended.error) == (2, "moe-surgery: --reasoning-effort needs --chat")
    assert asked(capsys, "example:tiny", "--reasoning-effort", "utmost").code == 2
