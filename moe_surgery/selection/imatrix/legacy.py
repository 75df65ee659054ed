"""The legacy form of importance matrices (.dat), which llama.cpp wrote until 2025 and ik_llama.cpp writes.

Source: common/imatrix-loader.cpp of ggml-org/llama.cpp. Little endian, without a magic number: i32 entries, each
i32 length of the name, name, i32 calls, i32 values, f32 values; then perhaps i32 chunks, i32 length, name of
the texts. A value is the mean of the squared input times `calls`: the count is divided away. Files of early 2024 hold
the sums themselves.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError
from moe_surgery.selection.imatrix.matrix import Entry, Imatrix

__all__ = ["parse_legacy"]

MAX_ENTRIES: Final = 100_000
MAX_NAME_BYTES: Final = 1024
MAX_DATASET_BYTES: Final = 1 << 16
_INT: Final = struct.Struct("<i")


def parse_legacy(raw: npt.NDArray[np.uint8], where: str, digest: str) -> Imatrix:
    """The matrix in the bytes of a whole file. Raises InvalidInputError, naming the entry."""
    reader = _Reader(raw, where)
    total = reader.integer("the number of entries")
    if not 1 <= total <= MAX_ENTRIES:
        raise InvalidInputError(
            f"{where}: is not an importance matrix: neither GGUF nor the legacy form, which begins with the number of "
            f"its entries ({total:,} here)"
        )
    entries: dict[str, Entry] = {}
    for number in range(total):
        name, entry = reader.entry(f"entry {number} of {total}")
        if name in entries:
            raise InvalidInputError(f"{where}: '{printable(name)}' has two entries")
        entries[name] = entry
    chunks, dataset = reader.tail()
    return Imatrix(where, entries, (dataset,) if dataset else (), chunks, legacy=True, digests=(digest,))


class _Reader:
    def __init__(self, raw: npt.NDArray[np.uint8], where: str) -> None:
        self._raw = raw
        self._where = where
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._raw) - self._at

    def take(self, nbytes: int, what: str) -> npt.NDArray[np.uint8]:
        if nbytes > self.left:
            raise InvalidInputError(
                f"{self._where}: ends within {what}: {nbytes:,} bytes are needed at {self._at:,}, {self.left:,} are "
                "left; it is not an importance matrix, or it is cut off: download it again"
            )
        self._at += nbytes
        return self._raw[self._at - nbytes : self._at]

    def integer(self, what: str) -> int:
        (value,) = _INT.unpack(self.take(4, what).tobytes())
        return value  # type: ignore[no-any-return]

    def text(self, limit: int, what: str) -> str:
        length = self.integer(f"the name of {what}")
        if not 0 <= length <= limit:
            raise InvalidInputError(
                f"{self._where}: {what} has a name of {length:,} bytes: it is damaged, or not an importance matrix"
            )
        raw = self.take(length, f"the name of {what}").tobytes()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise InvalidInputError(f"{self._where}: {what} has a name that is not UTF-8") from None

    def entry(self, what: str) -> tuple[str, Entry]:
        name = self.text(MAX_NAME_BYTES, what)
        if not name:
            raise InvalidInputError(f"{self._where}: {what} has no name")
        shown = f"'{printable(name)}'"
        calls, count = self.integer(shown), self.integer(shown)
        if calls < 1 or count < 1:
            raise InvalidInputError(
                f"{self._where}: {shown} has {count:,} values of {calls:,} calls; both must be positive"
            )
        values: npt.NDArray[Any] = self.take(4 * count, shown).view("<f4")
        if not np.isfinite(values).all() or (values < 0).any():
            raise InvalidInputError(
                f"{self._where}: {shown} holds values that are negative or not finite: the matrix is damaged; make it "
                "again"
            )
        return name, Entry(values[None], None, calls)

    def tail(self) -> tuple[int, str]:
        """What follows the entries: chunks and the name of the texts, 0 and "" where there is nothing."""
        if not self.left:
            return 0, ""
        chunks = self.integer("the number of chunks")
        dataset = self.text(MAX_DATASET_BYTES, "the texts") if self.left else ""
        if self.left:
            raise InvalidInputError(
                f"{self._where}: has {self.left:,} bytes after its last entry; it is damaged"
            )
        return max(chunks, 0), printable(dataset)
