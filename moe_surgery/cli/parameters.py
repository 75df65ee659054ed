"""The library's messages name parameters (`max_tokens`); the command line shows its options (--max-tokens)."""

from __future__ import annotations

import re

import click

from moe_surgery.errors import PARAMETER

__all__ = ["with_options"]


def with_options(message: str, command: click.Command | None) -> str:
    """`message` with parameters replaced by the options and arguments of `command`.

    A field of an object (`sampling.top_k`) becomes the option named after both (--sampling-top-k) or after
    the field (`sampling.seed`: --seed). Other names stay unchanged.
    """
    parameters = {p.name: p for p in command.params if p.name} if command else {}

    def option(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        for key in (name.replace(".", "_"), name.rpartition(".")[2]):
            if parameter := parameters.get(key):
                return _option_name(parameter, value)
        return match[0]

    return PARAMETER.sub(option, message)


def _option_name(parameter: click.Parameter, value: str | None) -> str:
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name
    names = parameter.secondary_opts if value == "False" and parameter.secondary_opts else parameter.opts
    return next((name for name in names if name.startswith("--")), names[0])
