"""Models of other families on the hub: the same output as from their files."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from moe_surgery import prune
from moe_surgery.engine.fetch import Fetch
from moe_surgery.selection.plan import Plan, plan_keeping

from ..support import per_expert
from ..support.command import contents
from ..support.hub_server import MODEL, serving
from ..support.routing_tables import CONFIG, model


def keep(model: object) -> Plan:
    return plan_keeping([0, 1, 3], model)  # type: ignore[arg-type]


def test_experts_stored_separately_with_mtp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = per_expert.deepseek(mtp=True)
    source = per_expert.write(tmp_path / "in", tensors, per_expert.config(mtp=True), shards=2)
    compare(source, tmp_path, monkeypatch)


def test_a_table_of_experts_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(per_expert.write(tmp_path / "in", model(), CONFIG, shards=2), tmp_path, monkeypatch)


def compare(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Fetch] = []
    prune(source, tmp_path / "local", keep, card=False)
    with serving(source) as server:
        server.use(tmp_path / "cache", monkeypatch)
        result = prune(MODEL, tmp_path / "remote", keep, card=False, on_fetch=said.append)
    local, remote = contents(tmp_path / "local"), contents(tmp_path / "remote")
    assert {name for name in local if local[name] != remote[name]} == {"surgery.json"}
    copied = sum((source / name).stat().st_size for name in result.program.copies)
    (fetch,) = said
    assert fetch.nbytes == result.program.bytes_read + copied
