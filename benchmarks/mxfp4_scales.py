"""BF16 to MXFP4 by the best of three scales, beside the scale of the largest value alone.

    python -m benchmarks.mxfp4_scales [--beside EXTENSION]

example:tiny's experts as BF16 with normal noise, in proportion to the tensor's standard deviation or to each
weight (as a fine-tune might have moved it), go to MXFP4 by both rules: relative error of the weights, and KL
divergence from the perturbed model on docstrings of the running Python's library, on the reference backend in
float32. Then the speed of encoding weights that come from MXFP4, the same with noise, and normal ones, beside a
copy of the BF16 bytes; with --beside also by another build's extension (a file), in turn. Seconds are the
thread's own, so that a busy machine disturbs them less. Results go to benchmarks/results/.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.exactness import prompts_of
from benchmarks.publish import begin, heading, publish, table
from moe_surgery import inspect, prune
from moe_surgery.bench.rounds import interleaved
from moe_surgery.formats import mxfp4, mxfp4_numpy
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.formats.native import native_module
from moe_surgery.quality.evaluate import evaluate
from moe_surgery.runtime.text import Text
from moe_surgery.selection.plan import plan_keeping

SOURCE = "example:tiny"
NOISE = (0.001, 0.003, 0.01, 0.03)
OF = ("the tensor's deviation", "each weight")
SEED, MAX_TOKENS, ROUNDS = 0, 4000, 40
BLOCKS, SCALES = "_blocks", "_scales"
INPUTS, ROWS = 1440, 2880  # values [inputs, rows] to time


def encode_by_the_largest(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, EncodeReport]:
    """The rule compared with: `mxfp4.encode_transposed` under the first of the three scales."""
    groups, rows = len(values) // 32, values.shape[1]
    blocks, scales = np.empty((rows, groups, 16), np.uint8), np.empty((rows, groups), np.uint8)
    for group in range(groups):
        part = values[32 * group : 32 * (group + 1)]
        scales[:, group] = mxfp4_numpy.first_scales(part)
        codes = mxfp4_numpy.nearest_codes(part, scales[:, group])
        blocks[:, group] = (codes[0::2] | (codes[1::2] << 4)).T
    back = mxfp4.decode_transposed(blocks, scales, isa="numpy")
    original = mxfp4_numpy.bf16_to_float64(values)
    error = original - mxfp4_numpy.bf16_to_float64(back)
    changed = (back != values).reshape(groups, 32, rows).any(axis=1)
    return (
        blocks,
        scales,
        EncodeReport(scales.size, int(changed.sum()), float(np.sum(error**2)), float(np.sum(original**2))),
    )


def keep_all(source: str | Path, out: Path, dtype: str) -> float:
    """Convert a checkpoint with all its experts; the relative error of the weights."""
    outcome = prune(source, out, plan_keeping(None, inspect(source)), store=dtype, card=False).outcome
    assert outcome is not None
    return float(str(outcome.conversion["relative_error"])) if outcome.conversion else 0.0


def is_expert_weight(name: str) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def perturbed(bf16: Path, out: Path, noise: float, of: str) -> None:
    """A copy of a BF16 checkpoint with noise on its experts' weights."""
    random = torch.Generator().manual_seed(SEED)
    shutil.copytree(bf16, out)
    for shard in sorted(out.glob("*.safetensors")):
        tensors = load_file(shard)
        for name in filter(is_expert_weight, tensors):
            weight = tensors[name].float()
            unit = weight.std() if of == OF[0] else weight
            moved = weight + noise * unit * torch.randn(weight.shape, generator=random)
            tensors[name] = moved.bfloat16()
        save_file(tensors, shard, {"format": "pt"})


def by_the_largest(tuned: Path, new: Path, out: Path) -> EncodeReport:
    """A copy of the MXFP4 checkpoint `new` with the experts of `tuned` encoded by the other rule."""
    weights = {k: v for shard in tuned.glob("*.safetensors") for k, v in load_file(shard).items()}
    shutil.copytree(new, out)
    parts = []
    for shard in sorted(out.glob("*.safetensors")):
        tensors = load_file(shard)
        for name in [n.removesuffix(BLOCKS) for n in tensors if n.endswith(BLOCKS)]:
            bits = weights[name].view(torch.int16).numpy().view(np.uint16)
            encoded = [encode_by_the_largest(expert) for expert in bits]
            tensors[name + BLOCKS] = torch.from_numpy(np.stack([e[0] for e in encoded]))
            tensors[name + SCALES] = torch.from_numpy(np.stack([e[1] for e in encoded]))
            parts += [e[2] for e in encoded]
        save_file(tensors, shard, {"format": "pt"})
    return EncodeReport.total(parts)


def quality(work: Path) -> list[dict[str, object]]:
    """What both rules lose, for each noise."""
    text = Text(SOURCE)
    texts = work / "docstrings.txt"
    texts.write_text("\n\n".join(text.decode(tokens) for tokens in prompts_of(SOURCE)))
    keep_all(SOURCE, work / "bf16", "bf16")
    rows = []
    for number, (of, noise) in enumerate(product(OF, NOISE)):
        folder = work / str(number)
        folder.mkdir()
        tuned, new, old = (folder / name for name in ("tuned", "new", "old"))
        perturbed(work / "bf16", tuned, noise, of)
        error_best = keep_all(tuned, new, "mxfp4")
        error_largest = by_the_largest(tuned, new, old).relative_error
        result = evaluate(
            tuned, texts, max_tokens=MAX_TOKENS, pruned=[old, new], dtype=torch.float32, backend="reference"
        )
        kl_old, kl_new = (model.overall.kl for model in result.models[1:])
        rows.append(
            {
                "noise": noise,
                "of": of,
                "tokens": result.models[0].overall.tokens,
                "error_largest": error_largest,
                "error_best": error_best,
                "kl_largest": kl_old,
                "kl_best": kl_new,
                "agreement_largest": result.models[1].overall.agreement,
                "agreement_best": result.models[2].overall.agreement,
            }
        )
        click.echo(str(rows[-1]), err=True)
    return rows


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def operands() -> dict[str, np.ndarray]:
    """Values u16 [INPUTS, ROWS] to encode."""
    rng = np.random.default_rng(SEED)
    blocks = rng.integers(0, 256, (ROWS, INPUTS // 32, 16), dtype=np.uint8)
    scales = rng.integers(118, 122, (ROWS, INPUTS // 32), dtype=np.uint8)
    exact = mxfp4.decode_transposed(blocks, scales)
    values = mxfp4_numpy.bf16_to_float64(exact)
    return {
        "from MXFP4": exact,
        "from MXFP4, 0.3 % noise": bf16_bits(values * (1 + 0.003 * rng.standard_normal(values.shape))),
        "normal": bf16_bits(0.02 * rng.standard_normal(values.shape)),
    }


def extension_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("moe_surgery._native", path)
    if spec is None or spec.loader is None:
        raise click.UsageError(f"--beside {path}: is not an extension module")
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():  # both builds register the same types
        warnings.simplefilter("ignore", RuntimeWarning)
        spec.loader.exec_module(module)
    return module


def seconds_of(job: Callable[[], object]) -> float:
    start = time.thread_time()
    job()
    return time.thread_time() - start


def speed(beside: Path | None) -> list[dict[str, object]]:
    builds = {"this": native_module()}
    if beside is not None:
        builds["beside"] = extension_at(beside)
    blocks, scales = np.empty((ROWS, INPUTS // 32, 16), np.uint8), np.empty((ROWS, INPUTS // 32), np.uint8)
    rows: list[dict[str, object]] = []
    for isa in mxfp4.instruction_sets():
        for name, values in operands().items():
            target = np.empty_like(values)
            jobs: dict[str, Callable[[], object]]
            if isa == "numpy":
                jobs = {
                    "this": partial(mxfp4_numpy.encode_transposed, values, blocks, scales),
                    "beside": partial(encode_by_the_largest, values),
                }
            else:
                jobs = {
                    build: partial(module.encode_transposed, values, blocks, scales, isa)
                    for build, module in builds.items()
                    if module is not None
                }
            jobs["copy"] = partial(np.copyto, target, values)
            taken: dict[str, list[float]] = {job: [] for job in jobs}
            rounds = ROUNDS if isa not in ("numpy", "scalar") else 5
            timed = [partial(seconds_of, job) for job in jobs.values()]
            for _, number, seconds in interleaved(timed, rounds):
                taken[list(jobs)[number]].append(seconds)
            row: dict[str, object] = {"instruction_set": isa, "values": name, "bytes": values.nbytes}
            rows.append(row | {job: statistics.median(times) for job, times in taken.items()})
            click.echo(str(rows[-1]), err=True)
    return rows


def page(report: dict) -> list[str]:
    lines = heading("Scales of BF16 to MXFP4", report)
    lines += [
        "",
        f"example:tiny with noise on its experts' weights, {report['quality'][0]['tokens']} tokens predicted;",
        "each figure under the largest value's scale / under the best of three:",
        "",
    ]
    columns = ("noise", "relative error of weights", "KL, nats a token", "agreement of the likeliest token")
    rows: list[tuple[object, ...]] = [
        (
            f"{100 * r['noise']:g} % of {r['of']}",
            f"{r['error_largest']:.4f} / {r['error_best']:.4f}",
            f"{r['kl_largest']:.6f} / {r['kl_best']:.6f}",
            f"{r['agreement_largest']:.4f} / {r['agreement_best']:.4f}",
        )
        for r in report["quality"]
    ]
    lines += table(columns, rows)
    lines += [
        "",
        f"Encoding BF16 [{INPUTS}, {ROWS}] on one thread, medians. The ratio is to the build given by --beside, here",
        "one without the search; in numpy to this script's encoder by the largest value.",
        "",
    ]
    rows = [
        (
            r["instruction_set"],
            r["values"],
            f"{1e3 * r['this']:.2f}",
            f"{r['bytes'] / r['this'] / 1e9:.2f}",
            f"{r['this'] / r['beside']:.2f}" if "beside" in r else "",
            f"{1e3 * r['copy']:.2f}",
        )
        for r in report["speed"]
    ]
    return [
        *lines,
        *table(("instructions", "values", "ms", "GB/s of BF16", "ratio", "copy of the BF16, ms"), rows),
    ]


@click.command(help=__doc__)
@click.option("--beside", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(beside: Path | None) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = {
            **begin(
                "python -m benchmarks.mxfp4_scales" + (" --beside EXTENSION" if beside else ""), Path(folder)
            ),
            "quality": quality(Path(folder)),
            "speed": speed(beside),
        }
    publish("mxfp4_scales", report, page(report))


if __name__ == "__main__":
    main()
