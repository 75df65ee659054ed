"""Which experts to keep by an importance matrix: its metrics beside those of `profile`, on held-out texts.

    python -m benchmarks.imatrix_quality [--checkpoint example:tiny]

For each of the embedded model's five domains and each seed of generated documents, experts are chosen on the first half
of the documents and measured on the second half, against the full model: mean KL divergence (nats per token).
The matrix is what llama-imatrix would sum up on the first half, taken from transformers' model by hooks
(`tests/support/imatrices.py`); the same texts go through `profile`.
"""

from __future__ import annotations

import json
import statistics as summary
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.publish import RESULTS, begin, heading, publish, table
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.examples.skills import DOMAINS, documents
from moe_surgery.quality.corpus import text_files
from moe_surgery.quality.evaluate import evaluate
from moe_surgery.quality.job import profile
from moe_surgery.runtime.text import Text
from moe_surgery.selection.imatrix.models import rank_imatrix
from moe_surgery.selection.plan import Plan, plan_from_ranking
from moe_surgery.selection.rank import rank
from moe_surgery.selection.ranking import Ranking
from tests.support.imatrices import measure, write_gguf_imatrix
from tests.support.routed import Routed

KEPT = (4, 8, 16, 24)
OF_MATRIX = ("energy", "rms_count", "frequency")
PROFILED = ("weighted_ean", "reap")
METHODS = (*OF_MATRIX, *PROFILED)
DOCUMENTS = 40
CONTEXT = 512
Row = dict[str, Any]


def write_halves(domain: str, seed: int, work: Path) -> tuple[Path, Path]:
    """Files with the first and the second half of a domain's documents."""
    texts = documents(domain, DOCUMENTS, seed)
    files = work / "first" / f"{domain}.jsonl", work / "second" / f"{domain}.jsonl"
    for file, part in zip(files, (texts[: DOCUMENTS // 2], texts[DOCUMENTS // 2 :]), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return files


def rankings(checkpoint: str, first: Path, routed: Routed, work: Path) -> dict[str, Ranking]:
    """A ranking by every method, all on the same tokens."""
    text = Text(checkpoint)
    tokens = [text.encode(json.loads(line)["text"]) for line in first.read_text().splitlines()]
    chunks = [row[i : i + CONTEXT] for row in tokens for i in range(0, len(row), CONTEXT)]
    matrix = write_gguf_imatrix(work / "imatrix.gguf", measure(routed, chunks))
    found = {metric: rank_imatrix(matrix, checkpoint, metric) for metric in OF_MATRIX}
    gathered = profile(checkpoint, text_files([first]), work / "stats", context=CONTEXT).statistics
    return found | {metric: rank(gathered, metric) for metric in PROFILED}


def measure_seed(checkpoint: str, seed: int, max_tokens: int, routed: Routed, work: Path) -> list[Row]:
    rows: list[Row] = []
    for domain in DOMAINS:
        folder = work / f"{seed}-{domain}"
        first, second = write_halves(domain, seed, folder)
        found = rankings(checkpoint, first, routed, folder)
        plans: list[tuple[str, Plan]] = [
            (f"{method}/{kept}", plan_from_ranking(found[method], kept))
            for method in METHODS
            for kept in KEPT
        ]
        models = evaluate(checkpoint, second, max_tokens=max_tokens, plans=plans).models
        kl = {model.name: model.overall.kl for model in models}
        for kept in KEPT:
            values = {method: kl[f"{method}/{kept}"] for method in METHODS}
            rows.append({"seed": seed, "domain": domain, "kept": kept, "kl": values})
        click.echo(f"seed {seed}, {domain}: measured", err=True)
    return rows


def values_of(rows: Sequence[Row], method: str, kept: int, domain: str | None = None) -> list[float]:
    """KL divergences of a method at a size: of all domains, or of one, over the seeds."""
    return [row["kl"][method] for row in rows if row["kept"] == kept and domain in (None, row["domain"])]


def page(report: Row) -> list[str]:
    rows, seeds = report["rows"], report["seeds"]
    lines = [*heading("Experts chosen by an importance matrix", report), ""]
    lines += [f"## Mean KL divergence over {len(DOMAINS)} domains and {len(seeds)} seeds, nats per token", ""]
    lines += table(
        ["chosen by", "from", *KEPT],
        [
            [m, _source(m), *(f"{summary.mean(values_of(rows, m, kept)):.4f}" for kept in KEPT)]
            for m in METHODS
        ],
    )
    cells = [row["kl"] for row in rows]
    lines += [
        "",
        f"Of {len(cells)} combinations of domain, size and seed, KL divergence (ties to 1e-6 aside):",
        "",
    ]
    for a, b in (("energy", "rms_count"), ("energy", "frequency"), ("rms_count", "frequency"), ("energy", "reap"),
                 ("energy", "weighted_ean")):  # fmt: skip
        less = sum(kl[a] < kl[b] - 1e-6 for kl in cells)
        more = sum(kl[a] > kl[b] + 1e-6 for kl in cells)
        lines.append(f"- {a} is below {b} in {less}, above it in {more}")
    for kept in KEPT:
        lines += ["", f"## {kept} of 32 kept, by domain: mean (least to largest of the seeds)", ""]
        lines += table(
            ["chosen by", *DOMAINS],
            [[m, *(_spread(values_of(rows, m, kept, domain)) for domain in DOMAINS)] for m in METHODS],
        )
    return [*lines, "", f"{report['seconds']:.0f} s in all, on a machine that did other work."]


def _source(method: str) -> str:
    return "matrix" if method in OF_MATRIX else "profile"


def _spread(values: Sequence[float]) -> str:
    return f"{summary.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


@click.command(help=__doc__)
@click.option("--checkpoint", default="example:tiny", show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Draws of documents.")
@click.option("--max-tokens", default=1000, show_default=True, help="Most tokens of a domain to measure on.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(checkpoint: str, seeds: int, max_tokens: int, out: Path) -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report: Row = begin(
            f"python -m benchmarks.imatrix_quality --seeds {seeds} --max-tokens {max_tokens} on {checkpoint}: chosen "
            f"on the first half of {DOCUMENTS} documents of a domain, measured on at most {max_tokens} tokens of the "
            "second half.",
            Path(folder),
        )
        routed = Routed(resolve(checkpoint))
        report["seeds"] = list(range(seeds))
        report["rows"] = [
            row
            for seed in report["seeds"]
            for row in measure_seed(checkpoint, seed, max_tokens, routed, Path(folder))
        ]
    report["seconds"] = time.perf_counter() - start
    publish("imatrix_quality", report, page(report), out)


if __name__ == "__main__":
    main()
