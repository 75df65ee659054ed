"""Decode speed of several models in one run: full and pruned, or views of one checkpoint."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from moe_surgery.bench.memory import memory_in_use, read_bandwidth, synchronize
from moe_surgery.bench.rounds import MedianRange, check_numbers, interleaved, median_range, percentile
from moe_surgery.errors import UsageError
from moe_surgery.runtime.generate import decoder
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.step_bytes import model_step_bytes, usable_bytes

__all__ = ["DecodeFigures", "DecodeRun", "Decoding", "decode_figures", "measure_decoding", "run_decoding"]


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """One prefill and the decoding after it, in seconds; the first token includes prefill. `read_bandwidth`:
    bytes per second of a plain read loop just before."""

    model: str
    batch: int
    number: int
    prompt_tokens: int
    prefill_seconds: float
    first_token_seconds: float
    step_seconds: tuple[float, ...]
    cache_bytes: int
    memory_bytes: int
    read_bandwidth: float


@dataclass(frozen=True, slots=True)
class DecodeFigures:
    """A model at one batch size, over all rounds. Rates are tokens per second over all sequences.

    `decode_rate` and `prefill_rate` are medians of rounds with their range. `latency` and `latency_p95`
    are median and 95th percentile of a step, seconds. `bytes_per_token` are the weights and cache that
    a step must read, divided by the batch; `bandwidth_share` is their share of the read bandwidth, the
    median over rounds with a read loop just before each: it exceeds 1 if memory was faster during the
    round. `weight_bytes` is the size of a checkpoint with these experts, `memory_bytes` the memory of the
    process (or device) at the end of a run, all models included. `ratio` is the decode rate over the
    first model's in the same round.
    """

    model: str
    experts: float
    top_k: int
    batch: int
    prefill_rate: MedianRange
    decode_rate: MedianRange
    first_token_seconds: float
    latency: float
    latency_p95: float
    bytes_per_token: float
    bandwidth_share: float
    weight_bytes: int
    cache_bytes: int
    memory_bytes: int
    ratio: MedianRange | None
    rounds: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Decoding:
    """Prefills `batch` sequences with `context` random tokens; then `step` decodes, up to `steps` times."""

    @torch.inference_mode()
    def __init__(
        self, model: CausalLM, name: str, batch: int, context: int, steps: int, seed: int = 0
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, model.config.vocab_size, (batch, context), generator=random)
        self._model, self._name, self._batch, self._prompt_tokens = model, name, batch, batch * context
        self._cache = model.new_cache(batch, context + steps + 1)
        synchronize(model.device)
        start = time.perf_counter()
        logits = model(ids, self._cache, logits_to_keep=1)
        synchronize(model.device)
        self._prefill_seconds = time.perf_counter() - start
        self._tokens = logits[:, -1].argmax(-1)
        self._tokens.tolist()
        self._first_token_seconds = time.perf_counter() - start
        self._step_seconds: list[float] = []
        self._decode = decoder(model, self._cache)
        self._next()  # warm-up

    def step(self) -> None:
        """Decode one token of each sequence, greedily."""
        start = time.perf_counter()
        self._next()
        self._step_seconds.append(time.perf_counter() - start)

    @torch.inference_mode()
    def _next(self) -> None:
        self._tokens = self._decode(self._tokens)[:, -1].argmax(-1)
        self._tokens.tolist()

    def run(self, read_bandwidth: float) -> DecodeRun:
        """The measurements so far."""
        return DecodeRun(
            self._name,
            self._batch,
            0,
            self._prompt_tokens,
            self._prefill_seconds,
            self._first_token_seconds,
            tuple(self._step_seconds),
            self._cache.nbytes,
            memory_in_use(self._model.device),
            read_bandwidth,
        )


def run_decoding(
    model: CausalLM, name: str, batch: int, context: int, steps: int, seed: int = 0
) -> DecodeRun:
    """Measure the read bandwidth, prefill `batch` sequences with `context` random tokens, and decode `steps`
    greedily."""
    bandwidth = read_bandwidth(model.device)
    decoding = Decoding(model, name, batch, context, steps, seed)
    for _ in range(steps):
        decoding.step()
    return decoding.run(bandwidth)


def measure_decoding(
    models: Mapping[str, CausalLM],
    *,
    batches: Sequence[int] = (1,),
    depth: int = 128,
    steps: int = 16,
    rounds: int = 3,
) -> Iterator[DecodeRun]:
    """Every model at every batch size, in alternation, `rounds` times after a warm-up.

    Raises UsageError for numbers below 1, or if depth and steps exceed a model's context.
    """
    check_numbers(depth=[depth], steps=[steps], rounds=[rounds], batches=batches)
    shortest = min(model.config.max_position_embeddings for model in models.values())
    if depth + steps + 1 > shortest:
        raise UsageError(
            f"`depth` {depth} and `steps` {steps} need {depth + steps + 1} tokens; "
            f"these models support {shortest}"
        )
    setups = [(name, model, batch) for batch in batches for name, model in models.items()]
    for name, model, batch in setups:
        Decoding(model, name, batch, depth, 1).step()
    calls = [partial(run_decoding, model, name, batch, depth, steps) for name, model, batch in setups]
    for number, _, run in interleaved(calls, rounds):
        yield replace(run, number=number)


def decode_figures(runs: Sequence[DecodeRun], models: Mapping[str, CausalLM]) -> list[DecodeFigures]:
    """Figures of the runs so far. The first model is the full one."""
    full = next(iter(models), None)
    rates = {(r.model, r.batch, r.number): _rate(r) for r in runs}
    figures = []
    for batch in dict.fromkeys(r.batch for r in runs):
        for name, model in models.items():
            group = [r for r in runs if (r.model, r.batch) == (name, batch)]
            if not group:
                continue
            ratios = [
                _rate(r) / rates[full, batch, r.number]
                for r in group
                if full is not None and (full, batch, r.number) in rates
            ]
            steps = [s for r in group for s in r.step_seconds]
            positions = group[0].prompt_tokens // batch + len(group[0].step_seconds) // 2
            read = model_step_bytes(model, batch) + cache_step_bytes(model, batch, positions)
            shares = [read / statistics.median(r.step_seconds) / r.read_bandwidth for r in group]
            figures.append(
                DecodeFigures(
                    name,
                    statistics.mean(len(layer.router.weight) for layer in model.layers),
                    max(layer.top_k for layer in model.layers),
                    batch,
                    median_range([r.prompt_tokens / r.prefill_seconds for r in group]),
                    median_range([_rate(r) for r in group]),
                    statistics.median(r.first_token_seconds for r in group),
                    statistics.median(steps),
                    percentile(steps, 0.95),
                    read / batch,
                    statistics.median(shares),
                    usable_bytes(model),
                    group[0].cache_bytes,
                    max(r.memory_bytes for r in group),
                    median_range(ratios) if ratios else None,
                    len(group),
                )
            )
    return figures


def cache_step_bytes(model: CausalLM, batch: int, positions: int) -> int:
    """Bytes of keys and values that a step reads with `positions` tokens of each sequence in the cache."""
    c = model.config
    visible = sum(positions if w is None else min(positions, w) for w in c.sliding_windows)
    return 2 * batch * visible * c.num_key_value_heads * c.head_dim * model.dtype.itemsize


def _rate(run: DecodeRun) -> float:
    """Tokens per second of a run, over all sequences."""
    return run.batch * len(run.step_seconds) / sum(run.step_seconds)
