"""Block shapes: (operation, format, tile tokens) -> (weight rows, reduction values, warps, stages).

Tile tokens 0 is the way without sorting. Rows of gate_up are units, each a gate and an up row. The values
have **not been measured on a GPU**. They were chosen by counting: at one token 16 rows give 720 and 180
programs for 2880 rows and top-4, several per multiprocessor; packed rows are read 128 and 256 bytes at a time; a
dense row piece is 64 values (128 bytes, a cache line) because dense weights lie transposed. For tiles the
accumulator, the decoded weights and the tokens fit the registers of every architecture (the compiled
table records no spills) and the stages fit the smallest shared memory, 99 KB. Reductions that are no
multiple of the reduction values (2880 = 22.5 x 128) end in a masked step.
`benchmarks/kernels/autotune.py` measures and rewrites OVERRIDES where there is a GPU.
"""

from __future__ import annotations

__all__ = ["BLOCKS", "OVERRIDES"]

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

# For one architecture (90, 120, ...) what differs from BLOCKS; measured, never guessed.
OVERRIDES: dict[int, dict[Key, Entry]] = {}
