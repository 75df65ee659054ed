"""The commands and their options, as click has them."""

from __future__ import annotations

import click

from moe_surgery.cli import COMMANDS, cli


def command_paths() -> list[tuple[str, ...]]:
    """Every command that does something: those of a group by two words."""
    paths: list[tuple[str, ...]] = []
    for name in COMMANDS:
        found = cli.get_command(click.Context(cli), name)
        inner = list(found.commands) if isinstance(found, click.Group) else []
        paths.extend([(name, sub) for sub in inner] or [(name,)])
    return paths


def command_at(path: tuple[str, ...]) -> click.Command:
    found: click.Command | None = cli
    for name in path:
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), name)
    assert found is not None
    return found
