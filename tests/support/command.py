"""Running the command line: in this process for what it says, as a process for signals and limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_digest

import moe_surgery
from moe_surgery.cli import main
from moe_surgery.surgery.verify import verify_checkpoint

PATIENCE = 120.0
"""Seconds after which a process that should have moved on is called stuck."""

_PACKAGE = Path(moe_surgery.__file__).parent.parent

_STOPPING = """
import os, re, signal, sys
from moe_surgery.cli import main
pattern, left = re.compile(sys.argv[1]), int(sys.argv[2])
def hook(event, arguments):
    global left
    if event == "open" and isinstance(arguments[0], str) and pattern.search(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
sys.addaudithook(hook)
main(sys.argv[3:])
"""


@dataclass(frozen=True)
class Ended:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr; fails if there are more or none."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]

    def json(self) -> Any:
        return json.loads(self.out)


def done(ended: Ended) -> Ended:
    """`ended`, which must have succeeded."""
    assert ended.code == 0, ended.err
    return ended


def refused(ended: Ended, code: int) -> str:
    """The one line of an error with exit code `code` and no output, without the program's name."""
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert ended.error.isprintable()
    return ended.error.removeprefix("moe-surgery: ")


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ended:
    """Run `moe-surgery ARGUMENTS` in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    return Ended(code, captured.out, captured.err)


def start(
    *arguments: str | Path, env: Mapping[str, str] | None = None, before: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    """Begin `moe-surgery ARGUMENTS` as a process; `before` runs in the child just before it."""
    return _start(["-m", "moe_surgery", *map(str, arguments)], env, before)


def start_stopped(pattern: str, number: int, *arguments: str | Path) -> subprocess.Popen[str]:
    """`start`, stopped (SIGSTOP) just before it opens its `number`-th file whose path matches `pattern`."""
    process = _start(["-c", _STOPPING, pattern, str(number), *map(str, arguments)], None, None)
    deadline = time.monotonic() + PATIENCE
    while True:
        pid, status = os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG)
        if pid:
            assert os.WIFSTOPPED(status), f"ended before it opened {number} files like {pattern}"
            return process
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("the command is stuck")
        time.sleep(0.002)


def stop_with(process: subprocess.Popen[str], number: signal.Signals) -> Ended:
    """Send `number` to a stopped process, let it continue, and wait for its end."""
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    return ended(process)


def _start(
    arguments: list[str], env: Mapping[str, str] | None, before: Callable[[], None] | None
) -> subprocess.Popen[str]:

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
        if before:
            before()

    path = os.pathsep.join([str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {}), "PYTHONPATH": path},
        preexec_fn=prepare,
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    """Wait for `process`."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the command is stuck")
    return Ended(process.returncode, out, err)


def run(
    *arguments: str | Path, env: Mapping[str, str] | None = None, before: Callable[[], None] | None = None
) -> Ended:
    """Run `moe-surgery ARGUMENTS` as a process to its end."""
    return ended(start(*arguments, env=env, before=before))


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait until `what` holds; False if `process` ended before it did."""
    limit = time.monotonic() + PATIENCE
    while not what():
        if process.poll() is not None:
            return False
        assert time.monotonic() < limit, "the command is stuck"
        time.sleep(0.0005)
    return True


def siblings(out: Path) -> list[str]:
    """What a run left next to `out` under a derived name."""
    return sorted(e.name for e in os.scandir(out.parent) if e.name.startswith(f".{out.name}."))


def contents(folder: Path) -> dict[str, bytes]:
    """Digest of every file under `folder`, by relative name."""
    return {
        str(p.relative_to(folder)): xxh3_128_digest(p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Fails if the block changes a byte, a modification time or a name under `folders`."""

    def look() -> list[object]:
        stats = [
            (p, s.st_size, s.st_mtime_ns, s.st_ino)
            for f in folders
            for p in sorted([f, *f.rglob("*")])
            for s in [p.lstat()]
        ]
        return [stats, [contents(f) for f in folders]]

    before = look()
    yield
    assert look() == before


def assert_sound(out: Path, source: Path | str) -> None:
    """`out` is complete, and every byte of it what its plan makes of `source`."""
    result = verify_checkpoint(out, source=source)
    assert result.problems == ()
    assert result.notes == ()
