"""What `repair` gains: KL divergence before and after, on its own domain and on the others.

    python -m benchmarks.repair [--seeds 0,1,2] [--kept 4,8,16,24] [--resume]
    python -m benchmarks.repair --checkpoint FOLDER --texts FOLDER

Each seed draws documents of every domain; experts are chosen by `search` and repaired on the first ones of a domain,
and measured on the last, of which neither saw anything, and on documents of the other domains. Results are
published after each domain; with --resume those that are there stay.

The documents of the bundled model are generated. Those of another checkpoint come from a .jsonl file of
{"text": ...} lines for each domain, split differently by each seed. The previously bundled model,
trained on five domains of real text, lies in the history of the repository, where its folder begins with 61b541f and
ends before 93e00fe: git archive REVISION moe_surgery/examples/tiny-gpt-oss | tar x
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch

from benchmarks.publish import RESULTS, begin, heading, load, publish, table
from moe_surgery import load_model, load_ranking, plan_from_ranking, repair, search, speculate, view
from moe_surgery.examples.skills import DOMAINS, documents
from moe_surgery.quality.repair.job import Gain
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.sampling import Sampling
from moe_surgery.runtime.text import Text
from moe_surgery.selection.ranking import Ranking

CHECKPOINT = "example:tiny"
FIRST, SECOND, OTHERS = 30, 12, 2
"""Documents of a domain to choose and repair on, to measure on, and of each other domain to measure on. The first
are fewer where a domain has fewer."""
SEARCH_TOKENS = 2500
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 20
BATCH_TOKENS = 512
CONTEXT = 256
"""Longest passage of real texts, in tokens; the generated documents are shorter."""
ACCEPTED = {"acceptance": "greedy", "sampled": "sampled"}

Row = dict[str, Any]


def write_jsonl(file: Path, texts: Sequence[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def domains(texts: Path | None) -> list[str]:
    """Names of the domains: of the generated documents, or of the files in `texts`."""
    if texts is None:
        return list(DOMAINS)
    if names := sorted(file.stem for file in texts.glob("*.jsonl")):
        return names
    raise click.UsageError(f"--texts {texts}: holds no .jsonl files")


def draw(texts: Path | None, domain: str, seed: int) -> list[str]:
    """At most FIRST + SECOND documents of a domain in the order of a seed."""
    if texts is None:
        return documents(domain, FIRST + SECOND, seed=200 + seed)
    lines = (texts / f"{domain}.jsonl").read_text().splitlines()
    drawn = [json.loads(line)["text"] for line in lines if line.strip()]
    if len(drawn) <= SECOND:
        raise click.UsageError(f"--texts {texts}: {domain}.jsonl needs more than {SECOND} documents")
    random.Random(f"{domain} {seed}").shuffle(drawn)
    return drawn[: FIRST + SECOND]


class Texts:
    """The documents of one seed as files: `first` and `second` part of each domain, and `few` of the second."""

    def __init__(self, checkpoint: str, texts: Path | None, seed: int, folder: Path) -> None:
        self.checkpoint = checkpoint
        self.first: dict[str, Path] = {}
        self.second: dict[str, Path] = {}
        self.few: dict[str, Path] = {}
        for domain in domains(texts):
            drawn = draw(texts, domain, seed)
            first, second = drawn[:-SECOND], drawn[-SECOND:]
            for part, kept in ((self.first, first), (self.second, second), (self.few, second[:OTHERS])):
                file = folder / f"{domain}-{seed}-{len(kept)}.jsonl"
                part[domain] = write_jsonl(file, kept)
        self.full, self.text = load_model(checkpoint), Text(checkpoint)
        self._rankings: dict[str, Ranking] = {}
        self._folder = folder

    def ranking(self, domain: str) -> Ranking:
        if domain not in self._rankings:
            file = self._folder / f"{self.first[domain].stem}.ranking.json"
            search(self.checkpoint, self.first[domain], file, max_tokens=SEARCH_TOKENS)
            self._rankings[domain] = load_ranking(file)
        return self._rankings[domain]


def measure(seed: int, kept: int, domain: str, texts: Texts, folder: Path, options: Mapping[str, Any]) -> Row:
    """KL divergences before and after: `own` on the second half of the domain, `others` the mean of the others."""
    others: dict[str, list[Path]] = {name: [few] for name, few in texts.few.items() if name != domain}
    plan = plan_from_ranking(texts.ranking(domain), kept)
    measured: Any = {domain: [texts.second[domain]], **others}
    start = time.perf_counter()
    result = repair(
        texts.checkpoint,
        {domain: [texts.first[domain]]},
        folder / f"{domain}-{kept}-{seed}",
        plan=plan,
        measure=measured,
        seed=seed,
        **options,
    )
    seconds = time.perf_counter() - start
    elsewhere = [result.measured[name] for name in others]
    drafts = [view(texts.full, plan), load_model(result.out)]
    row: Row = {
        "kept": kept,
        "domain": domain,
        "seed": seed,
        "repaired": result.repaired,
        "steps": result.steps,
        "own": pair(result.measured[domain], result.repaired),
        "acceptance": [acceptance(texts, draft, domain, Sampling()) for draft in drafts],
        "sampled": [acceptance(texts, draft, domain, Sampling(1.0, seed=seed)) for draft in drafts],
        "others": [mean(v) for v in zip(*(pair(g, result.repaired) for g in elsewhere), strict=True)],
    }
    click.echo(f"{kept} {domain} {seed}: own {row['own']}, others {row['others']}, {seconds:.0f} s", err=True)
    return row


def acceptance(texts: Texts, draft: CausalLM, domain: str, sampling: Sampling) -> float:
    """The share of drafted tokens that the full model accepts, for prompts from the second half."""
    lines = texts.second[domain].read_text().splitlines()[:PROMPTS]
    prompts = [texts.text.encode(json.loads(line)["text"])[:PROMPT_TOKENS] for line in lines]
    result = speculate(
        texts.full,
        draft,
        prompts,
        draft_length=4,
        sampling=sampling,
        max_new_tokens=NEW_TOKENS,
        stop_tokens=(),
    )
    return result.statistics.acceptance or 0.0


def pair(gain: Gain, repaired: bool) -> list[float]:
    """Before and after; what was tried and not kept changes nothing."""
    return [gain.before, gain.after if repaired else gain.before]


def figure(kl: float) -> str:
    """With three digits; what float32 rounds away as 0."""
    return f"{kl:.3g}" if kl > 1e-6 else "0"


def gain_of(rows: Sequence[Row], where: str = "own") -> str:
    """The change of the mean divergence in percent."""
    before, after = (mean(row[where][i] for row in rows) for i in (0, 1))
    return f"{100 * (after / before - 1):+.0f} %" if before > 1e-6 else "0 %"


def page(report: Mapping[str, Any]) -> list[str]:
    rows: list[Row] = report["rows"]
    lines = [*heading("What repair gains", report), ""]
    lines += [
        "KL divergence from the full model, nats per token, on texts that neither `search` nor `repair` saw; means "
        "over seeds. Accepted: the share of tokens that the full model accepts from the pruned one as its draft "
        f"(4 drafted tokens, {PROMPTS} prompts of {PROMPT_TOKENS} tokens), greedily or sampled at temperature 1.",
        "",
        "## Mean over the domains",
        "",
    ]
    accepted = [how for how in ACCEPTED if how in rows[0]]
    summary = []
    for kept in sorted({row["kept"] for row in rows}):
        mine = [row for row in rows if row["kept"] == kept]
        before, after = (mean(row["own"][i] for row in mine) for i in (0, 1))
        there, then = (mean(row["others"][i] for row in mine) for i in (0, 1))
        worse = sum(row["own"][1] > row["own"][0] for row in mine)
        counts = f"{sum(row['repaired'] for row in mine)} of {len(mine)}"
        shown = [figure(before), figure(after), gain_of(mine), counts, worse, f"{there:.3f}", f"{then:.3f}"]
        shares = [f"{mean(row[how][i] for row in mine):.1%}" for how in accepted for i in (0, 1)]
        summary.append([kept, *shown, gain_of(mine, "others"), *shares])
    columns = ["experts kept", "search", "repaired", "change", "repaired in", "worse in"]
    others = ["others before", "after", "change"]
    titles = [title for how in accepted for title in (f"accepted, {ACCEPTED[how]}", "repaired")]
    lines += table([*columns, *others, *titles], summary)
    for kept in sorted({row["kept"] for row in rows}):
        lines += ["", f"## {kept} experts kept", ""]
        cells = []
        for domain in dict.fromkeys(row["domain"] for row in rows):
            mine = [row for row in rows if (row["kept"], row["domain"]) == (kept, domain)]
            if not mine:
                continue
            before, after = (mean(row["own"][i] for row in mine) for i in (0, 1))
            each = ", ".join(f"{figure(row['own'][0])} to {figure(row['own'][1])}" for row in mine)
            there, then = (mean(row["others"][i] for row in mine) for i in (0, 1))
            cells.append([domain, figure(before), figure(after), gain_of(mine), each])
            cells[-1] += [f"{there:.3f}", f"{then:.3f}"]
        lines += table(
            ["domain", "search", "repaired", "change", "each seed", "others before", "others after"], cells
        )
    return lines


@click.command(help=__doc__)
@click.option("--checkpoint", default=CHECKPOINT, show_default=True)
@click.option(
    "--texts", type=click.Path(path_type=Path, exists=True), help="Folder with a .jsonl file a domain."
)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--kept", default="8,16,4,24", show_default=True)
@click.option("--norms/--no-norms", default=True, show_default=True)
@click.option("--steps", default=60, show_default=True)
@click.option("--resume", is_flag=True, help="Keep the results that are there, and measure what is missing.")
@click.option("--redraw", is_flag=True, help="Write the page again from the results that are there.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    checkpoint: str,
    texts: Path | None,
    seeds: str,
    kept: str,
    norms: bool,
    steps: int,
    resume: bool,
    redraw: bool,
    out: Path,
) -> None:
    if (texts is None) != (checkpoint == CHECKPOINT):
        raise click.UsageError("--checkpoint and --texts belong together")
    name = "repair" if texts is None else "repair_real_texts"
    earlier = load(name, out) if resume or redraw else None
    if redraw:
        if earlier is None:
            raise click.ClickException(f"{out}: holds no {name}.json")
        publish(name, earlier, page(earlier), out)
        return
    torch.set_num_threads(1)  # more only slow down so small a model
    options: dict[str, Any] = {"norms": norms, "steps": steps, "batch_tokens": BATCH_TOKENS}
    flags = f"--train-steps {steps} --batch-tokens {BATCH_TOKENS}" + (" --norms" if norms else "")
    if texts is not None:
        options["context"] = CONTEXT
        flags += f" --context {CONTEXT}"
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        how = (
            f"python -m benchmarks.repair: {CHECKPOINT}, {FIRST} generated documents of a domain to choose by "
            if texts is None
            else "python -m benchmarks.repair --checkpoint FOLDER --texts FOLDER: the model that was bundled "
            "before the present one, held-out documents of the five kinds of text that it was trained on, the others "
            "to choose by "
        )
        how += (
            f"`search` (the first {SEARCH_TOKENS} tokens) and to repair on ({flags}), {SECOND} others to measure on, "
            f"and {OTHERS} of each other domain."
        )
        rows: list[Row] = earlier["rows"] if earlier else []
        done = {(row["kept"], row["domain"], row["seed"]) for row in rows}
        for seed in map(int, seeds.split(",")):
            drawn = Texts(checkpoint, texts, seed, folder)
            for count in map(int, kept.split(",")):
                for domain in domains(texts):
                    if (count, domain, seed) not in done:
                        rows.append(measure(seed, count, domain, drawn, folder, options))
                        report = {**begin(how, folder), "rows": rows}
                        publish(name, report, page(report), out)


if __name__ == "__main__":
    main()
