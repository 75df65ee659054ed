"""The formats of expert weights: tensors and bytes of a weight in each.

Data only, without numpy: `moe_surgery.formats.convert` turns one into another.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from moe_surgery.errors import InvalidInputError

__all__ = [
    "AS_STORED",
    "BF16",
    "EXPERT_DTYPES",
    "F16",
    "F32",
    "FORMATS",
    "MXFP4",
    "ExpertFormat",
    "StoredTensor",
    "format_by_name",
    "format_of_dtype",
]


class StoredTensor(NamedTuple):
    """One tensor of an expert weight: the suffix of its name, safetensors dtype, shape without experts."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


class ExpertFormat(NamedTuple):
    """A format of expert weights.

    `name` is its spelling in options and JSON, `label` its name in messages, `dtype` the safetensors dtype of
    its values (of the blocks where `packed`). `block_bytes` bytes, scale included, hold `block_values`
    values along a row. Dense formats are stored transposed, [experts, columns, rows]; MXFP4 as blocks
    [experts, rows, columns/32, 16] and scales [experts, rows, columns/32]. `significand` and `exponents`
    are its significant bits and the exponents of its normal values.
    """

    name: str
    label: str
    dtype: str
    block_values: int
    block_bytes: int
    significand: int
    exponents: tuple[int, int]

    @property
    def packed(self) -> bool:
        """Whether values share a scale in blocks."""
        return self.block_values > 1

    def tensors(self, rows: int, columns: int) -> tuple[StoredTensor, ...]:
        """The tensors that hold one expert's weight [rows, columns]."""
        if not self.packed:
            return (StoredTensor("", self.dtype, (columns, rows)),)
        groups = columns // self.block_values
        return (
            StoredTensor("_blocks", "U8", (rows, groups, self.block_bytes - 1)),
            StoredTensor("_scales", "U8", (rows, groups)),
        )

    def fits_columns(self, columns: int) -> bool:
        """Whether rows of `columns` values are whole blocks."""
        return columns % self.block_values == 0

    def nbytes(self, values: int) -> int:
        """Bytes of `values` weights."""
        return values * self.block_bytes // self.block_values

    def can_represent(self, other: ExpertFormat) -> bool:
        """Whether this format can represent every finite value of `other`."""
        return (
            not self.packed
            and self.significand >= other.significand
            and self.exponents[0] <= other.exponents[0]
            and self.exponents[1] >= other.exponents[1]
        ) or self == other


# MXFP4's exponents are those of its values in BF16; larger values become infinities there.
MXFP4: Final = ExpertFormat("mxfp4", "MXFP4", "U8", 32, 17, 2, (-126, 127))
BF16: Final = ExpertFormat("bf16", "BF16", "BF16", 1, 2, 8, (-126, 127))
F16: Final = ExpertFormat("f16", "F16", "F16", 1, 2, 11, (-14, 15))
F32: Final = ExpertFormat("f32", "F32", "F32", 1, 4, 24, (-126, 127))

FORMATS: Final[Mapping[str, ExpertFormat]] = MappingProxyType({f.name: f for f in (BF16, MXFP4, F16, F32)})
"""Every format by its name."""

AS_STORED: Final = ExpertFormat("stored", "as in the source", "", 1, 0, 0, (0, 0))
"""Experts that are only copied, in any format: `nbytes` is not known from the number of weights."""

EXPERT_DTYPES: Final = ("keep", *FORMATS)
"""What `store` may be: a format, or "keep" for the source's."""


def format_by_name(name: str) -> ExpertFormat:
    """The format called `name`. Raises InvalidInputError for an unknown one."""
    if name == AS_STORED.name:
        return AS_STORED
    if name not in FORMATS:
        raise InvalidInputError(
            f"expert weights as {name[:40]!r}: unknown format; known: {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def format_of_dtype(dtype: str) -> ExpertFormat | None:
    """The dense format of a safetensors dtype, None where experts cannot be stored in it."""
    return next((f for f in FORMATS.values() if f.dtype == dtype and not f.packed), None)
