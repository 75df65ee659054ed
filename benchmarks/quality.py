"""Which experts to keep: every metric, ours and random plans on held-out texts of several domains.

    python benchmarks/quality.py --texts FOLDER [--checkpoint example:tiny]

FOLDER holds one .jsonl file of {"text": ...} lines a domain. Experts are chosen on the first half of
each domain's documents and measured on the second half, against the full model: mean KL divergence
(nats a token), cross-entropy and agreement of the likeliest token. "own" plans are chosen on the
domain they are measured on, "general" ones on the first halves of all domains together.
"""

from __future__ import annotations

import json
import statistics as summary
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from machine import describe_machine

from moe_surgery import inspect
from moe_surgery.quality.corpus import text_files
from moe_surgery.quality.evaluate import evaluate
from moe_surgery.quality.evaluation import ModelResult
from moe_surgery.quality.job import profile
from moe_surgery.quality.search import METHOD, search
from moe_surgery.selection.metrics import METRICS
from moe_surgery.selection.plan import Plan, plan_from_ranking, plan_random
from moe_surgery.selection.rank import rank
from moe_surgery.selection.ranking import Ranking

RESULTS = Path(__file__).parent / "results"
KEPT = (4, 8, 16, 24)
SEEDS = range(5)
METHODS = (*METRICS, METHOD)
Row = dict[str, object]


def halves(texts: Path, work: Path) -> dict[str, tuple[Path, Path]]:
    """Files with the first and the second half of each domain's documents."""
    found = {}
    for file in sorted(texts.glob("*.jsonl")):
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        places = work / "first" / file.name, work / "second" / file.name
        for place, part in zip(places, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
            place.parent.mkdir(exist_ok=True)
            place.write_text("\n".join(part) + "\n")
        found[file.stem] = places
    if not found:
        raise click.UsageError(f"--texts {texts}: holds no .jsonl files")
    return found


def rankings(
    checkpoint: str, files: dict[str, tuple[Path, Path]], work: Path
) -> tuple[dict[tuple[str, str], Ranking], dict[str, float]]:
    """Rankings by (domain or "general", method), and the seconds that profile and search took."""
    seconds = {}
    first = {domain: a for domain, (a, _) in files.items()}
    start = time.perf_counter()
    gathered = profile(checkpoint, text_files(list(first.values())), work / "stats").statistics
    seconds["profile, all domains"] = time.perf_counter() - start
    found = {}
    for scope in (*files, "general"):
        domains = None if scope == "general" else [scope]
        for metric in METRICS:
            found[scope, metric] = rank(gathered, metric, domains=domains)
        paths = list(first.values()) if scope == "general" else [first[scope]]
        start = time.perf_counter()
        found[scope, METHOD] = search(checkpoint, text_files(paths), work / f"{scope}.json")
        seconds[f"search, {scope}"] = time.perf_counter() - start
        click.echo(f"{scope}: ranked", err=True)
    return found, seconds


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
    found, seconds = rankings(checkpoint, files, work)
    rows: list[Row] = []
    for domain, (_, second) in files.items():
        start = time.perf_counter()
        done = evaluate(checkpoint, second, max_tokens=max_tokens, plans=plans_for(domain, found, checkpoint))
        seconds[f"evaluate, {domain}"] = time.perf_counter() - start
        rows.extend(row_of(domain, model) for model in done.models)
        click.echo(f"{domain}: evaluated", err=True)
    return {"domains": list(files), "rows": rows, "seconds": seconds}


def row_of(domain: str, model: ModelResult) -> Row:
    scope, method, kept = model.name.split("/") if "/" in model.name else ("full", "", str(model.experts[0]))
    quality = model.domains[domain]
    return {
        "domain": domain,
        "scope": scope,
        "method": method,
        "kept": int(kept),
        "tokens": quality.tokens,
        "cross_entropy": quality.cross_entropy,
        "kl": quality.kl,
        "agreement": quality.agreement,
        "redirected": summary.mean(quality.rerouted),
    }


def mean_of(rows: Sequence[Row], figure: str, **wanted: object) -> float:
    """Mean of a figure over the rows that have these values."""
    values = [r[figure] for r in rows if all(r[k] == v for k, v in wanted.items())]
    return summary.mean(float(str(v)) for v in values)


def table(rows: Sequence[Row], domains: Sequence[str], figure: str, kept: int, digits: int = 3) -> list[str]:
    lines = ["| chosen by | on | " + " | ".join([*domains, "mean"]) + " |", "|---" * (len(domains) + 3) + "|"]
    best = {
        d: min(mean_of(rows, "kl", domain=d, scope="own", method=m, kept=kept) for m in METHODS)
        for d in domains
    }

    def line(name: str, scope: str, **wanted: object) -> str:
        values = [mean_of(rows, figure, domain=d, scope=scope, kept=kept, **wanted) for d in domains]
        cells = [
            f"**{v:.{digits}f}**" if figure == "kl" and scope == "own" and v <= best[d] else f"{v:.{digits}f}"
            for d, v in zip(domains, values, strict=True)
        ]
        return f"| {name} | {scope} | " + " | ".join([*cells, f"{summary.mean(values):.{digits}f}"]) + " |"

    for scope in ("own", "general"):
        lines += [line(method, scope, method=method) for method in METHODS]
    return [*lines, line(f"mean of {len(SEEDS)} seeds", "random")]


def reading(rows: Sequence[Row], domains: Sequence[str]) -> list[str]:
    """What the figures say, counted over domains x sizes."""

    def kl(domain: str, kept: int, scope: str, method: str) -> float:
        return mean_of(rows, "kl", domain=domain, kept=kept, scope=scope, method=method)

    cells = [(d, k) for d in domains for k in KEPT]
    wins = {
        m: sum(kl(d, k, "own", m) == min(kl(d, k, "own", n) for n in METHODS) for d, k in cells)
        for m in METHODS
    }
    lines = [f"Of {len(cells)} pairs of domain and size (ties count for each):", ""]
    lines.append(
        "- least KL: " + ", ".join(f"{m} {n}" for m, n in sorted(wins.items(), key=lambda w: -w[1]) if n)
    )
    for method in (*METRICS, METHOD):
        own = sum(kl(d, k, "own", method) < kl(d, k, "general", method) for d, k in cells)
        drawn = [mean_of(rows, "kl", domain=d, kept=k, scope="random") for d, k in cells]
        chance = sum(kl(d, k, "own", method) < r for (d, k), r in zip(cells, drawn, strict=True))
        lines.append(f"- {method}: the domain's own plan beats the general one in {own}, random in {chance}")
    published = {
        k: min(METRICS, key=lambda m: summary.mean(kl(d, k, "own", m) for d in domains)) for k in KEPT
    }
    for kept, best in published.items():
        ours, theirs = (summary.mean(kl(d, kept, "own", m) for d in domains) for m in (METHOD, best))
        lines.append(
            f"- {kept} kept: {METHOD} {ours:.4f}, best metric {best} {theirs:.4f}, ratio {ours / theirs:.3f}"
        )
    return lines


def as_markdown(report: Row) -> str:
    rows, domains = report["rows"], report["domains"]
    assert isinstance(rows, list)
    assert isinstance(domains, list)
    lines = ["# Which experts to keep", "", str(report["how"]), ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]  # type: ignore[attr-defined]
    lines += ["", "![KL divergence against experts kept](quality.png)", ""]
    lines += ["## Mean KL divergence over the domains, own plans", ""]
    lines += ["| chosen by | " + " | ".join(map(str, KEPT)) + " |", "|---" * (len(KEPT) + 1) + "|"]
    for method in METHODS:
        values = [mean_of(rows, "kl", scope="own", method=method, kept=kept) for kept in KEPT]
        lines.append(f"| {method} | " + " | ".join(f"{v:.4f}" for v in values) + " |")
    values = [mean_of(rows, "kl", scope="random", kept=kept) for kept in KEPT]
    lines.append("| random | " + " | ".join(f"{v:.4f}" for v in values) + " |")
    lines += ["", *reading(rows, domains)]
    for kept in KEPT:
        lines += ["", f"## {kept} experts kept: KL divergence, nats a token", ""]
        lines += table(rows, domains, "kl", kept)
    lines += ["", "## Seconds", "", "| job | seconds |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in report["seconds"].items()]  # type: ignore[attr-defined]
    return "\n".join(lines) + "\n"


def draw(report: Row, file: Path) -> None:
    from matplotlib.figure import Figure

    rows, domains = report["rows"], report["domains"]
    assert isinstance(rows, list)
    assert isinstance(domains, list)
    figure = Figure(figsize=(3.2 * len(domains), 3.4), layout="constrained")
    styles = dict(zip(METHODS, ("o", "s", "^", "v", "D", "P", "X", "*"), strict=True))
    axes = figure.subplots(1, len(domains), sharey=True)
    for axis, domain in zip(axes, domains, strict=True):
        for method in METHODS:
            values = [mean_of(rows, "kl", domain=domain, scope="own", method=method, kept=k) for k in KEPT]
            mine = {"color": "black", "linewidth": 2.4} if method == METHOD else {"linewidth": 1.0}
            axis.plot(KEPT, values, marker=styles[method], label=method, **mine)
        draws = [
            [mean_of(rows, "kl", domain=domain, scope="random", method=str(s), kept=k) for k in KEPT]
            for s in SEEDS
        ]
        low, high = ([f(values) for values in zip(*draws, strict=True)] for f in (min, max))
        axis.fill_between(KEPT, low, high, alpha=0.25, color="grey", label="random, 5 seeds")
        axis.set(title=domain, xlabel="experts kept", yscale="log", xticks=KEPT)
    axes[0].set_ylabel("KL from the full model, nats a token")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(file, dpi=150)


@click.command(help=__doc__)
@click.option("--texts", type=click.Path(path_type=Path, exists=True))
@click.option("--checkpoint", default="example:tiny", show_default=True)
@click.option("--redraw", is_flag=True, help="Write table and plot again from the results that are there.")
@click.option("--max-tokens", default=4000, show_default=True, help="Most tokens of a domain to measure on.")
def main(texts: Path | None, checkpoint: str, max_tokens: int, redraw: bool) -> None:
    if redraw:
        report = json.loads((RESULTS / "quality.json").read_text())
        (RESULTS / "quality.md").write_text(as_markdown(report))
        draw(report, RESULTS / "quality.png")
        return
    if texts is None:
        raise click.UsageError("--texts FOLDER is missing")
    torch.set_num_threads(1)  # so small a model only loses by more
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "how": f"python benchmarks/quality.py on {checkpoint}: chosen on the first half of the documents, "
            f"measured on at most {max_tokens} tokens of the second; bold: the least of its column.",
            "date": time.strftime("%Y-%m-%d"),
            "machine": describe_machine(Path(folder)),
            **measure(checkpoint, texts, max_tokens, Path(folder)),
        }
    (RESULTS / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "quality.md").write_text(as_markdown(report))
    draw(report, RESULTS / "quality.png")
    click.echo(as_markdown(report))


if __name__ == "__main__":
    main()
