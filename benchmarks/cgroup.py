"""Running a command inside a memory cgroup, version 1 or 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["enter_command", "memory_cgroup"]


@contextmanager
def memory_cgroup(nbytes: int) -> Iterator[tuple[Path, Path] | None]:
    """A fresh memory cgroup and the file that holds its peak; None where none may be made."""
    for root, limit, peak in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
    ):
        folder = root / f"moe-surgery-benchmark-{os.getpid()}"
        if not (root / "cgroup.procs").exists():  # no file system of cgroups
            continue
        try:
            folder.mkdir()
            (folder / limit).write_text(str(nbytes))
        except OSError:
            continue
        try:
            yield folder, folder / peak
        finally:
            folder.rmdir()
        return
    yield None


def enter_command(group: Path, command: list[str]) -> list[str]:
    """`command` run by a shell that first puts itself, and so what it becomes, into `group`."""
    return ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
