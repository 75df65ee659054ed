"""Matrices in Q8_0 in memory: as GGUF files store them, with a row's bytes in the order that kernels read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.formats import q8_0
from moe_surgery.formats.expert_format import BF16, F16, F32, ExpertFormat

__all__ = ["DENSE", "Matrix", "Q8Matrix", "as_stored", "quantise"]

DENSE = ("keep", "q8_0")
"""What `dense` may be: as stored, or Q8_0."""

VALUES = q8_0.BLOCK_VALUES
TOGETHER = 16
"""Blocks whose codes are interleaved: one in each lane of the CPU kernels."""
ALIGNMENT = 64
PIECE_BYTES = 4 << 20
_WORDS = {
    torch.bfloat16: (BF16, torch.int16, np.uint16),
    torch.float16: (F16, torch.int16, np.uint16),
    torch.float32: (F32, torch.int32, np.uint32),
}


@dataclass(frozen=True, slots=True)
class Q8Matrix:
    """A matrix [rows, columns] in Q8_0: value = scale * code, one scale for 32 columns of a row.

    data: uint8 [rows, bytes of a row]. A row holds its codes (int8), 16 blocks at a time and the rest last: of n
    blocks together byte 2 (n k + i) + c is column 2k + c of block i, for k < 16, i < n, c < 2. After the codes
    follow the scales (float16), in order, and zeros up to a multiple of 64 bytes. 34 bytes for 32 values as in a
    GGUF file, but for those zeros.
    """

    data: Tensor
    columns: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.data), self.columns))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __len__(self) -> int:
        return len(self.data)

    def data_ptr(self) -> int:
        return self.data.data_ptr()

    def to(self, device: torch.device) -> Q8Matrix:
        return Q8Matrix(self.data.to(device), self.columns)

    def dequantise(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) as float32 [rows, columns]: every value exact."""
        data = self.data[first:last]
        scales = data[:, self.columns : self.columns // VALUES * q8_0.BLOCK_BYTES].contiguous()
        codes = torch.empty((len(data), self.columns // VALUES, VALUES), dtype=torch.int8, device=data.device)
        for start, blocks in _together(self.columns):
            part = data[:, VALUES * start : VALUES * (start + blocks)].view(torch.int8)
            part = part.reshape(len(data), VALUES // 2, blocks, 2).transpose(1, 2)
            codes[:, start : start + blocks] = part.reshape(len(data), blocks, VALUES)
        values = codes.float() * scales.view(torch.float16).float()[..., None]
        return values.view(len(data), self.columns)


Matrix = Tensor | Q8Matrix
"""A dense matrix [rows, columns]: as stored, or in Q8_0."""


def as_stored(matrix: Matrix, backend: str) -> Tensor:
    """`matrix`, for a backend that does not read Q8_0. Raises UsageError where it is in Q8_0."""
    if isinstance(matrix, Q8Matrix):
        raise UsageError(
            f"`dense` q8_0: the {backend} backend does not read Q8_0; choose `dense` keep or another backend"
        )
    return matrix


def quantise(values: Tensor, where: str) -> Q8Matrix:
    """A BF16, F16 or F32 matrix [rows, columns] on the CPU in Q8_0: the scales and codes that
    `export_gguf(dense="q8_0")` writes (`formats.q8_0.encode`).

    Raises UsageError where columns are not a multiple of 32, InvalidInputError for a value that Q8_0 cannot hold;
    messages begin with `where`, the file and tensor.
    """
    rows, columns = values.shape
    if columns % VALUES:
        raise UsageError(f"{where}: has {columns} columns; `dense` q8_0 needs a multiple of {VALUES}")
    row_bytes = columns // VALUES * q8_0.BLOCK_BYTES
    data = torch.zeros((rows, -(-row_bytes // ALIGNMENT) * ALIGNMENT), dtype=torch.uint8)
    source, bits, words = _WORDS[values.dtype]
    step = max(1, PIECE_BYTES // row_bytes)
    out = data.numpy()

    def convert(first: int) -> None:
        part = values[first : first + step].contiguous().view(bits).numpy().view(words)
        try:
            _write_rows(part, source, out[first : first + step])
        except InvalidInputError:
            for row in range(len(part)):  # to name it
                _check_row(part[row : row + 1], source, f"{where}, row {first + row}")

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(convert, range(0, rows, step)))
    return Q8Matrix(data, columns)


def _write_rows(words: NDArray[np.uint16 | np.uint32], source: ExpertFormat, out: NDArray[np.uint8]) -> None:
    """Bits [rows, columns] of the format `source` to `Q8Matrix.data`."""
    rows, columns = words.shape
    blocks = np.empty((rows, columns // VALUES, q8_0.BLOCK_BYTES), np.uint8)
    q8_0.encode(words.reshape(-1), source, blocks.reshape(-1))
    # In pairs of bytes: the scale, then 16 pairs of codes.
    pairs, target = blocks.view(np.uint16), out.view(np.uint16)
    for start, count in _together(columns):
        first = start * VALUES // 2
        part = target[:, first : first + count * VALUES // 2].reshape(rows, VALUES // 2, count)
        part[...] = pairs[:, start : start + count, 1:].transpose(0, 2, 1)
    target[:, columns // 2 : columns // 2 + columns // VALUES] = pairs[:, :, 0]


def _check_row(words: NDArray[np.uint16 | np.uint32], source: ExpertFormat, where: str) -> None:
    try:
        q8_0.encode(words.reshape(-1), source, np.empty(words.size // VALUES * q8_0.BLOCK_BYTES, np.uint8))
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: {error}; Q8_0 cannot hold it") from None


def _together(columns: int) -> Iterator[tuple[int, int]]:
    """(first block, blocks) of what is interleaved in a row."""
    for start in range(0, columns // VALUES, TOGETHER):
        yield start, min(TOGETHER, columns // VALUES - start)
