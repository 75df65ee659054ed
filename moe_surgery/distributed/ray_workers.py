"""Parts of a job on Ray: on this machine's cores, or on a cluster that is running."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from types import TracebackType
from typing import Any, TypeVar

from moe_surgery.errors import OutputError, UsageError

__all__ = ["LOCAL", "RayWorkers"]

LOCAL = "local"
RETRIES = 3
WAITING = 2
"""Parts that are handed out for each worker, so that none waits for the next."""

Part = TypeVar("Part")
Result = TypeVar("Result")


class RayWorkers:
    """`Workers` that are Ray tasks of one core each. Use as a context manager.

    A part whose process dies is done again by Ray, on another machine if need be, up to `RETRIES` times. All machines
    must have this package, and see files under the same paths.
    """

    def __init__(self, address: str = LOCAL, workers: int | None = None) -> None:
        """`address`: "local" starts Ray on this machine until the end of the block; "auto" or HOST:PORT is that of a
        cluster that runs. `workers`: parts at a time; default: one a core.

        Raises UsageError where ray is not installed or `workers` is below 1.
        """
        if workers is not None and workers < 1:
            raise UsageError(f"`workers` {workers}: must be at least 1")
        if find_spec("ray") is None:
            raise UsageError(
                "Ray is not installed: pip install 'moe-surgery[ray]', or '.[ray]' in a checkout"
            )
        self._address, self._count = address, workers

    @property
    def count(self) -> int:
        """Parts that are done at a time; known within the block."""
        assert self._count is not None
        return self._count

    def __enter__(self) -> RayWorkers:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports nothing to anyone
        import ray

        quiet: dict[str, Any] = {"include_dashboard": False} if self._address == LOCAL else {}
        if self._address == LOCAL:
            self._count = self._count or os.cpu_count() or 1
            quiet["num_cpus"] = self._count
        try:
            ray.init(self._address, log_to_driver=False, logging_level=logging.ERROR, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise OutputError(
                f"Ray at {self._address}: cannot connect: {reason}; start it with ray start --head, or leave out the "
                "address"
            ) from error
        cluster: Any = ray
        # Ray prints what it has to say to stdout, where the command's result goes.
        cluster._private.worker._worker_logs_enabled = False
        self._count = self._count or int(cluster.cluster_resources().get("CPU", 1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()

    def run(self, work: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[tuple[int, Result]]:
        """See `Workers.run`. Raises OutputError where the process of one part dies again and again."""
        import ray

        def do(part: Part) -> Result:
            return work(part)

        task = ray.remote(num_cpus=1, max_retries=RETRIES, retry_exceptions=False)(do)
        task = task.options(name=getattr(work, "__name__", "part"))
        numbered = enumerate(parts)
        pending: dict[Any, int] = {}

        def hand_out() -> None:
            while len(pending) < WAITING * self.count and (following := next(numbered, None)) is not None:
                number, part = following
                pending[task.remote(part)] = number

        try:
            hand_out()
            while pending:
                (ready,), _ = ray.wait(list(pending), num_returns=1)
                number = pending.pop(ready)
                result = _result(ready, number)
                hand_out()
                yield number, result
        finally:
            if ray.is_initialized():  # else the parts have ended with it
                for left in pending:
                    ray.cancel(left, force=True)


def _result(ready: Any, number: int) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(ready)
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, Exception) else error) from None
    except RayError as error:
        raise OutputError(
            f"part {number} of the job: its Ray worker died {RETRIES + 1} times ({type(error).__name__}); it may need "
            "more memory: try fewer `workers`"
        ) from error
