"""A whole file under a second name that takes no further disk space: reflink, else hard link."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from moe_surgery.checkpoint.fileops import UNSUPPORTED, FileOps
from moe_surgery.checkpoint.files import open_regular, printable_path
from moe_surgery.checkpoint.writer import output_failure
from moe_surgery.errors import OutputError

__all__ = ["share_file"]

_NO_LINKS = UNSUPPORTED | {errno.EPERM, errno.EMLINK}


def share_file(path: Path, target: Path, ops: FileOps) -> None:
    """Make the new file `target` with the content of the finished file `path`, both sharing their disk blocks.

    A reflink where the file system has them; the files are then independent. Else a hard link, and the file becomes
    read-only, since who writes into it in place changes it under all of its names.

    Raises OutputError where the file system can do neither, or a system call fails.
    """
    try:
        if not _cloned(path, target, ops):
            ops.make_read_only(path)
            ops.link(path, target)
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise OutputError(
                f"{printable_path(target)}: this file system can share files neither by reflink nor by hard link "
                f"({error.strerror}); pass `share=False` to write each file out"
            ) from error
        raise output_failure(error, target, f"share the blocks of {printable_path(path)} with") from error


def _cloned(path: Path, target: Path, ops: FileOps) -> bool:
    """Whether `target` could be made as a reflink; else it does not exist."""
    source = open_regular(path)
    try:
        fd = ops.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        try:
            ops.clone_range(source, 0, 0, fd, 0)  # 0 bytes: up to the end of the file
            ops.fsync(fd)
        except OSError as error:
            ops.unlink(target)
            if error.errno in UNSUPPORTED:
                return False
            raise
        finally:
            ops.close(fd)
    finally:
        os.close(source)
    return True
