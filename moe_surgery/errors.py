"""The exceptions a user can catch.

Every message is one line that says what is wrong, where (file, tensor, layer or parameter) and what
to do about it. Parameters are named in backticks as Python calls them (`max_tokens`, `overwrite=True`); the
command line shows the option. Each class has the exit code of the command line.
"""

from __future__ import annotations

import re

__all__ = [
    "PARAMETER",
    "CheckpointWarning",
    "DiskFullError",
    "InvalidInputError",
    "MoeSurgeryError",
    "NetworkError",
    "OutputError",
    "PlanMismatchError",
    "UsageError",
    "VerificationError",
]

PARAMETER = re.compile(r"`([a-z_][a-z0-9_]*(?:\.[a-z_][a-z0-9_]*)?)(?:=(True|False))?`")
"""How a message names a parameter, as in `dtype`, `sampling.top_k` or `overwrite=True`."""


class MoeSurgeryError(Exception):
    """Base of everything this package raises on purpose.

    `exit_code` is what the command line returns for it: 2 usage, 3 malformed input, 4 plan and
    checkpoint disagree, 5 input/output, 6 no space, 8 verification failed.
    """

    exit_code = 1

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that the message names, in its order: ("max_tokens",)."""
        return tuple(dict.fromkeys(name for name, _ in PARAMETER.findall(str(self))))


class CheckpointWarning(UserWarning):
    """A one-line note about a checkpoint that can be read anyway.

    The command line prints it as a note, once for each text.
    """


class UsageError(MoeSurgeryError):
    """An invalid argument or option: unknown value, missing choice, bad combination."""

    exit_code = 2


class InvalidInputError(MoeSurgeryError):
    """A malformed file, or a checkpoint whose parts contradict each other."""

    exit_code = 3


class PlanMismatchError(MoeSurgeryError):
    """A plan or ranking that does not fit the checkpoint."""

    exit_code = 4


class OutputError(MoeSurgeryError):
    """A path that cannot be read or written: missing, exists, no permission, device error."""

    exit_code = 5


class DiskFullError(OutputError):
    """The output does not fit the free space of its file system, a quota or a size limit."""

    exit_code = 6


class NetworkError(OutputError):
    """A server that cannot be reached, refuses, or fails after several attempts.

    A run that was writing keeps its finished files; the same call resumes it.
    """


class VerificationError(MoeSurgeryError):
    """A checkpoint whose bytes do not match its manifest or its source."""

    exit_code = 8
