"""The system calls through which the engine reads sources and writes output.

Everything that moves bytes or changes a directory goes through a `FileOps`: one place that lists
what the engine needs from an operating system, and where tests inject faults. Nothing here
interprets an error: `OSError` passes through.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys
from functools import cache
from typing import Final

FICLONERANGE: Final = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
F_FULLFSYNC: Final = 51  # <sys/fcntl.h> on macOS: flush the drive's own cache as well
F_NOCACHE: Final = 48  # <sys/fcntl.h> on macOS: reads and writes do not stay in the cache
RWF_DONTCACHE: Final = 0x80  # linux/fs.h, from Linux 6.14
SYS_CACHESTAT: Final = 451  # of every architecture; linux/mman.h
AT_FDCWD: Final = -100 if sys.platform == "linux" else -2
RENAME_NOREPLACE: Final = 1  # linux/fs.h
RENAME_EXCHANGE: Final = 2
RENAME_SWAP: Final = 2  # <sys/stdio.h> on macOS
RENAME_EXCL: Final = 4

UNSUPPORTED: Final = frozenset(
    {errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTSUP}
)


class FileOps:
    """System calls of the engine; subclass to inject faults. EINTR is retried by Python (PEP 475)."""

    _uncached = sys.platform == "linux"

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def open_direct(self, path: str | os.PathLike[str]) -> tuple[int, bool]:
        """Open for reads that bypass the page cache; False where the file system does not support that.

        With O_DIRECT buffer, offset and length must be multiples of the device's block size.
        """
        if hasattr(os, "O_DIRECT"):
            try:
                return self.open(path, os.O_RDONLY | os.O_DIRECT), True
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
        fd = self.open(path, os.O_RDONLY)
        if sys.platform != "darwin":
            return fd, False
        fcntl.fcntl(fd, F_NOCACHE, 1)
        return fd, True

    def close(self, fd: int) -> None:
        os.close(fd)

    def pread_into(self, fd: int, buffer: memoryview, offset: int, cache: bool = False) -> int:
        """Read at `offset` into `buffer`; returns the bytes read, which may be fewer (0 at the end).

        Pages that the read brings into the page cache are dropped again (pages that were there stay):
        they are used once, should not evict the user's working set, and on virtual machines growing
        the cache costs more than the read itself (measured: 2.5 times the time). With `cache` they
        stay, to be read again soon and then dropped with `drop_cache`.
        """
        if self._uncached and not cache:
            try:
                return os.preadv(fd, [buffer], offset, RWF_DONTCACHE)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self._uncached = False
        return os.preadv(fd, [buffer], offset)

    def stop_readahead(self, fd: int) -> None:
        """Make reads of `fd` bring in the bytes asked for and none beyond them."""
        if sys.platform == "linux":
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def cached_bytes(self, fd: int, offset: int, nbytes: int) -> int:
        """How much of the range is in the page cache, in whole pages; all of it where the system does not say."""
        if sys.platform != "linux":
            return nbytes
        wanted, found = struct.pack("=QQ", offset, nbytes), ctypes.create_string_buffer(40)
        if _library().syscall(ctypes.c_long(SYS_CACHESTAT), fd, wanted, found, 0):
            return nbytes  # before Linux 6.5, or a file of another user
        pages: int = struct.unpack_from("=Q", found)[0]
        return pages * mmap.PAGESIZE

    def drop_cache(self, fd: int, offset: int, nbytes: int) -> None:
        """Drop the page cache's copy of a range that was read with `cache`."""
        if sys.platform == "linux":
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        """Write at `offset`; returns the bytes written, which may be fewer."""
        return os.pwrite(fd, data, offset)

    def clone_range(self, source: int, source_offset: int, nbytes: int, target: int, offset: int) -> None:
        """Share the extents of `source` with `target` (reflink); offsets and size must be block-aligned.

        Raises OSError with an errno in `UNSUPPORTED` where the file system, or the pair of files,
        does not support it.
        """
        if sys.platform != "linux":
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        fcntl.ioctl(target, FICLONERANGE, struct.pack("=qQQQ", source, source_offset, nbytes, offset))

    def set_direct(self, fd: int, direct: bool) -> bool:
        """Make writes to `fd` bypass the page cache (O_DIRECT), or not; False where that is not supported.

        Direct writes need buffer, offset and length to be multiples of the device's block size.
        """
        if not hasattr(os, "O_DIRECT"):
            return False
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        new_flags = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, new_flags)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return False
            raise
        return True

    def allocate(self, fd: int, nbytes: int) -> bool:
        """Extend a file to `nbytes` and allocate its disk blocks; False where the file system cannot do so at once."""
        library = _library()
        if not hasattr(library, "fallocate"):  # posix_fallocate would write every block instead
            return False
        if not library.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
            return True
        code = ctypes.get_errno()
        if code in UNSUPPORTED:
            return False
        raise OSError(code, os.strerror(code))

    def start_writeback(self, fd: int, offset: int, nbytes: int) -> None:
        """Ask the kernel to start writing a range out, so that the final flush is short."""
        if sys.platform == "linux":
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def fsync(self, fd: int) -> None:
        if sys.platform == "darwin":
            fcntl.fcntl(fd, F_FULLFSYNC)
        else:
            os.fsync(fd)

    def fsync_dir(self, path: str | os.PathLike[str]) -> None:
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.fsync(fd)
        finally:
            self.close(fd)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        os.mkdir(path)

    def unlink(self, path: str | os.PathLike[str]) -> None:
        os.unlink(path)

    def link(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
        """A second name for the file `old` (hard link); FileExistsError if `new` exists."""
        os.link(old, new, follow_symlinks=False)

    def make_read_only(self, path: str | os.PathLike[str]) -> None:
        """Take away everyone's permission to write to a file."""
        os.chmod(path, os.stat(path).st_mode & 0o7555)

    def rename(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
        """Rename, replacing `new` if it exists (a file over a file)."""
        os.rename(old, new)

    def rename_new(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
        """Rename; FileExistsError if `new` exists, checked atomically where the kernel supports it."""
        if not _rename_flags(old, new, RENAME_NOREPLACE if sys.platform == "linux" else RENAME_EXCL):
            if os.path.lexists(new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(new))
            os.rename(old, new)

    def exchange(self, one: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
        """Swap two names atomically. OSError(ENOTSUP) where the file system cannot."""
        if not _rename_flags(one, other, RENAME_EXCHANGE if sys.platform == "linux" else RENAME_SWAP):
            raise OSError(errno.ENOTSUP, "this file system cannot exchange two names", os.fspath(other))

    def free_bytes(self, path: str | os.PathLike[str]) -> int:
        """Bytes that this user may still write on the file system of `path`."""
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize


@cache
def _library() -> ctypes.CDLL:
    """The C library."""
    return ctypes.CDLL(None, use_errno=True)


def _rename_flags(old: str | os.PathLike[str], new: str | os.PathLike[str], flags: int) -> bool:
    """renameat2 (Linux) or renamex_np (macOS); False where kernel or file system lacks the flag."""
    library = _library()
    source, target = os.fsencode(old), os.fsencode(new)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(AT_FDCWD, source, AT_FDCWD, target, flags)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(source, target, flags)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED - {errno.EXDEV}:
        return False
    raise OSError(code, os.strerror(code), os.fspath(old), None, os.fspath(new))
