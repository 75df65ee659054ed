"""Which block shapes a kernel runs with: the choice among the entries of `table`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from moe_surgery.kernels.triton.launch import COUNTERS, next_power_of_two
from moe_surgery.kernels.triton.table import BLOCKS, OVERRIDES

__all__ = [
    "SPLITS",
    "TILE_TOKENS",
    "Blocks",
    "Chip",
    "chip_of",
    "entry",
    "few_slots",
    "split_for",
    "tile_tokens",
]

# Every token width of the sorted way. 8 is the least that the tensor cores take on their N side.
TILE_TOKENS = (8, 16, 32, 64, 128)
SPLITS = (1, 2, 4, 8)
# Programs per multiprocessor below which a reduction is split.
PROGRAMS_PER_SM = 2


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes of one program's piece: weight rows, values of the reduction; then warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Chip:
    """What the choice depends on: compute capability as one number (90) and multiprocessors."""

    arch: int
    multiprocessors: int


@lru_cache(maxsize=16)
def chip_of(device: torch.device) -> Chip:
    """The chip of a CUDA device; for any other (the interpreter) one of 132 multiprocessors."""
    if device.type != "cuda":
        return Chip(90, 132)
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.major * 10 + properties.minor, properties.multi_processor_count)


def entry(arch: int, operation: str, mxfp4: bool, tokens: int = 0, wide: bool = False) -> Blocks:
    """The table's entry: `operation` "gate_up" or "down", `tokens` the tile's width, 0 for slots.

    An architecture that has no entry of its own uses the one for all. `wide` products (float32) halve the
    reduction's step, because their operands are twice as large.
    """
    key = (operation, "mxfp4" if mxfp4 else "dense", tokens)
    rows, columns, warps, stages = OVERRIDES.get(arch, {}).get(key, BLOCKS[key])
    return Blocks(rows, columns // 2 if wide else columns, warps, stages)


def few_slots(tokens: int, top_k: int, experts: int) -> bool:
    """Whether to give every (token, slot) pair its own programs rather than sort the pairs by expert.

    Pairs of one expert read its weights once each, so with few experts repetitions come early.
    """
    return tokens == 1 or tokens * top_k <= min(16, 2 * experts)


def tile_tokens(assignments: int, experts: int) -> int:
    """The width of the sorted way's tiles: the rows an expert gets on average, so that padding stays small."""
    average = -(-assignments // min(experts, assignments))
    return min(max(next_power_of_two(average), TILE_TOKENS[0]), TILE_TOKENS[-1])


def split_for(programs: int, steps: int, multiprocessors: int) -> int:
    """Into how many programs each reduction of `steps` steps is cut, where there are `programs` without."""
    split = 1
    for candidate in SPLITS:
        if (
            programs <= COUNTERS
            and candidate <= steps
            and split * programs < PROGRAMS_PER_SM * multiprocessors
        ):
            split = candidate
    return split
