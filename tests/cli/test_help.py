"""Every command has help with examples, and those that need nothing but example:tiny run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from moe_surgery.cli import COMMANDS
from moe_surgery.version import __version__
from tests.support.adapters import factors, write_adapter
from tests.support.command import call, run
from tests.support.command_tree import command_at, command_paths

Capture = pytest.CaptureFixture[str]


def examples(help_text: str) -> list[str]:
    """The lines of a help text that are command lines (the usage line is not)."""
    lines = [line.strip() for line in help_text.splitlines()]
    return [line for line in lines if line.startswith("moe-surgery ")]


def help_of(capsys: Capture, *command: str) -> str:
    ended = call(capsys, *command, "--help")
    assert (ended.code, ended.err) == (0, "")
    return ended.out


@pytest.mark.parametrize("path", command_paths(), ids=" ".join)
def test_a_command_has_help_with_an_example_and_a_word_on_every_option(
    path: tuple[str, ...], capsys: Capture
) -> None:
    output = help_of(capsys, *path)
    assert any(line.startswith(f"moe-surgery {' '.join(path)}") for line in examples(output))
    result = command_at(path)
    silent = [o.opts[0] for o in result.params if isinstance(o, click.Option) and not o.help]
    assert silent == []
    assert all(f"--{name}" in output for name in ("json", "debug", "quiet", "verbose", "help"))
    short = call(capsys, *path, "-h")
    assert (short.code, short.err, short.out) == (0, "", output)


def test_the_main_help_lists_every_command_with_what_it_does(capsys: Capture) -> None:
    output = help_of(capsys)
    listed = output[output.index("Commands:") :].splitlines()[1:]
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(len(line.split()) > 3 for line in listed)
    for code in (
        "0 done",
        "2 usage",
        "3 malformed",
        "4 plan",
        "5 input/output",
        "6 no space",
        "8 verification",
    ):
        assert code in " ".join(output.split())


def test_no_command_prints_help_and_is_a_usage_error(capsys: Capture) -> None:
    ended = call(capsys)
    assert ended.code == 2
    assert "Commands:" in ended.err


def test_the_version_is_printed(capsys: Capture) -> None:
    ended = call(capsys, "--version")
    assert (ended.code, ended.out) == (0, f"moe-surgery, version {__version__}\n")


def test_documented_examples_on_the_tiny_model_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for path in command_paths() for line in examples(help_of(capsys, *path))]
    runnable = [line for line in lines if "tiny" in line or line.split()[1] == "doctor"]
    runnable = [line for line in runnable if line.split()[1] != "demo"]  # has its own test
    assert {line.split()[1] for line in runnable} == set(COMMANDS) - {"demo"}
    (tmp_path / "notes.txt").write_text("An expert that is never asked can be left out. " * 3)
    (tmp_path / "code.py").write_text("def double(x):\n    return 2 * x\n" * 3)
    q_proj = "model.layers.0.self_attn.q_proj"
    write_adapter(tmp_path / "tiny-lora", factors(q_proj, 4, 160, 256))
    for line in runnable:
        ended = call(capsys, *shlex.split(line)[1:])
        assert ended.code == 0, (line, ended.err)
        assert ended.out or " -o " in line


def test_a_plan_file_made_as_the_help_says_prunes_as_the_help_says(tmp_path: Path, capsys: Capture) -> None:
    ranking = tmp_path / "law.json"
    ranking.write_text(
        "{" + ", ".join(f'"layer_{i}": {[(e * 5 + i) % 32 for e in range(32)]}' for i in range(4)) + "}"
    )
    plan, out = tmp_path / "law-8.json", tmp_path / "law-8"
    assert call(capsys, "plan", ranking, "--experts", 8, "--model-type", "gpt_oss", "-o", plan).code == 0
    assert call(capsys, "prune", "example:tiny", out, "--plan", plan).code == 0
    assert call(capsys, "verify", out, "--source", "example:tiny").code == 0
    other = tmp_path / "other"
    assert call(capsys, "prune", "example:tiny", other, "--ranking", ranking, "--experts", 8).code == 0
    assert (other / "expert_mapping.json").read_bytes() == (out / "expert_mapping.json").read_bytes()


def test_the_module_runs_as_the_command() -> None:
    ended = run("--version")
    assert (ended.code, ended.out) == (0, f"moe-surgery, version {__version__}\n")


@pytest.mark.parametrize(("words", "completed"), [("prune x y --st", "--store"), ("bench sp", "speculate")])
def test_a_shell_completes_commands_and_options(words: str, completed: str) -> None:
    """As the line of docs/running.md sets it up: click's protocol for bash."""
    typed = f"moe-surgery {words}"
    more = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    main = "from moe_surgery.cli import main; main()"
    done = [
        subprocess.run(
            [sys.executable, "-c", main],
            env={**os.environ, **more, "_MOE_SURGERY_COMPLETE": step},
            capture_output=True,
            text=True,
        ).stdout
        for step in ("bash_source", "bash_complete")
    ]
    assert "_MOE_SURGERY_COMPLETE=bash_complete" in done[0]
    assert completed in [line.partition(",")[2] for line in done[1].splitlines()]
