"""A plan: the experts kept in each layer, and their order in the output."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.kinds import PLAN, expects
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import describe_value
from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.selection.arguments import PathLike, load_if_path
from moe_surgery.selection.fields import integer_rows, is_integer, layer_numbers, optional_text, positive

if TYPE_CHECKING:
    from moe_surgery.families.grouping import Grouping
    from moe_surgery.selection.ranking import Ranking

__all__ = [
    "ORDERS",
    "PLAN_FORMAT",
    "Plan",
    "as_plan",
    "load_plan",
    "plan_from_ranking",
    "plan_keeping",
    "plan_random",
]

PLAN_FORMAT = "moe-surgery.plan"
VERSION = 1
MAX_BYTES = 100_000_000
ORDERS = ("ascending", "ranking")
_KEYS = frozenset(
    {"format", "version", "model_type", "num_source_experts", "num_layers", "top_k", "layers", "provenance"}
    | {"layer_numbers", "mtp_layers"}
)


class HasExperts(Protocol):
    """What a plan needs to know about a model: a `ModelSpec`, or the result of `inspect`.

    Where it has `layer_numbers`, they number the MoE layers.
    """

    @property
    def model_type(self) -> str: ...
    @property
    def experts(self) -> int: ...
    @property
    def layers(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """`layers[i]` lists the kept source experts of layer i in output order, at least one.

    `top_k` None means the model's; it is min(top_k, kept) in any case. `extra` holds
    unknown keys of the file; they are written back. `layer_numbers` are the model's numbers of its MoE layers
    where they are not 0, 1, ...; `mtp_layers` lists the kept experts of layers for multi-token prediction, () where
    they are dropped, None where that is left to `prune`.
    """

    model_type: str
    num_source_experts: int
    layers: tuple[tuple[int, ...], ...]
    top_k: int | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)
    layer_numbers: tuple[int, ...] = ()
    mtp_layers: tuple[tuple[int, ...], ...] | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers as the model numbers them."""
        return self.layer_numbers or tuple(range(self.num_layers))

    @property
    def uniform_experts(self) -> int | None:
        """The number of experts that every layer keeps, or None where layers differ."""
        counts = {len(kept) for kept in self.layers}
        return counts.pop() if len(counts) == 1 else None

    def with_top_k(self, top_k: int | None, name: str = "the plan") -> Plan:
        """The plan with `top_k` experts a token, which may be more than the model's; itself for None.

        A layer that keeps fewer uses all of them. Raises UsageError, calling the plan `name`, for a
        number below 1 or above the most experts that a layer keeps.
        """
        if top_k is None:
            return self
        check_top_k(top_k, max(map(len, self.layers)), f"{name} keeps")
        return replace(self, top_k=top_k)

    def as_dict(self) -> dict[str, object]:
        """The plan as the JSON object of its file form (version 1)."""
        return {
            "format": PLAN_FORMAT,
            "version": VERSION,
            "model_type": self.model_type,
            "num_source_experts": self.num_source_experts,
            "num_layers": self.num_layers,
            "top_k": self.top_k,
            "layers": [list(kept) for kept in self.layers],
            **({"layer_numbers": list(self.layer_numbers)} if self.layer_numbers else {}),
            **({"mtp_layers": [list(r) for r in self.mtp_layers]} if self.mtp_layers is not None else {}),
            "provenance": dict(self.provenance),
            **self.extra,
        }

    def to_json(self) -> str:
        """File form: one line a layer, so that plans can be read and compared by eye."""
        head = {k: v for k, v in self.as_dict().items() if k != "layers"}
        rows = ",\n".join(f"    {json.dumps(list(kept))}" for kept in self.layers)
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        return "{\n" + ",\n".join([*lines, f'  "layers": [\n{rows}\n  ]']) + "\n}\n"

    def fits(self, model_type: str, experts: int, layers: int) -> bool:
        """Whether the plan is for a model of this type and size."""
        return (self.model_type, self.num_source_experts, self.num_layers) == (model_type, experts, layers)

    def check_fits(
        self,
        model_type: str,
        experts: int,
        layers: int,
        checkpoint: str,
        numbers: tuple[int, ...] | None = None,
        *,
        also: Sequence[str] = (),
    ) -> None:
        """Raise PlanMismatchError unless the plan is for a model of this type and size; `checkpoint` names it.

        `numbers` are the model's numbers of its MoE layers (default: from 0), `also` further model types that fit.
        """
        if not any(self.fits(name, experts, layers) for name in (model_type, *also)):
            raise PlanMismatchError(
                f"the plan is for {self.model_type} with {self.num_layers} layers of {self.num_source_experts} "
                f"experts, but {checkpoint} is {model_type} with {layers} layers of {experts}; make a plan for this "
                "checkpoint"
            )
        if self.numbers != (tuple(range(layers)) if numbers is None else numbers):
            raise PlanMismatchError(
                f"the plan is for layers {_shown(self.numbers)}, but the MoE layers of {checkpoint} are "
                f"{_shown(numbers or tuple(range(layers)))}; number them as the model does"
            )


@expects("a plan", PLAN)
def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file.

    Raises InvalidInputError for another format, an unknown version, or a layer without
    experts, or with one out of range or listed twice; OutputError where the file cannot be read.
    """
    where = printable_path(path)
    raw = read_small_file(path, limit=MAX_BYTES, what="a plan")
    root = parse_json(raw, where=where, allow_floats=True)
    if not isinstance(root, dict) or root.get("format") != PLAN_FORMAT:
        raise InvalidInputError(f'{where}: not a plan: expected a JSON object with "format": "{PLAN_FORMAT}"')
    return plan_from_dict(root, where)


def as_plan(plan: Plan | PathLike) -> Plan:
    """`plan`, read by `load_plan` where it is a path."""
    return load_if_path(plan, Plan, load_plan)


def plan_from_dict(root: Mapping[str, object], where: str) -> Plan:
    """The plan in a parsed JSON object; `where` names its file. Raises as `load_plan`."""
    if not is_integer(root.get("version"), VERSION):
        raise InvalidInputError(
            f"{where}: plan version {describe_value(root.get('version'))} is not supported (this reads "
            f"version {VERSION}); upgrade moe-surgery"
        )
    experts = positive(root.get("num_source_experts"), f"{where}: num_source_experts")
    layers = integer_rows(root.get("layers"), f"{where}: layers")
    if not is_integer(root.get("num_layers"), len(layers)):
        raise InvalidInputError(
            f"{where}: num_layers is {describe_value(root.get('num_layers'))}, but layers has {len(layers)}"
        )
    for number, kept in enumerate(layers):
        check_kept(kept, experts, f"{where}: layer {number}", InvalidInputError)
    top_k = root.get("top_k")
    model_type = optional_text(root.get("model_type"), f"{where}: model_type")
    if model_type is None:
        raise InvalidInputError(f"{where}: model_type is missing")
    provenance = root.get("provenance", {})
    mtp = root.get("mtp_layers")
    mtp_layers = None if mtp is None else () if mtp == [] else integer_rows(mtp, f"{where}: mtp_layers")
    for number, kept in enumerate(mtp_layers or ()):
        check_kept(kept, experts, f"{where}: mtp_layers {number}", InvalidInputError)
    return Plan(
        model_type,
        experts,
        tuple(layers),
        None if top_k is None else positive(top_k, f"{where}: top_k"),
        provenance if isinstance(provenance, dict) else {},
        {k: v for k, v in root.items() if k not in _KEYS},
        layer_numbers(root.get("layer_numbers"), len(layers), f"{where}: layer_numbers"),
        None if mtp_layers is None else tuple(mtp_layers),
    )


def _shown(numbers: Sequence[int]) -> str:
    """Numbers for a message: as a range where they are one, else the first few."""
    if len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")


def numbers_of(model: HasExperts) -> tuple[int, ...]:
    """The `layer_numbers` of a plan for `model`: empty where its MoE layers are 0, 1, ..."""
    numbers = tuple(getattr(model, "layer_numbers", ()))
    return () if numbers == tuple(range(len(numbers))) else numbers


def check_kept(
    kept: Sequence[int], experts: int, where: str, error: type[InvalidInputError] | type[UsageError]
) -> None:
    """Raise `error` unless `kept` names at least one expert, each once and below `experts`."""
    if not kept:
        raise error(f"{where} keeps no expert; at least one must be kept")
    if (largest := max(kept)) >= experts:
        raise error(f"{where} keeps expert {largest}, but experts are 0 to {experts - 1}")
    if len(set(kept)) != len(kept):
        twice = next(e for i, e in enumerate(kept) if e in kept[:i])
        raise error(f"{where} keeps expert {twice} twice")


def check_count(count: int, experts: int, parameter: str = "experts") -> None:
    """Raise UsageError unless 1 <= count <= experts."""
    if not 1 <= count <= experts:
        raise UsageError(f"`{parameter}` {count}: the model has {experts} experts; choose 1 to {experts}")


def check_top_k(top_k: int, experts: int, whose: str, parameter: str = "top_k") -> None:
    """Raise UsageError unless 1 <= top_k <= experts; `whose` says what has that many, as in "the plan keeps"."""
    if not 1 <= top_k <= experts:
        raise UsageError(
            f"`{parameter}` {top_k}: {whose} {experts} {'expert' if experts == 1 else 'experts'} in a layer; "
            f"choose 1 to {experts}"
        )


def plan_from_ranking(
    ranking: Ranking | PathLike,
    experts: int,
    *,
    model_type: str | None = None,
    order: str = "ascending",
    grouping: Grouping | None = None,
) -> Plan:
    """Keep the first `experts` of every layer of `ranking`, a `Ranking` or what `load_ranking` takes.

    With a `grouping`, those of each group, group after group.

    `model_type` is required if the ranking has none, and must agree if it has one. `order`:
    "ascending" (by source number) or "ranking" (best first, as in the published models).
    """
    from moe_surgery.selection.ranking import as_ranking

    ranking = as_ranking(ranking)
    check_count(experts, ranking.num_experts)
    if order not in ORDERS:
        raise UsageError(f"`order` {order}: choose one of {', '.join(ORDERS)}")
    if ranking.model_type and model_type and ranking.model_type != model_type:
        raise PlanMismatchError(f"the ranking is for {ranking.model_type}, not for {model_type}")
    source_type = ranking.model_type or model_type
    if source_type is None:
        raise UsageError("the ranking does not say which model it is for; pass `model_type`")
    best = [r[:experts] if grouping is None else grouping.best(r, experts) for r in ranking.layers]
    layers = tuple(tuple(sorted(r)) if order == "ascending" else r for r in best)
    return Plan(
        source_type,
        ranking.num_experts,
        layers,
        provenance={"method": "ranking", **ranking.provenance, "experts": experts, "order": order},
        layer_numbers=ranking.layer_numbers,
    )


def plan_keeping(kept: Sequence[int] | None, model: HasExperts) -> Plan:
    """Keep the same experts in every layer of `model`, in the order given (None: all of them).

    Raises UsageError for an expert out of range or named twice.
    """
    chosen = tuple(range(model.experts)) if kept is None else tuple(kept)
    check_kept(chosen, model.experts, "`kept`", UsageError)
    provenance = {"method": "keep", "experts": len(chosen), "kept": list(chosen)}
    return Plan(
        model.model_type,
        model.experts,
        (chosen,) * model.layers,
        provenance=provenance,
        layer_numbers=numbers_of(model),
    )


def plan_random(count: int, seed: int, model: HasExperts, *, grouping: Grouping | None = None) -> Plan:
    """Keep `count` experts in each layer of `model`, drawn without replacement, ascending.

    With a `grouping`, the same number of each group: of a random order the first ones of each.
    Layer i draws from numpy's PCG64 seeded with [seed, i], so each layer's draw is independent of the others.
    Raises UsageError for a count or seed out of range.
    """
    import numpy as np

    experts = model.experts
    check_count(count, experts)
    if seed < 0:
        raise UsageError(f"`seed` {seed}: must not be negative")
    generators = (np.random.Generator(np.random.PCG64([seed, layer])) for layer in range(model.layers))
    if grouping is None:
        drawn = [g.choice(experts, count, replace=False).tolist() for g in generators]
    else:
        drawn = [list(grouping.best(g.permutation(experts).tolist(), count)) for g in generators]
    return Plan(
        model.model_type,
        experts,
        tuple(tuple(sorted(int(e) for e in row)) for row in drawn),
        provenance={"method": "random", "experts": count, "seed": seed, "generator": "PCG64([seed, layer])"},
        layer_numbers=numbers_of(model),
    )
