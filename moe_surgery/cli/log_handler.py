"""Log messages of the library on the terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable

__all__ = ["LogHandler"]


class LogHandler(logging.Handler):
    """Passes warnings to `note`, other messages to `detail`."""

    def __init__(self, note: Callable[[str], None], detail: Callable[[str], None]) -> None:
        super().__init__()
        self._note, self._detail = note, detail

    def emit(self, record: logging.LogRecord) -> None:
        show = self._note if record.levelno >= logging.WARNING else self._detail
        show(record.getMessage())
