"""A family with gpt-oss's structure and other names is one file of data (`pretend.py`).

The same weights under both families' names go through the whole pipeline, the second time with only the
pretend family known; the results must be equal except for the names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_surgery import (
    evaluate,
    export_gguf,
    inspect,
    load_model,
    make_card,
    make_plan,
    plan_keeping,
    profile,
    prune,
    search,
    trace,
    verify,
)
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.errors import InvalidInputError
from moe_surgery.families import FAMILIES, Family
from moe_surgery.families.base import LayerNames, ProjectionNames, WeightNames
from moe_surgery.families.gpt_oss import GPT_OSS
from tests.families.pretend import PRETEND
from tests.support.checkpoints import Shape, load_tensors, make_config, make_tensors, write_folder

SHAPE = Shape()
KEPT = [3, 1, 0]
SUFFIXES = ("_blocks", "_scales")
ON_CPU = {"dtype": torch.float32, "backend": "reference"}


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


def write_sources(folder: Path, shape: Shape = SHAPE, **config: object) -> tuple[Source, Source]:
    """The same model as a gpt-oss checkpoint and as one of the pretend family."""
    values = make_tensors(shape, scales=(121, 124))
    config = make_config(shape) | {"rms_norm_eps": 1e-3, "sliding_window": 3, "rope_theta": 1234.0} | config
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


# --- jobs that run texts through the model


@pytest.fixture
def with_text(tmp_path: Path) -> tuple[Source, Source]:
    """Both sources with the tokenizer of the embedded checkpoint."""
    pytest.importorskip("tokenizers")
    tiny = resolve("example:tiny")
    size = json.loads((tiny / "config.json").read_text())["vocab_size"]
    sources = write_sources(tmp_path, Shape(vocabulary=size), swiglu_limit=3.0)
    for source in sources:
        shutil.copy(tiny / "tokenizer.json", source.path)
    return sources


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "sums.txt"
    file.write_text("12 + 30 = 42. 7 * 6 = 42. What is 50 - 8? It is 42, as before.")
    return file


def test_it_is_profiled(with_text: tuple[Source, Source], texts: Path, tmp_path: Path) -> None:
    ours, pretend = (
        profile(s.path, texts, tmp_path / f"{s.path.name}.stats", families=s.families, **ON_CPU).statistics
        for s in with_text
    )
    assert (ours.model_type, pretend.model_type) == ("gpt_oss", "pretend")
    assert ours.tokens == pretend.tokens
    for one, other in zip(ours.data["sums"], pretend.data["sums"], strict=True):
        assert one.count.sum() == SHAPE.top_k * ours.tokens["sums"]
        for field in fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_it_is_searched(with_text: tuple[Source, Source], texts: Path, tmp_path: Path) -> None:
    ours, pretend = (
        search(s.path, texts, tmp_path / f"{s.path.name}.json", families=s.families, **ON_CPU)
        for s in with_text
    )
    assert (ours.model_type, pretend.model_type) == ("gpt_oss", "pretend")
    assert ours.layers == pretend.layers
    assert ours.provenance["errors"] == pretend.provenance["errors"]


def test_it_is_evaluated_and_gets_a_card(with_text: tuple[Source, Source], texts: Path) -> None:
    results = []
    for source in with_text:
        out = pruned(source)
        assert make_card(out.path, families=source.families) == (out.path / "README.md").read_text()
        plans = [
            ("cut", make_plan(source.path, lambda m: plan_keeping(KEPT, m), families=source.families)),
            ("worse", make_plan(source.path, lambda m: plan_keeping([2], m), families=source.families)),
        ]
        evaluation = evaluate(
            source.path, texts, plans=plans, pruned=[out.path], families=source.families, **ON_CPU
        )
        results.append([(m.kind, m.experts, m.top_k, m.domains) for m in evaluation.models])
        card = make_card(out.path, evaluation=evaluation, families=source.families)
        assert f"{evaluation.models[3].overall.perplexity:,.2f}" in card
        assert plans[0][1].model_type in card
    assert results[0] == results[1]
    full, view, worse, checkpoint = results[0]
    assert view[1:] == checkpoint[1:]
    assert full[3]["sums"].kl == 0 < worse[3]["sums"].kl
    assert sum(worse[3]["sums"].rerouted) > 0


def test_it_is_traced(with_text: tuple[Source, Source]) -> None:
    ours, pretend = (
        trace(s.path, "12 + 30 = 42", families=s.families, **ON_CPU).models[0] for s in with_text
    )
    np.testing.assert_array_equal(ours.experts, pretend.experts)
    np.testing.assert_array_equal(ours.loss, pretend.loss)


def test_transformers_takes_its_experts(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from moe_surgery.integrations.transformers import replace_experts
    from tests.support import oracle

    sources, tokens = write_sources(tmp_path), torch.arange(9)[None]
    ours, pretend = (
        oracle.logits_of(
            replace_experts(oracle.load_model(sources[0].path), s.path, families=s.families), tokens
        )
        for s in sources
    )
    assert torch.equal(ours, pretend)


def test_jobs_know_only_the_given_families(
    with_text: tuple[Source, Source], texts: Path, tmp_path: Path
) -> None:
    path = with_text[1].path
    out = pruned(with_text[1]).path
    for job in (
        lambda: profile(path, texts, tmp_path / "x.stats"),
        lambda: search(path, texts, tmp_path / "x.json"),
        lambda: evaluate(path, texts, top_k=1),
        lambda: trace(path, "x"),
        lambda: make_card(out),
    ):
        with pytest.raises(InvalidInputError, match="model_type"):
            job()
