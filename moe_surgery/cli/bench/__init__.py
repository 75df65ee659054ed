"""moe-surgery bench."""

from __future__ import annotations

import click

from moe_surgery.cli.bench import decode, kernels, speculate, surgery

__all__ = ["command"]


@click.group("bench")
def command() -> None:
    """Measure speed and memory on this machine.

    Variants are interleaved, so that drift affects them equally; figures are medians. Ctrl-C stops a
    benchmark and prints what was measured so far.

    \b
    moe-surgery bench decode example:tiny --expert-counts 4,16
    moe-surgery bench kernels --hidden 256 --rounds 3
    """


for module in (decode, speculate, surgery, kernels):
    command.add_command(module.command)
