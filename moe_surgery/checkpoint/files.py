"""Opening and reading input files by position, without ever blocking on a FIFO or device.

Interrupted system calls (EINTR) are retried by Python itself; short reads are continued here.
"""

from __future__ import annotations

import errno
import os
import stat

from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError, OutputError

__all__ = ["is_safetensors", "open_regular", "printable_path", "read_small_file"]

_PATH_LIMIT = 1024
_READ_BYTES = 1 << 20
_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def printable_path(path: str | os.PathLike[str]) -> str:
    """`path` for a message: unprintable characters escaped, only absurd lengths shortened."""
    return printable(os.fspath(path), limit=_PATH_LIMIT)


def open_regular(path: str | os.PathLike[str]) -> int:
    """A read-only descriptor of a regular file, or of the target of a symbolic link.

    Never blocks: a FIFO without a writer is refused like anything else that is not a regular file. The
    caller closes the descriptor.

    Raises InvalidInputError for a directory, FIFO, socket or device, OutputError for a missing
    file, a dangling symbolic link, missing permission or any other system error.
    """
    try:
        fd = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        raise _open_failure(path, error) from None
    except ValueError as error:
        raise OutputError(f"{printable_path(path)}: not a usable path: {error}") from None
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        os.close(fd)
        raise OutputError(f"{printable_path(path)}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise InvalidInputError(f"{printable_path(path)}: is {_kind(mode)}, not a regular file")
    return fd


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a safetensors file, as statistics are, rather than JSON, as rankings are, or a folder.

    Raises OutputError where `path` does not exist.
    """
    if not os.path.exists(path):
        raise OutputError(f"{printable_path(path)}: cannot open: no such file or folder")
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(9)
    return start[7:] == b"\0{"  # the high byte of the header length: never text


def read_small_file(path: str | os.PathLike[str], *, limit: int, what: str) -> bytes:
    """All bytes of a regular file that may hold at most `limit`; `what` names its role in errors.

    Raises as `open_regular`, InvalidInputError for more than `limit` bytes (before reading them,
    and also if the file grows while it is read), OutputError for a read that fails.
    """
    fd = open_regular(path)
    try:
        if os.fstat(fd).st_size > limit:
            raise _too_large(path, limit, what)
        return _read_to_end(fd, path, limit, what)
    except OSError as error:
        raise OutputError(f"{printable_path(path)}: cannot read {what}: {error.strerror}") from None
    finally:
        os.close(fd)


def _read_to_end(fd: int, path: str | os.PathLike[str], limit: int, what: str) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while piece := os.pread(fd, min(_READ_BYTES, limit + 1 - size), size):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise _too_large(path, limit, what)
    return b"".join(pieces)


def _too_large(path: str | os.PathLike[str], limit: int, what: str) -> InvalidInputError:
    return InvalidInputError(f"{printable_path(path)}: larger than the {limit} bytes allowed for {what}")


def _open_failure(path: str | os.PathLike[str], error: OSError) -> InvalidInputError | OutputError:
    name = printable_path(path)
    if error.errno == errno.ENOENT and _is_link(path):
        return OutputError(f"{name}: is a symbolic link to a file that does not exist")
    if error.errno in (errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP):
        # open() of a socket, or of a device without a driver.
        return InvalidInputError(f"{name}: is a socket or device, not a regular file")
    return OutputError(f"{name}: cannot open: {error.strerror}")


def _is_link(path: str | os.PathLike[str]) -> bool:
    try:
        return stat.S_ISLNK(os.stat(path, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _kind(mode: int) -> str:
    return next((kind for test, kind in _KINDS if test(mode)), "special")
