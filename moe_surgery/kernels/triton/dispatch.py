"""From chosen experts to a schedule of tiles: who computes which rows for which expert.

One launch for up to 1024 assignments, two beyond; nothing is read back, and what is allocated does not
grow with experts times tokens.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from moe_surgery.kernels.triton.launch import Launch, next_power_of_two

__all__ = ["ONE_LAUNCH", "Schedule", "dispatch", "schedule_for"]

# Assignments up to which one program does it all.
ONE_LAUNCH = 1024
# Beyond that: programs that share the work, and the fewest and most assignments that one sorts at a time.
PROGRAMS = 32
PIECE = (128, 1024)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The tiles of one step; an assignment is token * top_k + slot.

    order: int32 [assignments], assignments sorted by expert, each expert's in ascending order.
    offsets: int32 [experts + 1], where each expert's run in `order` begins.
    tiles: int32 [most_tiles, 3]: expert, first position in `order`, number of rows (at most tile_tokens).
    used: int32 [1], how many tiles there are; the rest of `tiles` is not written.
    """

    order: Tensor
    offsets: Tensor
    tiles: Tensor
    used: Tensor
    tile_tokens: int

    @property
    def most_tiles(self) -> int:
        return self.tiles.shape[0]


@triton.jit
def _piece(ids, start, assignments, BLOCK_A: tl.constexpr, BINS: tl.constexpr):
    """BLOCK_A ids from `start` on, those past the last counting as expert BINS - 1, which no expert is."""
    at = start + tl.arange(0, BLOCK_A)
    return tl.load(ids + at, mask=at < assignments, other=BINS - 1).to(tl.int32)


@triton.jit(do_not_specialize=["assignments", "pieces"])
def _count_kernel(ids, counts, assignments, pieces, BLOCK_A: tl.constexpr, BINS: tl.constexpr):
    """counts [programs, BINS]: how often each expert is chosen in a program's `pieces` pieces of BLOCK_A."""
    first = tl.program_id(0) * pieces * BLOCK_A
    total = tl.zeros((BINS,), tl.int32)
    for piece in range(pieces):
        total += tl.histogram(_piece(ids, first + piece * BLOCK_A, assignments, BLOCK_A, BINS), BINS)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), total)


@triton.jit(do_not_specialize=["assignments", "pieces"])
def _schedule_kernel(
    ids, counts, order, offsets, tiles, used, assignments, experts, pieces,
    BLOCK_A: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sort this program's pieces into `order` and write the tiles that begin in them."""
    program = tl.program_id(0)
    first = program * pieces * BLOCK_A
    bins = tl.arange(0, BINS)
    before = tl.zeros((BINS,), tl.int32)  # what earlier programs have of each expert
    if PROGRAMS > 1:
        total = tl.zeros((BINS,), tl.int32)
        for other in range(PROGRAMS):
            theirs = tl.load(counts + other * BINS + bins)
            total += theirs
            before += tl.where(other < program, theirs, 0)
    else:
        total = tl.histogram(_piece(ids, 0, assignments, BLOCK_A, BINS), BINS)
    real = tl.where(bins < experts, total, 0)
    offset = tl.cumsum(real, 0) - real
    needed = (real + TILE - 1) // TILE
    tile_offset = tl.cumsum(needed, 0) - needed
    if program == 0:
        tl.store(offsets + bins, offset, mask=bins <= experts)
        tl.store(used, tl.sum(needed, 0))
    lane = tl.arange(0, BLOCK_A)
    # Programs past the end of the assignments have nothing to sort.
    for piece in range(tl.minimum(pieces, tl.cdiv(tl.maximum(assignments - first, 0), BLOCK_A))):
        start = first + piece * BLOCK_A
        expert = _piece(ids, start, assignments, BLOCK_A, BINS)
        here = tl.histogram(expert, BINS)
        # Keys are distinct, so sorting them keeps the order within an expert.
        key = tl.sort(expert * BLOCK_A + lane)
        expert = key // BLOCK_A
        rank = lane - tl.gather(tl.cumsum(here, 0) - here, expert, 0) + tl.gather(before, expert, 0)
        position = tl.gather(offset, expert, 0) + rank
        ok = expert < experts
        tl.store(order + position, start + key % BLOCK_A, mask=ok)
        number = tl.gather(tile_offset, expert, 0) + rank // TILE
        rows = tl.minimum(tl.gather(total, expert, 0) - rank, TILE)
        opens = ok & (rank % TILE == 0)
        tl.store(tiles + number * 3, expert, mask=opens)
        tl.store(tiles + number * 3 + 1, position, mask=opens)
        tl.store(tiles + number * 3 + 2, rows, mask=opens)
        before += here


def schedule_for(assignments: int, experts: int, tile_tokens: int, device: torch.device) -> Schedule:
    """Room for a schedule, not yet written. Every expert chosen ends at most one tile early."""
    most = min(experts, assignments) + assignments // tile_tokens

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return Schedule(empty(assignments), empty(experts + 1), empty(most, 3), empty(1), tile_tokens)


def dispatch(ids: Tensor, experts: int, schedule: Schedule) -> list[Launch]:
    """The launches that fill `schedule` from ids, int64 [tokens, top_k] below `experts`."""
    assignments = ids.numel()
    # One bin more than experts: there the lanes without an assignment are counted.
    bins = max(16, next_power_of_two(experts + 1))
    if assignments <= ONE_LAUNCH:
        programs, block = 1, max(16, next_power_of_two(assignments))
    else:
        programs = PROGRAMS
        block = min(max(next_power_of_two(-(-assignments // programs)), PIECE[0]), PIECE[1])
    warps = 4 if max(block, bins) <= 256 else 8 if min(block, bins) <= 256 else 16
    pieces = -(-assignments // (block * programs))
    shared = {"ids": ids, "assignments": assignments, "pieces": pieces, "BLOCK_A": block, "BINS": bins}
    launches = []
    counts = schedule.used
    if programs > 1:
        counts = torch.empty((programs, bins), dtype=torch.int32, device=ids.device)
        launches.append(Launch(_count_kernel, (programs, 1, 1), {**shared, "counts": counts}, warps, 1))
    arguments = {
        **shared, "counts": counts, "order": schedule.order, "offsets": schedule.offsets,
        "tiles": schedule.tiles, "used": schedule.used, "experts": experts, "TILE": schedule.tile_tokens,
        "PROGRAMS": programs,
    }  # fmt: skip
    launches.append(Launch(_schedule_kernel, (programs, 1, 1), arguments, warps, 1))
    return launches
