"""A source and a pruned checkpoint to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints import write_checkpoint
from tests.surgery.verify.damage import pruned


@pytest.fixture(scope="module", params=["keep", "bf16", "mxfp4"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and a pruned checkpoint of some shards."""
    folder = tmp_path_factory.mktemp("job")
    layout = "bf16" if request.param == "mxfp4" else "mxfp4"
    source = write_checkpoint(folder / "source", layout=layout, shards=2)
    pruned(source, folder / "out", request.param)
    return source, folder / "out"


@pytest.fixture
def source(job: tuple[Path, Path]) -> Path:
    return job[0]


@pytest.fixture
def out(job: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(job[1], tmp_path / "out")
    return tmp_path / "out"
