"""The schedule of tiles in Triton's interpreter: its invariants, then its contents by brute force."""

from __future__ import annotations

import pytest
import torch

from moe_surgery.kernels.triton import dispatch as triton_dispatch
from moe_surgery.kernels.triton.dispatch import ONE_LAUNCH, dispatch, schedule_for
from tests.kernels.triton.cases import EXPERTS, TOKENS, TOP_K

SENTINEL = -123456


def dispatched(ids: torch.Tensor, experts: int, width: int):
    schedule = schedule_for(ids.numel(), experts, width, ids.device)
    for tensor in (schedule.order, schedule.offsets, schedule.tiles, schedule.used):
        tensor.fill_(SENTINEL)
    launches = dispatch(ids, experts, schedule)
    assert len(launches) == (1 if ids.numel() <= ONE_LAUNCH else 2)
    for launch in launches:
        launch.run()
    return schedule


def check(ids: torch.Tensor, experts: int, width: int) -> None:
    schedule = dispatched(ids, experts, width)
    flat = ids.flatten()
    # Invariants first: a permutation, offsets that are prefix sums and end at tokens * k.
    order = schedule.order.long()
    assert torch.equal(order.sort().values, torch.arange(len(flat)))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(flat))
    assert torch.equal(order[inverse], torch.arange(len(flat)))
    counts = torch.bincount(flat, minlength=experts)
    offsets = schedule.offsets.long()
    assert offsets[0] == 0
    assert offsets[-1] == ids.numel()
    assert torch.equal(offsets.diff(), counts)
    # Stable by expert.
    assert torch.equal(order, torch.sort(flat, stable=True).indices)
    # The tiles are the runs of `order`, cut at every `width` rows.
    wanted = [
        [expert, start, min(width, int(offsets[expert + 1]) - start)]
        for expert in range(experts)
        for start in range(int(offsets[expert]), int(offsets[expert + 1]), width)
    ]
    used = int(schedule.used)
    assert used <= schedule.most_tiles
    assert schedule.tiles[:used].tolist() == wanted
    assert (schedule.tiles[used:] == SENTINEL).all()


def choices(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(tokens * 7 + experts)
    return torch.rand(tokens, experts, generator=random).argsort(dim=1)[:, :top_k].contiguous()


@pytest.mark.parametrize("experts", EXPERTS)
def test_every_count_of_experts(experts: int) -> None:
    allowed = [k for k in TOP_K if k <= experts]
    for n, tokens in enumerate(TOKENS):
        check(choices(tokens, allowed[n % len(allowed)], experts), experts, (8, 16, 32)[n % 3])


@pytest.mark.parametrize(("assignments", "width"), [(1, 8), (8, 8), (9, 8), (64, 64), (65, 64)])
def test_all_on_one_expert(assignments: int, width: int) -> None:
    """One run only, ending exactly at a tile's end, one past it, and before it."""
    for expert in (0, 6):
        check(torch.full((assignments, 1), expert), 7, width)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [
        (256, 4, 32),  # the most that one launch takes
        (1025, 1, 32),  # one more: the last programs have nothing
        (400, 3, 5),  # pieces that end within a program
        pytest.param(
            150, 8, 1023, marks=pytest.mark.slow
        ),  # bins exactly full but for the one of empty lanes
        (130, 8, 1024),  # the most experts
    ],
)
def test_many_assignments(tokens: int, top_k: int, experts: int) -> None:
    check(choices(tokens, top_k, experts), experts, 16)


def test_several_pieces_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs of five small pieces, the last of which is cut short."""
    monkeypatch.setattr(triton_dispatch, "PROGRAMS", 2)
    monkeypatch.setattr(triton_dispatch, "PIECE", (128, 128))
    check(choices(550, 2, 8), 8, 128)


@pytest.mark.slow
def test_tens_of_thousands() -> None:
    check(choices(9000, 4, 8), 8, 128)


def test_nothing_grows_with_experts_times_tokens() -> None:
    """Room is assignments + experts, not their product."""
    schedule = schedule_for(1 << 20, 1024, 128, torch.device("meta"))
    tensors = (schedule.order, schedule.offsets, schedule.tiles, schedule.used)
    assert sum(t.numel() for t in tensors) < (1 << 20) + 3 * (1024 + (1 << 20) // 128) + 2000
