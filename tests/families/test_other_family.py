"""A family with gpt-oss's structure and other names is one file of data (`pretend.py`).

The same weights under both families' names go through the whole pipeline, the second time with only the
pretend family known; the results must be equal except for the names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_surgery import export_gguf, inspect, load_model, make_plan, plan_keeping, prune, verify
from moe_surgery.errors import InvalidInputError
from moe_surgery.families import FAMILIES, Family
from moe_surgery.families.base import LayerNames, ProjectionNames, WeightNames
from moe_surgery.families.gpt_oss import GPT_OSS
from tests.families.pretend import PRETEND
from tests.support.checkpoints import Shape, load_tensors, make_config, make_tensors, write_folder

SHAPE = Shape()
KEPT = [3, 1, 0]
SUFFIXES = ("_blocks", "_scales")


@dataclass(frozen=True)
class Source:
    path: Path
    families: tuple[Family, ...]


def names(weights: WeightNames | LayerNames | ProjectionNames) -> Iterator[str]:
    for value in weights:
        yield from [value] if isinstance(value, str) else names(value)


def renamed(name: str) -> str:
    """The pretend family's name of a gpt-oss tensor."""
    suffix = next((s for s in SUFFIXES if name.endswith(s)), "")
    for ours, other in zip(names(GPT_OSS.weights), names(PRETEND.weights), strict=True):
        for layer in range(SHAPE.layers):
            if name.removesuffix(suffix) == ours.format(layer=layer):
                return other.format(layer=layer) + suffix
    raise KeyError(name)


def write_sources(folder: Path, **config: object) -> tuple[Source, Source]:
    """The same model as a gpt-oss checkpoint and as one of the pretend family."""
    values = make_tensors(SHAPE, scales=(121, 124))
    config = make_config(SHAPE) | {"rms_norm_eps": 1e-3, "sliding_window": 3, "rope_theta": 1234.0} | config
    keys = {k for d in (GPT_OSS.dimensions, GPT_OSS.config_keys) for key in d.values() for k in key.keys}
    other = {f"x_{k}" if k in keys else k: v for k, v in config.items()} | {"model_type": "pretend"}
    ours = write_folder(folder / "gpt-oss", values, config)
    pretend = write_folder(folder / "pretend", {renamed(k): v for k, v in values.items()}, other)
    return Source(ours, FAMILIES), Source(pretend, (PRETEND,))


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Source, Source]:
    return write_sources(tmp_path)


def pruned(source: Source) -> Source:
    out = source.path.with_name(source.path.name + "-3")
    prune(source.path, out, lambda m: plan_keeping(KEPT, m), families=source.families)
    return Source(out, source.families)


def test_only_the_given_families_are_known(sources: tuple[Source, Source]) -> None:
    for source, other in (sources, sources[::-1]):
        assert inspect(source.path, families=source.families).experts == SHAPE.experts
        with pytest.raises(InvalidInputError, match="model_type"):
            inspect(source.path, families=other.families)


def test_it_is_pruned_and_verified(sources: tuple[Source, Source]) -> None:
    ours, pretend = map(pruned, sources)
    assert json.loads((pretend.path / "config.json").read_text())["x_num_local_experts"] == len(KEPT)
    expected = {renamed(name): value for name, value in load_tensors(ours.path).items()}
    tensors = load_tensors(pretend.path)
    assert sorted(tensors) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value)
    for out, source in ((ours, sources[0]), (pretend, sources[1])):
        verification = verify(out.path, source=source.path, families=source.families)
        assert verification.problems == ()
        assert verification.tensors == len(expected)


def test_damage_is_detected(sources: tuple[Source, Source]) -> None:
    out = pruned(sources[1])
    shard = out.path / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (problem,) = verify(out.path, families=out.families).problems
    assert str(shard) in problem


def test_it_is_exported(sources: tuple[Source, Source], tmp_path: Path) -> None:
    files = []
    for source in sources:
        plan = make_plan(source.path, lambda m: plan_keeping(KEPT, m), families=source.families)
        files.append(tmp_path / f"{source.path.name}.gguf")
        export_gguf(
            source.path, files[-1], plan=plan, name="a model", tokenizer=False, families=source.families
        )
    assert files[0].read_bytes() == files[1].read_bytes()


def logits(source: Source) -> torch.Tensor:
    model = load_model(source.path, backend="reference", dtype=torch.float32, families=source.families)
    return model(torch.arange(9)[None], model.new_cache(1, 12))


def test_it_runs(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, swiglu_limit=3.0)
    for ours, pretend in (sources, tuple(map(pruned, sources))):
        assert torch.equal(logits(ours), logits(pretend))
