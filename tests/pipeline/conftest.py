"""A finished sweep."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from moe_surgery import sweep
from moe_surgery.pipeline.sweep.run import SweepResult
from tests.support.checkpoints import write_checkpoint
from tests.support.sweeps import COUNTS, RANKINGS, SHAPE


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sweep") / "source", SHAPE, shards=2)


@pytest.fixture(scope="session")
def swept(source: Path) -> tuple[Path, SweepResult]:
    out = source.parent / "out"
    return out, sweep(source, out, RANKINGS, COUNTS)


@pytest.fixture
def copied(swept: tuple[Path, SweepResult], tmp_path: Path) -> Path:
    """The sweep's folder with its links, to be changed."""
    target = tmp_path / "out"
    subprocess.run(["cp", "-a", swept[0], target], check=True)
    return target
