"""A source with a README, and a checkpoint pruned from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_surgery import prune
from tests.card.cards import (
    README,
    SHAPE,
    cut,
)
from tests.support.checkpoints import write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "some-model", SHAPE, shards=2)
    (folder / "README.md").write_bytes(README)
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    prune(source, tmp_path / "out", cut)
    return tmp_path / "out"
