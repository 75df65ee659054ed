"""The library names parameters as Python calls them; the command line shows its options."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import click
import pytest

import moe_surgery
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.cli.parameters import with_options
from moe_surgery.errors import MoeSurgeryError, UsageError
from tests.support.command import call
from tests.support.command_tree import command_at

PACKAGE = Path(moe_surgery.__file__).parent
COMMANDS_ARE_MEANT = {
    "bench/surgery.py": "the commands that it runs",
    "card/method.py": "the commands that make such a checkpoint",
    "card/usage.py": "the commands that use one",
    "checkpoint/kinds.py": "which command takes a kind of file",
    "checkpoint/resolve.py": "the hub's own command that downloads",
    "demo.py": "the commands that it shows",
    "distributed/ray_workers.py": "Ray's own command that starts it",
    "integrations/lm_eval.py": "the options of lm-eval",
    "report/document.py": "names of CSS variables",
    "report/trace_sections.py": "where the exact figures are",
    "selection/importers/sglang.py": "the option of SGLang that records what can be read",
}
"""Strings outside cli/ that hold options all the same."""


def strings(module: Path) -> list[str]:
    return [
        node.value
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_no_string_of_the_library_names_an_option_of_the_command_line() -> None:
    result = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "cli"
        and any(re.search(r"(?<![\w-])--[a-z]", text) for text in strings(path))
    }
    assert result == set(COMMANDS_ARE_MEANT)


@pytest.mark.parametrize(
    ("command", "message", "shown"),
    [
        ("profile", "`max_tokens` 0: must be at least 1", "--max-tokens 0: must be at least 1"),
        ("prune", "exists; pass `overwrite=True`", "exists; pass --overwrite"),
        ("export", "pass `tokenizer=False`", "pass --no-tokenizer"),
        ("prune", "`card=False` or `card=True`", "--no-card or --card"),
        ("generate", "`sampling.top_k` -1 and `top_k` 2", "--sampling-top-k -1 and --top-k 2"),
        ("generate", "`sampling.seed` -1", "--seed -1"),
        ("generate", "`draft_length` 0", "--draft-length 0"),
        ("plan", "`experts` 0", "--experts 0"),
        ("inspect", "`ckpt`: what is it", "CKPT: what is it"),
        (
            "inspect",
            "`max_tokens` of `moe-surgery plan`, `rank`",
            "`max_tokens` of `moe-surgery plan`, `rank`",
        ),
    ],
)
def test_a_parameter_is_shown_as_the_option_of_the_command(command: str, message: str, shown: str) -> None:
    assert with_options(message, command_at((command,))) == shown
    assert with_options(message, None) == message


def test_an_error_tells_its_parameters() -> None:
    assert UsageError("`max_tokens` 0 and `sampling.seed` -1").parameters == ("max_tokens", "sampling.seed")
    assert MoeSurgeryError("a file of `moe-surgery plan`").parameters == ()


def test_python_reads_the_parameter_and_a_terminal_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text("{}")
    taken = tmp_path / "plan.json"
    with pytest.raises(MoeSurgeryError, match="`overwrite=True`") as caught:
        moe_surgery.export_gguf("example:tiny", taken, tokenizer=False)
    assert caught.value.parameters == ("overwrite",)
    ended = call(capsys, "export", "example:tiny", taken, "--no-tokenizer")
    assert "pass --overwrite to replace it" in ended.err
    assert "`" not in ended.err


@pytest.mark.parametrize("job", ["profile", "search", "evaluate", "prune", "export"])
def test_an_option_carries_the_name_of_its_parameter(job: str) -> None:
    """So that a message about the one is a message about the other."""
    pytest.importorskip("torch")
    function = getattr(moe_surgery, {"export": "export_gguf"}.get(job, job))
    known = set(inspect.signature(function).parameters)
    options = {p.name for p in command_at((job,)).params if isinstance(p, click.Option)}
    everywhere = {"json", "verbose", "quiet", "debug"}
    choose_experts = {"plan_file", "plan_files", "ranking", "experts", "kept", "order"}
    choose_experts |= {"imatrix", "metric", "allow_missing", "cut_imatrix"}
    assert options - known - everywhere - choose_experts <= {"domains", "output", "ray", "ray_workers"}


def test_a_checkpoint_names_the_flag_that_reads_it_anyway(tmp_path: Path) -> None:
    source = Path(moe_surgery.__file__).parent / "examples" / "tiny-gpt-oss"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(MoeSurgeryError, match="`ignore_unlisted=True`"):
        Checkpoint.open(tmp_path)
