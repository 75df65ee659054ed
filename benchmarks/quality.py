"""Which experts to keep: every metric, ours and random plans on held-out texts of several domains.

    python -m benchmarks.quality [--texts FOLDER] [--checkpoint example:tiny]

FOLDER holds one .jsonl file of {"text": ...} lines a domain; without it texts of the embedded model's domains are
generated. Experts are chosen on the first half of
each domain's documents and measured on the second half, against the full model: mean KL divergence
(nats a token). "own" plans are chosen on the
domain they are measured on, "general" ones on the first halves of all domains together.
"""

from __future__ import annotations

import statistics as summary
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.publish import RESULTS, begin, heading, load, publish, table
from benchmarks.skill_texts import write_texts
from moe_surgery import inspect
from moe_surgery.quality.corpus import text_files
from moe_surgery.quality.evaluate import evaluate
from moe_surgery.quality.evaluation import ModelResult
from moe_surgery.quality.job import profile
from moe_surgery.quality.search import METHOD, search
from moe_surgery.selection.metrics import PROFILED_METRICS
from moe_surgery.selection.plan import Plan, plan_from_ranking, plan_random
from moe_surgery.selection.rank import rank
from moe_surgery.selection.ranking import Ranking

KEPT = (4, 8, 16, 24)
SEEDS = range(5)
METHODS = (*PROFILED_METRICS, METHOD)
Row = dict[str, Any]


def halves(texts: Path, work: Path) -> dict[str, tuple[Path, Path]]:
    """Files with the first and the second half of each domain's documents."""
    result = {}
    for file in sorted(texts.glob("*.jsonl")):
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        places = work / "first" / file.name, work / "second" / file.name
        for place, part in zip(places, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
            place.parent.mkdir(exist_ok=True)
            place.write_text("\n".join(part) + "\n")
        result[file.stem] = places
    if not result:
        raise click.UsageError(f"--texts {texts}: holds no .jsonl files")
    return result


def rankings(
    checkpoint: str, files: dict[str, tuple[Path, Path]], work: Path
) -> tuple[dict[tuple[str, str], Ranking], dict[str, float]]:
    """Rankings by (domain or "general", method), and the seconds that profile and search took."""
    seconds = {}
    first = {domain: a for domain, (a, _) in files.items()}
    start = time.perf_counter()
    gathered = profile(checkpoint, text_files(list(first.values())), work / "stats").statistics
    seconds["profile, all domains"] = time.perf_counter() - start
    result = {}
    for scope in (*files, "general"):
        domains = None if scope == "general" else [scope]
        for metric in PROFILED_METRICS:
            result[scope, metric] = rank(gathered, metric, domains=domains)
        paths = list(first.values()) if scope == "general" else [first[scope]]
        start = time.perf_counter()
        result[scope, METHOD] = search(checkpoint, text_files(paths), work / f"{scope}.json")
        seconds[f"search, {scope}"] = time.perf_counter() - start
        click.echo(f"{scope}: ranked", err=True)
    return result, seconds


def plans_for(domain: str, found: dict[tuple[str, str], Ranking], checkpoint: str) -> list[tuple[str, Plan]]:
    """All plans to try on a domain, named scope/method/kept."""
    model = inspect(checkpoint)
    plans = [
        (f"{scope}/{method}/{kept}", plan_from_ranking(found[place, method], kept))
        for scope, place in (("own", domain), ("general", "general"))
        for method in METHODS
        for kept in KEPT
    ]
    return plans + [
        (f"random/{seed}/{kept}", plan_random(kept, seed, model)) for seed in SEEDS for kept in KEPT
    ]


def measure(checkpoint: str, texts: Path, max_tokens: int, work: Path) -> Row:
    files = halves(texts, work)
    result, seconds = rankings(checkpoint, files, work)
    rows: list[Row] = []
    for domain, (_, second) in files.items():
        start = time.perf_counter()
        done = evaluate(
            checkpoint, second, max_tokens=max_tokens, plans=plans_for(domain, result, checkpoint)
        )
        seconds[f"evaluate, {domain}"] = time.perf_counter() - start
        rows += rows_of(domain, done.models)
        click.echo(f"{domain}: evaluated", err=True)
    return {"domains": list(files), "rows": rows, "seconds": seconds}


def rows_of(domain: str, models: Sequence[ModelResult]) -> list[Row]:
    """A row per size: the KL divergence by method of own and general plans, and of random ones over the seeds."""
    kl = {model.name: model.domains[domain].kl for model in models}
    rows: list[Row] = []
    for kept in KEPT:
        drawn = [kl[f"random/{seed}/{kept}"] for seed in SEEDS]
        row: Row = {"kept": kept, "domain": domain}
        for scope in ("own", "general"):
            row[scope] = {method: kl[f"{scope}/{method}/{kept}"] for method in METHODS}
        row["random"] = {"mean": summary.mean(drawn), "least": min(drawn), "most": max(drawn)}
        rows.append(row)
    return rows


class Figures:
    """KL divergences (nats a token) of a report."""

    def __init__(self, rows: Sequence[Row], domains: Sequence[str]) -> None:
        self._rows = {(row["domain"], row["kept"]): row for row in rows}
        self.domains = domains

    def kl(self, domain: str, kept: int, scope: str, method: str) -> float:
        return float(self._rows[domain, kept][scope][method])

    def over_domains(self, kept: int, scope: str, method: str) -> list[float]:
        return [self.kl(domain, kept, scope, method) for domain in self.domains]

    def mean(self, kept: int, scope: str, method: str) -> float:
        return summary.mean(self.over_domains(kept, scope, method))

    def least(self, domain: str, kept: int) -> float:
        return min(self.kl(domain, kept, "own", method) for method in METHODS)


def rows_for(figures: Figures, kept: int) -> list[list[str]]:
    """The table of one size; the least of each domain among own plans is bold."""
    rows = []
    for scope in ("own", "general"):
        for method in METHODS:
            cells = []
            for domain in figures.domains:
                value = figures.kl(domain, kept, scope, method)
                best = scope == "own" and value <= figures.least(domain, kept)
                cells.append(f"**{value:.3f}**" if best else f"{value:.3f}")
            rows.append([method, scope, *cells, f"{figures.mean(kept, scope, method):.3f}"])
    drawn = [*figures.over_domains(kept, "random", "mean"), figures.mean(kept, "random", "mean")]
    return [*rows, [f"mean of {len(SEEDS)} seeds", "random", *(f"{value:.3f}" for value in drawn)]]


def reading(figures: Figures) -> list[str]:
    """What the figures say, counted over domains x sizes."""
    cells = [(d, k) for d in figures.domains for k in KEPT]
    wins = {m: sum(figures.kl(d, k, "own", m) == figures.least(d, k) for d, k in cells) for m in METHODS}
    lines = [f"Of {len(cells)} pairs of domain and size (ties count for each):", ""]
    lines.append(
        "- least KL: " + ", ".join(f"{m} {n}" for m, n in sorted(wins.items(), key=lambda w: -w[1]) if n)
    )
    for method in METHODS:
        own = sum(figures.kl(d, k, "own", method) < figures.kl(d, k, "general", method) for d, k in cells)
        chance = sum(figures.kl(d, k, "own", method) < figures.kl(d, k, "random", "mean") for d, k in cells)
        lines.append(f"- {method}: the domain's own plan beats the general one in {own}, random in {chance}")
    for kept in KEPT:
        means = {method: figures.mean(kept, "own", method) for method in METHODS}
        best, ours = min(PROFILED_METRICS, key=lambda metric: means[metric]), means[METHOD]
        lines.append(
            f"- {kept} kept: {METHOD} {ours:.4f}, best metric {best} {means[best]:.4f}, "
            f"ratio {ours / means[best]:.3f}"
        )
    return lines


def page(report: Row) -> list[str]:
    figures = Figures(report["rows"], report["domains"])
    lines = [*heading("Which experts to keep", report), ""]
    lines += ["![KL divergence against experts kept](quality.png)", ""]
    lines += ["## Mean KL divergence over the domains, own plans", ""]
    chosen = [*((method, "own", method) for method in METHODS), ("random", "random", "mean")]
    rows = [
        [name, *(f"{figures.mean(kept, scope, key):.4f}" for kept in KEPT)] for name, scope, key in chosen
    ]
    lines += [*table(["chosen by", *KEPT], rows), "", *reading(figures)]
    for kept in KEPT:
        lines += ["", f"## {kept} experts kept: KL divergence, nats a token", ""]
        lines += table(["chosen by", "on", *figures.domains, "mean"], rows_for(figures, kept))
    seconds = [(name, f"{value:.1f}") for name, value in report["seconds"].items()]
    return [*lines, "", "## Seconds", "", *table(("job", "seconds"), seconds)]


def draw(report: Row, file: Path) -> None:
    from matplotlib.figure import Figure

    figures = Figures(report["rows"], report["domains"])
    figure = Figure(figsize=(3.2 * len(figures.domains), 3.4), layout="constrained")
    styles = dict(zip(METHODS, ("o", "s", "^", "v", "D", "P", "X", "*"), strict=True))
    axes = figure.subplots(1, len(figures.domains), sharey=True, squeeze=False)[0]
    for axis, domain in zip(axes, figures.domains, strict=True):
        for method in METHODS:
            values = [figures.kl(domain, kept, "own", method) for kept in KEPT]
            line = {"color": "black", "linewidth": 2.4} if method == METHOD else {"linewidth": 1.0}
            axis.plot(KEPT, values, marker=styles[method], label=method, **line)
        low, high = ([figures.kl(domain, kept, "random", key) for kept in KEPT] for key in ("least", "most"))
        axis.fill_between(KEPT, low, high, alpha=0.25, color="grey", label=f"random, {len(SEEDS)} seeds")
        axis.set(title=domain, xlabel="experts kept", yscale="log", xticks=KEPT)
    axes[0].set_ylabel("KL from the full model, nats a token")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(file, dpi=150)


@click.command(help=__doc__)
@click.option("--texts", type=click.Path(path_type=Path, exists=True))
@click.option("--checkpoint", default="example:tiny", show_default=True)
@click.option("--redraw", is_flag=True, help="Write table and plot again from the results that are there.")
@click.option("--max-tokens", default=4000, show_default=True, help="Most tokens of a domain to measure on.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(texts: Path | None, checkpoint: str, max_tokens: int, redraw: bool, out: Path) -> None:
    if redraw:
        report = load("quality", out)
        if report is None:
            raise click.ClickException(f"{out}: holds no quality.json")
        publish("quality", report, page(report), out)
        draw(report, out / "quality.png")
        return
    torch.set_num_threads(1)  # so small a model only loses by more
    with tempfile.TemporaryDirectory() as folder:
        report = {
            **begin(
                f"python -m benchmarks.quality on {checkpoint}: chosen on the first half of the documents, "
                f"measured on at most {max_tokens} tokens of the second; bold: the least of its column.",
                Path(folder),
            ),
            **measure(checkpoint, texts or write_texts(Path(folder) / "texts"), max_tokens, Path(folder)),
        }
    publish("quality", report, page(report), out)
    draw(report, out / "quality.png")


if __name__ == "__main__":
    main()
