"""moe-surgery bench."""

from __future__ import annotations

import click

from moe_surgery.cli.bench import decode, kernels, speculate, surgery

__all__ = ["command"]


@click.group("bench")
def command() -> None:
    """Measure speed and memory on this machine: decoding, speculation, surgery, kernels.

    What is compared runs in turn, so that drift hits all alike; figures are medians. Ctrl-C ends a
    benchmark with what was measured until then.
    """


for module in (decode, speculate, surgery, kernels):
    command.add_command(module.command)
