"""Whatever goes wrong is one line on stderr that begins with the program's name, and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moe_surgery
from tests.support.checkpoints import Shape, write_checkpoint
from tests.support.command import Ended, call, contents, untouched

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"


def refused(ended: Ended, code: int) -> str:
    """The line after the program's name; nothing else was printed."""
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert ended.error.startswith("moe-surgery: ")
    assert ended.error.isprintable()
    return ended.error.removeprefix("moe-surgery: ")


# arguments ("{tmp}" is a folder with a checkpoint "in" and some files), exit code, what is printed
CASES: dict[str, tuple[str, int, str]] = {
    "no such command": ("dissect", 2, "No such command 'dissect'"),
    "no such option": ("inspect example:tiny --nope", 2, "No such option '--nope'"),
    "no checkpoint": ("inspect", 2, "Missing argument 'CKPT'"),
    "no output": ("prune example:tiny", 2, "Missing argument 'OUT'"),
    "two checkpoints": ("inspect a b", 2, "Got unexpected extra argument"),
    "unknown example": ("inspect example:nope", 2, "example:nope: unknown example; known: tiny"),
    "empty example": ("inspect example:", 2, "example:: unknown example; known: tiny"),
    "no such folder": ("inspect {tmp}/nothing", 5, "{tmp}/nothing: no such checkpoint folder or file"),
    "empty name": ("inspect {empty}", 2, "the name of the checkpoint is empty"),
    "another kind of file": ("inspect {tmp}/notes.txt", 2, "{tmp}/notes.txt: is neither a folder nor a"),
    "no config": ("inspect {tmp}/bare", 5, "{tmp}/bare/config.json: not found"),
    "no shards": ("inspect {tmp}/configured", 5, "{tmp}/configured: holds no .safetensors file"),
    "cut shard": ("inspect {tmp}/cut", 3, "{tmp}/cut/model.safetensors: truncated"),
    "nothing chosen to plan": ("plan", 2, "exactly one of RANKING or STATS, --imatrix, --keep and --random"),
    "two choices to plan": (
        "plan {tmp}/r.json example:tiny --random -n 2",
        2,
        "exactly one of RANKING or STATS, --imatrix, --keep and",
    ),
    "random plan for a ranking": ("plan {tmp}/r.json --random -n 2", 2, "is a ranking, not a checkpoint"),
    "a checkpoint as a ranking": ("plan example:tiny -n 2", 2, "example:tiny: is a checkpoint; also choose"),
    "plan without a count": ("plan {tmp}/r.json", 2, "exactly one of --experts, --coverage,"),
    "plan of a kept list with a count": ("plan --keep 1 -n 1", 2, "--keep already sets how many"),
    "kept list for no model": ("plan --keep 0", 2, "--keep needs CKPT"),
    "random plan for no model": ("plan --random -n 2", 2, "--random needs CKPT"),
    "ranking of no model": ("plan {tmp}/r.json -n 2", 2, "does not say which model it is for"),
    "keep none": ("plan --random -n 0 example:tiny", 2, "--experts 0: the model has 32"),
    "keep too many": ("plan --random -n 33 example:tiny", 2, "--experts 33: the model has 32"),
    "keep too many of a ranking": (
        "plan {tmp}/r.json -n 5 --model-type gpt_oss",
        2,
        "--experts 5: the model",
    ),
    "negative seed": ("plan --random -n 1 --seed -1 {tmp}/in", 2, "--seed -1: must not be"),
    "seed that is no number": ("plan --random --seed x", 2, "Invalid value for '--seed'"),
    "missing ranking": ("plan {tmp}/no.json -n 2", 5, "{tmp}/no.json: cannot open"),
    "a plan as a ranking": ("plan {tmp}/plan.json -n 2", 3, "{tmp}/plan.json: is a plan, not a ranking or a"),
    "ranking of another model": (
        "plan {tmp}/r.json -n 2 example:tiny",
        4,
        "the plan is for gpt_oss with 2 layers of 4 experts, but example:tiny is gpt_oss with 4 layers of 32",
    ),
    "plan into no folder": (
        "plan --keep 0 {tmp}/in -o {tmp}/no/plan.json",
        5,
        "{tmp}/no/plan.json: cannot create",
    ),
    "nothing chosen to prune": (
        "prune {tmp}/in {tmp}/out",
        2,
        "exactly one of --plan, --ranking, --imatrix and --keep",
    ),
    "two choices to prune": ("prune {tmp}/in {tmp}/out --keep 0 --plan p", 2, "exactly one of --plan"),
    "ranking without a count": ("prune {tmp}/in {tmp}/out --ranking {tmp}/r.json", 2, "need each other"),
    "a count without a ranking": ("prune {tmp}/in {tmp}/out --keep 0 -n 2", 2, "need each other"),
    "an expert there is not": ("prune {tmp}/in {tmp}/out --keep 4", 2, "--keep keeps expert 4, but experts"),
    "an expert twice": ("prune {tmp}/in {tmp}/out --keep 0-2,1", 2, "--keep keeps expert 1 twice"),
    "an unknown dtype": ("prune {tmp}/in {tmp}/out --keep 0 --store fp8", 2, "'fp8' is not one of 'keep'"),
    "a size of nothing": ("prune {tmp}/in {tmp}/out --keep 0 --max-shard-size 0", 2, "must be at least one"),
    "no size": ("prune {tmp}/in {tmp}/out --keep 0 --max-shard-size big", 2, "'big' is not a size"),
    "a ranking as a plan": (
        "prune {tmp}/in {tmp}/out --plan {tmp}/r.json",
        3,
        "{tmp}/r.json: is a ranking, not a plan; make a plan of it",
    ),
    "a plan for another model": (
        "prune example:tiny {tmp}/out --plan {tmp}/plan.json",
        4,
        "the plan is for gpt_oss with 2 layers of 4 experts",
    ),
    "an uneven plan": (
        "prune {tmp}/in {tmp}/out --plan {tmp}/uneven.json",
        4,
        "config.json of a gpt_oss model has one number for all layers",
    ),
    "an output that is there": ("prune {tmp}/in {tmp}/bare --keep 0", 5, "{tmp}/bare: exists"),
    "an output that is the source": ("prune {tmp}/in {tmp}/in --keep 0", 2, "{tmp}/in: is the source"),
    "an output in no folder": ("prune {tmp}/in {tmp}/no/out --keep 0", 5, "{tmp}/no: no such folder"),
    "verify nothing": ("verify {tmp}/nothing", 5, "{tmp}/nothing: no such checkpoint folder or file"),
    "verify two ways": ("verify {tmp}/in --source {tmp}/in --structure-only", 2, "choose one"),
    "demo into a folder that is there": ("demo --output {tmp}/bare", 5, "{tmp}/bare: cannot create"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "in", Shape(layers=2, experts=4))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bare").mkdir()
    (tmp_path / "configured").mkdir()
    (tmp_path / "configured" / "config.json").write_text("{}")
    cut = write_checkpoint(tmp_path / "cut") / "model.safetensors"
    os.truncate(cut, cut.stat().st_size - 1)
    ranking = {"layer_0": [0, 1, 2, 3], "layer_1": [3, 2, 1, 0]}
    (tmp_path / "r.json").write_text(json.dumps(ranking))
    plan = {"format": "moe-surgery.plan", "version": 1, "model_type": "gpt_oss", "num_source_experts": 4}
    plan |= {"num_layers": 2, "top_k": None}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"layers": [[0, 1], [2, 3]]}))
    (tmp_path / "uneven.json").write_text(json.dumps(plan | {"layers": [[0, 1], [2]]}))
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_an_error_is_one_line_with_its_exit_code_and_nothing_is_written(
    case: str, folder: Path, capsys: Capture
) -> None:
    arguments, code, printed = CASES[case]
    filled = [a.format(tmp=folder, empty="") for a in arguments.split()]
    with untouched(folder):
        line = refused(call(capsys, *filled), code)
    assert printed.format(tmp=folder) in line


@pytest.mark.parametrize("case", ["no such folder", "cut shard", "a plan for another model"])
def test_debug_adds_the_traceback_before_the_line(case: str, folder: Path, capsys: Capture) -> None:
    arguments, code, printed = CASES[case]
    filled = [a.format(tmp=folder) for a in arguments.split()]
    ended = call(capsys, *filled, "--debug")
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith("Traceback (most recent call last):")
    last = ended.err.splitlines()[-1]
    assert last.startswith("moe-surgery: ")
    assert printed.format(tmp=folder) in last


def test_an_unreadable_file_is_an_input_output_error(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in")
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    assert f"{source}/config.json: is a directory" in refused(call(capsys, "inspect", source), 3)


# --- what strangers' names can do to a terminal

EVIL = "x\x1b[2J\x1b]0;owned\x07\r\n\u202eend"


def test_control_characters_of_a_tensor_name_reach_the_terminal_as_escapes(
    tmp_path: Path, capsys: Capture
) -> None:
    source = write_checkpoint(
        tmp_path / "in", edit_tensors=lambda tensors: tensors.update({EVIL: np.zeros(1, np.uint16)})
    )
    line = refused(call(capsys, "inspect", source), 3)
    assert "is not part of a gpt_oss model" in line
    assert r"\x1b[2J" in line.replace("\\\\", "\\")


def test_control_characters_of_a_key_and_of_a_value_reach_the_terminal_as_escapes(
    tmp_path: Path, capsys: Capture
) -> None:
    source = write_checkpoint(tmp_path / "in", edit_config=lambda c: c.update(model_type=EVIL))
    assert r"\x1b[2J" in refused(call(capsys, "inspect", source), 3).replace("\\\\", "\\")
    ranking = tmp_path / "ranking.json"
    ranking.write_text(json.dumps({EVIL: [0]}))
    assert r"\x1b[2J" in refused(call(capsys, "plan", ranking, "-n", 1), 3).replace("\\\\", "\\")


@pytest.mark.parametrize("name", [EVIL, os.fsdecode(b"caf\xe9 \xff"), "[bold]markup[red] :smile:"])
def test_any_folder_name_works_and_is_printed_as_one_printable_line(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    source = write_checkpoint(tmp_path / f"in {name}")
    out = tmp_path / f"out {name}"
    for arguments in (
        ["inspect", source],
        ["prune", source, out, "--keep", "0,1", "--dry-run"],
        ["prune", source, out, "--keep", "0,1"],
        ["verify", out, "--source", source],
        ["verify", out, "--json"],
    ):
        ended = call(capsys, *arguments)
        assert ended.code == 0, ended.err
        assert ended.out
        assert all(line.isprintable() for line in (ended.out + ended.err).split("\n"))
    line = refused(call(capsys, "prune", source, out, "--keep", "0,1"), 5)
    assert "exists" in line
    assert sorted(contents(out)) == sorted(file.name for file in out.iterdir())


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "moe_surgery", "inspect", TINY, "--json"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(moe_surgery.__file__).parent.parent,
            check=False,
        )
    finally:
        os.close(write)
    assert done.returncode != 0
    assert done.stderr == ""
