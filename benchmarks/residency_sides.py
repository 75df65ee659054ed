"""One side of `residency.py`, in a process of its own: decodes random tokens and says how fast, as one line of JSON.

python -m benchmarks.residency_sides resident|mapped|llama.cpp|calibrate FILE --threads N [--memory BYTES]
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.decode_sides import status_mib

SIDES = ("resident", "mapped", "llama.cpp")
PROMPT, WARM_UP, CONTEXT = 48, 8, 256
BEST, SHARE = 16, 0.8
CALIBRATION_TOKENS = 128


def tokens(vocabulary: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (1, count))


def timed_steps(side: Any, vocabulary: int, steps: int, seed: int) -> dict[str, Any]:
    """A prompt, a few steps, then those that count."""
    ids = tokens(vocabulary, PROMPT + WARM_UP + steps, seed)
    start = time.perf_counter()
    side.step(ids[:, :PROMPT])
    prompt = PROMPT / (time.perf_counter() - start)
    for i in range(WARM_UP):
        side.step(ids[:, PROMPT + i : PROMPT + i + 1])
    side.begin_counting()
    seconds = []
    for i in range(PROMPT + WARM_UP, ids.shape[1]):
        start = time.perf_counter()
        side.step(ids[:, i : i + 1])
        seconds.append(time.perf_counter() - start)
    memory = {
        name: status_mib(key) for name, key in (("anonymous_mib", "RssAnon"), ("mapped_mib", "RssFile"))
    }
    return {
        "tokens_per_s": steps / sum(seconds),
        "median_s": statistics.median(seconds),
        "prompt_tokens_per_s": prompt,
        **memory,
        **side.counted(steps, sum(seconds)),
    }


class Ours:
    """Our runtime, mapped or (with `memory`) resident."""

    def __init__(self, checkpoint: str, threads: int, memory: int | None, biases: str) -> None:
        import torch

        from moe_surgery import Plan, load_model
        from moe_surgery.kernels.weights import Projection

        torch.set_num_threads(threads)
        self._torch = torch
        stored = dict(np.load(biases)) if biases else {}
        plan = None
        if stored and memory:
            kept = tuple(tuple(map(int, row)) for row in stored["best"])
            plan = Plan("gpt_oss", len(stored["bias"][0]), kept)
        self.model: Any = load_model(checkpoint, memory=memory, residency=plan)
        if stored:
            layers = [
                replace(
                    layer, router=Projection(layer.router.weight, torch.from_numpy(bias).to(torch.bfloat16))
                )
                for layer, bias in zip(self.model.layers, stored["bias"], strict=True)
            ]
            self.model.layers = layers
        self.vocabulary = self.model.config.vocab_size
        self._cache = self.model.new_cache(1, CONTEXT)
        self._resident = memory is not None

    def step(self, ids: np.ndarray) -> None:
        self.model(self._torch.from_numpy(ids), self._cache, logits_to_keep=1)

    def begin_counting(self) -> None:
        if not self._resident:
            return
        from moe_surgery.bench.residency import disk_rate

        pool = self.model.pool
        self._rate = disk_rate(pool.files, pool.reads, 1 << 29)
        self._before, self._read, self._uses = pool.counts.copy(), pool.reads.nbytes, pool.usage.scores * 0
        count = pool.usage.count

        def counting(layer: int, experts: list[int], uses: list[int]) -> None:
            self._uses[layer, experts] += uses
            count(layer, experts, uses)

        pool.usage.count = counting

    def counted(self, steps: int, seconds: float) -> dict[str, Any]:
        if not self._resident:
            return {}
        from moe_surgery.bench.residency import disk_rate

        pool = self.model.pool
        counts, read = pool.counts.since(self._before), pool.reads.nbytes - self._read
        rate = (self._rate + disk_rate(pool.files, pool.reads, 1 << 29, 1)) / 2
        needed = (counts.total("ahead") + counts.total("missed")) * pool.files.nbytes
        best = np.sort(self._uses, axis=1)[:, ::-1][:, :BEST].sum(axis=1) / self._uses.sum(axis=1)
        return {
            "experts_held": pool.capacity,
            "read_mb_per_token": read / steps / 1e6,
            "needed_mb_per_token": needed / steps / 1e6,
            "hit_rate": counts.hit_rate,
            "hit_rate_by_layer": [min(counts.hit_rates), max(counts.hit_rates)],
            "guess_precision": counts.guess_precision,
            "disk_gb_per_s": rate / 1e9,
            "disk_share": read / seconds / rate,
            "bound_tokens_per_s": rate / (needed / steps) if needed else None,
            "share_of_best": float(best.mean()),
        }


class Llama:
    def __init__(self, gguf: str, threads: int) -> None:
        import llama_cpp as api

        self._api = api
        self._model = api.llama_model_load_from_file(gguf.encode(), api.llama_model_default_params())
        options = api.llama_context_default_params()
        options.n_ctx = CONTEXT
        options.n_batch = options.n_ubatch = PROMPT
        options.n_threads = options.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, options)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(PROMPT, 0, 1)
        self._position = 0

    def step(self, ids: np.ndarray) -> None:
        batch, length = self._batch, ids.shape[1]
        batch.n_tokens = length
        for place in range(length):
            batch.token[place] = int(ids[0, place])
            batch.pos[place] = self._position + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = place == length - 1
        if self._api.llama_decode(self._context, batch):
            raise click.ClickException("llama_decode failed")
        self._position += length

    def begin_counting(self) -> None:
        pass

    def counted(self, steps: int, seconds: float) -> dict[str, Any]:
        return {}


def calibrate(checkpoint: str, threads: int, out: Path) -> dict[str, Any]:
    """Router biases such that in every layer `BEST` experts, drawn at random, get `SHARE` of the routes."""
    import torch

    from moe_surgery import load_model

    torch.set_num_threads(threads)
    model = load_model(checkpoint)
    random, backend = np.random.default_rng(7), model.backend
    found: list[np.ndarray] = []
    best: list[np.ndarray] = []

    class Calibrating(type(backend)):  # type: ignore[misc]
        def fuse_layers(self, layers: object, shape: object) -> None:
            return None

        def route(self, x: Any, weight: Any, bias: Any, top_k: int) -> Any:
            logits = x.float() @ weight.float().T + bias.float()
            chosen = np.sort(random.permutation(len(weight))[:BEST])
            low, high = 0.0, 64.0
            for _ in range(30):
                middle = (low + high) / 2
                pushed = logits.clone()
                pushed[:, chosen] += middle
                share = np.isin(pushed.topk(top_k).indices.numpy(), chosen).mean()
                low, high = (middle, high) if share < SHARE else (low, middle)
            new = bias.float().clone()
            new[chosen] += high
            found.append(new.numpy())
            best.append(chosen)
            return super().route(x, weight, new.to(bias.dtype), top_k)

    model.backend = Calibrating()
    ids = tokens(model.config.vocab_size, CALIBRATION_TOKENS, 3)
    model(torch.from_numpy(ids), logits_to_keep=1)
    np.savez(out, bias=np.stack(found).astype(np.float32), best=np.stack(best))
    return {"bias": float(np.max(found))}


@click.command(help=__doc__)
@click.argument("side", type=click.Choice([*SIDES, "calibrate"]))
@click.argument("file")
@click.option("--threads", type=int, required=True)
@click.option("--memory", type=int)
@click.option("--biases", default="")
@click.option("--steps", default=16)
@click.option("--seed", default=0)
def main(side: str, file: str, threads: int, memory: int | None, biases: str, steps: int, seed: int) -> None:
    if side == "calibrate":
        click.echo(json.dumps(calibrate(file, threads, Path(biases))))
        return
    start = time.perf_counter()
    if side == "llama.cpp":
        runner: Any = Llama(file, threads)
    else:
        runner = Ours(file, threads, memory if side == "resident" else None, biases)
    loaded = time.perf_counter() - start
    click.echo(json.dumps({"load_s": loaded} | timed_steps(runner, runner.vocabulary, steps, seed)))


if __name__ == "__main__":
    main()
