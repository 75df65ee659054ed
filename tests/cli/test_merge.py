"""merge on the command line: what it prints, the dry run, JSON, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.adapters import EXPERTS, factors, write_adapter
from tests.support.checkpoints import Shape, write_checkpoint
from tests.support.command import call

Capture = pytest.CaptureFixture[str]
SHAPE = Shape()
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Adapter, checkpoint and output."""
    down = factors(EXPERTS.format(1), 4 * SHAPE.experts, SHAPE.intermediate, SHAPE.hidden, size=0.001)
    q = factors(Q, 4, SHAPE.hidden, SHAPE.heads * SHAPE.head_dim)
    config = {"target_parameters": ["experts.down_proj"]}
    lora = write_adapter(tmp_path / "my-lora", {**down, **q}, 4, **config)
    return lora, write_checkpoint(tmp_path / "in", SHAPE), tmp_path / "out"


def test_it_says_what_it_did_and_what_mxfp4_lost(paths: tuple[Path, Path, Path], capsys: Capture) -> None:
    ended = call(capsys, "merge", *paths)
    assert ended.code == 0
    assert "my-lora merged into 3 tensors" in " ".join(ended.out.split())
    assert "of the update" in ended.err
    assert "MXFP4 is too coarse for this update" in ended.err
    assert "--store bf16 keeps it" in " ".join(ended.err.split())
    verified = call(capsys, "verify", paths[2], "--source", paths[1], "--adapter", paths[0])
    assert verified.code == 0


def test_a_dry_run_writes_nothing(paths: tuple[Path, Path, Path], capsys: Capture) -> None:
    ended = call(capsys, "merge", *paths, "--dry-run")
    assert (ended.code, paths[2].exists()) == (0, False)
    assert "merged" in ended.out


def test_json_names_the_adapter(paths: tuple[Path, Path, Path], capsys: Capture) -> None:
    result = call(capsys, "merge", *paths, "--store", "bf16", "--json").json()
    assert (result["adapter"]["name"], result["adapter"]["ranks"]) == ("my-lora", [4])
    assert result["outcome"]["conversion"] is None
    assert len(result["adapter"]["tensors"]) == 2
    again = call(capsys, "merge", *paths)
    assert again.code == 5
    assert "exists; choose another name, or pass --overwrite" in again.error
    assert call(capsys, "merge", *paths, "--overwrite").code == 0


def test_options_are_named_in_errors(paths: tuple[Path, Path, Path], capsys: Capture) -> None:
    ended = call(capsys, "merge", *paths, "--numbering", "source")
    assert ended.code == 2
    assert "--numbering source:" in ended.error
