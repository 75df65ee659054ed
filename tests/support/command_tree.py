"""The commands and their options, as click has them."""

from __future__ import annotations

import click

from moe_surgery.cli import COMMANDS, cli


def command_paths() -> list[tuple[str, ...]]:
    """Every command that does something: those of a group by two words."""
    paths: list[tuple[str, ...]] = []
    for name in COMMANDS:
        result = cli.get_command(click.Context(cli), name)
        inner = result.list_commands(click.Context(result)) if isinstance(result, click.Group) else []
        paths.extend([(name, sub) for sub in inner] or [(name,)])
    return paths


def command_at(path: tuple[str, ...]) -> click.Command:
    result: click.Command | None = cli
    for name in path:
        assert isinstance(result, click.Group)
        result = result.get_command(click.Context(result), name)
    assert result is not None
    return result
