"""A ranking: for every layer, all experts from the one to keep first to the one to drop first."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.kinds import RANKING, reads
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import describe
from moe_surgery.errors import InvalidInputError
from moe_surgery.selection.fields import integer_rows, is_integer, number_rows, optional_text, positive

__all__ = ["RANKING_FORMAT", "Ranking", "load_ranking"]

RANKING_FORMAT = "moe-surgery.ranking"
VERSION = 1
MAX_BYTES = 100_000_000
_PUBLISHED_KEY = re.compile(r"layer_(0|[1-9][0-9]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Ranking:
    """`layers[i]` orders all experts of layer i, best first.

    `model_type` is None where the file did not say. `scores`, if present, are the values ranked by,
    in expert order. `provenance` says how it was made.
    """

    num_experts: int
    layers: tuple[tuple[int, ...], ...]
    model_type: str | None = None
    scores: tuple[tuple[float, ...], ...] | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> str:
        """The ranking's own file form (version 1)."""
        return json.dumps(
            {
                "format": RANKING_FORMAT,
                "version": VERSION,
                "model_type": self.model_type,
                "num_experts": self.num_experts,
                "layers": self.layers,
                "scores": self.scores,
                "provenance": dict(self.provenance),
            },
            allow_nan=False,
        )


@reads("a ranking", RANKING)
def load_ranking(path: str | os.PathLike[str]) -> Ranking:
    """Read a ranking file: ours, or the published form `{"layer_0": [31, 9, ...], ...}`.

    Raises InvalidInputError for an unknown version, or a layer that is not a full order of experts;
    OutputError where the file cannot be read.
    """
    where = printable_path(path)
    root = parse_json(
        read_small_file(path, limit=MAX_BYTES, what="a ranking"), where=where, allow_floats=True
    )
    if not isinstance(root, dict) or not root:
        raise InvalidInputError(f"{where}: not a ranking: expected a JSON object with layers")
    name = os.path.basename(os.fspath(path))
    if "format" in root:
        return _own(root, where)
    return _published(root, where, name)


def _own(root: Mapping[str, object], where: str) -> Ranking:
    if root["format"] != RANKING_FORMAT:
        raise InvalidInputError(f"{where}: format is {describe(root['format'])}, expected {RANKING_FORMAT!r}")
    if not is_integer(root.get("version"), VERSION):
        raise InvalidInputError(
            f"{where}: ranking version {describe(root.get('version'))} is not known here (this reads version "
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
    )


def _published(root: Mapping[str, object], where: str, name: str) -> Ranking:
    numbers: dict[int, object] = {}
    for key, value in root.items():
        match = _PUBLISHED_KEY.fullmatch(key)
        if not match:
            raise InvalidInputError(
                f"{where}: key {key[:60]!r} is neither of a moe-surgery ranking nor 'layer_N' of a published one"
            )
        numbers[int(match[1])] = value
    if sorted(numbers) != list(range(len(numbers))):
        missing = next(i for i in range(len(numbers)) if i not in numbers)
        raise InvalidInputError(f"{where}: layer_{missing} is missing among {len(numbers)} layers")
    layers = integer_rows([numbers[i] for i in range(len(numbers))], where)
    return Ranking(len(layers[0]), _checked(layers, len(layers[0]), where), provenance={"ranking": name})


def _checked(layers: Sequence[tuple[int, ...]], experts: int, where: str) -> tuple[tuple[int, ...], ...]:
    for number, order in enumerate(layers):
        if len(order) != experts:
            raise InvalidInputError(
                f"{where}: layer {number} ranks {len(order)} experts, expected all {experts}"
            )
        if sorted(order) != list(range(experts)):
            raise InvalidInputError(
                f"{where}: layer {number} is not an order of experts 0..{experts - 1}: "
                f"one is there twice or out of range"
            )
    return tuple(layers)
