"""moe-surgery plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import EXPERT_LIST, check_new_output, common, terminal_of
from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from moe_surgery.selection.plan import Plan


@click.command("plan")
@click.argument("ranking", required=False, type=click.Path(path_type=Path))
@click.option("--experts", "-n", type=int, help="How many experts each layer keeps.")
@click.option("--keep", type=EXPERT_LIST, help="Keep these experts in every layer, in this order: 0,3,8-11.")
@click.option("--random", "at_random", is_flag=True, help="Draw the experts, as a baseline to compare with.")
@click.option("--seed", type=int, help="Seed of --random; default 0.")
@click.option("--checkpoint", metavar="CKPT", help="The checkpoint that the plan is for.")
@click.option("--model-type", help="The model type, where neither ranking nor checkpoint says it.")
@click.option(
    "--order",
    type=click.Choice(["ascending", "ranking"]),
    default="ascending",
    show_default=True,
    help="Order of the kept experts: by number, or best first as the published pruned models have them.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan here, not to stdout.")
@common
@click.pass_context
def command(
    context: click.Context,
    ranking: Path | None,
    experts: int | None,
    keep: list[int] | str | None,
    at_random: bool,
    seed: int | None,
    checkpoint: str | None,
    model_type: str | None,
    order: str,
    output: Path | None,
) -> None:
    """Decide which experts of each layer stay.

    RANKING is a ranking file: ours, or a published one ({"layer_0": [31, 9, ...], ...}). The plan
    is a small JSON file for `prune --plan`.

    \b
    moe-surgery plan law.json --experts 8 --model-type gpt_oss -o law-8.json
    moe-surgery plan --keep 0,3,7 --checkpoint example:tiny
    moe-surgery plan --random --experts 8 --seed 1 --checkpoint example:tiny
    """
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file

    terminal = terminal_of(context)
    check_new_output(output, [ranking])
    plan = _plan(ranking, experts, keep, at_random, seed, checkpoint, model_type, order)
    text = plan.to_json()
    if output is None:
        click.echo(text, nl=False)
        return
    write_file(output, text.encode(), FileOps())
    if terminal.json:
        terminal.data({"output": str(output), **plan.as_dict()})
    terminal.say(
        f"{output}: keeps {plan.uniform_experts} of {plan.num_source_experts} experts in {plan.num_layers} layers"
    )


def _plan(
    ranking: Path | None,
    experts: int | None,
    keep: list[int] | str | None,
    at_random: bool,
    seed: int | None,
    checkpoint: str | None,
    model_type: str | None,
    order: str,
) -> Plan:
    from moe_surgery.pipeline import make_plan
    from moe_surgery.selection.plan import plan_from_ranking, plan_keeping, plan_random
    from moe_surgery.selection.ranking import load_ranking

    if (ranking is not None) + (keep is not None) + at_random != 1:
        raise UsageError("say what to keep by exactly one of RANKING, --keep and --random")
    if ranking is None and order != "ascending":
        raise UsageError("--order goes with a ranking")
    if seed is not None and not at_random:
        raise UsageError("--seed goes with --random")
    if model_type is not None and (ranking is None or checkpoint is not None):
        raise UsageError("--model-type goes with a ranking and without --checkpoint, which says it")
    if keep is not None:
        if experts is not None:
            raise UsageError("--keep already says how many experts stay; leave out --experts")
        kept = None if isinstance(keep, str) else keep
        return make_plan(_needed(checkpoint, "--keep"), lambda model: plan_keeping(kept, model))
    if experts is None:
        raise UsageError("--experts N is missing: how many experts each layer keeps")
    if at_random:
        return make_plan(
            _needed(checkpoint, "--random"), lambda model: plan_random(experts, seed or 0, model)
        )
    assert ranking is not None
    loaded = load_ranking(ranking)
    if checkpoint is None:
        return plan_from_ranking(loaded, experts, model_type=model_type, order=order)
    return make_plan(
        checkpoint, lambda m: plan_from_ranking(loaded, experts, model_type=m.model_type, order=order)
    )


def _needed(checkpoint: str | None, option: str) -> str:
    if checkpoint is None:
        raise UsageError(f"{option} needs --checkpoint CKPT, to know the model's layers and experts")
    return checkpoint
