"""An output folder that appears whole or not at all, and a partial one that can be resumed.

Everything is written to the sibling `.OUT.partial-DIGEST`, which is renamed to OUT as the last step.
DIGEST is that of the job, so the same command finds its own partial folder. A file counts as finished
only if the journal lists it and its bytes have the recorded digest.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.writer import output_failure
from moe_surgery.errors import OutputError

__all__ = ["Staging", "output_lock", "stale_partials"]

_JOURNAL = ".journal"


class Staging:
    """The folder in which the output `out` is built, locked against a second run.

    Use as a context manager: leaving it releases the lock; the folder stays unless it was published
    or discarded, and the next run with the same digest resumes from it. `finished` holds the journal
    entries of earlier runs, oldest first.
    """

    def __init__(self, out: Path, digest: str, ops: FileOps) -> None:
        """Lock `out` and create or resume its partial folder.

        Raises OutputError where another run holds the lock or the folder cannot be created.
        """
        self.out = out
        self._ops = ops
        self.folder = out.with_name(f".{out.name}.partial-{digest}")
        self._lock_path = out.with_name(f".{out.name}.lock")
        self._lock = _acquire_lock(self._lock_path, out)
        try:
            self._replaces = _file_id(out)
            self._prepare()
        except OSError as error:
            self._release()
            raise output_failure(error, self.folder, "create") from error
        except BaseException:
            self._release()
            raise

    def _prepare(self) -> None:
        try:
            self._ops.mkdir(self.folder)
        except FileExistsError:
            if self.folder.is_symlink() or not self.folder.is_dir():
                raise OutputError(
                    f"{printable_path(self.folder)}: is not a folder of an earlier run; remove it"
                ) from None
        self.finished = self._read_journal()
        self._remove_unlisted({_JOURNAL, *(str(e.get("name")) for e in self.finished)})

    def _remove_unlisted(self, listed: set[str]) -> None:
        """Remove what the journal does not list: leftovers of a killed run, or the replaced output of a
        run that was killed right after publishing."""
        for entry in list(os.scandir(self.folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name not in listed or entry.is_symlink():
                self._ops.unlink(entry.path)

    def _read_journal(self) -> list[dict[str, object]]:
        """The journal's entries; an incomplete last line is cut off."""
        path = self.folder / _JOURNAL
        entries: list[dict[str, object]] = []
        self._journal_end = 0
        raw = path.read_bytes() if path.exists() else b""
        for line in raw.splitlines(keepends=True):
            body, _, check = line.rpartition(b" ")
            if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(body).encode() != check[:-1]:
                os.truncate(path, self._journal_end)
                break
            entries.append(json.loads(body))
            self._journal_end += len(line)
        return entries

    def record(self, entry: dict[str, object]) -> None:
        """Append `entry`, which marks a file as finished, to the journal and flush it."""
        path = self.folder / _JOURNAL
        body = json.dumps(entry).encode()
        line = body + b" " + xxhash.xxh3_64_hexdigest(body).encode() + b"\n"
        try:
            fd = self._ops.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
            try:
                done = 0
                while done < len(line):
                    done += self._ops.pwrite(fd, line[done:], self._journal_end + done)
                self._ops.fsync(fd)
            finally:
                self._ops.close(fd)
        except OSError as error:
            raise output_failure(error, path, "write") from error
        self._journal_end += len(line)

    def publish(self, *, overwrite: bool) -> None:
        """Rename the folder to `out`. With `overwrite` the folder that was there at the start is
        exchanged with it and removed.

        Raises OutputError where something else was created under that name since.
        """
        replaced: Path | None = None
        try:
            if (journal := self.folder / _JOURNAL).exists():
                self._ops.unlink(journal)
            self._ops.fsync_dir(self.folder)
            if overwrite and self._replaces is not None and os.path.lexists(self.out):
                replaced = self._exchange()
            else:
                self._ops.rename_new(self.folder, self.out)
            self._ops.fsync_dir(self.out.parent)
        except FileExistsError:
            raise OutputError(
                f"{printable_path(self.out)}: was created by another program during this run; it was not touched"
            ) from None
        except OSError as error:
            raise output_failure(error, self.out, "rename into place") from error
        finally:
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)

    def publish_files(self, names: Sequence[str], *, overwrite: bool) -> None:
        """Move the files `names` next to `out`, the first one last, so that a set is there once its first file is.

        With `overwrite` files of those names are replaced. On an error all is as it was, but where only the last
        flush failed. Raises OutputError where something else was created under one of the names since.
        """
        targets = {name: self.out.with_name(name) for name in names}
        move = self._ops.rename if overwrite else self._ops.rename_new
        first, *others = names
        moved: list[str] = []
        replaced: list[str] = []
        try:
            self._ops.fsync_dir(self.folder)
            if others and overwrite:
                for name in (name for name in names if os.path.lexists(targets[name])):
                    self._ops.rename(targets[name], self.folder / f"{name}.old")
                    replaced.append(name)
            for name in (*others, first):
                if others and name == first:
                    self._ops.fsync_dir(self.out.parent)
                move(self.folder / name, targets[name])
                moved.append(name)
            self._ops.fsync_dir(self.out.parent)
        except BaseException as error:
            if first not in moved:
                self._take_back(targets, moved, replaced)
            if isinstance(error, FileExistsError):
                where = printable_path(error.filename2 or error.filename or self.out)
                raise OutputError(
                    f"{where}: was created by another program during this run; it was not touched"
                ) from None
            if isinstance(error, OSError):
                raise output_failure(error, self.out, "rename into place") from error
            raise
        self.discard()

    def _take_back(self, targets: Mapping[str, Path], moved: Sequence[str], replaced: Sequence[str]) -> None:
        """Undo half a publication, as far as that is possible. Never raises."""
        for name in moved:
            with suppress(OSError):
                os.rename(targets[name], self.folder / name)
        for name in replaced:
            with suppress(OSError):
                os.rename(self.folder / f"{name}.old", targets[name])

    def _exchange(self) -> Path:
        """Swap the folder and the output, and back if that was not the one to replace; returns the
        replaced folder's path."""
        self._expect_replaced(self.out)
        try:
            self._ops.exchange(self.folder, self.out)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            return self._exchange_by_renames()
        try:
            self._expect_replaced(self.folder)
        except FileExistsError:
            self._ops.exchange(self.folder, self.out)
            raise
        return self.folder

    def _exchange_by_renames(self) -> Path:
        old = self.out.with_name(f"{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed at this point
        self._ops.rename_new(self.out, old)
        try:
            self._expect_replaced(old)
            self._ops.rename_new(self.folder, self.out)
        except BaseException:
            self._ops.rename_new(old, self.out)
            raise
        return old

    def _expect_replaced(self, path: Path) -> None:
        if _file_id(path) != self._replaces:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))

    def discard(self) -> None:
        """Remove the partial folder. Never raises."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            with suppress(OSError):
                os.unlink(self._lock_path)  # before releasing the lock: see `_acquire_lock`
            os.close(self._lock)
            self._lock = -1


@contextmanager
def output_lock(out: Path) -> Iterator[None]:
    """Hold the lock on the output file `out` within the block; OutputError where another run holds it."""
    path = out.with_name(f".{out.name}.lock")
    lock = _acquire_lock(path, out)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(path)  # before releasing the lock: see `_acquire_lock`
        os.close(lock)


def stale_partials(out: Path) -> list[Path]:
    """Partial folders that other jobs left next to `out`."""
    prefix = f".{out.name}.partial-"
    try:
        return sorted(Path(e.path) for e in os.scandir(out.parent) if e.name.startswith(prefix))
    except OSError:
        return []


def _file_id(path: Path) -> tuple[int, int] | None:
    """Device and inode of `path`, None where it does not exist."""
    try:
        stat = os.lstat(path)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def _acquire_lock(path: Path, out: Path) -> int:
    """A descriptor that holds the advisory lock on `path`, which is created.

    The holder removes the file before it releases the lock, so a lock on a removed file protects
    nothing and is tried again. Where the file system has no locks, the exclusive creation of every
    file and the final rename still keep two runs apart.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise output_failure(error, path, "create") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise OutputError(
                f"{printable_path(out)}: another run is writing it; wait for it to finish"
            ) from None
        except OSError:
            return fd
        try:
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)
