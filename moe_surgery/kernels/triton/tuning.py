"""Block shapes and split-K factors of the kernels.

BLOCKS: (operation, format, block_n) -> (block_m, block_k, num_warps, num_stages). block_n 0 is the GEMV, which
does not sort. Rows of gate_up are counted in pairs, a gate and an up row. The values have **not been
measured on a GPU**. They were derived by counting: at one token 16 rows give 720 and 180 programs for 2880
rows and top-4, several per multiprocessor; packed rows are read 128 and 256 bytes at a time; a dense row
is read 64 values at a time (128 bytes, a cache line) because dense weights are stored transposed. For tiles the
accumulator, the decoded weights and the tokens fit the registers of every architecture (the compiled
table records no spills) and the stages fit the smallest shared memory, 99 KB. Reductions that are not a
multiple of block_k (2880 = 22.5 x 128) end in a masked step.
`benchmarks/kernels/autotune.py` measures and rewrites OVERRIDES, at the end, where there is a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from moe_surgery.kernels.triton.launch import COUNTERS, next_power_of_two

__all__ = [
    "BLOCKS",
    "BLOCK_N_CHOICES",
    "OVERRIDES",
    "SPLIT_K_CHOICES",
    "Blocks",
    "DeviceProps",
    "block_n_for",
    "blocks_for",
    "get_device_props",
    "split_k_for",
    "use_gemv",
]

Key = tuple[str, str, int]
Entry = tuple[int, int, int, int]

BLOCKS: dict[Key, Entry] = {
    ("gate_up", "mxfp4", 0): (16, 256, 4, 2),
    ("gate_up", "mxfp4", 8): (32, 128, 4, 3),
    ("gate_up", "mxfp4", 16): (32, 128, 4, 3),
    ("gate_up", "mxfp4", 32): (32, 128, 4, 3),
    ("gate_up", "mxfp4", 64): (64, 128, 8, 3),
    ("gate_up", "mxfp4", 128): (64, 64, 8, 3),
    ("gate_up", "dense", 0): (32, 64, 4, 2),
    ("gate_up", "dense", 8): (32, 64, 4, 2),
    ("gate_up", "dense", 16): (32, 64, 4, 2),
    ("gate_up", "dense", 32): (32, 64, 4, 2),
    ("gate_up", "dense", 64): (64, 64, 8, 3),
    ("gate_up", "dense", 128): (64, 64, 8, 3),
    ("down", "mxfp4", 0): (16, 512, 4, 2),
    ("down", "mxfp4", 8): (64, 128, 4, 3),
    ("down", "mxfp4", 16): (64, 128, 4, 3),
    ("down", "mxfp4", 32): (64, 64, 4, 3),
    ("down", "mxfp4", 64): (128, 64, 8, 3),
    ("down", "mxfp4", 128): (64, 64, 8, 2),
    ("down", "dense", 0): (64, 64, 4, 2),
    ("down", "dense", 8): (64, 64, 4, 2),
    ("down", "dense", 16): (64, 64, 4, 2),
    ("down", "dense", 32): (64, 64, 4, 2),
    ("down", "dense", 64): (128, 64, 8, 3),
    ("down", "dense", 128): (128, 64, 8, 3),
}

# Tokens per tile. 8 is the least that the tensor cores take on their N side.
BLOCK_N_CHOICES = (8, 16, 32, 64, 128)
SPLIT_K_CHOICES = (1, 2, 4, 8)
# Programs per multiprocessor below which a reduction is split.
PROGRAMS_PER_SM = 2


@dataclass(frozen=True, slots=True)
class Blocks:
    """Weight rows and values of the reduction that a program takes at once; warps and pipeline stages."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class DeviceProps:
    """The device properties that tuning depends on: compute capability as one number (90), multiprocessors."""

    arch: int
    multiprocessors: int


@lru_cache(maxsize=16)
def get_device_props(device: torch.device) -> DeviceProps:
    """Properties of a CUDA device; for any other (the interpreter) those of an H100."""
    if device.type != "cuda":
        return DeviceProps(90, 132)
    properties = torch.cuda.get_device_properties(device)
    return DeviceProps(properties.major * 10 + properties.minor, properties.multi_processor_count)


def blocks_for(arch: int, operation: str, mxfp4: bool, block_n: int = 0, upcast_fp32: bool = False) -> Blocks:
    """The table's entry: `operation` "gate_up" or "down", `block_n` tokens a tile, 0 for the GEMV.

    An architecture without overrides uses BLOCKS. `upcast_fp32` products halve block_k, because their
    operands are twice as large.
    """
    key = (operation, "mxfp4" if mxfp4 else "dense", block_n)
    block_m, block_k, num_warps, num_stages = OVERRIDES.get(arch, {}).get(key, BLOCKS[key])
    return Blocks(block_m, block_k // 2 if upcast_fp32 else block_k, num_warps, num_stages)


def use_gemv(tokens: int, top_k: int, experts: int) -> bool:
    """Whether every (token, slot) pair gets its own programs, instead of sorting the pairs by expert.

    Every pair reads its expert's weights, so with few experts sorting pays off early.
    """
    return tokens == 1 or tokens * top_k <= min(16, 2 * experts)


def block_n_for(assignments: int, experts: int) -> int:
    """Tokens per tile: an expert's average number, so that padding stays small."""
    average = -(-assignments // min(experts, assignments))
    return min(max(next_power_of_two(average), BLOCK_N_CHOICES[0]), BLOCK_N_CHOICES[-1])


def split_k_for(programs: int, steps: int, multiprocessors: int) -> int:
    """How many programs split each reduction of `steps` steps, given `programs` without splitting."""
    split_k = 1
    for candidate in SPLIT_K_CHOICES:
        if (
            programs <= COUNTERS
            and candidate <= steps
            and split_k * programs < PROGRAMS_PER_SM * multiprocessors
        ):
            split_k = candidate
    return split_k


# Differences from BLOCKS by architecture (90, 120, ...); measured, never guessed.
OVERRIDES: dict[int, dict[Key, Entry]] = {}
