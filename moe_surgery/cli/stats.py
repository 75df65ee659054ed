"""moe-surgery stats: merge, show and import statistics files."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.cli.options import OUTPUT, check_new_output, common, computed_by, terminal_of
from moe_surgery.selection.importers.formats import FORMATS


@click.group("stats")
def command() -> None:
    """Show and merge the statistics files of `profile`, and import what other programs measured.

    \b
    moe-surgery stats show tiny.stats
    moe-surgery stats import imatrix.gguf --model model.gguf -o general.stats
    moe-surgery stats merge monday.stats tuesday.stats -o both.stats
    """


@command.command("merge")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OUTPUT, required=True, help="Write the statistics here.")
@common
@click.pass_context
def merge_command(context: click.Context, files: tuple[Path, ...], output: Path) -> None:
    """Merge statistics of one checkpoint from several runs; domains of the same name are added up.

    Refuses files that share texts, which would count twice, and files that differ in backend, kind of
    device or dtype. Files of earlier versions, which do not record these, match any.

    \b
    moe-surgery stats merge monday.stats tuesday.stats -o both.stats
    """
    from moe_surgery.selection.statistics import COMPUTATION, load_statistics, merge, save_statistics

    terminal = terminal_of(context)
    check_new_output(output, files)
    parts = [load_statistics(file) for file in files]
    merged = merge(parts, [str(file) for file in files])
    for file, part in zip(files, parts, strict=True):
        unknown = [key for key in COMPUTATION if part.settings.get(key) is None]
        if unknown and "source" not in part.settings:  # imported ones were not computed here
            terminal.say(
                f"note: {file} does not record its {' and '.join(unknown)} (earlier versions did not); assumed to be "
                "the same as the others'"
            )
    save_statistics(merged, output)
    if terminal.json:
        terminal.data({"output": str(output), "checkpoint": merged.identity, "tokens": merged.tokens})
        return
    for domain in merged.domains:
        terminal.result(f"{domain}: {merged.tokens[domain]:,} tokens of {len(merged.texts[domain])} texts")
    terminal.say(f"{output}: {len(files)} files merged")


@command.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@common
@click.pass_context
def show_command(context: click.Context, file: Path) -> None:
    """Show a statistics file: checkpoint, domains, texts, and the share of routing weight in the best experts (of
    routed tokens where the weights are not known).

    \b
    moe-surgery stats show tiny.stats
    """
    from moe_surgery.selection.coverage import coverage
    from moe_surgery.selection.metrics import metrics_from
    from moe_surgery.selection.statistics import load_statistics

    terminal = terminal_of(context)
    statistics = load_statistics(file)
    if terminal.json:
        terminal.data(
            {
                "checkpoint": statistics.identity,
                "model_type": statistics.model_type,
                "layers": statistics.layers,
                "experts": statistics.experts,
                "top_k": statistics.top_k,
                "tokens": statistics.tokens,
                "texts": statistics.texts,
                "settings": statistics.settings,
                "statistics": statistics.known,
                "metrics": metrics_from(statistics.known),
                "layer_numbers": statistics.layer_numbers or list(range(statistics.layers)),
            }
        )
        return
    terminal.result(
        f"{statistics.model_type or 'an unknown model'}, {statistics.layers} layers of {statistics.experts} experts, "
        f"top-{statistics.top_k}, checkpoint {statistics.identity or 'not known'}"
    )
    files = statistics.settings.get("files")
    if isinstance(files, list):
        terminal.result(
            f"imported from {', '.join(map(str, files))}; rank --metric {'|'.join(metrics_from(statistics.known))}"
        )
    else:
        terminal.result(computed_by(statistics.settings))
    counts = [n for n in (4, 8, 16, 24) if n < statistics.experts]
    rows = []
    of = "gate" if "gate" in statistics.known else "count"
    for domain in statistics.domains:
        shares = coverage(statistics.over([domain]), of=of)
        cells = [f"{shares[:, n - 1].mean():.0%} ({shares[:, n - 1].min():.0%})" for n in counts]
        rows.append([domain, f"{statistics.tokens[domain]:,}", str(len(statistics.texts[domain])), *cells])
    what = "routing weight" if of == "gate" else "routed tokens"
    terminal.table(
        f"share of {what} in the best n experts: mean over layers (worst layer)",
        ["domain", "tokens", "texts", *(f"n = {n}" for n in counts)],
        rows,
    )


@command.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--model", metavar="CKPT", help="The model that the counts are of: a checkpoint or a GGUF file; checked."
)
@click.option(
    "--file-format", type=click.Choice(FORMATS), help="What the files are; default: by content and name."
)
@click.option(
    "--domain",
    "domains",
    metavar="NAME",
    multiple=True,
    help="Domain of the texts: once for all files, which are added up, or once per file; default: the file's name.",
)
@click.option(
    "--model-top-k", type=int, metavar="N", help="Experts per token of the model, for counts without --model."
)
@click.option(
    "--chunk-size",
    type=int,
    default=512,
    show_default=True,
    help="Tokens in a chunk, for .dat files, which do not say (llama-imatrix -c).",
)
@click.option(
    "--energy/--no-energy",
    default=None,
    help="Read the expert weights of --model as well, which the metric energy needs; default: unless they are on the "
    "hub.",
)
@click.option("--allow-missing", is_flag=True, help="Accept layers without data: their counts are 0.")
@click.option("-o", "--output", type=OUTPUT, required=True, help="Write the statistics here.")
@common
@click.pass_context
def import_command(
    context: click.Context,
    files: tuple[Path, ...],
    model: str | None,
    file_format: str | None,
    domains: tuple[str, ...],
    model_top_k: int | None,
    chunk_size: int,
    energy: bool | None,
    allow_missing: bool,
    output: Path,
) -> None:
    """Make a statistics file from what another program measured.

    FILES are of one kind: importance matrices of llama.cpp (GGUF or .dat), recordings of SGLang's
    expert distribution recorder (.pt, mode stat), or counts of tokens by layer and expert as JSON, JSON lines, CSV or
    NPY. The result has what they support: `rank` offers frequency for counts, rms_count as well for
    importance matrices, and energy with --model. With --model the files are checked to be of that model; .dat
    files need it, because their counts must be solved for. docs/imatrix.md says how and which forms are read.

    \b
    moe-surgery stats import imatrix.gguf --model model.gguf -o general.stats
    moe-surgery stats import code.imatrix.gguf maths.imatrix.gguf --model openai/gpt-oss-20b -o both.stats
    moe-surgery stats import expert_distribution_recorder_1.pt --model openai/gpt-oss-20b -o served.stats
    moe-surgery stats import counts.csv --model-top-k 4 -o counts.stats
    """
    from moe_surgery.selection.importers.importing import import_statistics
    from moe_surgery.selection.metrics import metrics_from
    from moe_surgery.selection.statistics import save_statistics

    terminal = terminal_of(context)
    check_new_output(output, files)
    with terminal.job() as progress:
        statistics = import_statistics(
            list(files),
            model=model,
            file_format=file_format,
            domains=domains,
            model_top_k=model_top_k,
            chunk_size=chunk_size,
            energy=energy,
            allow_missing=allow_missing,
            progress=progress,
        )
    save_statistics(statistics, output)
    metrics = metrics_from(statistics.known)
    if terminal.json:
        terminal.data(
            {
                "output": str(output),
                "checkpoint": statistics.identity,
                "tokens": statistics.tokens,
                "metrics": metrics,
                "settings": statistics.settings,
            }
        )
        return
    for name, tokens in statistics.tokens.items():
        terminal.result(
            f"{name}: {tokens:,} tokens, {statistics.layers} layers of {statistics.experts} experts"
        )
    terminal.say(f"{output}: rank it by {', '.join(metrics)}")
