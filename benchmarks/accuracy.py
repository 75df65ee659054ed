"""How many questions of each domain the embedded model answers right, by experts kept and how they were chosen.

    python -m benchmarks.accuracy
    python -m benchmarks.accuracy --redraw

Experts are chosen on generated texts (`moe_surgery/examples/skills.py`), once for each domain (own; repaired: the
same experts, repaired on the same texts) and once on all texts (general), or at random; questions asked are held out
of training and of those texts, except facts, which every model met. Each of three seeds draws its own texts,
questions and random experts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch

from benchmarks.publish import RESULTS, begin, heading, load, publish, table
from moe_surgery import load_model, profile, repair
from moe_surgery.examples.skills import DOMAINS, documents, draw_questions
from moe_surgery.quality.exact_match import answer_line, exact_match
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.text import Text
from moe_surgery.runtime.view import view
from moe_surgery.selection.plan import Plan, plan_from_ranking, plan_random
from moe_surgery.selection.rank import rank

CHECKPOINT = "example:tiny"
METRIC = "weighted_ean"
SEEDS = (0, 1, 2)
KEPT = (4, 8, 16, 24, 32)
WAYS = ("own", "repaired", "general", "random")
REPAIR_STEPS = 60
DOCUMENTS, QUESTIONS = 20, 100
NAME = "accuracy"

Row = dict[str, Any]


def statistics_of(seed: int, work: Path) -> Any:
    """What the experts do with texts of every domain."""
    texts = {}
    for domain in DOMAINS:
        file = work / f"{domain}-{seed}.txt"
        file.write_text("\n".join(documents(domain, DOCUMENTS, seed=100 + seed)))
        texts[domain] = [file]
    return profile(CHECKPOINT, texts, work / f"{seed}.stats").statistics


def measure(work: Path) -> list[Row]:
    """A row for each number of experts and way to choose them: accuracies by domain and seed."""
    model, text = load_model(CHECKPOINT), Text(CHECKPOINT)
    rows: list[Row] = [
        {"kept": kept, "way": way, "accuracy": {domain: [] for domain in DOMAINS}}
        for kept in KEPT
        for way in WAYS
    ]
    for seed in SEEDS:
        statistics = statistics_of(seed, work)
        asked = {d: draw_questions(d, QUESTIONS, 100 + seed, held_out=True) for d in DOMAINS}
        for row in rows:
            for domain, questions in asked.items():
                plan = plan_for(row["way"], row["kept"], domain, statistics, seed)
                asked_model = view(model, plan)
                if row["way"] == "repaired" and row["kept"] < max(KEPT):
                    asked_model = repaired_model(plan, domain, seed, work)
                replies = answer_line(asked_model, text, [q.prompt for q in questions])
                row["accuracy"][domain].append(exact_match(replies, [q.answer for q in questions]))
        click.echo(f"seed {seed}: asked", err=True)
    return rows


def repaired_model(plan: Plan, domain: str, seed: int, work: Path) -> CausalLM:
    """The domain's own plan repaired on the texts that it was chosen on."""
    out = work / f"{domain}-{len(plan.layers[0])}-{seed}"
    texts = {domain: [work / f"{domain}-{seed}.txt"]}
    repair(CHECKPOINT, texts, out, plan=plan, context=256, norms=True, steps=REPAIR_STEPS, batch_tokens=512)
    return load_model(out)


def plan_for(way: str, kept: int, domain: str, statistics: Any, seed: int) -> Plan:
    if way == "random":
        return plan_random(kept, seed, statistics)
    return plan_from_ranking(rank(statistics, METRIC, domains=None if way == "general" else [domain]), kept)


def page(report: Mapping[str, Any]) -> list[str]:
    lines = [*heading("Questions answered right by experts kept", report), ""]
    lines += [f"![Accuracy against experts kept]({NAME}.png)", ""]
    lines += [f"Mean of {len(SEEDS)} seeds; least and most in brackets.", ""]
    rows = []
    for row in report["rows"]:
        cells = [f"{mean(v):.0%} ({min(v):.0%} to {max(v):.0%})" for v in row["accuracy"].values()]
        rows.append([row["kept"], row["way"], *cells])
    return [*lines, *table(["experts kept", "chosen", *DOMAINS], rows)]


def draw(report: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(DOMAINS), 3.0), layout="constrained")
    axes = figure.subplots(1, len(DOMAINS), sharey=True)
    styles = {
        "own": ("chosen for the domain", "#0072b2", "o", "-"),
        "repaired": ("chosen for the domain, repaired", "#009e73", "^", "-"),
        "general": ("chosen for all domains", "#e69f00", "s", "--"),
        "random": ("drawn at random", "#777777", "x", ":"),
    }
    for axis, domain in zip(axes, DOMAINS, strict=True):
        for way, (label, color, marker, line) in styles.items():
            values = [100 * mean(r["accuracy"][domain]) for r in report["rows"] if r["way"] == way]
            if values:
                axis.plot(KEPT, values, label=label, color=color, marker=marker, linestyle=line)
        axis.set(title=domain, xlabel="experts kept of 32", xticks=KEPT, ylim=(-4, 104))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("questions answered right, %")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=150)


@click.command(help=__doc__)
@click.option("--redraw", is_flag=True, help="Write table and plot again from the results that are there.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(redraw: bool, out: Path) -> None:
    if redraw:
        report = load(NAME, out)
        if report is None:
            raise click.ClickException(f"{out}: holds no {NAME}.json")
    else:
        torch.set_num_threads(1)  # more only slow down so small a model
        with tempfile.TemporaryDirectory() as folder:
            how = (
                f"python -m benchmarks.accuracy: {CHECKPOINT}, {QUESTIONS} questions of each domain, experts by "
                f"{METRIC} on {DOCUMENTS} generated texts a domain."
            )
            report = {**begin(how, Path(folder)), "rows": measure(Path(folder))}
    publish(NAME, report, page(report), out)
    draw(report, out / f"{NAME}.png")


if __name__ == "__main__":
    main()
