"""A server like the hub's, for tests that read files from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ..support.hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    pytest.importorskip("huggingface_hub")
    from ..support.hub_server import serving
    from .hub_files import CONTENT, SHARD

    folder = tmp_path / "served"
    (folder / "original").mkdir(parents=True)
    (folder / SHARD).write_bytes(CONTENT)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "empty.txt").touch()
    (folder / "original" / "config.json").write_bytes(b'{"original": 1}')
    with serving(folder) as server:
        server.use(tmp_path / "cache", monkeypatch)
        yield server
