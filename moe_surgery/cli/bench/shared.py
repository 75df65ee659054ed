"""Shared by the benchmarks: lists of numbers, and collecting results until Ctrl-C."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import click

from moe_surgery.cli.options import OUTPUT, SIZE
from moe_surgery.cli.terminal import Terminal

__all__ = [
    "NUMBERS",
    "SIZES",
    "collect",
    "finish",
    "machine",
    "plot_option",
]

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])
INTERRUPTED = "; figures are of what was measured so far"


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.2
    """ "4,8,16" -> [4, 8, 16], without duplicates."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*", value):
            self.fail(f"{value!r} is not a list of numbers; write 4,8,16", param, ctx)
        return list(dict.fromkeys(int(n) for n in value.split(",")))


class _Sizes(click.ParamType):  # type: ignore[type-arg]
    """ "6GB,8GB" -> [6_000_000_000, 8_000_000_000], without duplicates."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return list(dict.fromkeys(SIZE.convert(part, param, ctx) for part in value.split(",")))


NUMBERS = _Numbers()
SIZES = _Sizes()


def plot_option(command: Command) -> Command:
    """--plot."""
    return click.option("--plot", type=OUTPUT, help="Write a chart here: .png, .svg or .pdf.")(command)


def collect(results: Iterator[T], describe: Callable[[T], str], terminal: Terminal) -> tuple[list[T], bool]:
    """All `results`, and whether Ctrl-C stopped them early; each is printed with -v."""
    collected: list[T] = []
    try:
        for result in results:
            collected.append(result)
            terminal.detail(describe(result))
    except KeyboardInterrupt:
        if isinstance(results, Generator):
            results.close()
        return collected, True
    return collected, False


def finish(terminal: Terminal, interrupted: bool, measured: bool) -> None:
    """Abort if Ctrl-C stopped the benchmark; `measured`: whether there are any figures."""
    if interrupted:
        terminal.after_interrupt = INTERRUPTED if measured else "; nothing measured yet"
        raise click.Abort


def machine() -> dict[str, object]:
    """Machine and versions, for JSON."""
    from moe_surgery.doctor import examine

    report = examine()
    return {"machine": report["machine"], "versions": report["versions"]}
