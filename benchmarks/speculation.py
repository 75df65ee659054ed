"""Speculative decoding on held-out texts, every way a pruned draft can be had: exactness and acceptance.

    python -m benchmarks.speculation [--texts FOLDER] [--checkpoint example:tiny] [--work FOLDER] [--only facts]

FOLDER holds <domain>.jsonl files with a line {"text": ...} each; without it texts of the embedded model's domains
are generated. The last 20 texts of a domain give its
prompts (the first 32 tokens; nothing of them is kept), the others its ranking (sum of router weights).
Greedy, float32, batches of a domain's 20 prompts whose sequences accept different numbers.

Product: drafts that keep 1, 4, 8, 16 and 31 experts by the domain's own ranking, as pruned checkpoints and
as views, top-k 1, 2 and 4, lengths 1 to 8. Beside it, at top-k 4 and length 4, random plans of the same
sizes and a draft that keeps all. Results go to benchmarks/results/; with --only those of other domains
that are there already stay, so that domains can be run one by one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch

from benchmarks.publish import RESULTS, begin, heading, load, publish, table
from benchmarks.skill_texts import write_texts
from moe_surgery import Plan, load_model, prune
from moe_surgery.quality.corpus import Passage, open_corpus, text_files
from moe_surgery.quality.profile import profile_passages
from moe_surgery.quality.prompts import prompts_of
from moe_surgery.runtime.generate import generate
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.speculation.speculate import speculate
from moe_surgery.runtime.speculation.statistics import SpeculationStatistics
from moe_surgery.runtime.text import Text
from moe_surgery.runtime.view import view
from moe_surgery.selection.metrics import order, score
from moe_surgery.selection.plan import plan_random

EXPERTS = (1, 4, 8, 16, 31)
TOP_KS = (1, 2, 4)
LENGTHS = tuple(range(1, 9))
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 32, 20
RANKING_TOKENS = 256
METRIC = "gate"

Prompts = list[list[int]]


class Domain:
    """One domain's prompts, what the target says to them, and its own order of experts by layer."""

    def __init__(self, name: str, target: CausalLM, prompts: Prompts, ranked: list[tuple[int, ...]]) -> None:
        self.name, self.prompts, self._ranked = name, prompts, ranked
        self.plain = generate(target, prompts, max_new_tokens=NEW_TOKENS, stop_tokens=()).tokens

    def plan(self, experts: int) -> Plan:
        kept = tuple(tuple(sorted(layer[:experts])) for layer in self._ranked)
        return Plan("gpt_oss", len(self._ranked[0]), kept)

    def run(self, target: CausalLM, draft: CausalLM, length: int) -> tuple[SpeculationStatistics, int]:
        """What speculation did, and how many of the prompts went on other than plainly."""
        result = speculate(
            target, draft, self.prompts, draft_length=length, max_new_tokens=NEW_TOKENS, stop_tokens=()
        )
        wrong = sum(a != b for a, b in zip(result.tokens, self.plain, strict=True))
        return result.statistics, wrong


def make_domains(target: CausalLM, checkpoint: str, texts: Path, only: tuple[str, ...]) -> list[Domain]:
    """Domains with prompts from their last texts and rankings from the others."""
    result = []
    for file in text_files(sorted(texts.glob("*.jsonl")), format="jsonl"):
        if only and file.domain not in only:
            continue
        corpus, name = open_corpus([file], Text(checkpoint), context=RANKING_TOKENS), file.domain
        several = [d.text for d in corpus.documents() if d.text is not None]
        first = [tuple(corpus.tokenizer.encode(t)[:RANKING_TOKENS]) for t in several[:-PROMPTS]]
        statistics = profile_passages(target, [Passage(name, tokens) for tokens in first])[name]
        prompts = prompts_of(corpus, PROMPT_TOKENS)[name][-PROMPTS:]
        result.append(Domain(name, target, prompts, [order(s) for s in score(METRIC, statistics)]))
        click.echo(f"{name}: {len(prompts)} prompts, ranked by {len(first)} texts")
    return result


def drafts(
    target: CausalLM, checkpoint: str, domain: Domain, work: Path
) -> Iterator[tuple[str, int, CausalLM]]:
    """(kind, experts, draft) for every draft of the product, with the model's own top-k."""
    for experts in EXPERTS:
        plan = domain.plan(experts)
        out = work / f"{domain.name}-{experts}"
        prune(checkpoint, out, plan)
        yield "checkpoint", experts, load_model(out, dtype=target.dtype)
        yield "view", experts, view(target, plan)


def product(target: CausalLM, checkpoint: str, domain: Domain, work: Path) -> Iterator[dict[str, Any]]:
    """A row for every draft, top-k and length."""
    for kind, experts, whole in drafts(target, checkpoint, domain, work):
        for top_k in TOP_KS:
            draft = view(whole, None, top_k)
            for length in LENGTHS:
                row = {"plan": "own", "kind": kind, "experts": experts, "top_k": top_k, "length": length}
                yield {**row, **measured(target, draft, domain, length)}


def beside(target: CausalLM, domain: Domain, seeds: int = 3) -> Iterator[dict[str, Any]]:
    """Random plans of the same sizes, and the model as its own draft."""
    layers, experts = target.config.num_hidden_layers, target.config.num_local_experts
    shape = type("Shape", (), {"model_type": "gpt_oss", "experts": experts, "layers": layers})()
    for count in (*EXPERTS, experts):
        for seed in range(seeds if count < experts else 1):
            plan = plan_random(count, seed, shape)
            name = "random" if count < experts else "all"
            row = {"plan": name, "kind": "view", "experts": count, "top_k": 4, "length": 4, "seed": seed}
            yield {**row, **measured(target, view(target, plan), domain, 4)}


def measured(target: CausalLM, draft: CausalLM, domain: Domain, length: int) -> dict[str, Any]:
    s, wrong = domain.run(target, draft, length)
    return {
        "domain": domain.name,
        "prompts": len(domain.prompts),
        "differing_prompts": wrong,
        "tried": sum(s.tried),
        "accepted": sum(s.accepted),
        "tokens_per_target_step": s.tokens_per_target_step,
    }


def summary(domain: str, runs: list[dict]) -> tuple[dict, list[dict]]:
    """A domain's runs as outputs that differ from plain decoding, and a row for each number of experts kept.

    A row holds [accepted, tried] tokens of own plans by top-k and of random plans, at length 4, and the tokens
    a target step by length, at top-k 4; all of views (of checkpoints they are the same).
    """
    views = [r for r in runs if r["kind"] == "view"]

    def accepted(**chosen: object) -> list[int]:
        actual = [r for r in views if all(r[k] == v for k, v in {"length": 4, **chosen}.items())]
        return [sum(r[key] for r in actual) for key in ("accepted", "tried")]

    rows: list[dict] = []
    for experts in EXPERTS:
        by_length = [r for r in views if (r["plan"], r["experts"], r["top_k"]) == ("own", experts, 4)]
        rows.append(
            {
                "domain": domain,
                "experts": experts,
                "own": {str(k): accepted(plan="own", experts=experts, top_k=k) for k in TOP_KS},
                "random": accepted(plan="random", experts=experts),
                "tokens_per_target_step": [r["tokens_per_target_step"] for r in by_length],
            }
        )
    rows.append({"domain": domain, "experts": "all", "own": {"4": accepted(plan="all")}})
    exactness = {
        "domain": domain,
        "runs": len(runs),
        "prompts": max(r["prompts"] for r in runs),
        "outputs": sum(r["prompts"] for r in runs),
        "differing": sum(r["differing_prompts"] for r in runs),
    }
    return exactness, rows


def rate(*pairs: list[int]) -> float | None:
    """Acceptance over several [accepted, tried]; each weighs by its tried tokens."""
    accepted, tried = (sum(numbers) for numbers in zip(*pairs, strict=True))
    return accepted / tried if tried else None


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def page(report: dict) -> list[str]:
    total = {
        key: sum(e[key] for e in report["exactness"]) for key in ("runs", "prompts", "outputs", "differing")
    }
    domains = sorted(e["domain"] for e in report["exactness"])
    rows = {(row["domain"], row["experts"]): row for row in report["rows"]}
    lines = [
        *heading("Speculative decoding on held-out texts", report),
        "",
        f"Exactness: {total['differing']} of {total['outputs']} outputs differ from plain greedy decoding "
        f"({total['runs']} runs, {total['prompts']} prompts, {NEW_TOKENS} new tokens each).",
        "",
        "## Acceptance by experts kept (top-k 4, length 4): the domain's own ranking / a random plan",
        "",
    ]
    acceptance = [
        [
            n,
            *(
                f"{cell(rate(r['own']['4']))} / {cell(rate(r['random']))}"
                for r in (rows[d, n] for d in domains)
            ),
        ]
        for n in EXPERTS
    ]
    acceptance.append([32, *(cell(rate(rows[d, "all"]["own"]["4"])) for d in domains)])
    lines += table(["experts", *domains], acceptance)
    lines += ["", "## Acceptance by the draft's top-k (own ranking, length 4, all domains)", ""]
    by_top_k = [
        [n, *(cell(rate(*(rows[d, n]["own"][str(k)] for d in domains))) for k in TOP_KS)] for n in EXPERTS
    ]
    lines += table(["experts", *(f"top-k {k}" for k in TOP_KS)], by_top_k)
    lines += ["", "## Tokens a target step by draft length (own ranking, top-k 4, mean of domains)", ""]
    by_length = [
        [n, *map(cell, map(mean, zip(*(rows[d, n]["tokens_per_target_step"] for d in domains), strict=True)))]
        for n in EXPERTS
    ]
    return [*lines, *table(["experts", *LENGTHS], by_length)]


def plot(report: dict, file: Path) -> None:
    """Acceptance against experts kept, a panel for each domain, own ranking and random plans."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {(row["domain"], row["experts"]): row for row in report["rows"]}
    domains = sorted(e["domain"] for e in report["exactness"])
    figure, panels = pyplot.subplots(
        1, len(domains), figsize=(3 * len(domains), 3), sharey=True, squeeze=False
    )
    for panel, domain in zip(panels[0], domains, strict=True):
        own = [rate(rows[domain, n]["own"]["4"]) for n in EXPERTS]
        panel.plot(EXPERTS, own, "o-", label="own plan")
        panel.plot(EXPERTS, [rate(rows[domain, n]["random"]) for n in EXPERTS], "s--", label="random plan")
        panel.set(title=domain, xlabel="experts kept", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("acceptance")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


@click.command(help=__doc__)
@click.option("--texts", type=click.Path(path_type=Path, exists=True))
@click.option("--checkpoint", default="example:tiny", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="For pruned drafts; default: temporary.")
@click.option("--only", multiple=True, help="This domain only; repeat for more.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(texts: Path | None, checkpoint: str, work: Path | None, only: tuple[str, ...], out: Path) -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    target = load_model(checkpoint, dtype=torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    report = begin(
        f"python -m benchmarks.speculation: greedy, float32, {target.backend.name} backend, one thread, "
        "domains in runs of their own, "
        f"{PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new ones. Own plans: experts with the greatest sum of "
        "router weights on the domain's other texts. Acceptance is of tokens whose predecessors in the draft "
        "were accepted; random plans are pooled over three seeds.",
        out,
    )
    report["checkpoint"] = checkpoint
    before = (load("speculation", out) if only else None) or {}
    for part in ("exactness", "rows"):
        report[part] = [row for row in before.get(part, ()) if row["domain"] not in only]
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        source = texts or write_texts(Path(temporary) / "texts")
        for domain in make_domains(target, checkpoint, source, only):
            runs = [*beside(target, domain), *product(target, checkpoint, domain, folder)]
            exactness, rows = summary(domain.name, runs)
            report["exactness"].append(exactness)
            report["rows"] += rows
            seconds = time.perf_counter() - start
            click.echo(f"{domain.name}: {len(runs)} runs, {seconds:.0f} s since the start")
            publish("speculation", report, page(report), out)
            plot(report, out / "speculation.png")


if __name__ == "__main__":
    main()
