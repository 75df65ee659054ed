"""What a verification finds, collected over all its checks."""

from __future__ import annotations

from collections.abc import Callable

from moe_surgery.errors import MoeSurgeryError, NetworkError

__all__ = ["Findings"]


class Findings:
    """Problems and notes in the order found, one line each, and the bytes read."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.bytes_read = 0
        self._progress = progress

    def attempt(self, check: Callable[[], None]) -> None:
        """Run `check`; an error of this package becomes a problem, but for one of the network."""
        try:
            check()
        except NetworkError:
            raise
        except MoeSurgeryError as error:
            self.failed(error)

    def failed(self, error: MoeSurgeryError) -> None:
        """`error` is a problem, listed once."""
        if str(error) not in self.problems:
            self.problems.append(str(error))

    def advance(self, nbytes: int) -> None:
        """`nbytes` more bytes were read."""
        self.bytes_read += nbytes
        self._progress(nbytes)
