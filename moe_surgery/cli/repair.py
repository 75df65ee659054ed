"""moe-surgery repair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import OUTPUT, Compute, common, compute_options, needs_torch, terminal_of
from moe_surgery.cli.text_options import TextArguments, text_options

if TYPE_CHECKING:
    from moe_surgery.cli.terminal import Terminal
    from moe_surgery.repairing import RepairResult


@click.command("repair")
@click.argument("ckpt")
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Plan file; its experts are kept; repeat for more, of which the best after the first step is repaired.",
)
@click.option(
    "--source",
    metavar="CKPT",
    help="Checkpoint that this one was pruned from; its experts are kept as they are in CKPT, instead of --plan.",
)
@text_options
@click.option("--answers-only", is_flag=True, help="Count only the answers of conversations.")
@click.option(
    "--measure",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Text file of another domain, to measure before and after; not trained on; repeat for more.",
)
@click.option("--norms", is_flag=True, help="Repair norm weights as well.")
@click.option("--train-steps", "steps", type=int, help="Training steps; default: 100.")
@click.option(
    "--learning-rate", type=float, help="Learning rate, relative to a tensor's values; default: 0.01."
)
@click.option("--batch-tokens", type=int, help="Tokens per batch; default: 1024.")
@click.option(
    "--held-out", type=float, help="Share of each domain's texts that is not trained on; default: 0.2."
)
@click.option("--seed", type=int, help="Random seed; default: 0.")
@click.option("-o", "--output", type=OUTPUT, required=True, help="Write the repaired checkpoint here.")
@click.option(
    "--overwrite", is_flag=True, help="Replace existing output; only a checkpoint that moe-surgery wrote."
)
@compute_options
@common
@click.pass_context
def command(
    click_context: click.Context,
    ckpt: str,
    plan: tuple[Path, ...],
    source: str | None,
    texts: TextArguments,
    answers_only: bool,
    measure: tuple[Path, ...],
    norms: bool,
    steps: int | None,
    learning_rate: float | None,
    batch_tokens: int | None,
    held_out: float | None,
    seed: int | None,
    output: Path,
    overwrite: bool,
    compute: Compute,
) -> None:
    """Prune, then repair what that broke.

    Writes the checkpoint that prune writes, with small tensors changed so that its predictions follow the
    full model's on your texts: routers, biases of the experts and, with --norms, norm weights. Weights of
    experts and attention stay byte for byte, the format and the size too. A share of the texts is not
    trained on; it decides when to stop, and whether the repair helps at all. Supports gpt-oss only so far.

    CKPT is the full checkpoint, with --plan, or one that is already pruned, with --source.

    \b
    moe-surgery repair tiny-8 --source example:tiny --texts notes.txt --train-steps 10 -o tiny-8-repaired
    moe-surgery repair openai/gpt-oss-20b --plan law-8.json --texts law.jsonl --max-tokens 50000 -o law-8
    moe-surgery repair law-8/ --source openai/gpt-oss-20b --texts law.jsonl --measure code.jsonl -o law-8-repaired

    Stop it at any time; the same command resumes. verify --source still compares every other tensor with
    the full checkpoint.
    """
    needs_torch("repair")
    from moe_surgery.quality.corpus import text_files
    from moe_surgery.repairing import repair

    terminal = terminal_of(click_context)
    given = {
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_tokens": batch_tokens,
        "held_out": held_out,
        "seed": seed,
    }
    terminal.after_interrupt = "; the same command resumes"
    with terminal.job() as progress:
        result = repair(
            ckpt,
            texts.files(),
            output,
            plan=plan or None,
            source=source,
            measure=text_files(measure, format=texts.format) if measure else (),
            norms=norms,
            answers_only=answers_only,
            overwrite=overwrite,
            progress=progress,
            **texts.limits,
            **compute.arguments(),
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
    if terminal.json:
        terminal.data(_as_dict(result))
        return
    _print(terminal, result)


def _as_dict(result: RepairResult) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "output": str(result.out),
        "repaired": result.repaired,
        "tensors": result.tensors,
        "held_out": {domain: asdict(gain) for domain, gain in result.held_out.items()},
        "measured": {domain: asdict(gain) for domain, gain in result.measured.items()},
        "steps": result.steps,
        "kl": result.kl,
    }


def _print(terminal: Terminal, result: RepairResult) -> None:
    rows = [
        [domain, texts, f"{gain.tokens:,}", f"{gain.before:.4g}", f"{gain.after:.4g}", gain.percent]
        for texts, gains in (("held out", result.held_out), ("measured", result.measured))
        for domain, gain in gains.items()
    ]
    terminal.table(
        "KL divergence from the full model, nats per token",
        ["domain", "texts", "tokens", "before", "after", "change"],
        rows,
    )
    for note in result.pruned.notes:
        terminal.note(note)
    if result.repaired:
        terminal.result(f"{result.out}: {len(result.tensors)} tensors repaired in {result.steps} steps")
    else:
        terminal.result(f"{result.out}: pruned, not repaired")
