"""The one place that prints: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from moe_surgery.cli.parameters import with_options
from moe_surgery.errors import CheckpointWarning

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from moe_surgery.engine.fetch import Fetch
    from moe_surgery.progress import OnProgress, Progress

__all__ = ["Terminal", "count", "fetch_text", "size"]

PLAIN_PROGRESS_SECONDS = 10.0
PIPE_WIDTH = 200
COLUMN_GAP = 3
STAGES = {
    "prune": "pruning",
    "sweep": "making variants",
    "merge": "merging",
    "export": "exporting",
    "verify": "verifying",
    "answer": "answering",
    "profile": "profiling",
    "search": "searching",
    "energy": "reading weights of experts",
    "evaluate": "evaluating",
    "generate": "generating",
    "trace": "tracing",
    "targets": "running the full model",
    "first step": "comparing plans",
    "repair": "repairing",
}
Advance = Callable[[int], None]


class Terminal:
    """Owns the consoles. Everything printed is escaped: names come from untrusted files."""

    def __init__(self) -> None:
        self.verbosity = 0
        self.debug = False
        self.json = False
        self.after_interrupt = ""
        self.command: click.Command | None = None
        self._notes: set[str] = set()
        self._standing = ""

    def say(self, text: str) -> None:
        """A line on stderr, unless -q."""
        if self.verbosity >= 0:
            click.echo(_safe(text), err=True)

    def detail(self, text: str) -> None:
        """A line on stderr with -v."""
        if self.verbosity > 0:
            click.echo(_safe(text), err=True)

    def error(self, text: str) -> None:
        click.echo(f"moe-surgery: {_safe(with_options(text, self.command))}", err=True)

    def failed(self, error: BaseException) -> None:
        """One line for an error; the traceback as well with --debug."""
        if self.debug:
            traceback.print_exception(error)
        self.error(str(error))

    def result(self, text: str) -> None:
        """A line of the command's result, on stdout."""
        click.echo(_safe(text))

    def stream(self, text: str) -> None:
        """Generated text on stdout, unbuffered; line breaks are kept."""
        click.echo(_safe_lines(text), nl=False)

    def aside(self, text: str) -> None:
        """Generated text that is not the result, on stderr, dimmed on a terminal, unless -q."""
        if self.verbosity >= 0:
            dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
            click.echo(
                click.style(_safe_lines(text), dim=True) if dim else _safe_lines(text), err=True, nl=False
            )

    def data(self, value: object) -> None:
        """The command's result as JSON, on stdout."""
        click.echo(json.dumps(value, indent=2, default=str))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table on stdout; the first column is left-aligned, the others right. A table wider than the
        terminal is split into several, each with the first column."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        self.result(title)  # rich would wrap it to the width of a narrow table
        console = _console(sys.stdout)
        cells = [list(map(_safe, row)) for row in [columns, *rows]]
        for numbers in _split_columns(cells, console.width):
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            for number in numbers:
                first = number == 0
                table.add_column(
                    cells[0][number],
                    justify="left" if first else "right",
                    no_wrap=not first,
                    overflow="fold",
                    max_width=console.width // 2 - COLUMN_GAP if first and len(columns) > 1 else None,
                )
            for row in cells[1:]:
                table.add_row(*(row[number] for number in numbers))
            console.print(table)

    def note(self, text: str) -> None:
        """A note on stderr, unless -q; each is printed once."""
        if text not in self._notes:
            self._notes.add(text)
            self.say(f"note: {with_options(text, self.command)}")

    def unfinished(self, folders: Iterable[Path]) -> None:
        """Say which partial folders of other runs there are, and how large they are."""
        for folder in folders:
            nbytes = sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) if folder.is_dir() else 0
            self.say(
                f"note: {folder} holds {size(nbytes)} of another, unfinished run; delete it if you do not need it"
            )

    def fetching(self, fetch: Fetch) -> None:
        """Say what is about to be fetched."""
        self.say(f"fetching {fetch_text(fetch)}")

    @contextmanager
    def notes(self) -> Iterator[None]:
        """Within the block print the library's CheckpointWarnings and logged warnings as notes, and its
        other log messages with -v."""
        import logging

        from moe_surgery.cli.log_handler import LogHandler

        logger, handler = logging.getLogger("moe_surgery"), LogHandler(self.note, self.detail)
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", CheckpointWarning)
                warnings.showwarning = self._warning_printer(warnings.showwarning)
                yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)

    def _warning_printer(self, default: Callable[..., None]) -> Callable[..., None]:
        """For warnings.showwarning: a CheckpointWarning becomes a note, others go to `default`."""

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, CheckpointWarning):
                self.note(str(message))
            else:
                default(message, category, *rest, **more)

        return show

    @contextmanager
    def job(self) -> Iterator[OnProgress]:
        """Show each stage of a job while the block runs; yields the library's `progress`."""
        with ExitStack() as stack:
            last: Progress | None = None
            advance: Advance = lambda _: None  # noqa: E731

            def show(progress: Progress) -> None:
                nonlocal last, advance
                if last is None or last.stage != progress.stage:
                    stack.close()  # the previous stage's bar
                    title = STAGES[progress.stage]
                    advance = stack.enter_context(self.progress(title, progress.total, progress.unit))
                    last = None
                self._standing = f", {progress.note}" if progress.note else ""
                advance(progress.done - (last.done if last else 0))
                last = progress

            yield show

    @contextmanager
    def progress(self, title: str, total: int, unit: str = "bytes") -> Iterator[Advance]:
        """Show amount done, rate and time left while the block runs; yields a function to call with each
        new number of `unit`s done."""
        if self.verbosity < 0 or total <= 0:
            yield lambda _: None
        elif sys.stderr.isatty():
            yield from self._bar(title, total, unit)
        else:
            yield _plain(title, total, unit, lambda text: self.say(text + self._standing))

    def _bar(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                speed = task.finished_speed or task.speed
                return Text("" if speed is None else f"{speed:,.{0 if speed >= 10 else 1}f}/s")

        amount = (
            (DownloadColumn(), TransferSpeedColumn())
            if unit == "bytes"
            else (MofNCompleteColumn(), TextColumn(unit, markup=False), Rate())
        )
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *amount,
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda nbytes: bar.update(task, advance=nbytes, description=title + self._standing)


def _safe(text: str) -> str:
    """`text` with control characters, line breaks included, as visible escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _safe_lines(text: str) -> str:
    return "\n".join(map(_safe, text.expandtabs(4).split("\n")))


def _plain(title: str, total: int, unit: str, say: Callable[[str], None]) -> Advance:
    """Progress for logs: a line every few seconds."""

    def amount(value: float) -> str:
        return size(value) if unit == "bytes" else f"{value:,.0f}"

    of = "" if unit == "bytes" else f" {unit}"
    done, start = 0, time.monotonic()
    last = start

    def advance(nbytes: int) -> None:
        nonlocal done, last
        done += nbytes
        now = time.monotonic()
        if now - last >= PLAIN_PROGRESS_SECONDS:
            last = now
            rate = done / (now - start)
            left = (total - done) / rate if rate else 0
            say(f"{title}: {amount(done)} of {amount(total)}{of}, {amount(rate)}/s, {left:.0f} s left")

    return advance


def _split_columns(cells: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns in groups that fit `width`, the first column in each (at most half of `width`)."""
    widths = [max(map(len, column)) + COLUMN_GAP for column in zip(*cells, strict=True)]
    first = min(widths[0], width // 2)
    groups: list[list[int]] = [[0]]
    used = first
    for number, needed in enumerate(widths[1:], 1):
        if used + needed > width and len(groups[-1]) > 1:
            groups.append([0])
            used = first
        groups[-1].append(number)
        used += needed
    return groups


def _console(file: TextIO) -> Console:
    from rich.console import Console

    # A pipe or file has no width.
    width = None if file.isatty() or os.environ.get("COLUMNS", "").isdigit() else PIPE_WIDTH
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def size(nbytes: float) -> str:
    """Bytes in decimal units: 13.76 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"


def fetch_text(fetch: Fetch) -> str:
    """6.13 GB of the 13.76 GB of owner/name@commit."""
    return f"{size(fetch.nbytes)} of the {size(fetch.total)} of {fetch.name}"


def count(number: float) -> str:
    """A number of parameters: 20.9B, 597.4M."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return f"{number:.0f}"
