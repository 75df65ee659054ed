"""The exceptions a user can catch.

Every message is one line that says what is wrong, where (file, tensor, layer or option) and what
to do about it. Each class carries the exit code with which the command line ends.
"""

from __future__ import annotations

__all__ = [
    "CheckpointWarning",
    "DiskFullError",
    "InvalidInputError",
    "MoeSurgeryError",
    "OutputError",
    "PlanMismatchError",
    "UsageError",
    "VerificationError",
]


class MoeSurgeryError(Exception):
    """Base of everything this package raises on purpose.

    `exit_code` is what the command line returns for it: 2 usage, 3 malformed input, 4 plan and
    checkpoint disagree, 5 input/output, 6 no space, 8 verification failed.
    """

    exit_code = 1


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
