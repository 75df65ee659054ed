"""moe-surgery inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import common, terminal_of
from moe_surgery.cli.terminal import Terminal, count, size

if TYPE_CHECKING:
    from moe_surgery.surgery.inspect import Inspection

MAX_ROWS = 10


@click.command("inspect")
@click.argument("ckpt")
@click.option("--all-sizes", is_flag=True, help="List every expert count.")
@click.option(
    "--ignore-unlisted",
    is_flag=True,
    help="Skip tensors and a model.safetensors that the index does not list.",
)
@common
@click.pass_context
def command(context: click.Context, ckpt: str, all_sizes: bool, ignore_unlisted: bool) -> None:
    """Show what a checkpoint holds, and its size with fewer experts.

    Reads headers only, so it is instant at any size. The table shows how many parameters remain with
    n experts kept in each layer, and how many bytes they take in MXFP4, BF16 and the format they are
    stored in. JSON lists every n.

    \b
    moe-surgery inspect example:tiny
    moe-surgery inspect openai/gpt-oss-20b --json
    """
    from moe_surgery.pipeline import inspect

    terminal = terminal_of(context)
    found = inspect(ckpt, ignore_unlisted=ignore_unlisted)
    if terminal.json:
        terminal.data(found.as_dict())
        return
    _summary(terminal, found)
    _sizes(terminal, found, all_sizes)
    for note in found.notes:
        terminal.note(note)


def _summary(terminal: Terminal, found: Inspection) -> None:
    lines = {
        "checkpoint": found.path,
        "family": f"{found.family} ({found.model_type}, {found.layout} layout)",
        "experts": f"{found.experts} in each of {found.layers} layers, top-{found.top_k}, "
        f"stored as {found.expert_format.label}",
        "parameters": f"{count(found.parameters)} total, {count(found.active_parameters)} active, "
        f"{count(found.parameters_per_expert)} per expert",
        "bytes": f"{size(found.nbytes)} in {found.tensors} tensors: "
        + ", ".join(f"{part} {size(nbytes)}" for part, nbytes in found.parts.items()),
        "dtypes": ", ".join(f"{dtype} {size(nbytes)}" for dtype, nbytes in found.dtypes.items()),
        "shards": ", ".join(f"{name} ({size(nbytes)})" for name, nbytes in found.shards.items()),
    }
    for name, text in lines.items():
        terminal.result(f"{name:<11} {text}")


def _sizes(terminal: Terminal, found: Inspection, all_sizes: bool) -> None:
    step = 1
    while not all_sizes and found.experts > step * MAX_ROWS:
        step *= 2
    shown = [s for s in found.sizes if s.experts % step == 0 or s.experts == found.experts]
    rows = [
        [
            str(s.experts),
            count(s.parameters),
            count(s.active_parameters),
            *(size(s.nbytes(f)) for f in found.formats),
        ]
        for s in shown
    ]
    labels = [f.label for f in found.formats]
    terminal.result("")
    terminal.table("kept experts", ["n", "parameters", "active", *labels], rows)
    for memory, fits in found.fits.items():
        most = ", ".join(f"{n or 'none'} in {name.upper()}" for name, n in fits.items())
        terminal.result(f"most experts whose weights fit {memory} GB: {most}")
