"""moe-surgery bench."""

from __future__ import annotations

import importlib

import click

from moe_surgery.cli.options import common

SUBCOMMANDS = ("decode", "speculate", "surgery", "kernels")


class _Benches(click.Group):
    """Loads a benchmark's module only when it is named or help lists them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            return None
        command = importlib.import_module(f"moe_surgery.cli.bench.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group("bench", cls=_Benches)
@common
def command() -> None:
    """Measure speed and memory on this machine: decoding, speculation, surgery, kernels.

    What is compared runs in turn, so that drift hits all alike; figures are medians. Ctrl-C ends a
    benchmark with what was measured until then.

    \b
    moe-surgery bench decode example:tiny --experts 4,16 --context 32 --steps 4 --rounds 2
    moe-surgery bench speculate --target example:tiny --draft-top-k 1 --lengths 1,4 --context 32
    moe-surgery bench surgery example:tiny --experts 8 --rounds 1
    moe-surgery bench kernels --hidden 256 --experts 4,32 --rounds 3
    """
