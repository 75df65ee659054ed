"""From chosen experts to tiles of one expert's tokens: which program computes what.

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

__all__ = ["ONE_LAUNCH", "RoutingMetadata", "empty_routing", "routing_launches"]

# The most assignments that a single program handles.
ONE_LAUNCH = 1024
# Beyond that: the number of programs, and the fewest and most assignments that one sorts at a time.
PROGRAMS = 32
CHUNK_SIZES = (128, 1024)


@dataclass(frozen=True, slots=True)
class RoutingMetadata:
    """The tiles of one step. An assignment is token * top_k + slot, as in vLLM's `sorted_token_ids`.

    sorted_token_ids: int32 [assignments], assignments sorted by expert, each expert's in ascending order.
    expert_offsets: int32 [experts + 1], where each expert's run in `sorted_token_ids` begins.
    tiles: int32 [max_tiles, 3]: expert, first position in `sorted_token_ids`, number of rows (at most block_n).
    num_tiles: int32 [1], how many tiles there are; the rest of `tiles` is not written.
    """

    sorted_token_ids: Tensor
    expert_offsets: Tensor
    tiles: Tensor
    num_tiles: Tensor
    block_n: int

    @property
    def max_tiles(self) -> int:
        return self.tiles.shape[0]


@triton.jit
def _load_ids(ids, start, assignments, BLOCK_A: tl.constexpr, BINS: tl.constexpr):
    """BLOCK_A ids from `start` on, those past the last as BINS - 1, which is not an expert."""
    at = start + tl.arange(0, BLOCK_A)
    return tl.load(ids + at, mask=at < assignments, other=BINS - 1).to(tl.int32)


@triton.jit(do_not_specialize=["assignments", "chunks"])
def _expert_histogram_kernel(ids, counts, assignments, chunks, BLOCK_A: tl.constexpr, BINS: tl.constexpr):
    """counts [programs, BINS]: how often each expert is chosen in a program's `chunks` chunks of BLOCK_A."""
    first = tl.program_id(0) * chunks * BLOCK_A
    total = tl.zeros((BINS,), tl.int32)
    for chunk in range(chunks):
        total += tl.histogram(_load_ids(ids, first + chunk * BLOCK_A, assignments, BLOCK_A, BINS), BINS)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), total)


@triton.jit(do_not_specialize=["assignments", "chunks"])
def _routing_metadata_kernel(
    ids, counts, sorted_token_ids, expert_offsets, tiles, num_tiles, assignments, experts, chunks,
    BLOCK_A: tl.constexpr, BINS: tl.constexpr, BLOCK_N: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sort this program's chunks into `sorted_token_ids` and write the tiles that begin in them."""
    program = tl.program_id(0)
    first = program * chunks * BLOCK_A
    bins = tl.arange(0, BINS)
    before = tl.zeros((BINS,), tl.int32)  # assignments of each expert in earlier programs
    if PROGRAMS > 1:
        total = tl.zeros((BINS,), tl.int32)
        for other in range(PROGRAMS):
            count = tl.load(counts + other * BINS + bins)
            total += count
            before += tl.where(other < program, count, 0)
    else:
        total = tl.histogram(_load_ids(ids, 0, assignments, BLOCK_A, BINS), BINS)
    real = tl.where(bins < experts, total, 0)
    offset = tl.cumsum(real, 0) - real
    needed = (real + BLOCK_N - 1) // BLOCK_N
    tile_offset = tl.cumsum(needed, 0) - needed
    if program == 0:
        tl.store(expert_offsets + bins, offset, mask=bins <= experts)
        tl.store(num_tiles, tl.sum(needed, 0))
    lane = tl.arange(0, BLOCK_A)
    # Programs past the last assignment have nothing to sort.
    for chunk in range(tl.minimum(chunks, tl.cdiv(tl.maximum(assignments - first, 0), BLOCK_A))):
        start = first + chunk * BLOCK_A
        expert = _load_ids(ids, start, assignments, BLOCK_A, BINS)
        here = tl.histogram(expert, BINS)
        # Keys are distinct, so sorting them keeps the order within an expert.
        key = tl.sort(expert * BLOCK_A + lane)
        expert = key // BLOCK_A
        rank = lane - tl.gather(tl.cumsum(here, 0) - here, expert, 0) + tl.gather(before, expert, 0)
        position = tl.gather(offset, expert, 0) + rank
        ok = expert < experts
        tl.store(sorted_token_ids + position, start + key % BLOCK_A, mask=ok)
        number = tl.gather(tile_offset, expert, 0) + rank // BLOCK_N
        rows = tl.minimum(tl.gather(total, expert, 0) - rank, BLOCK_N)
        opens = ok & (rank % BLOCK_N == 0)
        tl.store(tiles + number * 3, expert, mask=opens)
        tl.store(tiles + number * 3 + 1, position, mask=opens)
        tl.store(tiles + number * 3 + 2, rows, mask=opens)
        before += here


def empty_routing(assignments: int, experts: int, block_n: int, device: torch.device) -> RoutingMetadata:
    """Buffers for the routing metadata, not yet written. Every expert chosen ends at most one tile early."""
    most = min(experts, assignments) + assignments // block_n

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return RoutingMetadata(empty(assignments), empty(experts + 1), empty(most, 3), empty(1), block_n)


def routing_launches(ids: Tensor, experts: int, routing: RoutingMetadata) -> list[Launch]:
    """The launches that fill `routing` from ids, int64 [tokens, top_k] below `experts`."""
    assignments = ids.numel()
    # One bin more than experts: there the lanes without an assignment are counted.
    bins = max(16, next_power_of_two(experts + 1))
    if assignments <= ONE_LAUNCH:
        programs, block = 1, max(16, next_power_of_two(assignments))
    else:
        programs = PROGRAMS
        block = min(max(next_power_of_two(-(-assignments // programs)), CHUNK_SIZES[0]), CHUNK_SIZES[1])
    warps = 4 if max(block, bins) <= 256 else 8 if min(block, bins) <= 256 else 16
    chunks = -(-assignments // (block * programs))
    shared = {"ids": ids, "assignments": assignments, "chunks": chunks, "BLOCK_A": block, "BINS": bins}
    launches = []
    counts = routing.num_tiles
    if programs > 1:
        counts = torch.empty((programs, bins), dtype=torch.int32, device=ids.device)
        launches.append(
            Launch(_expert_histogram_kernel, (programs, 1, 1), {**shared, "counts": counts}, warps, 1)
        )
    arguments = {
        **shared, "counts": counts, "sorted_token_ids": routing.sorted_token_ids,
        "expert_offsets": routing.expert_offsets, "tiles": routing.tiles,
        "num_tiles": routing.num_tiles, "experts": experts, "BLOCK_N": routing.block_n,
        "PROGRAMS": programs,
    }  # fmt: skip
    launches.append(Launch(_routing_metadata_kernel, (programs, 1, 1), arguments, warps, 1))
    return launches
