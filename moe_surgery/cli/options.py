"""Options and argument types that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from moe_surgery.cli.terminal import Terminal
from moe_surgery.errors import UsageError

__all__ = ["EXPERT_LIST", "SIZE", "check_new_output", "common", "terminal_of"]

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


def terminal_of(context: click.Context) -> Terminal:
    """The terminal of this run (made here when a command is called without `main`)."""
    return context.find_root().ensure_object(Terminal)


def check_new_output(output: Path | None, inputs: Iterable[Path | None]) -> None:
    """Raise UsageError where `-o` names a folder or one of the inputs."""
    if output is None or not output.exists():
        return
    if output.is_dir():
        raise UsageError(f"-o {output}: is a folder; name the file to write")
    if any(i is not None and i.exists() and output.samefile(i) for i in inputs):
        raise UsageError(f"-o {output}: is the input; name another file")


def common(command: Command) -> Command:
    """--json, -v, -q and --debug."""

    def switch(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
        def apply(context: click.Context, _: click.Parameter, value: bool) -> None:
            if value:
                setattr(terminal_of(context), name, True)

        return apply

    def verbosity(step: int) -> Callable[[click.Context, click.Parameter, bool], None]:
        def apply(context: click.Context, _: click.Parameter, value: bool) -> None:
            if value:
                terminal_of(context).verbosity = step

        return apply

    flags: tuple[tuple[tuple[str, ...], Any, str], ...] = (
        (("--debug",), switch("debug"), "Show the traceback of an error."),
        (("-q", "--quiet"), verbosity(-1), "No progress and no remarks."),
        (("-v", "--verbose"), verbosity(1), "Say more on stderr."),
        (("--json",), switch("json"), "Print the result as JSON on stdout."),
    )
    for names, callback, text in flags:
        command = click.option(*names, is_flag=True, expose_value=False, callback=callback, help=text)(
            command
        )
    return command


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.2
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if not match or match[2].upper() not in _UNITS:
            self.fail(f"{value!r} is no size; write 5GB (10^9 bytes each), 500MB or 4GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].upper()])


class _ExpertList(click.ParamType):  # type: ignore[type-arg]
    """ "all" becomes None, "0,3,8-11" a list of numbers."""

    name = "LIST|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if value.strip() == "all":
            return "all"
        kept: list[int] = []
        for item in value.split(","):
            match = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5}))?\s*", item)
            if not match:
                self.fail(
                    f"{item!r} is no expert; write all, or numbers and ranges such as 0,3,8-11", param, ctx
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"{item!r} runs backwards; write {last}-{first}, or list the experts", param, ctx)
            kept.extend(range(first, last + 1))
        return kept


SIZE = _Size()
EXPERT_LIST = _ExpertList()
