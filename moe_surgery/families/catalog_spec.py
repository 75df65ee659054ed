"""Checks a checkpoint against an entry of the catalogue. Names decide what a tensor is, shapes confirm it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError
from moe_surgery.families.base import AnyFamily, CatalogFamily, Layout, Role
from moe_surgery.families.catalog import UNTESTED
from moe_surgery.families.catalog_config import (
    COUNT_KEYS,
    GROUP_KEYS,
    MTP_KEYS,
    TOP_K_KEYS,
    count_in,
    hidden_layers,
    holders,
    mtp_layers,
    optional_count,
)
from moe_surgery.families.grouping import Grouping
from moe_surgery.families.model_spec import EXPERT, ModelSpec, ModelTensor
from moe_surgery.families.stored_weights import format_of, role_of, values_of

__all__ = ["build_catalog_spec", "find_catalog_family"]

MAX_EXPERTS: Final = 4096
# Names with "expert" in them that are not routed experts.
_SHARED: Final = re.compile(r"share[d]?_expert|routed_expert_")
_NUMBER_LAST: Final = re.compile(r"\.[0-9]+(\.|$)")


def find_catalog_family(checkpoint: Checkpoint, families: tuple[AnyFamily, ...]) -> CatalogFamily | None:
    """The entry for `checkpoint` among `families`: by its model type, and of several by the router's name.

    Raises InvalidInputError for a model type that is known and not supported.
    """
    model_type = checkpoint.config.get("model_type")
    entries = [f for f in families if isinstance(f, CatalogFamily) and f.model_type == model_type]
    if not entries:
        if isinstance(model_type, str) and model_type in UNTESTED and _has_catalog(families):
            raise InvalidInputError(
                f"{printable_path(checkpoint.config_path)}: {model_type} is not supported yet: {UNTESTED[model_type]}"
            )
        return None
    routers = tuple("." + f.router for f in entries)
    if len(entries) > 1:
        name = next((n for n in checkpoint.tensors if n.endswith(routers)), None)
        return next((f for f in entries if name and name.endswith("." + f.router)), entries[0])
    return entries[0]


def _has_catalog(families: tuple[AnyFamily, ...]) -> bool:
    return any(isinstance(f, CatalogFamily) for f in families)


@dataclass(slots=True)
class _Layer:
    """The tensors of one layer that count experts; `prefix` begins their names."""

    prefix: str
    number: int
    mtp: bool
    router: TensorRef | None = None
    slices: dict[str, TensorRef] = field(default_factory=dict)
    numbered: dict[str, dict[int, TensorRef]] = field(default_factory=dict)
    stacked: dict[str, TensorRef] = field(default_factory=dict)
    table: TensorRef | None = None

    @property
    def sample(self) -> TensorRef:
        """A tensor of an expert."""
        if self.stacked:
            return next(iter(self.stacked.values()))
        return next(iter(next(iter(self.numbered.values())).values()))


def build_catalog_spec(checkpoint: Checkpoint, family: CatalogFamily) -> ModelSpec:
    """All of `checkpoint` by the entry `family`.

    Raises InvalidInputError, one line naming the tensor or key, where experts are missing, differ from one
    another in dtype or shape, or disagree with the router or config.json.
    """
    where = printable_path(checkpoint.config_path)
    key, experts = count_in(checkpoint.config, COUNT_KEYS, where)
    top_key, top_k = count_in(checkpoint.config, TOP_K_KEYS, where)
    count = hidden_layers(checkpoint.config, where)
    tail = _tail(checkpoint, family, where)
    if experts > MAX_EXPERTS:
        raise InvalidInputError(f"{where}: {key} is {experts}; at most {MAX_EXPERTS} are supported")
    if top_k > experts:
        raise InvalidInputError(f"{where}: {top_key} {top_k} is more than the {experts} experts of {key}")
    tensors, layers = _sorted_by_layer(checkpoint, family, count)
    moe = [layer for layer in layers if layer.router is not None]
    main = [layer for layer in moe if not layer.mtp]
    if not main:
        raise InvalidInputError(
            f"{printable_path(checkpoint.path)}: no layer has a router ({family.router}): not an MoE model of "
            f"{family.title}, or its tensors are renamed"
        )
    _check_router_rows(checkpoint, moe, experts, tail, f"{where}: {key}")
    _check_same_slices(checkpoint, family, main)
    rows = {False: 0, True: 0}
    for layer in moe:
        tensors.extend(_tensors_of(checkpoint, family, layer, rows[layer.mtp], experts, tail))
        rows[layer.mtp] += 1
    for layer in layers:
        if layer.router is None:
            raise InvalidInputError(
                f"{checkpoint.where(layer.sample.name)}: is an expert of a layer without a router "
                f"({layer.prefix}{family.router}); a file is missing, or the checkpoint was saved without it"
            )
    numbers = tuple(layer.number for layer in main)
    kinds = {bool(layer.numbered) for layer in moe}
    layout = "mixed" if len(kinds) > 1 else "per expert" if True in kinds else "stacked"
    return ModelSpec(
        family,
        Layout(layout, "transformers"),
        checkpoint.config,
        {"layers": len(main), "experts": experts, "top_k": top_k, "hidden_layers": count},
        tuple(tensors),
        format_of(checkpoint.config, tensors),
        tuple(checkpoint.notes),
        () if numbers == tuple(range(len(numbers))) else numbers,
        tuple(layer.prefix.rstrip(".") for layer in moe if layer.mtp),
        _grouping(checkpoint, family, experts, where),
        max(family.minimum, max((layer.table.shape[1] for layer in moe if layer.table), default=1)),
    )


def _tail(checkpoint: Checkpoint, family: CatalogFamily, where: str) -> int:
    if family.tail_key is None:
        return 0
    values = [
        holder[family.tail_key] for _, holder in holders(checkpoint.config) if family.tail_key in holder
    ]
    for value in values:
        if type(value) is not int or value < 0 or value != values[0]:
            raise InvalidInputError(
                f"{where}: {family.tail_key} is {value!r}, not a number of router rows"[:300]
            )
    if not values:
        raise InvalidInputError(
            f"{where}: {family.tail_key} is missing; it counts router rows that always stay"
        )
    assert isinstance(values[0], int)
    return values[0]


def _grouping(checkpoint: Checkpoint, family: CatalogFamily, experts: int, where: str) -> Grouping | None:
    config = checkpoint.config
    methods = {holder["topk_method"] for _, holder in holders(config) if "topk_method" in holder}
    groups = optional_count(config, GROUP_KEYS, where)
    if groups is None or groups[1] == 1 or methods == {"greedy"}:
        return None
    used = optional_count(config, ("topk_group",), where)
    if used is None:
        raise InvalidInputError(f"{where}: {groups[0]} is {groups[1]}, but topk_group is missing; add it")
    if experts % groups[1] or used[1] > groups[1]:
        raise InvalidInputError(
            f"{where}: {experts} experts cannot be routed in {groups[1]} groups ({groups[0]}), {used[1]} of them used "
            "(topk_group); correct the keys"
        )
    return Grouping(experts, groups[1], used[1], family.group_minimum)


def _sorted_by_layer(
    checkpoint: Checkpoint, family: CatalogFamily, count: int
) -> tuple[list[ModelTensor], list[_Layer]]:
    """The tensors that are copied whole, and those of each layer that count experts, MTP layers last."""
    prefixes = "|".join(map(re.escape, sorted((*family.layers, *family.mtp), key=len, reverse=True)))
    name_of_layer = re.compile(rf"({prefixes})([0-9]+)\.")
    own = tuple(p.removesuffix("layers.") for p in family.mtp)
    whole: list[ModelTensor] = []
    layers: dict[str, _Layer] = {}
    seen: set[int] = set()
    further = mtp_layers(checkpoint.config)
    for name, ref in checkpoint.tensors.items():
        match = name_of_layer.match(name)
        if match is None:
            _refuse_expert(checkpoint, name, name)
            whole.append(ModelTensor(name, role_of(name), None, ref.shape, ref, mtp=name.startswith(own)))
            continue
        prefix, number = match[0], int(match[2])
        mtp = match[1] in family.mtp or number >= count
        if mtp and match[1] not in family.mtp and number >= count + further:
            raise InvalidInputError(
                f"{checkpoint.where(name)}: is in layer {number}, but config.json counts {count} layers and "
                f"{further} for multi-token prediction ({MTP_KEYS[0]}); correct the keys, or take the config.json "
                "that belongs to these shards"
            )
        if not mtp:
            seen.add(number)
        rest = name[len(prefix) :]
        layer = layers.get(prefix)
        if layer is None:
            layer = layers[prefix] = _Layer(prefix, number, mtp)
        if not _sort(checkpoint, family, layer, rest, ref):
            _refuse_expert(checkpoint, name, rest)
            whole.append(ModelTensor(name, role_of(rest), None, ref.shape, ref, mtp=mtp))
    if missing := sorted(set(range(count)) - seen):
        raise InvalidInputError(
            f"{printable_path(checkpoint.path)}: layer {missing[0]} has no tensors, but config.json counts {count} "
            "layers; a file is missing, or the checkpoint was saved without it"
        )
    with_experts = [x for x in layers.values() if x.router or x.numbered or x.stacked or x.slices or x.table]
    with_experts.sort(key=lambda x: (x.mtp, x.number))
    for one, other in pairwise(with_experts):
        if (one.mtp, one.number) == (other.mtp, other.number):
            raise InvalidInputError(
                f"{printable_path(checkpoint.path)}: {one.prefix} and {other.prefix} both hold experts: two models in "
                "one checkpoint are not supported"
            )
    return whole, with_experts


def _sort(checkpoint: Checkpoint, family: CatalogFamily, layer: _Layer, rest: str, ref: TensorRef) -> bool:
    """Note a tensor that counts experts in `layer`; False for any other."""
    if rest == family.router:
        layer.router = ref
    elif rest in family.slices:
        layer.slices[rest] = ref
    elif rest == family.table:
        layer.table = ref
    elif rest.startswith(family.experts):
        number, _, leaf = rest[len(family.experts) :].partition(".")
        if leaf and number.isascii() and number.isdigit():
            if str(int(number)) != number:
                raise InvalidInputError(
                    f"{checkpoint.where(ref.name)}: expert number {number} has leading zeros"
                )
            layer.numbered.setdefault(leaf, {})[int(number)] = ref
        elif _NUMBER_LAST.search(rest):
            raise InvalidInputError(
                f"{checkpoint.where(ref.name)}: numbers experts after the projection (as AutoRound does), which is "
                f"not supported; rename it to {family.experts}NUMBER.NAME"
            )
        else:
            layer.stacked[rest] = ref
    elif rest.startswith(family.stacked):
        layer.stacked[rest] = ref
    else:
        module = family.router.rpartition(".")[0] + "."
        if rest.startswith(module) and rest not in family.whole:
            raise InvalidInputError(
                f"{checkpoint.where(ref.name)}: is part of the router, but not known in {family.title}; it may count "
                "experts, so it is neither cut nor copied"
            )
        return False
    return True


def _refuse_expert(checkpoint: Checkpoint, name: str, rest: str) -> None:
    if "expert" in rest and not _SHARED.search(rest):
        raise InvalidInputError(
            f"{checkpoint.where(name)}: is named like an expert, but is not part of an MoE layer known here; it is "
            "neither cut nor copied"
        )


def _check_router_rows(
    checkpoint: Checkpoint, layers: list[_Layer], experts: int, tail: int, key: str
) -> None:
    rows = Counter(layer.router.shape[0] if layer.router and layer.router.shape else 0 for layer in layers)
    usual = rows.most_common(1)[0][0]
    for layer in layers:
        router = layer.router
        assert router is not None
        found = router.shape[0] if router.shape else 0
        if found == experts + tail:
            continue
        if found == usual and rows[usual] == len(layers):
            extra = f" and {tail} more rows" if tail else ""
            raise InvalidInputError(
                f"{key} is {experts}{extra}, but {checkpoint.where(router.name)} has {found} rows, as in every layer; "
                "correct the key, or take the config.json that belongs to these shards"
            )
        raise InvalidInputError(
            f"{checkpoint.where(router.name)}: shape {list(router.shape)}, expected {experts + tail} rows as {key} says"
        )


def _check_same_slices(checkpoint: Checkpoint, family: CatalogFamily, layers: list[_Layer]) -> None:
    """Every MoE layer must have the slices that one has; a table replaces them."""
    known = {name for layer in layers for name in layer.slices}
    for layer in layers:
        missing = sorted(known - set(layer.slices))
        if missing and layer.table is None:
            raise InvalidInputError(
                f"{printable_path(checkpoint.path)}: tensor '{printable(layer.prefix + missing[0])}' is missing, which "
                "other MoE layers have; a file is missing, or the checkpoint was saved without it"
            )


def _tensors_of(
    checkpoint: Checkpoint, family: CatalogFamily, layer: _Layer, row: int, experts: int, tail: int
) -> Iterator[ModelTensor]:
    """The checked tensors of an MoE layer."""
    router = layer.router
    assert router is not None
    if not layer.numbered and not layer.stacked:
        raise InvalidInputError(
            f"{checkpoint.where(router.name)}: is the router of a layer without experts ({layer.prefix}"
            f"{family.experts}...); a file is missing, or the checkpoint was saved without them"
        )
    mtp = layer.mtp
    yield ModelTensor(router.name, Role.ROUTER, row, router.shape, router, tail=tail, mtp=mtp)
    for name, ref in sorted(layer.slices.items()):
        axis = family.slices[name]
        entries = experts + tail if len(ref.shape) > axis and ref.shape[axis] == experts + tail else experts
        if len(ref.shape) <= axis or ref.shape[axis] != entries:
            raise InvalidInputError(
                f"{checkpoint.where(ref.name)}: shape {list(ref.shape)}, expected {experts} entries on axis {axis}"
            )
        yield ModelTensor(
            ref.name, Role.ROUTER, row, ref.shape, ref, axis=axis, tail=entries - experts, mtp=mtp
        )
    if layer.table is not None:
        if layer.table.dtype not in ("I64", "I32") or len(layer.table.shape) != 2:
            raise InvalidInputError(
                f"{checkpoint.where(layer.table.name)}: {layer.table.dtype} {list(layer.table.shape)}, expected I64 or "
                "I32 of [vocabulary, top-k]"
            )
        yield ModelTensor(
            layer.table.name, Role.ROUTING_TABLE, row, layer.table.shape, layer.table, mtp=mtp, values=0
        )
    for rest, ref in sorted(layer.stacked.items()):
        yield _stacked(checkpoint, layer, row, rest, ref, experts)
    yield from _numbered(checkpoint, family, layer, row, experts, tail)


def _stacked(
    checkpoint: Checkpoint, layer: _Layer, row: int, rest: str, ref: TensorRef, experts: int
) -> ModelTensor:
    if ref.shape in ((), (1,)) and experts > 1:  # a scale that all experts share
        return ModelTensor(ref.name, Role.OTHER, None, ref.shape, ref, mtp=layer.mtp, values=0)
    if not ref.shape or ref.shape[0] != experts:
        raise InvalidInputError(
            f"{checkpoint.where(ref.name)}: shape {list(ref.shape)}, expected {experts} experts on axis 0"
        )
    values = values_of(rest, ref, checkpoint.config)
    return ModelTensor(ref.name, Role.EXPERT_WEIGHT, row, ref.shape, ref, mtp=layer.mtp, values=values)


def _numbered(
    checkpoint: Checkpoint, family: CatalogFamily, layer: _Layer, row: int, experts: int, tail: int
) -> Iterator[ModelTensor]:
    present = {number for refs in layer.numbered.values() for number in refs}
    stem = f"{layer.prefix}{family.experts}"
    for leaf, refs in sorted(layer.numbered.items()):
        pieces = []
        first = refs.get(0)
        for number in range(experts):
            ref = refs.get(number)
            if ref is None:
                what = "has other tensors" if number in present else "has none at all"
                raise InvalidInputError(
                    f"{printable_path(checkpoint.path)}: tensor '{printable(f'{stem}{number}.{leaf}')}' is missing "
                    f"(expert {number} {what}; {experts} experts need it); a file is missing, or the checkpoint was "
                    "saved without it"
                )
            assert first is not None
            if ref.dtype != first.dtype or ref.shape != first.shape:
                raise InvalidInputError(
                    f"{checkpoint.where(ref.name)}: {ref.dtype} {list(ref.shape)}, but expert 0 of the layer has "
                    f"{first.dtype} {list(first.shape)}; all experts of a layer must have the same tensors"
                )
            pieces.append(ref)
        for number in sorted(set(refs) - set(range(experts))):
            ref = refs[number]
            if number >= experts + tail:
                raise InvalidInputError(
                    f"{checkpoint.where(ref.name)}: expert {number} is beyond the {experts} that config.json counts"
                )
            pieces.append(ref)
        assert first is not None
        values = values_of(leaf, first, checkpoint.config)
        yield ModelTensor(
            f"{stem}{EXPERT}.{leaf}",
            Role.EXPERT_WEIGHT,
            row,
            (len(pieces), *first.shape),
            first,
            pieces=tuple(pieces),
            tail=len(pieces) - experts,
            mtp=layer.mtp,
            values=None if values is None else values * len(pieces),
        )
