"""Ray, with two real workers: the same files as without, also where a worker dies, and no part done twice."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_64_hexdigest

pytest.importorskip("torch")
pytest.importorskip("ray", reason="Ray is not installed")

from moe_surgery import evaluate, plan_random, profile, prune, sweep, verify
from moe_surgery.distributed.ray_workers import RayWorkers
from moe_surgery.errors import OutputError, UsageError
from moe_surgery.progress import Progress
from moe_surgery.selection.ranking import Ranking
from moe_surgery.workers import Workers
from tests.support.checkpoints import Shape, assert_same_tensors, load_tensors, write_checkpoint
from tests.support.command import call

TINY = "example:tiny"


@pytest.fixture(scope="module")
def two() -> Iterator[RayWorkers]:
    with RayWorkers(workers=2) as workers:
        yield workers


@dataclass
class Watched:
    """Workers that log each part that was done to a file; `wrap` changes the work."""

    workers: Workers
    log: Path
    wrap: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] = lambda work: work

    @property
    def count(self) -> int:
        return self.workers.count

    def run(self, work: Callable[[Any], Any], parts: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        log, inner = self.log, self.wrap(work)

        def logged(part: Any) -> Any:
            result = inner(part)
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, f"{xxh3_64_hexdigest(repr(part).encode())}\n".encode())
            os.close(fd)
            return result

        return self.workers.run(logged, parts)

    @property
    def done(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


def dying_once(marker: Path, opening: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Work whose process is killed the first time that it opens a file whose path ends so ("": when it is done)."""

    def wrap(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def die() -> None:
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, arguments: Any) -> None:
            if opening and event == "open" and str(arguments[0]).endswith(opening):
                die()

        def task(part: Any) -> Any:
            if opening:
                sys.addaudithook(hook)
            result = work(part)
            if not opening:
                die()
            return result

        return task

    return wrap


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("law", "The tenant shall pay the rent. "), ("code", "def f(x): return x + 1\n")):
        (folder / name).write_text("".join(f"{n}. {words}" for n in range(40)))
    return {name: [folder / name] for name in ("law", "code")}


PROFILE: dict[str, Any] = {"context": 64, "batch_tokens": 128}


@pytest.fixture(scope="module")
def alone(texts: dict[str, list[Path]]) -> bytes:
    """The statistics of one process."""
    out = texts["law"][0].parent / "alone.stats"
    profile(TINY, texts, out, **PROFILE)
    return out.read_bytes()


def test_parts_are_done_and_errors_come_back(two: RayWorkers) -> None:
    assert two.count == 2
    assert sorted(two.run(abs, range(-20, 0))) == [(n, 20 - n) for n in range(20)]

    def refuse(part: int) -> int:
        raise UsageError(f"part {part}: no")

    with pytest.raises(UsageError, match=r"^part 7: no$"):
        list(two.run(refuse, [7]))


@pytest.mark.slow  # a process is started for each try
def test_a_part_that_kills_every_worker_is_an_error(two: RayWorkers) -> None:
    with pytest.raises(OutputError, match="part 0 of the job: its Ray worker died 4 times"):
        list(two.run(lambda _: os.kill(os.getpid(), signal.SIGKILL), [0]))


def test_two_workers_give_the_statistics_of_one_process(
    two: RayWorkers, texts: dict[str, list[Path]], alone: bytes, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    watched = Watched(two, tmp_path / "log")
    profile(TINY, texts, tmp_path / "two.stats", **PROFILE, workers=watched, progress=seen.append)
    assert (tmp_path / "two.stats").read_bytes() == alone
    assert len(watched.done) == len(set(watched.done)) > 4
    assert (seen[0].done, seen[-1].done) == (0, seen[-1].total)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["log", "two.stats"]


def test_a_worker_that_dies_changes_nothing(
    two: RayWorkers,
    texts: dict[str, list[Path]],
    alone: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    watched = Watched(two, tmp_path / "log", dying_once(tmp_path / "died", ""))
    profile(TINY, texts, tmp_path / "two.stats", **PROFILE, workers=watched)
    assert (tmp_path / "died").exists()
    assert capsys.readouterr().out == ""  # results are printed there
    assert (tmp_path / "two.stats").read_bytes() == alone
    assert len(watched.done) == len(set(watched.done))  # the lost result is the only one that is made again


@pytest.mark.slow  # tests/quality/test_parts.py has it without processes
def test_a_finished_part_is_not_done_again_after_an_interrupt(
    two: RayWorkers, texts: dict[str, list[Path]], alone: bytes, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    reported: list[int] = []

    def stop(progress: Progress) -> None:
        reported.append(progress.done)
        if len(reported) == 4:  # the start, and three parts
            raise Stop

    first = Watched(two, tmp_path / "first")
    with pytest.raises(Stop):
        profile(TINY, texts, tmp_path / "two.stats", **PROFILE, workers=first, progress=stop)
    kept = [f.name for f in tmp_path.iterdir() if ".partial" in f.name]
    assert kept
    second = Watched(two, tmp_path / "second")
    result = profile(TINY, texts, tmp_path / "two.stats", **PROFILE, workers=second)
    assert (tmp_path / "two.stats").read_bytes() == alone
    everything = Watched(two, tmp_path / "third")
    profile(TINY, texts, tmp_path / "again.stats", **PROFILE, workers=everything)
    # Two of three that were reported are sure to be kept: the third was just being noted.
    assert len(second.done) <= len(everything.done) - 3
    assert result.statistics.tokens
    assert not [f.name for f in tmp_path.iterdir() if ".partial" in f.name]


@pytest.mark.slow  # a process is started anew in each
@pytest.mark.parametrize("batch_tokens", [128, 100_000], ids=["passages", "plans"])
def test_evaluations_are_those_of_one_process(
    two: RayWorkers, texts: dict[str, list[Path]], tmp_path: Path, batch_tokens: int
) -> None:
    from moe_surgery import inspect

    model = inspect(TINY)
    plans = [(f"random-{n}", plan_random(8, n, model)) for n in range(3)]
    prune(TINY, tmp_path / "pruned", plan_random(12, 9, model))
    arguments: dict[str, Any] = {"plans": plans, "pruned": [tmp_path / "pruned"], "context": 64}
    expected = evaluate(TINY, texts, **arguments, batch_tokens=batch_tokens)
    watched = Watched(two, tmp_path / "log", dying_once(tmp_path / "died", ""))
    found = evaluate(TINY, texts, **arguments, batch_tokens=batch_tokens, workers=watched)
    assert found.to_json() == expected.to_json()
    assert (tmp_path / "died").exists()
    assert len(watched.done) == len(set(watched.done)) > 3


def test_a_sweep_by_two_workers_with_one_killed(two: RayWorkers, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Shape(layers=2, experts=8), shards=2)
    rows = tuple(tuple((3 * e + layer) % 8 for e in range(8)) for layer in range(2))
    rankings = [("a", Ranking(8, rows, "gpt_oss")), ("b", Ranking(8, rows[::-1], "gpt_oss"))]
    sweep(source, tmp_path / "alone", rankings, range(2, 6))
    watched = Watched(
        two, tmp_path / "log", dying_once(tmp_path / "died", "model-00002-of-00002.safetensors.tmp")
    )
    result = sweep(source, tmp_path / "two", rankings, range(2, 6), workers=watched)
    assert (tmp_path / "died").exists()
    assert sorted(result.verified) == sorted(v.name for v in result.variants)
    assert len(watched.done) == len(set(watched.done)) == 7  # the first is made before it is shared
    inodes = set()
    for variant in result.variants:
        folder = tmp_path / "two" / variant.name
        assert verify(folder, source=source).ok
        assert_same_tensors(load_tensors(folder), load_tensors(tmp_path / "alone" / variant.name))
        inodes.add((folder / "model-00001-of-00002.safetensors").stat().st_ino)
    assert len(inodes) == 1
    assert not [f for f in (tmp_path / "two").iterdir() if f.name.startswith(".")]
    assert (tmp_path / "two" / "index.md").read_bytes() == (tmp_path / "alone" / "index.md").read_bytes()


def test_options_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = f"r{uuid.uuid4().hex[:6]}.json"
    ended = call(
        capsys, "sweep", TINY, tmp_path / "out", "--ranking", name, "--experts", "4", "--ray-workers", "2"
    )
    assert (ended.code, ended.error) == (2, "moe-surgery: --ray-workers needs --ray")
    ended = call(
        capsys,
        "sweep",
        TINY,
        tmp_path / "out",
        "--ranking",
        name,
        "--experts",
        "4",
        "--ray",
        "--ray-workers",
        "0",
    )
    assert (ended.code, ended.error) == (2, "moe-surgery: --ray-workers 0: must be at least 1")
