"""When a failed request is sent again, and after how long."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Final

from moe_surgery.checkpoint.http_connections import Headers
from moe_surgery.errors import NetworkError

__all__ = ["TRANSIENT", "Retries", "delay_asked_for"]

TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""

FIRST_DELAY: Final = 0.25
LONGEST_DELAY: Final = 30.0
LONGEST_ASKED_FOR: Final = 600.0

log = logging.getLogger("moe_surgery")


class Retries:
    """The failures in a row of one read. Delays in seconds: 0.25, doubled each time, up to 30, a half of it random."""

    def __init__(self, where: str, wait: Callable[[float], None], *, most: int = 8) -> None:
        """Errors begin with `where`; `wait` sleeps; after `most` failures in a row it gives up."""
        self._where = where
        self._wait = wait
        self._most = most
        self._failures = 0

    def failed(self, reason: str, asked_for: float | None = None) -> None:
        """Wait before the next attempt, `asked_for` seconds if the server named a delay.

        Raises NetworkError, which ends with `reason`, after the last attempt or for a delay over 10 minutes.
        """
        self._failures += 1
        attempts = "1 attempt" if self._failures == 1 else f"{self._failures} attempts"
        if self._failures >= self._most:
            raise NetworkError(f"{self._where}: {reason}, after {attempts}")
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self._failures - 1))
        delay *= random.uniform(0.5, 1)
        if asked_for is not None:
            if asked_for > LONGEST_ASKED_FOR:
                raise NetworkError(f"{self._where}: {reason}, and asks to wait for {asked_for:.0f} s")
            delay = max(asked_for, min(delay, 1))
        log.info("%s: %s; trying again in %.1f s", self._where, reason, delay)
        self._wait(delay)

    def succeeded(self) -> None:
        """Bytes have arrived: failures are counted from 0 again."""
        self._failures = 0


def delay_asked_for(headers: Headers) -> float | None:
    """Seconds to wait according to Retry-After or the hub's RateLimit header; None without a number."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    fields = dict(field.strip().partition("=")[::2] for field in headers.get("ratelimit", "").split(";"))
    rest = fields.get("t", "")
    return float(rest) if fields.get("r") == "0" and rest.isascii() and rest.isdecimal() else None
