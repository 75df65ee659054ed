"""The types of tensors in GGUF files, as sizes: llama.cpp's and those that ik_llama.cpp adds.

Sources: ggml.h, ggml.c (type_traits) and ggml-common.h of ggml-org/llama.cpp (0c1e570) and of
ikawrakow/ik_llama.cpp (8337e4c), and iqk_quantize.cpp of the latter for the rows that are interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = ["BLOCK_TYPES", "BY_NAME", "REFUSED_TYPES", "BlockType"]


@dataclass(frozen=True, slots=True)
class BlockType:
    """How a row is stored: `row_header` bytes, then a block of `block_bytes` for every `block_values` values.

    `row_group` rows are interleaved, so that only groups of them can be cut out; 1 for most types.
    `number` is ggml's.
    """

    number: int
    name: str
    block_values: int
    block_bytes: int
    row_header: int = 0
    row_group: int = 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` values, which must be a multiple of `block_values`."""
        return self.row_header + columns // self.block_values * self.block_bytes


_MAINLINE: Final = (
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
)
_IK: Final = (
    (133, "Q6_0", 32, 26, 0),
    (134, "IQ1_BN", 64, 13, 2),
    (135, "IQ2_BN", 64, 16, 4),
    (137, "IQ2_K", 256, 76, 0),
    (138, "IQ3_K", 256, 110, 0),
    (139, "IQ4_K", 256, 144, 0),
    (140, "IQ5_K", 256, 176, 0),
    (141, "IQ6_K", 256, 212, 0),
    (144, "IQ4_KS", 256, 136, 4),
    (145, "IQ2_KS", 256, 70, 2),
    (146, "IQ4_KSS", 256, 128, 4),
    (151, "Q8_KV", 32, 32, 8),
    (152, "IQ5_KS", 256, 168, 4),
    (153, "IQ2_KT", 256, 68, 4),
    (154, "IQ3_KT", 256, 100, 4),
    (155, "IQ4_KT", 256, 128, 4),
    (156, "IQ3_KS", 256, 102, 2),
    (157, "IQ2_KL", 256, 86, 2),
    (158, "IQ1_KT", 256, 56, 4),
)
# Rows interleaved by 4, 8 or 16.
_INTERLEAVED: Final = (
    (202, "Q4_0_R8", 32, 18, 0, 8),
    (206, "Q5_0_R4", 32, 22, 0, 4),
    (208, "Q8_0_R8", 32, 34, 0, 8),
    (210, "Q2_K_R4", 256, 84, 0, 4),
    (211, "Q3_K_R4", 256, 110, 0, 4),
    (212, "Q4_K_R4", 256, 144, 0, 4),
    (213, "Q5_K_R4", 256, 176, 0, 4),
    (214, "Q6_K_R4", 256, 210, 0, 4),
    (216, "IQ2_XXS_R4", 256, 66, 0, 4),
    (217, "IQ2_XS_R4", 256, 74, 0, 4),
    (218, "IQ3_XXS_R4", 256, 98, 0, 4),
    (219, "IQ1_S_R4", 32, 6, 2, 4),
    (220, "IQ4_NL_R4", 32, 18, 0, 4),
    (221, "IQ3_S_R4", 256, 110, 0, 4),
    (222, "IQ2_S_R4", 256, 82, 0, 4),
    (223, "IQ4_XS_R8", 256, 136, 0, 8),
    (229, "IQ1_M_R4", 32, 7, 2, 4),
    (230, "BF16_R16", 1, 2, 0, 16),
    (233, "Q6_0_R4", 32, 26, 0, 4),
    (335, "IQ2_BN_R4", 64, 16, 4, 4),
    (337, "IQ2_K_R4", 256, 76, 0, 4),
    (338, "IQ3_K_R4", 256, 110, 0, 4),
    (339, "IQ4_K_R4", 256, 144, 0, 4),
    (340, "IQ5_K_R4", 256, 176, 0, 4),
    (344, "IQ4_KS_R4", 256, 136, 4, 4),
    (352, "IQ5_KS_R4", 256, 168, 4, 4),
    (353, "MXFP4_R8", 32, 17, 0, 8),
    (397, "Q8_K_R16", 256, 258, 0, 16),
    (398, "Q8_KV_R8", 32, 32, 4, 8),
    (399, "Q8_K_R8", 256, 258, 0, 8),
)

BLOCK_TYPES: Final[Mapping[int, BlockType]] = MappingProxyType(
    {row[0]: BlockType(*row) for row in (*_MAINLINE, *_IK, *_INTERLEAVED)}
)
"""By ggml's number."""

BY_NAME: Final[Mapping[str, BlockType]] = MappingProxyType({t.name: t for t in BLOCK_TYPES.values()})

REFUSED_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        **dict.fromkeys((4, 5), "a type that llama.cpp removed in 2023"),
        **dict.fromkeys((31, 32, 33, 37, 38), "a repacked type that llama.cpp no longer reads from files"),
        36: "I2_S of BitNet, which keeps one scale for the whole tensor",
        **dict.fromkeys((142, 143), "a type that ik_llama.cpp removed"),
        **dict.fromkeys(
            (9, 15, 97, 98, 99, 136, 147, 148, 149, 150), "a type of activations, which no model file has"
        ),
    }
)
"""Numbers that mean a type that no file of today has or that cannot be cut, and why."""
