"""A pruned checkpoint of any family computes what transformers' full model does with the dropped experts masked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moe_surgery import Plan, inspect, prune, verify

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.support.masked import load, logits, restricted, tables  # noqa: E402
from tests.support.tiny_checkpoints import save, unpacked  # noqa: E402
from tests.support.tiny_families import FAMILIES, TinyFamily  # noqa: E402

pytestmark = pytest.mark.xdist_group("transformers")

TOLERANCE = 1e-5  # of the largest logit
TOKENS = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))


def plan_of(source: Path, count: int) -> Plan:
    """`count` random experts of each layer, in random order unless the router chooses from groups."""
    found, drawn = inspect(source), random.Random(count)
    groups = found.groups[0] if found.groups else 1
    size = found.experts // groups
    layers = []
    for _ in found.layer_numbers:
        row: list[int] = []
        for group in range(groups):
            row += drawn.sample(range(group * size, (group + 1) * size), count // groups)
        layers.append(tuple(row))
    plan = Plan(found.model_type, found.experts, tuple(layers))
    return (
        plan
        if found.layer_numbers[0] == 0 and found.layer_numbers[-1] == len(layers) - 1
        else replace(plan, layer_numbers=found.layer_numbers)
    )


def adopt_table(full: torch.Tensor, small: torch.Tensor, kept: Sequence[int]) -> None:
    """Make a full model's table of experts by token that of the pruned one, which must differ only where it has to.

    Entries of kept experts stay, and no row has an expert twice.
    """
    numbers = torch.tensor(kept)[small]
    stay = torch.isin(full, torch.tensor(kept))
    assert torch.equal(numbers[stay], full[stay])
    assert all(len(set(row)) == len(row) for row in numbers.tolist())
    full.copy_(numbers)


def check(family: TinyFamily, source: Path, out: Path, count: int) -> None:
    plan = plan_of(source, count)
    prune(source, out, plan, card=False)
    assert verify(out, source=source).problems == ()
    kept: dict[int, Sequence[int]] = dict(zip(plan.numbers, plan.layers, strict=True))
    full, small = load(unpacked(source), top_k=min(2, count)), load(unpacked(out))
    for layer, table in tables(full).items():
        adopt_table(table, tables(small)[layer], kept[layer])
    with restricted(full, kept, family.experts, family.tail):
        expected = logits(full, TOKENS)
    got = logits(small, TOKENS)
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()
    if count < family.experts:
        assert (logits(load(unpacked(source)), TOKENS) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.quick], ids=lambda f: f.name)
def test_a_pruned_model_is_the_full_one_with_its_experts_masked(family: TinyFamily, tmp_path: Path) -> None:
    check(family, save(family, tmp_path / "full"), tmp_path / "pruned", family.counts[-1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_so_it_is_at_every_count(family: TinyFamily, tmp_path: Path) -> None:
    source = save(family, tmp_path / "full")
    for count in family.counts:
        check(family, source, tmp_path / str(count), count)
