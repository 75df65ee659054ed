"""Every kernel beside a plain read, alternately in one run; results to benchmarks/results/native_cpu.{json,md}.

    python -m benchmarks.native [--rounds 7]

A figure is the median over rounds of bytes of weights per second; its ratio is that of the medians to the
plain read by as many threads. CPU seconds are given too: on a machine that others use they say more than
the clock.
"""

from __future__ import annotations

import os
import statistics
import time

import click
import torch

from benchmarks.native.operands import Measured, Operands
from benchmarks.publish import begin, heading, publish, table
from moe_surgery.kernels.native import NativeBackend


def measure(candidates: dict[str, Measured], rounds: int) -> dict[str, dict[str, float]]:
    """GB/s by the clock and by CPU time of each, one after the other in every round."""
    clock: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name, measured in candidates.items():
            time.sleep(0.02)  # until the threads of the one before have stopped looking for work
            started, used = time.perf_counter(), time.process_time()
            measured.run()
            if round_:  # the first warms up
                clock[name].append((time.perf_counter() - started) / measured.nbytes * 1e9)
                cpu[name].append((time.process_time() - used) / measured.nbytes * 1e9)
    return {
        name: {
            "GB/s": 1 / statistics.median(clock[name]),
            "best GB/s": 1 / min(clock[name]),
            "GB per CPU second": 1 / statistics.median(cpu[name]),
        }
        for name in candidates
    }


def candidates_of(operands: Operands, threads: int, tokens: int) -> dict[str, Measured]:
    torch.set_num_threads(threads)
    result = {"plain read": operands.plain_read(threads), "torch BF16 linear": operands.torch_linear(tokens)}
    for isa in NativeBackend.instruction_sets():
        if isa == "scalar":
            continue
        backend = NativeBackend(isa, threads)
        for measured in (
            operands.linear(backend, tokens),
            operands.experts(backend, tokens, True),
            operands.experts(backend, tokens, False),
        ):
            result[f"{measured.name}, {isa}"] = measured
    return result


@click.command(help=__doc__)
@click.option("--rounds", default=7, show_default=True)
def main(rounds: int) -> None:
    operands, rows = Operands(), []
    for threads in sorted({1, os.cpu_count() or 1}):
        for tokens in (1, 8):
            result = measure(candidates_of(operands, threads, tokens), rounds)
            read = result["plain read"]
            for name, figures in result.items():
                ratio = figures["GB/s"] / read["GB/s"]
                cpu_ratio = figures["GB per CPU second"] / read["GB per CPU second"]
                rows.append(
                    {"kernel": name, "threads": threads, "tokens": tokens, **figures}
                    | {"ratio": ratio, "CPU ratio": cpu_ratio}
                )
                click.echo(rows[-1])
    report = begin(
        f"python -m benchmarks.native --rounds {rounds}: weights of gpt-oss-20b's sizes in anonymous memory, "
        "medians of alternating rounds; ratios are to the plain read of the same run."
    )
    report["machine"]["load average at the end"] = round(os.getloadavg()[0], 2)
    report["rows"] = rows
    publish("native_cpu", report, page(report))


def page(report: dict) -> list[str]:
    rows = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in report["rows"]]
    lines = heading("CPU kernels beside a plain read of memory", report)
    return [*lines, "", *table(list(report["rows"][0]), rows)]


if __name__ == "__main__":
    main()
