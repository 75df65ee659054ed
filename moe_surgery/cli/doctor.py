"""moe-surgery doctor."""

from __future__ import annotations

import click

from moe_surgery.cli.options import common, terminal_of


@click.command("doctor")
@common
@click.pass_context
def command(context: click.Context) -> None:
    """Show what works on this machine.

    Lists versions, instruction sets, devices and backends, and gives the reason for everything that
    does not work. Put this output in a bug report.

    \b
    moe-surgery doctor
    moe-surgery doctor --json
    """
    from moe_surgery.doctor import examine

    terminal = terminal_of(context)
    report = examine()
    if terminal.json:
        terminal.data(report)
        return
    for section, entries in report.items():
        terminal.result(section)
        for name, value in entries.items():
            terminal.result(f"  {name:<24} {value}")
