"""The routing metadata in Triton's interpreter: its invariants, then its contents by brute force."""

from __future__ import annotations

import pytest
import torch

from moe_surgery.kernels.triton import routing_metadata
from moe_surgery.kernels.triton.routing_metadata import empty_routing, routing_launches
from tests.kernels.triton.cases import EXPERTS, FEW_EXPERTS, TOKENS, TOP_K

SENTINEL = -123456


def filled(ids: torch.Tensor, experts: int, block_n: int):
    routing = empty_routing(ids.numel(), experts, block_n, ids.device)
    for tensor in (routing.sorted_token_ids, routing.expert_offsets, routing.tiles, routing.num_tiles):
        tensor.fill_(SENTINEL)
    launches = routing_launches(ids, experts, routing)
    assert len(launches) == (1 if ids.numel() <= routing_metadata.ONE_LAUNCH else 2)
    for launch in launches:
        launch.run()
    return routing


def check(ids: torch.Tensor, experts: int, block_n: int) -> None:
    routing = filled(ids, experts, block_n)
    flat = ids.flatten()
    # Invariants first: a permutation, offsets that are prefix sums and end at tokens * k.
    order = routing.sorted_token_ids.long()
    assert torch.equal(order.sort().values, torch.arange(len(flat)))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(flat))
    assert torch.equal(order[inverse], torch.arange(len(flat)))
    counts = torch.bincount(flat, minlength=experts)
    offsets = routing.expert_offsets.long()
    assert offsets[0] == 0
    assert offsets[-1] == ids.numel()
    assert torch.equal(offsets.diff(), counts)
    # Stable by expert.
    assert torch.equal(order, torch.sort(flat, stable=True).indices)
    # The tiles are the runs of `order`, cut at every `block_n` rows.
    expected = [
        [expert, start, min(block_n, int(offsets[expert + 1]) - start)]
        for expert in range(experts)
        for start in range(int(offsets[expert]), int(offsets[expert + 1]), block_n)
    ]
    num_tiles = int(routing.num_tiles)
    assert num_tiles <= routing.max_tiles
    assert routing.tiles[:num_tiles].tolist() == expected
    assert (routing.tiles[num_tiles:] == SENTINEL).all()


def choices(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(tokens * 7 + experts)
    return torch.rand(tokens, experts, generator=random).argsort(dim=1)[:, :top_k].contiguous()


@pytest.mark.parametrize(
    "experts", [n if n in FEW_EXPERTS else pytest.param(n, marks=pytest.mark.slow) for n in EXPERTS]
)
def test_every_count_of_experts(experts: int) -> None:
    allowed = [k for k in TOP_K if k <= experts]
    for n, tokens in enumerate(TOKENS):
        check(choices(tokens, allowed[n % len(allowed)], experts), experts, (8, 16, 32)[n % 3])


@pytest.mark.parametrize(("assignments", "block_n"), [(1, 8), (8, 8), (9, 8), (64, 64), (65, 64)])
def test_all_on_one_expert(assignments: int, block_n: int) -> None:
    """One run only, ending exactly at a tile's end, one past it, and before it."""
    for expert in (0, 6):
        check(torch.full((assignments, 1), expert), 7, block_n)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [
        (1025, 1, 32),  # one more than one launch takes: the last programs have nothing
        pytest.param(256, 4, 32, marks=pytest.mark.slow),  # the most that one launch takes
        pytest.param(400, 3, 5, marks=pytest.mark.slow),  # chunks that end within a program
        # Bins exactly full but for the one of empty lanes.
        pytest.param(150, 8, 1023, marks=pytest.mark.slow),
        pytest.param(130, 8, 1024, marks=pytest.mark.slow),  # the most experts
    ],
)
def test_many_assignments(tokens: int, top_k: int, experts: int) -> None:
    check(choices(tokens, top_k, experts), experts, 16)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "programs"),
    [
        (110, 2, 8, 2),  # four chunks a program, the last of which is cut short
        (50, 3, 5, 4),  # two chunks a program, the third has one and the last none
        (20, 8, 1023, 8),  # bins exactly full but for the one of empty lanes
        (12, 8, 1024, 4),  # the most experts; the last program has nothing
    ],
)
def test_small_chunks(
    monkeypatch: pytest.MonkeyPatch, tokens: int, top_k: int, experts: int, programs: int
) -> None:
    """The interpreter sorts one element after the other, so large chunks are slow."""
    monkeypatch.setattr(routing_metadata, "ONE_LAUNCH", 64)
    monkeypatch.setattr(routing_metadata, "PROGRAMS", programs)
    monkeypatch.setattr(routing_metadata, "CHUNK_SIZES", (32, 32))
    check(choices(tokens, top_k, experts), experts, 16)


@pytest.mark.slow
def test_tens_of_thousands() -> None:
    check(choices(9000, 4, 8), 8, 128)


def test_nothing_grows_with_experts_times_tokens() -> None:
    """Memory is assignments + experts, not their product."""
    routing = empty_routing(1 << 20, 1024, 128, torch.device("meta"))
    tensors = (routing.sorted_token_ids, routing.expert_offsets, routing.tiles, routing.num_tiles)
    assert sum(t.numel() for t in tensors) < (1 << 20) + 3 * (1024 + (1 << 20) // 128) + 2000
