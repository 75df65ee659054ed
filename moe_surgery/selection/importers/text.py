"""Counts in JSON, JSON lines and CSV.

JSON: {"LAYER": {"EXPERT": n, ...}, ...}, {"LAYER": [n, ...], ...} or [[n, ...], ...], a row a layer; layers are
"3", "layer_3" or "model.layers.3". JSON lines: objects of the first two forms, or {"layer": 3, "counts": [n, ...]}, or
a list a line. CSV: a row a layer, or with the headings layer, expert and count (or tokens).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from moe_surgery.checkpoint.kinds import MAPPING, RANKING, wrong_kind
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError
from moe_surgery.selection.importers.table import (
    MAX_EXPERTS,
    MAX_LAYERS,
    CountTable,
    by_number,
    count,
    whole_numbers,
)

__all__ = ["counts_from_csv", "counts_from_json", "counts_from_jsonl"]

_LAYER = re.compile(r"(?:layer_|layers\.|model\.layers\.|blk\.)?(0|[1-9][0-9]{0,4})", re.ASCII)
_EXPERT = re.compile(r"(?:expert_)?(0|[1-9][0-9]{0,4})", re.ASCII)
_COUNT_HEADINGS = ("count", "counts", "tokens")
COUNTS = "counts of routed tokens"
Row = dict[int, int] | list[int]


def counts_from_json(raw: bytes, where: str) -> CountTable:
    """Raises InvalidInputError naming the layer and expert."""
    root = parse_json(raw, where=where, allow_floats=True)
    if isinstance(root, list):
        return _matrix(root, where)
    if not isinstance(root, dict) or not root:
        raise InvalidInputError(
            f"{where}: expected counts by layer and expert, or a list with a list a layer"
        )
    return _checked(_by_layer(root, where), where)


def counts_from_jsonl(raw: bytes, where: str) -> CountTable:
    """Raises InvalidInputError naming the line."""
    rows: dict[int, Row] = {}
    lists: list[object] = []
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        inside = f"{where}: line {number}"
        root = parse_json(line, where=inside, allow_floats=True)
        if isinstance(root, list):
            lists.append(root)
            continue
        if not isinstance(root, dict):
            raise InvalidInputError(f"{inside}: expected a JSON object or list")
        if "layer" in root:
            values = next((root[k] for k in (*_COUNT_HEADINGS, "experts") if k in root), None)
            root = {str(root["layer"]): values}
        for layer, row in _by_layer(root, inside).items():
            if layer in rows:
                raise InvalidInputError(f"{inside}: layer {layer} is listed twice")
            rows[layer] = row
    if lists and rows:
        raise InvalidInputError(f"{where}: has lines with and without a layer's number")
    return _matrix(lists, where) if lists else _checked(rows, where)


def counts_from_csv(raw: bytes, where: str) -> CountTable:
    """Raises InvalidInputError naming the line."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{where}: not UTF-8 at byte {error.start}") from None
    try:
        delimiter = (
            ";" if ";" in text.partition("\n")[0] else "\t" if "\t" in text.partition("\n")[0] else ","
        )
        lines = [
            (n, [cell.strip() for cell in line])
            for n, line in enumerate(csv.reader(io.StringIO(text), delimiter=delimiter), 1)
            if any(cell.strip() for cell in line)
        ]
    except csv.Error as error:
        raise InvalidInputError(f"{where}: not CSV: {error}") from None
    if not lines:
        raise InvalidInputError(f"{where}: is empty")
    headings = [cell.lower() for cell in lines[0][1]]
    if "layer" in headings and "expert" in headings:
        return _long(lines[1:], headings, where)
    if "layer" in headings:
        return _wide(lines[1:], headings, where)
    if not all(_is_number(cell) for cell in lines[0][1]):
        lines = lines[1:]  # names of experts
    return _matrix([[_cell(cell, f"{where}: line {n}") for cell in line] for n, line in lines], where)


def _long(lines: Sequence[tuple[int, list[str]]], headings: list[str], where: str) -> CountTable:
    value = next((headings.index(name) for name in _COUNT_HEADINGS if name in headings), None)
    if value is None:
        raise InvalidInputError(f"{where}: has no column count (or tokens) beside layer and expert")
    rows: dict[int, Row] = {}
    for n, line in lines:
        inside = f"{where}: line {n}"
        if len(line) != len(headings):
            raise InvalidInputError(f"{inside}: has {len(line)} columns, the heading {len(headings)}")
        layer = _layer(line[headings.index("layer")], inside)
        expert = _expert(line[headings.index("expert")], inside)
        row = rows.setdefault(layer, {})
        assert isinstance(row, dict)
        if expert in row:
            raise InvalidInputError(f"{inside}: layer {layer}, expert {expert} is listed twice")
        row[expert] = count(_cell(line[value], inside), inside)
    return _checked(rows, where)


def _wide(lines: Sequence[tuple[int, list[str]]], headings: list[str], where: str) -> CountTable:
    at = headings.index("layer")
    rows: dict[int, Row] = {}
    for n, line in lines:
        inside = f"{where}: line {n}"
        if len(line) != len(headings):
            raise InvalidInputError(f"{inside}: has {len(line)} columns, the heading {len(headings)}")
        layer = _layer(line[at], inside)
        if layer in rows:
            raise InvalidInputError(f"{inside}: layer {layer} is listed twice")
        rows[layer] = [count(_cell(cell, inside), inside) for cell in line[:at] + line[at + 1 :]]
    return _checked(rows, where)


def _by_layer(root: dict[str, object], where: str) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    for key, value in root.items():
        layer = _layer(key, where)
        if layer in rows:
            raise InvalidInputError(f"{where}: layer {layer} is listed twice")
        inside = f"{where}: layer {layer}"
        if isinstance(value, dict):
            row: dict[int, int] = {}
            for name, number in value.items():
                expert = _expert(name, inside)
                if expert in row:
                    raise InvalidInputError(f"{inside}: expert {expert} is listed twice")
                row[expert] = count(number, f"{inside}: expert {expert}")
            rows[layer] = row
        elif isinstance(value, list) and 0 < len(value) <= MAX_EXPERTS:
            rows[layer] = [count(number, f"{inside}: expert {e}") for e, number in enumerate(value)]
        else:
            raise InvalidInputError(f"{inside} is neither a list of counts nor an object of counts by expert")
    return rows


def _checked(rows: dict[int, Row], where: str) -> CountTable:
    if not 1 <= len(rows) <= MAX_LAYERS:
        raise InvalidInputError(f"{where}: has {len(rows)} layers; expected 1 to {MAX_LAYERS}")
    listed = [row for row in rows.values() if isinstance(row, list)]
    if len(listed) == len(rows) and all(sorted(row) == list(range(len(row))) for row in listed):
        raise InvalidInputError(wrong_kind(where, COUNTS, RANKING))
    mapped = [row for row in rows.values() if isinstance(row, dict)]
    if len(mapped) == len(rows) and all(sorted(row.values()) == list(range(len(row))) for row in mapped):
        raise InvalidInputError(wrong_kind(where, COUNTS, MAPPING))
    return by_number(rows, where)


def _matrix(rows: Sequence[object], where: str) -> CountTable:
    if not 1 <= len(rows) <= MAX_LAYERS:
        raise InvalidInputError(f"{where}: has {len(rows)} layers; expected 1 to {MAX_LAYERS}")
    checked: list[list[int]] = []
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not 1 <= len(row) <= MAX_EXPERTS:
            raise InvalidInputError(f"{where}: layer {number} is not a list of counts")
        if checked and len(row) != len(checked[0]):
            raise InvalidInputError(
                f"{where}: layer {number} has {len(row)} experts, the first has {len(checked[0])}"
            )
        checked.append([count(value, f"{where}: layer {number}, expert {e}") for e, value in enumerate(row)])
    return CountTable(where, whole_numbers(checked, where))


def _layer(key: str, where: str) -> int:
    match = _LAYER.fullmatch(key.strip())
    if not match:
        raise InvalidInputError(f"{where}: '{printable(key[:60])}' is not a layer (3, or layer_3)")
    return int(match[1])


def _expert(key: str, where: str) -> int:
    match = _EXPERT.fullmatch(key.strip())
    if not match or int(match[1]) >= MAX_EXPERTS:
        raise InvalidInputError(f"{where}: '{printable(key[:60])}' is not an expert number")
    return int(match[1])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _cell(cell: str, where: str) -> int | float:
    try:
        return int(cell) if re.fullmatch(r"[0-9]{1,19}", cell, re.ASCII) else float(cell)
    except ValueError:
        raise InvalidInputError(f"{where}: '{printable(cell[:40])}' is not a number") from None
