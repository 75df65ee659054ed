"""moe-surgery bench."""

from __future__ import annotations

import click

from moe_surgery.cli.lazy_group import LazyGroup

__all__ = ["command"]


@click.group("bench", cls=LazyGroup, package=__name__, names=("decode", "speculate", "surgery", "kernels"))
def command() -> None:
    """Measure speed and memory on this machine.

    Variants are interleaved, so that drift affects them equally; figures are medians. Ctrl-C stops a
    benchmark and prints what was measured so far.

    \b
    moe-surgery bench decode example:tiny --expert-counts 4,16
    moe-surgery bench kernels --hidden 256 --rounds 3
    """
