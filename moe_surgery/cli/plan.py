"""moe-surgery plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.keep import first_of, keep_options, keeping
from moe_surgery.cli.options import (
    COUNT,
    OUTPUT,
    SIZE,
    check_new_output,
    common,
    ranked,
    router_top_k,
    terminal_of,
)
from moe_surgery.errors import UsageError
from moe_surgery.formats.expert_format import EXPERT_DTYPES, format_by_name

if TYPE_CHECKING:
    from moe_surgery.selection.plan import Plan
    from moe_surgery.selection.ranking import Ranking
    from moe_surgery.selection.statistics import Statistics


@dataclass(frozen=True, slots=True)
class _Amount:
    """How many experts stay: exactly one of these is given."""

    experts: int | None
    coverage: float | None
    coverage_over: str
    target_size: int | None
    target_params: int | None
    store: str


@click.command("plan")
@click.argument("source", metavar="[RANKING|STATS]", required=False, type=click.Path(path_type=Path))
@ranked
@keep_options
@click.option(
    "--coverage",
    type=float,
    metavar="SHARE",
    help="Keep the fewest experts that carry this share of routing weight (0.95), by STATS.",
)
@click.option(
    "--coverage-over",
    type=click.Choice(["worst", "mean"]),
    default="worst",
    show_default=True,
    help="Reach --coverage in every layer, or on the mean of layers.",
)
@click.option("--target-size", type=SIZE, help="Keep the most experts whose weights take at most this: 6GB.")
@click.option(
    "--target-params", type=COUNT, help="Keep the most experts with at most this many weights: 6.6B."
)
@click.option(
    "--store",
    type=click.Choice(EXPERT_DTYPES),
    default="keep",
    show_default=True,
    help="How experts will be stored, for --target-size.",
)
@click.option("--random", "at_random", is_flag=True, help="Draw the experts, as a baseline to compare with.")
@click.option("--seed", type=int, help="Seed of --random; default 0.")
@router_top_k
@click.option("--checkpoint", metavar="CKPT", help="The checkpoint that the plan is for.")
@click.option("--model-type", help="The model type, where neither ranking nor checkpoint has it.")
@click.option("-o", "--output", type=OUTPUT, help="Write the plan here, not to stdout.")
@common
@click.pass_context
def command(
    context: click.Context,
    source: Path | None,
    metric: str | None,
    domains: tuple[str, ...],
    protect_super_experts: bool,
    experts: int | None,
    coverage: float | None,
    coverage_over: str,
    target_size: int | None,
    target_params: int | None,
    store: str,
    kept: list[int] | str | None,
    at_random: bool,
    seed: int | None,
    top_k: int | None,
    checkpoint: str | None,
    model_type: str | None,
    order: str,
    output: Path | None,
) -> None:
    """Choose which experts of each layer to keep.

    RANKING is a ranking file: ours, or layers by name ({"layer_0": [31, 9, ...], ...} or {"0": [...], ...},
    one object or one a line); or published:NAME, one of those published for gpt-oss-20b (all,
    health_or_medicine, instruction_following, law, math, safety, science, unsafety). STATS is what `profile`
    made, ranked here by --metric. Choose how many with exactly one of --experts, --coverage,
    --target-size and --target-params. The plan is a small JSON file for `prune --plan`, `evaluate --plan`
    and `generate --plan`.

    \b
    moe-surgery plan published:law --experts 8 -o law-8.json
    moe-surgery plan tiny.stats --metric reap --domain code --coverage 0.95 -o code.json
    moe-surgery plan tiny.stats --metric reap --target-size 5MB --checkpoint example:tiny
    moe-surgery plan --random --experts 8 --seed 1 --checkpoint example:tiny
    moe-surgery plan --keep all --top-k 2 --checkpoint example:tiny
    """
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file

    terminal = terminal_of(context)
    check_new_output(output, [source])
    amount = _Amount(experts, coverage, coverage_over, target_size, target_params, store)
    if (source is not None) + (kept is not None) + at_random != 1:
        raise UsageError("choose experts with exactly one of RANKING or STATS, --keep and --random")
    if coverage is None and coverage_over != "worst":
        raise UsageError("--coverage-over goes with --coverage")
    if target_size is None and store != "keep":
        raise UsageError("--store goes with --target-size")
    if source is None and order != "ascending":
        raise UsageError("--order goes with a ranking")
    if seed is not None and not at_random:
        raise UsageError("--seed goes with --random")
    if model_type is not None and (source is None or checkpoint is not None):
        raise UsageError("--model-type goes with a ranking and without --checkpoint, which has it")
    if source is None:
        if metric is not None or domains or protect_super_experts:
            raise UsageError("--metric, --domain and --protect-super-experts go with STATS")
        plan = _fixed(kept, at_random, seed, amount, checkpoint)
    else:
        ranking, statistics = _ranked(source, metric, domains, protect_super_experts, checkpoint)
        plan = _first(ranking, statistics, amount, checkpoint, model_type, order)
    plan = plan.with_top_k(top_k)
    text = plan.to_json()
    if output is None:
        click.echo(text, nl=False)
        return
    write_file(output, text.encode(), FileOps())
    if terminal.json:
        terminal.data({"output": str(output), **plan.as_dict()})
    terminal.say(
        f"{output}: keeps {plan.uniform_experts} of {plan.num_source_experts} experts in {plan.num_layers} layers"
        + (f", top-{plan.top_k}" if plan.top_k is not None else "")
    )


def _fixed(
    kept: list[int] | str | None, at_random: bool, seed: int | None, amount: _Amount, checkpoint: str | None
) -> Plan:
    """A plan that needs no ranking."""
    from moe_surgery.pipeline import make_plan
    from moe_surgery.selection.plan import plan_random

    if kept is not None:
        if _said(amount):
            raise UsageError(f"--keep already says how many experts stay; leave out {_said(amount)[0]}")
        return make_plan(_needed(checkpoint, "--keep"), keeping(kept))
    assert at_random
    count, told = _count(amount, None, None, _needed(checkpoint, "--random"))
    plan = make_plan(_needed(checkpoint, "--random"), lambda model: plan_random(count, seed or 0, model))
    return replace(plan, provenance={**plan.provenance, **told})


def _ranked(
    source: Path,
    metric: str | None,
    domains: tuple[str, ...],
    protect_super_experts: bool,
    checkpoint: str | None,
) -> tuple[Ranking, Statistics | None]:
    from moe_surgery.checkpoint.files import is_safetensors
    from moe_surgery.checkpoint.kinds import RANKING, STATISTICS, check_kind
    from moe_surgery.selection.ranking import load_ranking
    from moe_surgery.selection.shipped import is_shipped

    if not is_shipped(source):
        check_kind(source, "a ranking or a statistics file", RANKING, STATISTICS)
    if is_shipped(source) or not is_safetensors(source):
        if metric is not None or domains or protect_super_experts:
            raise UsageError(
                f"{source}: is a ranking; --metric, --domain and --protect-super-experts go with STATS"
            )
        return load_ranking(source), None
    from moe_surgery.pipeline import check_statistics
    from moe_surgery.selection.metrics import METRICS
    from moe_surgery.selection.rank import rank
    from moe_surgery.selection.statistics import load_statistics

    if metric is None:
        raise UsageError(f"{source}: are statistics; choose how to rank them: --metric {'|'.join(METRICS)}")
    statistics = load_statistics(source)
    if checkpoint is not None:
        check_statistics(checkpoint, statistics)
    ranking = rank(statistics, metric, domains=domains or None, protect_super_experts=protect_super_experts)
    return ranking, statistics


def _first(
    ranking: Ranking,
    statistics: Statistics | None,
    amount: _Amount,
    checkpoint: str | None,
    model_type: str | None,
    order: str,
) -> Plan:
    """The first experts of a ranking, as many as `amount` says."""
    from moe_surgery.pipeline import make_plan
    from moe_surgery.selection.plan import plan_from_ranking

    count, told = _count(amount, ranking, statistics, checkpoint)
    if checkpoint is None:
        plan = plan_from_ranking(ranking, count, model_type=model_type, order=order)
    else:
        plan = make_plan(checkpoint, first_of(ranking, count, order))
    return replace(plan, provenance={**plan.provenance, **told})


def _count(
    amount: _Amount, ranking: Ranking | None, statistics: Statistics | None, checkpoint: str | None
) -> tuple[int, dict[str, object]]:
    """How many experts stay, and what the plan's provenance should say of it."""
    said = _said(amount)
    if len(said) != 1:
        raise UsageError(
            "choose how many experts stay with exactly one of --experts, --coverage, --target-size and "
            "--target-params"
        )
    if amount.experts is not None:
        return amount.experts, {}
    if amount.coverage is not None:
        if ranking is None or statistics is None:
            raise UsageError("--coverage needs STATS: a ranking does not have how much each expert carries")
        from moe_surgery.selection.coverage import coverage, smallest_count

        domains = ranking.provenance["domains"]
        assert isinstance(domains, list)
        shares = coverage(statistics.over(domains), ranking.layers)
        count = smallest_count(shares, amount.coverage, amount.coverage_over)
        return count, {"coverage": amount.coverage, "coverage_over": amount.coverage_over}
    from moe_surgery.pipeline import inspect

    found = inspect(_needed(checkpoint, said[0]))
    stored = found.expert_format if amount.store == "keep" else format_by_name(amount.store)
    best = found.largest(amount.target_size, amount.target_params, stored)
    if amount.target_size is not None:
        return best, {"target_size": amount.target_size, "expert_storage": stored.name}
    return best, {"target_params": amount.target_params}


def _said(amount: _Amount) -> list[str]:
    options = {
        "--experts": amount.experts,
        "--coverage": amount.coverage,
        "--target-size": amount.target_size,
        "--target-params": amount.target_params,
    }
    return [name for name, value in options.items() if value is not None]


def _needed(checkpoint: str | None, option: str) -> str:
    if checkpoint is None:
        raise UsageError(f"{option} needs --checkpoint CKPT, to know the model's layers and experts")
    return checkpoint
