"""What README and docs show is true: commands and Python blocks run, and print what is shown.

In a `console` block a line that begins with `$` is a command; each other line must be in what it prints.
Commands in `sh` blocks need what a test has not (the hub, a full-size model): their options are checked.
Python blocks run where the README's commands have run.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import click
import pytest

import moe_surgery
from moe_surgery.cli import cli
from moe_surgery.selection.imatrix.models import open_weights
from tests.support.command import call
from tests.support.imatrices import simulate, write_gguf_imatrix, write_legacy_imatrix

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SENTENCES = [
    "The parties agree that this contract is governed by the law of the state.",
    "The tenant shall pay the rent on the first day of every month.",
    "No liability arises where the delay was caused by the other party.",
    "The court held that the agreement was void from the beginning.",
]

Capture = pytest.CaptureFixture[str]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)


def words(text: str) -> str:
    return " ".join(text.split())


def commands(block: str) -> list[str]:
    """The `moe-surgery` lines of a `sh` block, without their comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0] for line in lines if line.startswith("moe-surgery ")]


def run_console(page: str, capsys: Capture) -> None:
    for block in blocks(page, "console"):
        printed = ""
        for line in block.splitlines():
            if not line.startswith("$ "):
                assert words(line) in printed, f"{page}: {line!r} is not in what the command prints"
                continue
            program, *arguments = shlex.split(line[2:])
            assert program == "moe-surgery"
            ended = call(capsys, *arguments)
            assert ended.code == 0, f"{page}: {line}: {ended.err}"
            printed = words(ended.out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages' commands run."""
    folder = tmp_path_factory.mktemp("docs")
    for name, shift in (("law.jsonl", 0), ("held-out.jsonl", 1)):
        rows = [json.dumps({"text": f"{n}. {SENTENCES[(n + shift) % 4]}"}) for n in range(12)]
        (folder / name).write_text("\n".join(rows) + "\n")
    write_matrices(folder)
    return folder


def write_matrices(folder: Path) -> None:
    """imatrix.gguf and more.dat: importance matrices of the bundled model."""
    with open_weights("example:tiny") as (weights, _):
        norms = {n: weights.norm(n) for n in weights.spec.layer_numbers}
        shape = weights.shape("blk.0.ffn_down_exps.weight")
    assert shape is not None
    for seed, (name, write) in enumerate(
        (("imatrix.gguf", write_gguf_imatrix), ("more.dat", write_legacy_imatrix))
    ):
        write(folder / name, simulate(norms, shape[1], experts=32, top_k=4, tokens=1024, seed=seed))  # type: ignore[arg-type,operator]


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Work in `folder`, with what the README's commands make."""
    monkeypatch.chdir(folder)
    if not (folder / "tiny-law-8.gguf").exists():
        run_console("README.md", capsys)


def test_the_readme_fits_a_first_visit() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "console")])
def test_commands_run_and_print_what_is_shown(page: str, capsys: Capture) -> None:
    run_console(page, capsys)


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_need_more_than_a_test_has_take_their_options(page: str) -> None:
    for block in blocks(page, "sh"):
        for line in commands(block):
            arguments = shlex.split(line)[1:]
            # As the program makes it: a command remembers the help options of the first context it sees.
            context = click.Context(cli, **cli.context_settings)
            command: click.Command | None = cli
            while isinstance(command, click.Group):
                command = command.get_command(context, arguments.pop(0))
            assert command is not None, line
            parser = command.make_parser(click.Context(command, parent=context))
            parser.parse_args(arguments)  # raises on an option that is not there


@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page, code, id=f"{page}-{i}")
        for page in PAGES
        for i, code in enumerate(blocks(page, "python"))
    ],
)
def test_python_blocks_run(page: str, code: str) -> None:
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_the_page_on_python_names_every_public_name() -> None:
    page = (ROOT / "docs" / "python-api.md").read_text()
    assert [name for name in moe_surgery.__all__ if not re.search(rf"`{name}\b", page)] == []


def test_the_page_on_python_gives_parameters_their_names() -> None:
    page = (ROOT / "docs" / "python-api.md").read_text()
    calls = [call for call in re.findall(r"`(\w+)\(([^`]*)\)`", page) if call[0] in moe_surgery.__all__]
    assert len(calls) > 20
    for name, arguments in calls:
        parameters = inspect.signature(getattr(moe_surgery, name)).parameters
        named = [
            a.split("=")[0].strip() for a in arguments.split(",") if a.strip().isidentifier() or "=" in a
        ]
        assert set(named) <= set(parameters), name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
