"""Expert numbers inside settings: quantisation configurations name tensors, literally or as regular expressions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.source import read_small
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.families.base import CatalogFamily
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.selection.plan import Plan

__all__ = ["quantization_files", "renumbered"]

FILES: Final = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
MAX_BYTES: Final = 200_000_000

Rename = Callable[[str], str | None]


def renumbered(value: object, model: ModelSpec, plan: Plan) -> object:
    """`value`, parsed JSON, with entries of dropped experts left out and the others renumbered.

    An entry is a key or a string that begins with an expert's name, also as an escaped regular expression behind
    "re:", "-:", "+:" or "^". Everything else stays.
    """
    return _renamed(value, _rename(model, plan))


def quantization_files(checkpoint: Checkpoint, model: ModelSpec, plan: Plan) -> dict[str, bytes]:
    """The side files about quantisation that name experts, with their names in the output; others are copied.

    Raises InvalidInputError for one that is not JSON.
    """
    if not isinstance(model.family, CatalogFamily):
        return {}
    texts: dict[str, bytes] = {}
    for name in FILES:
        if name not in checkpoint.side_files:
            continue
        with checkpoint.files.open(name) as source:
            raw = read_small(source, limit=MAX_BYTES, what="a quantisation config")
            value = parse_json(raw, where=source.where, allow_floats=True)
        new = renumbered(value, model, plan)
        if new != value:
            texts[name] = (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()
    return texts


def _rename(model: ModelSpec, plan: Plan) -> Rename:
    family = model.family
    assert isinstance(family, CatalogFamily)
    rows: dict[str, Sequence[int]] = dict(zip(map(str, plan.numbers), plan.layers, strict=True))
    own: dict[str, Sequence[int]] = {}
    for name, row in zip(model.mtp_layers, plan.mtp_layers or (), strict=False):
        stem, _, number = name.rpartition(".")
        (rows if f"{stem}." in family.layers else own)[number] = row
    layer = _pattern("layers.")
    mtp = "|".join(_pattern(prefix) for prefix in family.mtp)
    name_of_expert = re.compile(
        rf"^(?:re:|[-+]:)?\^?(?P<stem>(?:(?P<mtp>{mtp})|[\w\\.]*?{layer}))(?P<layer>[0-9]+)"
        rf"(?P<path>{_pattern('.' + family.experts)})(?P<expert>[0-9]+)(?![0-9])"
    )

    def rename(text: str) -> str | None:
        if "expert" not in text or (match := name_of_expert.match(text)) is None:
            return text
        row = (own if match["mtp"] else rows).get(match["layer"])
        if row is None:
            return text
        expert = int(match["expert"])
        if expert not in row:
            return text if expert >= model.experts else None
        return f"{text[: match.start('expert')]}{row.index(expert)}{text[match.end('expert') :]}"

    return rename


def _pattern(name: str) -> str:
    """A pattern of `name` whose dots may be escaped."""
    return re.escape(name).replace(r"\.", r"\\?\.")


def _renamed(value: object, rename: Rename) -> object:
    if isinstance(value, Mapping):
        renamed = ((rename(k), v) for k, v in value.items())
        return {k: _renamed(v, rename) for k, v in renamed if k is not None and not _dropped(v, rename)}
    if isinstance(value, list):
        return [_renamed(v, rename) for v in value if not _dropped(v, rename)]
    return rename(value) if isinstance(value, str) else value


def _dropped(value: object, rename: Rename) -> bool:
    return isinstance(value, str) and rename(value) is None
