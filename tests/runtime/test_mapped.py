"""On the CPU weights are the mapped files: nothing is copied, nothing can be written."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from moe_surgery import Plan, load_model  # noqa: E402
from moe_surgery.checkpoint.checkpoint import Checkpoint  # noqa: E402
from moe_surgery.kernels.weights import Layer  # noqa: E402
from moe_surgery.runtime.generate import generate  # noqa: E402
from moe_surgery.runtime.mapped import MappedShards  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from tests.runtime.conftest import SMALL  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support.checkpoints import load_tensors, write_checkpoint  # noqa: E402
from tests.support.command import untouched  # noqa: E402
from tests.support.sources import MemoryFolder  # noqa: E402

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
PLAN = Plan("gpt_oss", SMALL.experts, ((4, 0, 2), (1,), (3, 2)))


def tensors_in(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a layer, by attribute path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name), f"{name}.{field.name}")


def weights_of(model: CausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    yield from (("embedding", model.embedding), ("norm", model.norm), ("unembedding", model.unembedding))
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        yield from tensors_in(layer, str(number))


def maps_of(folder: Path) -> list[tuple[int, int, str]]:
    """(start, end, permissions) of this process's mappings of the shards in `folder`."""
    result = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith(f"{os.path.realpath(folder)}/") and path[0].endswith(".safetensors"):
            start, end = (int(edge, 16) for edge in span.split("-"))
            result.append((start, end, permissions))
    return result


def is_mapped(tensor: torch.Tensor, maps: list[tuple[int, int, str]]) -> bool:
    start = tensor.data_ptr()
    return any(low <= start and start + tensor.nbytes <= high for low, high, _ in maps)


@needs_proc
@pytest.mark.parametrize("layout", ["mxfp4", "bf16", "original"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_lies_in_a_read_only_mapping_of_its_shard(
    layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = write_lively(tmp_path / "model", SMALL, layout, shards=3)
    model = load_model(folder, dtype=dtype)
    model(torch.arange(10)[None])
    maps = maps_of(folder)
    assert {permissions for _, _, permissions in maps} == {"r--s"}
    weights = dict(weights_of(model))
    assert sum(t.nbytes for t in weights.values()) == sum(t.nbytes for t in load_tensors(folder).values())
    assert [name for name, tensor in weights.items() if not is_mapped(tensor, maps)] == []


@needs_proc
def test_a_view_adds_no_memory_but_router_rows(small: Path) -> None:
    model = load_model(small, plan=PLAN)
    maps = maps_of(small)
    own = {name: t for name, t in weights_of(model) if not is_mapped(t, maps)}
    leaves = ("router.weight", "router.bias", "experts.expert_map")
    assert set(own) == {f"{layer}.{leaf}" for layer in range(SMALL.layers) for leaf in leaves}
    assert [len(own[f"{layer}.router.weight"]) for layer in range(SMALL.layers)] == [3, 1, 2]
    for layer in model.layers:
        assert layer.experts.gate_up_bias.shape[0] == SMALL.experts


def test_experts_share_the_storage_of_the_shard(small: Path) -> None:
    """One shard, one buffer: every tensor of the model is a window of it."""
    model = load_model(small)
    shard = (small / "model.safetensors").stat().st_size
    pointers = [t.untyped_storage().data_ptr() for _, t in weights_of(model)]
    assert max(pointers) - min(pointers) < shard


def test_running_a_model_changes_no_file(small: Path) -> None:
    with untouched(small):
        for plan in (None, PLAN):
            generate(load_model(small, plan=plan), [[1, 2, 3]], max_new_tokens=10, stop_tokens=())


@needs_proc
def test_the_mapping_lives_as_long_as_a_tensor_over_it(tmp_path: Path) -> None:
    folder = write_lively(tmp_path / "model", SMALL)
    model = load_model(folder)
    bias = model.layers[0].experts.down_bias
    del model
    gc.collect()
    assert is_mapped(bias, maps_of(folder))
    assert bias.isfinite().all()
    del bias
    gc.collect()
    assert maps_of(folder) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_at_odd_offsets_are_read_right(small: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    shard = "model.safetensors"
    raw = (small / shard).read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")].rstrip(b" ")
    header += b" " * (1 - len(header) % 2)  # odd length: no BF16 tensor lies at an even offset
    assert len(header) % 2
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.json").write_bytes((small / "config.json").read_bytes())
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    (moved / shard).write_bytes(len(header).to_bytes(8, "little") + header + data)
    ids = torch.arange(20)[None]
    assert torch.equal(load_model(moved, dtype=dtype)(ids), load_model(small, dtype=dtype)(ids))


def test_tensors_of_a_source_without_a_mapping_are_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", shards=2)
    with Checkpoint.open(MemoryFolder(folder)) as opened:
        shards = MappedShards(opened)
        got = {name: shards.tensor(ref) for name, ref in opened.tensors.items()}
        for ref in opened.tensors.values():
            shards.release(ref)
    for name, expected in load_tensors(folder).items():
        assert got[name].contiguous().view(torch.uint8).numpy().tobytes() == expected.tobytes()
        assert tuple(got[name].shape) == expected.shape
