"""The variants of a sweep: a ranking and a number of experts each, with the name of its folder."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import CheckpointWarning, PlanMismatchError, UsageError
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.selection.arguments import Named, PathLike, load_if_path
from moe_surgery.selection.plan import Plan, check_count, plan_from_ranking
from moe_surgery.selection.ranking import Ranking, load_ranking
from moe_surgery.selection.shipped import PREFIX, is_shipped
from moe_surgery.surgery.routing import check_routing, problem_of_count

__all__ = ["Variant", "named_rankings", "variants_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Variant:
    """The first `experts` of every layer of the ranking called `ranking`, in the folder `name`."""

    name: str
    ranking: str
    experts: int
    plan: Plan


def named_rankings(rankings: Named[Ranking]) -> list[tuple[str, Ranking]]:
    """The rankings with their names, for a path that of its file without the ending (`published:law`: law).

    Raises UsageError for a name that is taken or cannot begin the name of a folder, and as `load_ranking`.
    """
    named: dict[str, Ranking] = {}
    for item in rankings:
        name, ranking = item if isinstance(item, tuple) else (_stem(item), item)
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"`rankings` {printable(name)}: folders are named after the ranking, and this cannot be part of a "
                "name; give it another one: NAME=FILE"
            )
        if name in named:
            raise UsageError(f"`rankings` {name}: two rankings have this name; give one another: NAME=FILE")
        named[name] = load_if_path(ranking, Ranking, load_ranking)
    if not named:
        raise UsageError("no ranking; name at least one in `rankings`")
    return list(named.items())


def _stem(path: PathLike) -> str:
    if is_shipped(path):
        return str(path).removeprefix(PREFIX)
    return PurePath(path).name.removesuffix(".jsonl").removesuffix(".json")


def variants_of(
    model: ModelSpec,
    checkpoint: str,
    rankings: Sequence[tuple[str, Ranking]],
    experts: Sequence[int],
    *,
    order: str = "ascending",
    store: str = "keep",
) -> list[Variant]:
    """A variant for every ranking and every number of `experts`, ranking by ranking.

    Its name is RANKING-EXPERTS, with -STORE where weights are converted. Numbers that the router cannot choose from
    are left out with a CheckpointWarning. Raises UsageError for a number out of range, PlanMismatchError for a
    ranking of another model or where no number works; `checkpoint` names the model.
    """
    counts = list(dict.fromkeys(experts))
    if not counts:
        raise UsageError("`experts`: name at least one number of experts to keep")
    for count in counts:
        check_count(count, model.experts)
    kept = [n for n in counts if problem_of_count(model, n, min(n, model.top_k)) is None]
    if left_out := [n for n in counts if n not in kept]:
        problem = problem_of_count(model, left_out[0], min(left_out[0], model.top_k))
        numbers = ", ".join(map(str, left_out))
        if not kept:
            raise PlanMismatchError(f"`experts` {numbers}: {problem}")
        warnings.warn(f"leaving out {numbers} experts: {problem}", CheckpointWarning, stacklevel=2)
    ending = "" if store in ("keep", model.expert_format.name) else f"-{store}"
    variants = []
    for name, ranking in rankings:
        for count in kept:
            try:
                plan = _plan(model, checkpoint, ranking, count, order)
            except PlanMismatchError as error:
                raise PlanMismatchError(f"ranking {name}: {error}") from None
            variants.append(Variant(f"{name}-{count}{ending}", name, count, plan))
    return variants


def _plan(model: ModelSpec, checkpoint: str, ranking: Ranking, count: int, order: str) -> Plan:
    named = ranking.model_type
    plan = plan_from_ranking(
        ranking,
        count,
        model_type=named if named in model.model_types else model.model_type,
        order=order,
        grouping=model.grouping,
    )
    plan.check_fits(model.model_type, model.experts, model.layers, checkpoint, model.layer_numbers)
    check_routing(model, plan, min(model.top_k, count))
    return plan
