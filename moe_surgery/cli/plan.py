"""moe-surgery plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.keep import by_imatrix, first_of, imatrix_options, keep_options, keeping, random_of
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
    """How many experts to keep; exactly one field is set."""

    experts: int | None
    coverage: float | None
    coverage_over: str
    target_size: int | None
    target_params: int | None
    store: str


@click.command("plan")
@click.argument("source", metavar="[RANKING|STATS]", required=False)
@click.argument("ckpt", metavar="[CKPT]", required=False)
@ranked
@imatrix_options
@keep_options
@click.option(
    "--coverage",
    type=float,
    metavar="SHARE",
    help="Keep the fewest experts that account for this fraction (such as 0.95) of the routing weight; needs STATS.",
)
@click.option(
    "--coverage-over",
    type=click.Choice(["worst", "mean"]),
    default="worst",
    show_default=True,
    help="Reach --coverage in the worst layer, or on average.",
)
@click.option("--target-size", type=SIZE, help="Keep as many experts as fit this size, such as 6GB.")
@click.option(
    "--target-params", type=COUNT, help="Keep as many experts as fit this parameter count, such as 6.6B."
)
@click.option(
    "--store",
    type=click.Choice(EXPERT_DTYPES),
    default="keep",
    show_default=True,
    help="Format of expert weights in the output; used by --target-size.",
)
@click.option("--random", "at_random", is_flag=True, help="Choose experts at random, as a baseline.")
@click.option("--seed", type=int, help="Random seed; default: 0.")
@router_top_k
@click.option("--model-type", help="Model type to record (gpt_oss); for a ranking without one.")
@click.option("-o", "--output", type=OUTPUT, help="Write the plan here; default: stdout.")
@common
@click.pass_context
def command(
    context: click.Context,
    source: str | None,
    ckpt: str | None,
    metric: str | None,
    domains: tuple[str, ...],
    protect_super_experts: bool,
    imatrix: tuple[Path, ...],
    allow_missing: bool,
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
    model_type: str | None,
    order: str,
    output: Path | None,
) -> None:
    """Choose which experts each layer keeps.

    Experts come from a RANKING or from STATS, from --imatrix, from --keep, or from --random. RANKING is a file
    written by `rank` or `search`, one in the published form ({"layer_0": [31, 9, ...], ...} or
    {"0": [...], ...}, as one object or one per line), or published:NAME, a ranking published for gpt-oss-20b (all,
    health_or_medicine, instruction_following, law, math, safety, science, unsafety). STATS is a file
    written by `profile` or `stats import`, ranked here by --metric. Say how many with exactly one of --experts,
    --coverage, --target-size and --target-params.

    --imatrix ranks by importance matrices of llama.cpp, as they are published with GGUF models and written by
    llama-imatrix (docs/imatrix.md). --metric is then rms_count (the default), frequency, or energy, which reads the
    expert weights as well.

    CKPT is the model to plan for. --imatrix, --keep, --random and the --target options need it; a ranking is
    checked against it. The plan is a small JSON file for `prune`, `export`, `evaluate` and `generate`. Where a
    model's router chooses from groups of experts, each group keeps the same number of them: N becomes the
    nearest number that allows it, and the best of each group stay.

    \b
    moe-surgery plan published:law --experts 8 -o law-8.json
    moe-surgery plan tiny.stats --metric reap --domain code --coverage 0.95 -o code.json
    moe-surgery plan tiny.stats example:tiny --metric reap --target-size 5MB
    moe-surgery plan gpt-oss-20b --imatrix imatrix.gguf --experts 16 -o 16.json
    moe-surgery plan example:tiny --random --experts 8 --seed 1
    moe-surgery plan example:tiny --keep all --top-k 2
    """
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.pipeline.planning import make_plan

    terminal = terminal_of(context)
    if ckpt is None and (kept is not None or at_random or imatrix):
        source, ckpt = None, source  # without a ranking the one argument is CKPT
    ranking_file = None if source is None else Path(source)
    check_new_output(output, [ranking_file, *imatrix])
    amount = _Amount(experts, coverage, coverage_over, target_size, target_params, store)
    if source is not None and imatrix:
        raise UsageError(f"{source}: choose experts by --imatrix or by a RANKING or STATS, not by both")
    if source is not None and ckpt is None and source.startswith("example:"):
        raise UsageError(
            f"{source}: is a checkpoint; also choose experts by RANKING or STATS, --keep or --random"
        )
    if (ranking_file is not None) + bool(imatrix) + (kept is not None) + at_random != 1:
        raise UsageError(
            "choose experts with exactly one of RANKING or STATS, --imatrix, --keep and --random"
        )
    if allow_missing and not imatrix:
        raise UsageError("--allow-missing needs --imatrix")
    if coverage is None and coverage_over != "worst":
        raise UsageError("--coverage-over needs --coverage")
    if target_size is None and store != "keep":
        raise UsageError("--store needs --target-size")
    if ranking_file is None and not imatrix and order != "ascending":
        raise UsageError("--order needs a ranking")
    if seed is not None and not at_random:
        raise UsageError("--seed needs --random")
    if model_type is not None and (ranking_file is None or ckpt is not None):
        raise UsageError("--model-type is for a ranking without CKPT, which has its own")
    if imatrix:
        if domains or protect_super_experts:
            raise UsageError("--domain and --protect-super-experts need STATS")
        count, details = _count(amount, None, None, _needed(ckpt, "--imatrix"))
        with terminal.job() as progress:
            best = by_imatrix(imatrix, str(ckpt), count, order, metric, allow_missing, progress)
            plan = make_plan(str(ckpt), best)
        plan = replace(plan, provenance={**plan.provenance, **details})
    elif ranking_file is None:
        if metric is not None or domains or protect_super_experts:
            raise UsageError(
                "--metric needs STATS or --imatrix, --domain and --protect-super-experts need STATS"
            )
        plan = _fixed(kept, at_random, seed, amount, ckpt)
    else:
        ranking, statistics = _ranked(ranking_file, metric, domains, protect_super_experts, ckpt)
        plan = _first(ranking, statistics, amount, ckpt, model_type, order)
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
    kept: list[int] | str | None, at_random: bool, seed: int | None, amount: _Amount, ckpt: str | None
) -> Plan:
    """A plan that needs no ranking."""
    from moe_surgery.pipeline.planning import make_plan

    if kept is not None:
        if _given(amount):
            raise UsageError(f"--keep already sets how many experts stay; leave out {_given(amount)[0]}")
        return make_plan(_needed(ckpt, "--keep"), keeping(kept))
    assert at_random
    count, details = _count(amount, None, None, _needed(ckpt, "--random"))
    plan = make_plan(_needed(ckpt, "--random"), random_of(count, seed or 0))
    return replace(plan, provenance={**plan.provenance, **details})


def _ranked(
    source: Path,
    metric: str | None,
    domains: tuple[str, ...],
    protect_super_experts: bool,
    ckpt: str | None,
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
                f"{source}: is a ranking; --metric, --domain and --protect-super-experts need STATS"
            )
        return load_ranking(source), None
    from moe_surgery.pipeline.planning import check_statistics
    from moe_surgery.selection.metrics import metrics_from
    from moe_surgery.selection.rank import rank
    from moe_surgery.selection.statistics import load_statistics

    statistics = load_statistics(source)
    if metric is None:
        choices = "|".join(metrics_from(statistics.known))
        raise UsageError(f"{source}: is a statistics file; choose how to rank it: --metric {choices}")
    if ckpt is not None:
        check_statistics(ckpt, statistics)
    ranking = rank(statistics, metric, domains=domains or None, protect_super_experts=protect_super_experts)
    return ranking, statistics


def _first(
    ranking: Ranking,
    statistics: Statistics | None,
    amount: _Amount,
    ckpt: str | None,
    model_type: str | None,
    order: str,
) -> Plan:
    """Keep the best `amount` of a ranking."""
    from moe_surgery.pipeline.planning import make_plan
    from moe_surgery.selection.plan import plan_from_ranking

    count, details = _count(amount, ranking, statistics, ckpt)
    if ckpt is None:
        plan = plan_from_ranking(ranking, count, model_type=model_type, order=order)
    else:
        plan = make_plan(ckpt, first_of(ranking, count, order))
    return replace(plan, provenance={**plan.provenance, **details})


def _count(
    amount: _Amount, ranking: Ranking | None, statistics: Statistics | None, ckpt: str | None
) -> tuple[int, dict[str, object]]:
    """How many experts to keep, and how that was chosen, for the plan's provenance."""
    given = _given(amount)
    if len(given) != 1:
        raise UsageError(
            "choose how many experts stay with exactly one of --experts, --coverage, --target-size and "
            "--target-params"
        )
    if amount.experts is not None:
        return amount.experts, {}
    if amount.coverage is not None:
        if ranking is None or statistics is None:
            raise UsageError("--coverage needs STATS: a ranking does not record routing weights")
        from moe_surgery.selection.coverage import coverage, smallest_count

        domains = ranking.provenance["domains"]
        assert isinstance(domains, list)
        shares = coverage(statistics.over(domains), ranking.layers)
        count = smallest_count(shares, amount.coverage, amount.coverage_over)
        return count, {"coverage": amount.coverage, "coverage_over": amount.coverage_over}
    from moe_surgery.pipeline.planning import inspect

    inspected = inspect(_needed(ckpt, given[0]))
    stored = inspected.expert_format if amount.store == "keep" else format_by_name(amount.store)
    best = inspected.largest(amount.target_size, amount.target_params, stored)
    if amount.target_size is not None:
        return best, {"target_size": amount.target_size, "expert_storage": stored.name}
    return best, {"target_params": amount.target_params}


def _given(amount: _Amount) -> list[str]:
    options = {
        "--experts": amount.experts,
        "--coverage": amount.coverage,
        "--target-size": amount.target_size,
        "--target-params": amount.target_params,
    }
    return [name for name, value in options.items() if value is not None]


def _needed(ckpt: str | None, option: str) -> str:
    if ckpt is None:
        raise UsageError(f"{option} needs CKPT, for the sizes of layers and experts")
    return ckpt
