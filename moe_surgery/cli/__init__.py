"""The `moe-surgery` command: parse, call the library, print. Library imports happen inside commands."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from moe_surgery.cli.lazy_group import LazyGroup
from moe_surgery.cli.terminal import Terminal
from moe_surgery.errors import MoeSurgeryError
from moe_surgery.version import __version__

__all__ = ["main"]

COMMANDS = (
    "inspect",
    "profile",
    "stats",
    "search",
    "rank",
    "plan",
    "evaluate",
    "report",
    "trace",
    "prune",
    "sweep",
    "repair",
    "merge",
    "verify",
    "card",
    "export",
    "generate",
    "bench",
    "demo",
    "doctor",
)
INTERRUPTED = 130
IO_ERROR = 5
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""The environment variable that has torch ask for huge pages for large tensors: hidden states of thousands of tokens
then take one page fault for each 2 MiB, not 512."""


class _Commands(LazyGroup):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would add an empty line
            if sys.stderr.isatty():
                click.echo(err=True)  # end the line with ^C
            raise click.Abort from None


@click.group(
    cls=_Commands,
    package=__name__,
    names=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="moe-surgery")
def cli() -> None:
    """Remove experts from mixture-of-experts checkpoints without loading the model.

    CKPT is a folder, a .safetensors file, example:tiny (a bundled model for trying things out), or a
    model on the hub such as openai/gpt-oss-20b, with @REVISION if not the latest. A path that exists
    wins, then the local hub cache, then the hub, from which only what a command needs is fetched;
    HF_HUB_OFFLINE=1 forbids that.

    \b
    moe-surgery inspect openai/gpt-oss-20b
    moe-surgery plan published:law --experts 8 -o law-8.json
    moe-surgery prune openai/gpt-oss-20b gpt-oss-law-8 --plan law-8.json
    moe-surgery verify gpt-oss-law-8 --source openai/gpt-oss-20b

    Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 usage, 3 malformed input,
    4 plan and checkpoint disagree, 5 input/output, 6 no space, 8 verification failed, 130 interrupted.
    """


def _one_line(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context else "moe-surgery"
    return f"{error.format_message().rstrip('.')} (see {path} --help)"


def _out_of_memory(error: BaseException) -> bool:
    """Python's error, or one of torch's allocators."""
    message = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in message or "out of memory" in message


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: run a command and exit with its code. Errors are one line, not a traceback."""
    terminal = Terminal()
    os.environ.setdefault(HUGE_PAGES, "1")  # before torch is imported
    try:
        code = cli.main(arguments, prog_name="moe-surgery", standalone_mode=False, obj=terminal)
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()  # its message is the help
        else:
            terminal.error(_one_line(error))
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        terminal.error("interrupted" + terminal.after_interrupt)
        code = INTERRUPTED
    except MoeSurgeryError as error:
        terminal.failed(error)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader closed the pipe
        code = IO_ERROR
    except OSError as error:
        terminal.failed(error)
        code = IO_ERROR
    except (MemoryError, RuntimeError) as error:
        if terminal.debug or not _out_of_memory(error):
            raise
        terminal.error("not enough memory; try smaller batches, a smaller --context or fewer experts")
        code = IO_ERROR
    sys.exit(code if isinstance(code, int) else 0)
