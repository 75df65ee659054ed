"""Choosing experts on real structure in another family: a small Qwen3-MoE, trained here on two domains.

    OMP_NUM_THREADS=1 python -m benchmarks.any_family_choice --work FOLDER [--minutes 4]

The model (transformers, 4 layers of 16 experts, 2 for a token) learns generated texts of two of the embedded model's
domains from nothing, with its own loss and, so that experts specialise, the mutual information of domain and expert
(arXiv 2212.08066). FOLDER/trained is kept, and used again. Experts are then chosen by `profile` and `search` on
texts of one domain and measured by `evaluate` on others of it: mean KL divergence from the full model, nats a token,
beside plans chosen on the other domain and random ones.
"""

from __future__ import annotations

import random
import shutil
import statistics as summary
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.publish import begin, heading, publish, table
from moe_surgery import inspect
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.examples.skills import documents
from moe_surgery.quality.evaluate import evaluate
from moe_surgery.quality.job import profile
from moe_surgery.quality.search import METHOD, search
from moe_surgery.runtime.text import Text
from moe_surgery.selection.plan import Plan, plan_from_ranking, plan_random
from moe_surgery.selection.rank import rank

CHOSEN = ("arithmetic", "facts")
LENGTH, BATCH, LAYERS, EXPERTS, TOP_K = 128, 16, 4, 16, 2
KEPT, SEEDS, METRICS = (4, 8), range(5), ("frequency", "reap")
TRAINED_ON, PROFILED, MEASURED = (400, 1), (20, 2), (12, 3)  # documents, seed
INFORMATION_WEIGHT = 0.1


def streams(text: Text, domains: tuple[str, ...]) -> list[Tensor]:
    """Token ids of each domain's training texts, int64 [tokens]."""
    result = []
    for domain in domains:
        ids = [token for document in documents(domain, *TRAINED_ON) for token in text.encode(document + "\n")]
        result.append(torch.tensor(ids))
    return result


def information(router_logits: tuple[Tensor, ...], domains: Tensor) -> Tensor:
    """Mutual information of domain and expert in nats, mean over layers."""
    total = torch.zeros(())
    for logits in router_logits:
        usage = logits.float().softmax(-1).view(len(domains), -1, EXPERTS).mean(1)
        by_domain = torch.stack([usage[domains == d].mean(0) for d in range(len(CHOSEN))])
        total = total + _entropy(by_domain.mean(0)) - _entropy(by_domain).mean()
    return total / len(router_logits)


def _entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-9).log()).sum(-1)


def train(folder: Path, domains: tuple[str, ...], minutes: float) -> None:
    """Train for that long, and write the model into the new `folder`."""
    source = resolve("example:tiny")
    text = Text(source)
    tokens = streams(text, domains)
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": max(int(t.max()) for t in tokens) + 1,
        "hidden_size": 128,
        "moe_intermediate_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.001,
    }
    model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    drawn, start, losses, steps = random.Random(0), time.monotonic(), [], 0
    share = 0.0
    while share < 1:
        share = min(1.0, (time.monotonic() - start) / (60 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (steps + 1) / 50) * max(0.02, 1 - share)
        rows = torch.arange(BATCH) % len(domains)
        starts = [drawn.randrange(len(tokens[d]) - LENGTH) for d in rows.tolist()]
        ids = torch.stack([tokens[d][a : a + LENGTH] for d, a in zip(rows.tolist(), starts, strict=True)])
        output = model(input_ids=ids, labels=ids)
        loss = output.loss - INFORMATION_WEIGHT * information(output.router_logits, rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(output.loss.item())
        steps += 1
        if steps % 100 == 0:
            click.echo(f"step {steps}: loss {summary.mean(losses[-50:]):.3f}", err=True)
    model.config.output_router_logits = False
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


def texts(work: Path, domain: str, count: int, seed: int) -> Path:
    """A file of generated documents of `domain`."""
    file = work / f"{domain}-{seed}" / f"{domain}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n\n".join(documents(domain, count, seed)))
    return file


def plans_of(model: str, work: Path, domains: tuple[str, ...]) -> dict[str, list[tuple[str, Plan]]]:
    """For each domain: plans chosen on it ("own"), on the other one, and random ones, as (kind/method/kept, plan)."""
    rankings: dict[str, dict[str, Any]] = {}
    for domain in domains:
        file = texts(work, domain, *PROFILED)
        found = profile(model, file, work / f"{domain}.stats").statistics
        rankings[domain] = {metric: rank(found, metric) for metric in METRICS}
        rankings[domain][METHOD] = search(model, file, work / f"{domain}.json", max_tokens=3000)
    spec = inspect(model)
    result = {}
    for domain in domains:
        other = next(d for d in domains if d != domain)
        plans = [
            (f"{kind}/{method}/{kept}", plan_from_ranking(rankings[source][method], kept))
            for kind, source in (("own", domain), ("other", other))
            for method in (*METRICS, METHOD)
            for kept in KEPT
        ]
        plans += [(f"random/{seed}/{kept}", plan_random(kept, seed, spec)) for kept in KEPT for seed in SEEDS]
        result[domain] = plans
    return result


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--minutes", default=4.0, show_default=True, help="Of training.")
@click.option("--no-publish", is_flag=True, help="Print the figures only.")
def main(work: Path, minutes: float, no_publish: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "trained"
    if not folder.exists():
        train(folder, CHOSEN, minutes)
    rows = []
    for domain, plans in plans_of(str(folder), work, CHOSEN).items():
        measured = evaluate(folder, texts(work, domain, *MEASURED), plans=plans)
        full, *models = measured.models
        kl = {m.name: m.overall.kl for m in models}
        for kept in KEPT:
            row: dict[str, Any] = {
                "domain": domain,
                "kept": kept,
                "tokens": full.overall.tokens,
                "full_perplexity": full.overall.perplexity,
            }
            for kind in ("own", "other"):
                row |= {f"{kind} {m}": kl[f"{kind}/{m}/{kept}"] for m in (*METRICS, METHOD)}
            drawn = [kl[f"random/{seed}/{kept}"] for seed in SEEDS]
            row |= {"random best": min(drawn), "random mean": summary.mean(drawn)}
            rows.append(row)
    report: dict[str, Any] = {
        **begin(
            f"python -m benchmarks.any_family_choice: a Qwen3-MoE of {LAYERS} layers of {EXPERTS} experts, {TOP_K} for "
            f"a token, trained on {' and '.join(CHOSEN)} for {minutes:g} minutes of wall time on one thread, beside "
            f"other work. Mean KL from the full model in nats a token, float32; random plans: {len(SEEDS)} seeds."
        ),
        "figures": rows,
    }
    columns = [key for key in rows[0] if key != "tokens"]
    cells = [
        [v if isinstance(v, (int, str)) else f"{v:.3f}" for k, v in r.items() if k != "tokens"] for r in rows
    ]
    lines = [*heading("Choosing experts in a trained Qwen3-MoE", report), "", *table(columns, cells)]
    if no_publish:
        click.echo("\n".join(lines))
    else:
        publish("any_family_choice", report, lines)


if __name__ == "__main__":
    main()
