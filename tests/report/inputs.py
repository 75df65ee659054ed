"""Statistics, plans, evaluations and traces for the report's tests: real ones of the embedded checkpoint, made-up
ones of any size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality
from moe_surgery.quality.routing_trace import ModelTrace, Trace
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


def made_up_trace(
    layers: int,
    experts: int,
    tokens: int,
    top_k: int = 8,
    plans: Sequence[tuple[str, int]] = (),
    seed: int = 0,
) -> Trace:
    """A trace in form: every token chooses experts at random, some experts more often; plans keep the first n."""
    rng = np.random.default_rng(seed)
    words = [" the", " law", "\n", " of", "(x", " =", "\t", " \u00e9t\u00e9", "", "<|end|>", " tenant", ","]
    texts = tuple(words[i] for i in rng.integers(0, len(words), tokens))

    def model(name: str, kept: int) -> ModelTrace:
        slots = min(top_k, kept)
        ids = np.empty((layers, tokens, slots), np.int32)
        weights = np.empty((layers, tokens, slots), np.float32)
        for layer in range(layers):
            logits = rng.standard_normal((tokens, kept), np.float32) + rng.standard_normal(kept, np.float32)
            chosen = np.argpartition(-logits, slots - 1, axis=1)[:, :slots]
            values = np.take_along_axis(logits, chosen, axis=1)
            order = np.argsort(-values, axis=1)
            ids[layer] = np.take_along_axis(chosen, order, axis=1)
            values = np.exp(1.5 * np.take_along_axis(values, order, axis=1))
            weights[layer] = values / values.sum(axis=1, keepdims=True)
        kl = np.zeros(tokens) if kept == experts else rng.exponential(0.4, tokens)
        predicted = tuple(int(i) for i in rng.integers(0, len(words), tokens))
        return ModelTrace(
            name,
            "full" if kept == experts else "plan",
            (tuple(range(kept)),) * layers,
            ids,
            weights,
            rng.exponential(2.0, tokens - 1),
            kl,
            predicted,
            tuple(words[i] for i in predicted),
            rng.uniform(0, 1, tokens),
            {} if kept == experts else {"method": "reap", "domains": [name]},
        )

    models = (model("full", experts), *(model(name, kept) for name, kept in plans))
    ids = tuple(int(i) for i in rng.integers(0, 50_000, tokens))
    prompt = max(1, tokens * 3 // 4)
    return Trace(
        "gpt_oss", "example", "f" * 32, experts, top_k, ids, texts, prompt, models, {"dtype": "float32"}
    )
