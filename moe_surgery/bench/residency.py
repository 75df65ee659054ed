"""Decode speed of one model under limits on memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moe_surgery.bench.decode import Decoding
from moe_surgery.bench.rounds import MedianRange, check_numbers, median_range
from moe_surgery.errors import UsageError
from moe_surgery.runtime.residency.model import ResidentCausalLM
from moe_surgery.runtime.residency.reads import Reads
from moe_surgery.runtime.residency.slots import ExpertFiles, Slot
from moe_surgery.runtime.usage import peak_memory

__all__ = ["ResidencyFigures", "ResidencyRun", "disk_rate", "measure_residency", "residency_figures"]

DISK_BYTES = 1 << 30
CLEAR_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class ResidencyRun:
    """One round under a limit of `memory` bytes: a prompt and the decoding after it.

    `nbytes` were read from disk for the decoded tokens; `hit_rates` are by layer; `disk_rate` is that of random
    experts in bytes per second, measured just before.
    """

    memory: int
    number: int
    slots: int
    experts: int
    prefill_rate: float
    decode_rate: float
    nbytes: int
    tokens: int
    hit_rates: tuple[float, ...]
    hit_rate: float
    guess_precision: float
    disk_rate: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class ResidencyFigures:
    """A model under one limit, over all rounds. Rates are tokens per second, and medians of rounds with their range.

    `slots` of `experts` experts fit. `hit_rate` is the share of a layer's chosen experts that were in memory,
    `guess_precision` that of experts read ahead that were then chosen. `disk_share` is what was read per second
    of decoding over the disk's rate, the median over rounds. `peak_bytes` are the resident pages of the process.
    """

    memory: int
    slots: int
    experts: int
    prefill_rate: MedianRange
    decode_rate: MedianRange
    bytes_per_token: float
    hit_rate: float
    hit_rates: tuple[float, ...]
    guess_precision: float
    disk_rate: float
    disk_share: float
    peak_bytes: int
    rounds: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def disk_rate(files: ExpertFiles, reads: Reads, nbytes: int = DISK_BYTES, seed: int = 0) -> float:
    """Bytes per second at which experts drawn at random are read, a few at a time; at least one of each layer."""
    random = torch.Generator().manual_seed(seed)
    slots = [Slot(files.slot_bytes) for _ in range(3)]
    done, start = 0, time.perf_counter()
    while done < nbytes:
        batch = []
        for slot in slots:
            layer = int(torch.randint(len(files.weights), (), generator=random))
            expert = int(torch.randint(files.experts, (), generator=random))
            batch += slot.reads(files, layer, expert)
        reads.read(batch)
        done += sum(read.nbytes for read in batch)
    return done / (time.perf_counter() - start)


def measure_residency(
    load: Callable[[int], ResidentCausalLM],
    limits: Sequence[int],
    *,
    depth: int = 128,
    steps: int = 16,
    rounds: int = 3,
) -> Iterator[ResidencyRun]:
    """`rounds` rounds under each limit, the lowest first, so that peaks can be told apart; `load` loads the model.

    Raises UsageError for numbers below 1, or if depth and steps exceed the model's context, and as `load`.
    """
    check_numbers(depth=[depth], steps=[steps], rounds=[rounds], memory=limits)
    for limit in sorted(limits):
        _clear_peak()
        model = load(limit)
        if depth + steps + 1 > model.config.max_position_embeddings:
            raise UsageError(
                f"`depth` {depth} and `steps` {steps} need {depth + steps + 1} tokens; "
                f"this model supports {model.config.max_position_embeddings}"
            )
        Decoding(model, "", 1, depth, 1).step()
        for number in range(rounds):
            yield _round(model, limit, number, depth, steps)


def _round(model: ResidentCausalLM, limit: int, number: int, depth: int, steps: int) -> ResidencyRun:
    pool = model.pool
    small = DISK_BYTES if pool.files.nbytes > 1 << 20 else pool.files.nbytes * 16
    rate = disk_rate(pool.files, pool.reads, small, number)
    decoding = Decoding(model, "", 1, depth, steps, seed=number)
    before, nbytes = pool.counts.copy(), pool.reads.nbytes
    for _ in range(steps):
        decoding.step()
    counts, run = pool.counts.since(before), decoding.run(rate)
    return ResidencyRun(
        limit,
        number,
        pool.capacity,
        len(pool.files.weights) * pool.files.experts,
        run.prompt_tokens / run.prefill_seconds,
        steps / sum(run.step_seconds),
        pool.reads.nbytes - nbytes,
        steps,
        tuple(counts.hit_rates),
        counts.hit_rate,
        counts.guess_precision,
        rate,
        peak_memory(model.device) if not CLEAR_PEAK.exists() else _peak(),
    )


def residency_figures(runs: Sequence[ResidencyRun]) -> list[ResidencyFigures]:
    """Figures of the runs so far, by limit."""
    figures = []
    for memory in dict.fromkeys(run.memory for run in runs):
        group = [run for run in runs if run.memory == memory]
        shares = [run.nbytes / run.tokens * run.decode_rate / run.disk_rate for run in group]
        figures.append(
            ResidencyFigures(
                memory,
                group[0].slots,
                group[0].experts,
                median_range([run.prefill_rate for run in group]),
                median_range([run.decode_rate for run in group]),
                statistics.median(run.nbytes / run.tokens for run in group),
                statistics.median(run.hit_rate for run in group),
                tuple(map(statistics.median, zip(*(run.hit_rates for run in group), strict=True))),
                statistics.median(run.guess_precision for run in group),
                statistics.median(run.disk_rate for run in group),
                statistics.median(shares),
                max(run.peak_bytes for run in group),
                len(group),
            )
        )
    return figures


def _clear_peak() -> None:
    """Let the peak that the kernel keeps of this process start again."""
    with suppress(OSError):
        CLEAR_PEAK.write_text("5")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
