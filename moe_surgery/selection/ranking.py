"""A ranking: for every layer, all experts from the one to keep first to the one to drop first."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.kinds import RANKING, expects
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import describe_value
from moe_surgery.errors import InvalidInputError
from moe_surgery.selection.arguments import PathLike, load_if_path
from moe_surgery.selection.fields import (
    MAX_ROWS,
    integer_rows,
    is_integer,
    layer_numbers,
    number_rows,
    optional_text,
    positive,
)
from moe_surgery.selection.shipped import is_shipped, shipped_ranking

__all__ = ["RANKING_FORMAT", "Ranking", "as_ranking", "load_ranking"]

RANKING_FORMAT = "moe-surgery.ranking"
VERSION = 1
MAX_BYTES = 100_000_000
_LAYER_KEY = re.compile(r"(?:layer_)?(0|[1-9][0-9]{0,4})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Ranking:
    """`layers[i]` orders all experts of layer i, best first.

    `model_type` is None where the file has none. `scores`, if present, are the values ranked by,
    in expert order. `provenance` says how the ranking was made. `layer_numbers` are the model's numbers
    of its MoE layers where they are not 0, 1, ...
    """

    num_experts: int
    layers: tuple[tuple[int, ...], ...]
    model_type: str | None = None
    scores: tuple[tuple[float, ...], ...] | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)
    layer_numbers: tuple[int, ...] = ()

    def to_json(self) -> str:
        """The ranking as moe-surgery's file format (version 1)."""
        return json.dumps(
            {
                "format": RANKING_FORMAT,
                "version": VERSION,
                "model_type": self.model_type,
                "num_experts": self.num_experts,
                "layers": self.layers,
                **({"layer_numbers": self.layer_numbers} if self.layer_numbers else {}),
                "scores": self.scores,
                "provenance": dict(self.provenance),
            },
            allow_nan=False,
        )


@expects("a ranking", RANKING)
def load_ranking(path: str | os.PathLike[str]) -> Ranking:
    """Read a ranking file: ours, or layers by name, `{"layer_0": [31, 9, ...], ...}` or `{"0": [...], ...}`.

    Layers by name come in one JSON object or as JSONL, an object a line, in any order, numbered as the
    model numbers them. `published:NAME` is one
    of the eight rankings published for gpt-oss-20b, which ship with the package.

    Raises InvalidInputError for an unknown version, or a layer that is not a full order of experts;
    OutputError where the file cannot be read; UsageError for an unknown published name.
    """
    if is_shipped(path):
        layers = shipped_ranking(path)
        return Ranking(len(layers[0]), layers, "gpt_oss", provenance={"ranking": os.fspath(path)})
    where = printable_path(path)
    objects = _objects(read_small_file(path, limit=MAX_BYTES, what="a ranking"), where)
    if len(objects) == 1 and "format" in objects[0][1]:
        return _parse_native(objects[0][1], where)
    return _by_layer(objects, where, os.path.basename(os.fspath(path)))


def as_ranking(ranking: Ranking | PathLike) -> Ranking:
    """`ranking`, read by `load_ranking` where it is a path."""
    return load_if_path(ranking, Ranking, load_ranking)


def _objects(raw: bytes, where: str) -> list[tuple[str, dict[str, object]]]:
    """The file's JSON objects, each with its name in errors: one, or one a line (JSONL)."""
    lines = [(n, line) for n, line in enumerate(raw.splitlines(), 1) if line.strip()]
    texts = [(where, raw)]
    if len(lines) > 1 and _is_object(lines[0][1].strip()):
        if len(lines) > MAX_ROWS:
            raise InvalidInputError(f"{where}: not a ranking: has {len(lines)} lines, expected one a layer")
        texts = [(f"{where}: line {n}", line) for n, line in lines]
    objects = []
    for name, text in texts:
        root = parse_json(text, where=name, allow_floats=True)
        if not isinstance(root, dict) or not root:
            raise InvalidInputError(f"{name}: not a ranking: expected a JSON object with layers")
        objects.append((name, root))
    return objects


def _parse_native(root: Mapping[str, object], where: str) -> Ranking:
    if root["format"] != RANKING_FORMAT:
        raise InvalidInputError(
            f"{where}: format is {describe_value(root['format'])}, expected {RANKING_FORMAT!r}"
        )
    if not is_integer(root.get("version"), VERSION):
        raise InvalidInputError(
            f"{where}: ranking version {describe_value(root.get('version'))} is not supported (this reads version "
            f"{VERSION}); upgrade moe-surgery"
        )
    experts = positive(root.get("num_experts"), f"{where}: num_experts")
    layers = integer_rows(root.get("layers"), f"{where}: layers")
    ordered = _checked(layers, experts, where)
    scores = None if root.get("scores") is None else number_rows(root["scores"], f"{where}: scores")
    if scores is not None and [len(row) for row in scores] != [experts] * len(layers):
        raise InvalidInputError(f"{where}: scores: expected {len(layers)} layers of {experts} numbers")
    provenance = root.get("provenance")
    return Ranking(
        experts,
        ordered,
        optional_text(root.get("model_type"), f"{where}: model_type"),
        scores,
        provenance if isinstance(provenance, dict) else {},
        layer_numbers(root.get("layer_numbers"), len(layers), f"{where}: layer_numbers"),
    )


def _is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object, as the first of JSONL is."""
    return line[:1] == b"{" and line[-1:] == b"}" and line.count(b"{") == line.count(b"}")


def _by_layer(objects: Sequence[tuple[str, Mapping[str, object]]], where: str, name: str) -> Ranking:
    numbers: dict[int, object] = {}
    for inside, root in objects:
        if "format" in root:
            raise InvalidInputError(
                f"{inside}: a moe-surgery ranking must be the only JSON object in its file"
            )
        for key, value in root.items():
            match = _LAYER_KEY.fullmatch(key)
            if not match:
                raise InvalidInputError(f"{inside}: key {key[:60]!r} is not a layer (layer_0, or 0)")
            if int(match[1]) in numbers:
                raise InvalidInputError(f"{inside}: layer {match[1]} is listed twice")
            numbers[int(match[1])] = value
    ordered = sorted(numbers)
    # Models whose first layer has experts have them in all; others count from their first MoE layer.
    if ordered[0] == 0 and ordered[-1] != len(ordered) - 1:
        missing = next(i for i in range(len(numbers)) if i not in numbers)
        raise InvalidInputError(f"{where}: layer {missing} is missing among {len(numbers)} layers")
    layers = integer_rows([numbers[i] for i in ordered], where)
    return Ranking(
        len(layers[0]),
        _checked(layers, len(layers[0]), where),
        provenance={"ranking": name},
        layer_numbers=layer_numbers(ordered, len(ordered), where),
    )


def _checked(layers: Sequence[tuple[int, ...]], experts: int, where: str) -> tuple[tuple[int, ...], ...]:
    for number, order in enumerate(layers):
        if len(order) != experts:
            raise InvalidInputError(
                f"{where}: layer {number} ranks {len(order)} experts, expected all {experts}"
            )
        if sorted(order) != list(range(experts)):
            raise InvalidInputError(
                f"{where}: layer {number} is not an order of experts 0..{experts - 1}: "
                f"one is listed twice or out of range"
            )
    return tuple(layers)
