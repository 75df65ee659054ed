"""Options for which experts to keep, and the plans they make; shared by `plan` and `prune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moe_surgery.cli.options import EXPERT_LIST

if TYPE_CHECKING:
    from moe_surgery.families.model_spec import ModelSpec
    from moe_surgery.progress import OnProgress
    from moe_surgery.selection.plan import Plan
    from moe_surgery.selection.ranking import Ranking

__all__ = [
    "by_imatrix",
    "first_of",
    "imatrix_options",
    "keep_options",
    "keeping",
    "order_option",
    "random_of",
]

Command = TypeVar("Command", bound=Callable[..., Any])


def keep_options(command: Command) -> Command:
    """--experts, --keep and --order."""
    for option in (
        order_option,
        click.option(
            "--keep",
            "kept",
            type=EXPERT_LIST,
            help="Keep these experts in every layer, in this order: 0,3,8-11 or all.",
        ),
        click.option(
            "--experts", "-n", type=int, metavar="N", help="Number of experts to keep in each layer."
        ),
    ):
        command = option(command)
    return command


def order_option(command: Command) -> Command:
    """--order, for commands that keep the best of a ranking."""
    return click.option(
        "--order",
        type=click.Choice(["ascending", "ranking"]),
        default="ascending",
        show_default=True,
        help="Order of the kept experts: by number, or best first as in the published pruned models.",
    )(command)


def imatrix_options(command: Command) -> Command:
    """--imatrix and --allow-missing."""
    for option in (
        click.option(
            "--allow-missing",
            is_flag=True,
            help="Accept layers without data: experts 0 to N-1 of layers that are not in --imatrix are kept.",
        ),
        click.option(
            "--imatrix",
            metavar="FILE",
            type=click.Path(path_type=Path),
            multiple=True,
            help="Rank experts by this importance matrix of llama.cpp (GGUF or .dat); repeat to add several up.",
        ),
    ):
        command = option(command)
    return command


def keeping(kept: list[int] | str) -> Callable[[ModelSpec], Plan]:
    """The plan of --keep: the same experts in every layer."""
    from moe_surgery.selection.plan import plan_keeping

    return lambda model: plan_keeping(None if isinstance(kept, str) else kept, model)


def first_of(ranking: Ranking, experts: int, order: str) -> Callable[[ModelSpec], Plan]:
    """The first `experts` of each layer of a ranking, or the nearest number that the model's router allows."""
    from moe_surgery.selection.plan import plan_from_ranking
    from moe_surgery.surgery.routing import offered_count

    def plan(model: ModelSpec) -> Plan:
        named = ranking.model_type
        return plan_from_ranking(
            ranking,
            offered_count(model, experts),
            model_type=named if named in model.model_types else model.model_type,
            order=order,
            grouping=model.grouping,
        )

    return plan


def random_of(experts: int, seed: int) -> Callable[[ModelSpec], Plan]:
    """Random experts of each layer: `experts`, or the nearest number that the model's router allows."""
    from moe_surgery.selection.plan import plan_random
    from moe_surgery.surgery.routing import offered_count

    return lambda model: plan_random(offered_count(model, experts), seed, model, grouping=model.grouping)


def by_imatrix(
    files: Sequence[Path],
    ckpt: str,
    experts: int,
    order: str,
    metric: str | None = None,
    allow_missing: bool = False,
    progress: OnProgress | None = None,
) -> Callable[[ModelSpec], Plan]:
    """The best `experts` of each layer by the importance matrix of `files`, as `first_of`."""
    from moe_surgery.selection.imatrix.models import rank_imatrix

    def choose(model: ModelSpec) -> Plan:
        ranking = rank_imatrix(list(files), ckpt, metric, allow_missing=allow_missing, progress=progress)
        return first_of(ranking, experts, order)(model)

    return choose
