"""New values of small tensors in a pruned checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_surgery import Plan, prune, verify
from moe_surgery.errors import UsageError
from moe_surgery.surgery.repaired import Repair
from tests.support.checkpoints import Shape, load_tensors, write_checkpoint

PLAN = Plan("gpt_oss", 4, ((2, 0), (1, 3)))
ROUTER = "model.layers.1.mlp.router.weight"
NORM = "model.norm.weight"
BIAS = "model.layers.0.mlp.experts.down_proj_bias"


@pytest.fixture(scope="module", params=["mxfp4", "bf16", "original"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / request.param
    return write_checkpoint(folder, layout=request.param, shards=1 if request.param == "original" else 2)


@pytest.mark.parametrize("store", ["keep", "f32"])
def test_the_tensors_are_the_given_ones_and_all_others_the_sources(
    source: Path, tmp_path: Path, store: str
) -> None:
    plain = prune(source, tmp_path / "plain", PLAN, store=store)
    expected = load_tensors(plain.out)
    rng = np.random.default_rng(0)
    new = {name: rng.bytes(expected[name].nbytes) for name in (ROUTER, NORM, BIAS)}
    record = {"texts": {"a": [{"name": "a.txt", "tokens": 3}]}, "held_out": {}}
    out = prune(source, tmp_path / "out", PLAN, store=store, repair=Repair(new, record)).out
    actual = load_tensors(out)
    assert {n: t.tobytes() for n, t in actual.items()} == {
        n: new.get(n, t.tobytes()) for n, t in expected.items()
    }
    manifest = json.loads((out / "surgery.json").read_text())
    assert manifest["repair"] == {"tensors": sorted(new), **record}
    result = verify(out, source=source)
    assert result.ok
    assert set(result.repaired) == set(new)
    assert verify(plain.out, source=source).repaired == ()
    assert "repair" not in json.loads((plain.out / "surgery.json").read_text())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.nothing", b"", "'model.nothing' is not a router, expert bias or norm of this model"),
        ("lm_head.weight", b"", "'lm_head.weight' is not a router, expert bias or norm of this model"),
        ("model.layers.0.mlp.experts.down_proj_blocks", b"", "is not a router, expert bias or norm"),
        ("model.layers.0.self_attn.sinks", b"", "is not a router, expert bias or norm"),
        (ROUTER, b"abc", f"'{ROUTER}' has 3 bytes, expected 256"),
    ],
)
def test_other_tensors_and_sizes_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    source = write_checkpoint(tmp_path / "source", Shape())
    with pytest.raises(UsageError, match=message):
        prune(source, tmp_path / "out", PLAN, repair=Repair({name: content}))
    assert not (tmp_path / "out").exists()
