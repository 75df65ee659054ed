"""The packed data of a page, read with plain loops."""

from __future__ import annotations

import base64
import struct


def bits_of(text: str) -> str:
    return "".join(f"{byte:08b}" for byte in base64.b64decode(text))


def floats_of(text: str) -> list[float]:
    raw = base64.b64decode(text)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def shares_of(text: str) -> list[float]:
    raw = base64.b64decode(text)
    return [v / 65535 for v in struct.unpack(f"<{len(raw) // 2}H", raw)]


def rows_of(text: str, rows: int) -> list[str]:
    """The bits of each row; all rows have the same whole number of bytes."""
    bits = bits_of(text)
    assert len(bits) % rows == 0
    return [bits[i * len(bits) // rows : (i + 1) * len(bits) // rows] for i in range(rows)]


def orders_of(text: str, rows: int, experts: int, listed: int) -> list[list[int]]:
    result = []
    for bits in rows_of(text, rows):
        left, order, at = list(range(experts)), [], 0
        for _ in range(listed):
            width = (len(left) - 1).bit_length()
            order.append(left.pop(int(bits[at : at + width] or "0", 2)))
            at += width
        assert len(bits) - at < 8
        result.append(order)
    return result


def scores_of(
    packed: str | list[str], orders: list[list[int]], experts: int, levels: int | None
) -> list[list[float]]:
    """Scores of the listed experts of each layer, best first."""
    if levels is None:
        assert isinstance(packed, str)
        values = floats_of(packed)
        return [[values[experts * i + e] for e in order] for i, order in enumerate(orders)]
    largest, ways = floats_of(packed[0]), rows_of(packed[1], len(orders))
    result = []
    for top, way, order in zip(largest, ways, orders, strict=True):
        level, row = levels, []
        for bit in way:
            if bit == "0":
                level -= 1
            else:
                row.append(top * (level / levels) ** 2)
        assert len(row) == len(order)
        result.append(row)
    return result
