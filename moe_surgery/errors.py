"""The exceptions a user can catch.

Every message is one line that says what is wrong, where (file, tensor, layer or parameter) and what
to do about it. Parameters are named in backticks as Python calls them (`max_tokens`, `overwrite=True`); the
command line shows its option instead. Each class carries the exit code with which the command line ends.
"""

from __future__ import annotations

import re

__all__ = [
    "PARAMETER",
    "CheckpointWarning",
    "DiskFullError",
    "InvalidInputError",
    "MoeSurgeryError",
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
    """Something worth knowing about a checkpoint that is read all the same; one line.

    The command line prints it as a note, once for each text.
    """


class UsageError(MoeSurgeryError):
    """An argument or option that cannot be meant: unknown value, missing choice, bad combination."""

    exit_code = 2


class InvalidInputError(MoeSurgeryError):
    """A file that breaks its format, or a checkpoint whose parts contradict each other."""

    exit_code = 3


class PlanMismatchError(MoeSurgeryError):
    """A plan or ranking that does not fit the checkpoint it is meant for."""

    exit_code = 4


class OutputError(MoeSurgeryError):
    """A path that cannot be read or written as asked: missing, exists, no permission, device error."""

    exit_code = 5


class DiskFullError(OutputError):
    """The output does not fit the space left on its file system (or within a quota or size limit)."""

    exit_code = 6


class VerificationError(MoeSurgeryError):
    """A checkpoint whose bytes are not what its manifest, or its source, says."""

    exit_code = 8
