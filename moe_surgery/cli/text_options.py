"""Options of commands that read texts: files of them, or one prompt."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from moe_surgery.cli.options import DOMAIN_HELP
from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from moe_surgery.quality.text_files import TextFile

__all__ = [
    "TextArguments",
    "generate_option",
    "optional_text_options",
    "prompt_options",
    "read_stdin",
    "text_options",
]

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class TextArguments:
    """What `text_options` reads from the command line.

    `limits` are --max-tokens and --context, as keyword arguments of the jobs that read texts.
    """

    paths: tuple[Path, ...]
    domains: tuple[str, ...]
    format: str | None
    limits: dict[str, Any] = field(default_factory=dict)

    def files(self) -> tuple[TextFile, ...]:
        """The files with their domains and formats; raises as `text_files`."""
        from moe_surgery.quality.corpus import text_files

        return text_files(self.paths, self.domains, self.format)


def prompt_options(command: Command) -> Command:
    """--prompt and --chat, for commands that run one text; without either they read it with `read_stdin`."""
    for option in (
        click.option("--chat", help="Message to answer, using the checkpoint's chat template."),
        click.option("--prompt", help="Text to start from; default: stdin."),
    ):
        command = option(command)
    return command


def read_stdin() -> str:
    """All of stdin. Raises UsageError where it is not UTF-8."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin: not UTF-8 at byte {error.start}") from None


def generate_option(what: str) -> Callable[[Command], Command]:
    """--generate, for commands that let the model continue texts first; `what` says which."""
    return click.option("--generate", metavar="N", type=int, help=f"Generate up to N tokens first: {what}.")


def text_options(command: Command, absent: str | None = None) -> Command:
    """--texts, --domain, --format, --max-tokens and --context as one argument `texts`.

    `absent` says what the command does without texts; None: it needs them.
    """

    @wraps(command)
    def run(
        *args: Any, max_tokens: int | None, context: int | None, texts: TextArguments, **kwargs: Any
    ) -> Any:
        texts = replace(texts, limits={"max_tokens": max_tokens, "context": context})
        return command(*args, texts=texts, **kwargs)

    for option in (
        click.option(
            "--context", type=int, help="Context length in tokens; longer texts are split; default: 4096."
        ),
        click.option("--max-tokens", type=int, help="Maximum tokens per domain; default: all."),
    ):
        option(run)
    return cast(Command, _text_files(run, absent))


def optional_text_options(command: Command) -> Command:
    """--texts, --domain and --format as one argument `texts`, for a command that also works without any."""
    return _text_files(command, "measure costs only")


def _text_files(command: Command, absent: str | None) -> Command:
    @wraps(command)
    def run(
        *args: Any, texts: tuple[Path, ...], domains: tuple[str, ...], format: str | None, **kwargs: Any
    ) -> Any:
        return command(*args, texts=TextArguments(texts, domains, format), **kwargs)

    for option in (
        click.option(
            "--format",
            type=click.Choice(["text", "jsonl", "chat"]),
            help='Plain text, {"text": ...} rows, or {"messages": [...]} rows; default: by name and first row.',
        ),
        click.option(
            "--domain",
            "domains",
            metavar="NAME",
            multiple=True,
            help=f"{DOMAIN_HELP}: once for all files, or once per file; default: the file's name.",
        ),
        click.option(
            "--texts",
            metavar="FILE",
            type=click.Path(path_type=Path),
            multiple=True,
            required=absent is None,
            help="Text file, or rows in .jsonl or .json, plain or gzip; repeat for more"
            + ("." if absent is None else f"; default: {absent}."),
        ),
    ):
        option(run)
    return cast(Command, run)
