"""All GPU tests, then all GPU benchmarks; results go to benchmarks/results/gpu.{json,md}.

    make gpu PYTHON=python3            # or: PYTHONPATH=. python3 -m benchmarks.gpu
    ... -m benchmarks.gpu --only tests # one part: tests, sanitizer, layer or decode

Needs a CUDA device, torch and triton; nothing is fetched. Figures are of random weights: speed and memory,
not quality. Benchmarks are not run where a test has failed, and a speed-up is withheld where its own
numbers are wrong.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

PARTS = ("tests", "sanitizer", "layer", "decode")
RESULTS = Path(__file__).parents[1] / "results"
NO_DEVICE = 3


def missing() -> str | None:
    """Why nothing can be measured here, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    try:
        from moe_surgery.kernels.triton import availability
    except ImportError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    return availability()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--timeout", type=float, default=1200, help="seconds for the tests, and for the sanitizer"
    )
    options = parser.parse_args(arguments)
    reason = missing()
    if reason is not None:
        print(f"make gpu: nothing was tested or measured: {reason}", file=sys.stderr)
        return NO_DEVICE
    return run(options.only, options.results, options.timeout)


def run(parts: list[str], results: Path, timeout: float) -> int:
    """Carry out `parts`; what has been found is written after each, so that a later failure loses nothing."""
    import torch

    from benchmarks.gpu import checks, report
    from benchmarks.gpu.timing import copy_bandwidth

    device = torch.device("cuda", 0)
    bandwidth = copy_bandwidth(device)
    torch.cuda.empty_cache()
    here = machine(bandwidth)
    before = report.earlier(results, here)  # parts that are not run now keep what they had
    titles = (
        "tests",
        "compute-sanitizer",
        "one MoE layer",
        "launches and bytes",
        "decode",
        "pruned against full",
    )
    result: dict[str, object] = {
        "how": "python -m benchmarks.gpu",
        "date": time.strftime("%Y-%m-%d"),
        "machine": here,
        **{title: before.get(title) for title in titles},
    }
    if "tests" in parts:
        result["tests"] = checks.test(timeout)
    if "sanitizer" in parts:
        result["compute-sanitizer"] = checks.sanitize(timeout)
    results.mkdir(parents=True, exist_ok=True)
    report.write(results, result)
    failed = [part for part in ("tests", "compute-sanitizer") if str(result[part]).startswith("failed")]
    if failed:
        print(f"make gpu: {' and '.join(failed)} failed; nothing was measured", file=sys.stderr)
        return 1
    if "layer" in parts:
        result["one MoE layer"] = layers(bandwidth)
        report.write(results, result)
    if "decode" in parts:
        rows, costs = decode(bandwidth)
        result["decode"], result["launches and bytes"] = rows, costs
        result["pruned against full"] = report.against_full(rows)
        report.write(results, result)
    print(report.as_markdown(result))
    measured = [row for rows in result.values() if isinstance(rows, list) for row in rows]
    ours = [row for row in measured if str(row.get("method", "moe_surgery")).startswith("moe_surgery")]
    return 1 if any(row.get("gate") == "RED" for row in ours) else 0


def machine(bandwidth: float) -> dict[str, object]:
    import torch
    import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GB": round(properties.total_memory / 1e9, 1),
        "copy GB/s, read and written": round(bandwidth / 1e9, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "CUDA": torch.version.cuda,
        "python": platform.python_version(),
    }


def layers(bandwidth: float) -> list[dict[str, object]]:
    import torch

    from benchmarks.gpu.layer import EXPERTS, measure_layer
    from moe_surgery.kernels.triton import TritonBackend

    rows: list[dict[str, object]] = []
    for experts in EXPERTS:
        print(f"one MoE layer, {experts} experts", file=sys.stderr)
        rows += measure_layer(experts, TritonBackend(), bandwidth, torch.device("cuda", 0))
        torch.cuda.empty_cache()
    return rows


def decode(bandwidth: float) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Rows measured, and what was counted for each beforehand."""
    import torch

    from benchmarks.gpu.decode import BATCHES, CONTEXT, KEPT, describe_step, kept, measure_decode
    from benchmarks.gpu.weights import gpt_oss_20b
    from moe_surgery.kernels.triton import TritonBackend

    rows: list[dict[str, object]] = []
    costs: list[dict[str, object]] = []
    for experts in KEPT:
        print(f"decode, {experts} experts", file=sys.stderr)
        config = kept(gpt_oss_20b(), experts)
        costs += [{"step": describe_step(config, batch, CONTEXT)} for batch in BATCHES]
        rows += measure_decode(config, TritonBackend(), bandwidth, torch.device("cuda", 0))
    return rows, costs


if __name__ == "__main__":
    sys.exit(main())
