"""Statistics, plans and evaluations for the report's tests: real ones of the embedded checkpoint, made-up
ones of any size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality
from moe_surgery.selection.plan import Plan, plan_from_ranking
from moe_surgery.selection.rank import rank
from moe_surgery.selection.statistics import ExpertStatistics, Statistics


def made_up(layers: int, experts: int, domains: Sequence[str], seed: int = 0, top_k: int = 4) -> Statistics:
    """Statistics as a model might give: uneven experts, domains that share some of them, one never chosen."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(layers, experts))
    data: dict[str, list[ExpertStatistics]] = {}
    tokens = {d: 4000 + 500 * i for i, d in enumerate(domains)}
    for domain in domains:
        data[domain] = []
        for layer in range(layers):
            liking = np.exp(0.8 * common[layer] + 0.9 * rng.normal(size=experts))
            if experts > 1:
                liking[(3 * layer) % experts] = 0
            count = rng.multinomial(top_k * tokens[domain], liking / liking.sum())
            gate = count * rng.uniform(0.15, 0.35, experts)
            norm = count * rng.uniform(1, 3, experts) * (1 + layer)
            direction = rng.normal(size=(experts, 8))
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            data[domain].append(
                ExpertStatistics(
                    count.astype(np.int64),
                    gate,
                    norm,
                    norm * np.divide(gate, count, out=np.zeros(experts), where=count > 0),
                    direction * (0.6 * norm)[:, None],
                    np.where(count > 0, rng.uniform(1, 40, experts), 0),
                    np.where(count > 0, rng.uniform(0, 30, experts), 0),
                )
            )
    texts: dict[str, list[dict[str, object]]] = {
        d: [{"name": f"{d}.txt", "xxh3_128": f"{i:032x}", "tokens": tokens[d]}] for i, d in enumerate(domains)
    }
    return Statistics("gpt_oss", "f" * 32, experts, 8, top_k, tokens, texts, data)


def plan_of(statistics: Statistics, metric: str, count: int, domains: Sequence[str] | None = None) -> Plan:
    return plan_from_ranking(rank(statistics, metric, domains=domains), count)


def evaluation_of(
    statistics: Statistics, metrics: Sequence[str] = ("frequency", "reap"), seeds: int = 3, seed: int = 0
) -> Evaluation:
    """An evaluation in form, its figures made up: full model, plans of each domain and all, random draws."""
    rng = np.random.default_rng(seed)
    layers, experts, domains = statistics.layers, statistics.experts, statistics.domains
    sizes = [max(1, experts * i // 8) for i in (1, 2, 4, 6)]

    def quality(domain: str, kl: float) -> Quality:
        rerouted = tuple(float(x) for x in rng.uniform(0, min(1.0, kl / 3), layers))
        return Quality(statistics.tokens[domain], 2.5 + kl, kl, float(np.exp(-kl)), rerouted)

    def full(domain: str) -> Quality:
        return Quality(statistics.tokens[domain], 2.5, 0.0, 1.0, (0.0,) * layers)

    models = [ModelResult("full", "full", (experts,) * layers, 4, {d: full(d) for d in domains})]

    def add(name: str, n: int, provenance: dict[str, object], good: float) -> None:
        kept = provenance.get("domains") or []
        cut = 1.6 * ((experts - n) / experts) ** 2
        result = {
            d: quality(d, good * (0.6 if kept == [d] else 1.0) * rng.uniform(0.9, 1.1) * cut + 0.001)
            for d in domains
        }
        models.append(ModelResult(name, "plan", (n,) * layers, min(4, n), result, provenance))

    for n in sizes:
        for metric in metrics:
            for ranked in [domains] + [[d] for d in domains if len(domains) > 1]:
                add(
                    f"{metric}-{'-'.join(ranked) if len(ranked) == 1 else 'all'}-{n}.json",
                    n,
                    {"method": metric, "domains": ranked, "experts": n},
                    0.5 if metric == "reap" else 0.7,
                )
        for s in range(seeds):
            add(f"random-{n}-{s}.json", n, {"method": "random", "seed": s, "experts": n}, 1.4)
    texts: dict[str, list[dict[str, object]]] = dict(statistics.texts)
    return Evaluation("gpt_oss", "example", statistics.identity, experts, tuple(models), texts, {})
