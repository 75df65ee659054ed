"""Peak memory and time of pruning a GGUF file of 20 GB, compared with `cp` of the same bytes.

    python -m benchmarks.gguf_budgets --work FOLDER [--rounds 3] [--layers 48]

FOLDER needs some 45 GB. A model of Qwen3-30B-A3B's shapes (128 experts in each of 48 layers, Q4_K with Q6_K down
projections, random bytes, a vocabulary of 151,936 tokens) is made there as one file, and as a set of four whose bytes
are the same. Per source and round, alternating: `moe-surgery prune` to 64 random experts of each layer from a dropped
page cache, until its output is flushed; then `cp --reflink=never` of that output, from a dropped page cache, until
`sync`. Ratios are of the two in one round. Memory is the whole process's peak resident set. With fewer layers nothing
is published. Dropping the page cache needs root. Results go to benchmarks/results/.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.publish import RESULTS, begin, heading, publish, span, table
from moe_surgery.bench import surgery as bench
from moe_surgery.checkpoint.gguf.block_types import BY_NAME, BlockType
from moe_surgery.checkpoint.gguf.writer import Metadata, TensorEntry, padding, preamble, tensor_table

MIB = 1 << 20
LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS = 48, 128, 8, 2048, 768, 151_936
KEPT = 64
SET = 4
TIME_BUDGET, RSS_BUDGET = 1.1, 64
PIECE = 8 << 20


def entry(name: str, kind: str, *shape: int) -> TensorEntry:
    block: BlockType = BY_NAME[kind]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return TensorEntry(name, block, shape, rows * block.row_bytes(shape[-1]))


def tensors_of(layers: int) -> Iterator[TensorEntry]:
    """In the order of llama.cpp's converter."""
    yield entry("token_embd.weight", "Q4_K", TOKENS, HIDDEN)
    for layer in range(layers):
        p = f"blk.{layer}."
        yield entry(p + "attn_norm.weight", "F32", HIDDEN)
        for name, rows in (("q", 4096), ("k", 512), ("v", 512)):
            yield entry(f"{p}attn_{name}.weight", "Q4_K", rows, HIDDEN)
        yield entry(p + "attn_output.weight", "Q4_K", HIDDEN, 4096)
        yield entry(p + "attn_q_norm.weight", "F32", 128)
        yield entry(p + "attn_k_norm.weight", "F32", 128)
        yield entry(p + "ffn_norm.weight", "F32", HIDDEN)
        yield entry(p + "ffn_gate_inp.weight", "F32", EXPERTS, HIDDEN)
        yield entry(p + "ffn_down_exps.weight", "Q6_K", EXPERTS, HIDDEN, WIDTH)
        yield entry(p + "ffn_gate_exps.weight", "Q4_K", EXPERTS, WIDTH, HIDDEN)
        yield entry(p + "ffn_up_exps.weight", "Q4_K", EXPERTS, WIDTH, HIDDEN)
    yield entry("output_norm.weight", "F32", HIDDEN)
    yield entry("output.weight", "Q6_K", TOKENS, HIDDEN)


def metadata_of(layers: int) -> Metadata:
    metadata = Metadata()
    metadata.text("general.architecture", "qwen3moe")
    metadata.text("general.name", "Synthetic 128x")
    for key, value in (
        ("block_count", layers),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", 6144),
        ("expert_feed_forward_length", WIDTH),
        ("expert_count", EXPERTS),
        ("expert_used_count", TOP_K),
    ):
        metadata.u32(f"qwen3moe.{key}", value)
    metadata.text("tokenizer.ggml.model", "gpt2")
    metadata.texts("tokenizer.ggml.tokens", [b"token %d" % number for number in range(TOKENS)])
    metadata.texts("tokenizer.ggml.merges", [b"tok en%d" % number for number in range(TOKENS)])
    return metadata


def write(path: Path, metadata: Metadata, tensors: list[TensorEntry], pool: bytes) -> None:
    """A GGUF file with the bytes of `pool`, over and over at odd offsets, as weights."""
    raw = preamble(len(tensors), len(metadata.keys)) + metadata.packed + tensor_table(tensors)
    at = 0
    with path.open("wb") as file:
        file.write(raw + bytes(padding(len(raw))))
        for tensor in tensors:
            left = tensor.nbytes
            while left:
                count = min(left, len(pool) - at)
                file.write(pool[at : at + count])
                left -= count
                at = (at + count + 4099) % (len(pool) - 1)
            file.write(bytes(padding(tensor.nbytes)))
        file.flush()
        os.fsync(file.fileno())


def make(folder: Path, layers: int, files: int) -> Path:
    """The model as a set of `files`; returns the first."""
    names = ["model.gguf"] if files == 1 else [f"model-{n + 1:05d}-of-{files:05d}.gguf" for n in range(files)]
    if not (folder / names[-1]).exists():
        folder.mkdir(parents=True, exist_ok=True)
        pool = os.urandom(PIECE)
        tensors = list(tensors_of(layers))
        share = sum(t.nbytes for t in tensors) / files
        groups: list[list[TensorEntry]] = [[] for _ in range(files)]
        position = 0
        for tensor in tensors:
            groups[min(files - 1, int(position / share))].append(tensor)
            position += tensor.nbytes
        for number, (name, group) in enumerate(zip(names, groups, strict=True)):
            metadata = metadata_of(layers) if number == 0 else Metadata()
            if files > 1:
                metadata.u16("split.no", number)
                metadata.u16("split.count", files)
                metadata.i32("split.tensors.count", len(tensors))
            write(folder / name, metadata, group, pool)
    return folder / names[0]


@dataclass(frozen=True)
class Job:
    name: str
    files: int
    options: tuple[str, ...] = ()


JOBS = (
    Job("one file", 1),
    Job("set of four", SET),
    Job("one file into a set", 1, ("--max-shard-size", "4GB")),
)


def measure(job: Job, work: Path, layers: int, rounds: int) -> dict[str, object]:
    source = make(work / f"{layers}-layers-{job.files}", layers, job.files)
    plan, out, target = work / "plan.json", work / "out", work / "copy"
    bench.timed(bench.command_of("plan", "--random", "--experts", KEPT, source, "-o", plan, "-q"), RESULTS)
    rows = []
    for number in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        command = bench.command_of("prune", source, out / "out.gguf", "--plan", plan, *job.options, "--quiet")
        pruned = bench.timed(command, RESULTS)
        copied = bench.copy_seconds(out, target)
        ratio = pruned.seconds / copied.seconds
        rows.append((pruned.seconds, copied.seconds, ratio, pruned.peak_bytes / MIB))
        click.echo(
            f"{job.name} round {number}: prune {rows[-1][0]:.2f} s, cp {rows[-1][1]:.2f} s, "
            f"ratio {ratio:.2f}, RSS {rows[-1][3]:.1f} MiB"
        )
    first = min(out.glob("*.gguf"))
    nbytes = sum(f.stat().st_size for f in out.iterdir())
    checked = bench.timed(bench.command_of("verify", first, "--source", source, "-q"), RESULTS)
    inspected = bench.timed(bench.command_of("inspect", source, "--json"), RESULTS)
    shutil.rmtree(out)
    return {
        "source_bytes": sum(f.stat().st_size for f in source.parent.glob("*.gguf")),
        "bytes": nbytes,
        "prune_s": span([row[0] for row in rows]),
        "cp_s": span([row[1] for row in rows]),
        "ratio_to_cp": statistics.median(row[2] for row in rows),
        "peak_rss_mib": max(row[3] for row in rows),
        "verify_s": checked.seconds,
        "verify_rss_mib": checked.peak_bytes / MIB,
        "inspect_s": inspected.seconds,
        "inspect_rss_mib": inspected.peak_bytes / MIB,
    }


def page(report: dict) -> list[str]:
    rows = [
        (
            name,
            f"{job['source_bytes'] / 1e9:.1f} GB to {job['bytes'] / 1e9:.1f} GB",
            *("{:.1f}-{:.1f} s".format(*job[key]) for key in ("prune_s", "cp_s")),
            f"{job['ratio_to_cp']:.2f} ({TIME_BUDGET})",
            f"{job['peak_rss_mib']:.1f} ({RSS_BUDGET})",
            f"{job['verify_s']:.1f} s, {job['verify_rss_mib']:.0f} MiB",
            f"{job['inspect_s']:.2f} s, {job['inspect_rss_mib']:.0f} MiB",
        )
        for name, job in report["jobs"].items()
    ]
    columns = ["source", "bytes", "prune", "cp + sync", "ratio, median (budget)", "peak RSS MiB (budget)"]
    return [
        *heading("Pruning a GGUF file", report),
        "",
        *table([*columns, "verify --source", "inspect"], rows),
    ]


@click.command(help=__doc__)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Scratch folder on the disk to measure."
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--layers", default=LAYERS, show_default=True, help="Fewer make a smaller model: 0.4 GB each.")
def main(work: Path, rounds: int, layers: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if not bench.drop_page_cache():
        raise click.ClickException("the page cache cannot be dropped; run as root")
    report = {
        **begin(
            "python -m benchmarks.gguf_budgets: prune to 64 of 128 experts and `cp --reflink=never` + sync of the "
            "output alternate, each from a dropped page cache until flushed; whole process.",
            work,
        ),
        "jobs": {job.name: measure(job, work, layers, rounds) for job in JOBS},
    }
    if layers == LAYERS:
        publish("gguf_budgets", report, page(report))
    else:
        click.echo("\n".join(page(report)))


if __name__ == "__main__":
    main()
