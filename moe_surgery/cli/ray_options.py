"""Options of commands whose parts other processes can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from moe_surgery.workers import Workers

__all__ = ["Ray", "ray_options"]

Command = TypeVar("Command", bound=Callable[..., Any])


def ray_options(command: Command) -> Command:
    """--ray and --ray-workers as one argument `ray`, for commands whose parts can be done by other processes."""

    @wraps(command)
    def run(*args: Any, ray: str | None, workers: int | None, **kwargs: Any) -> Any:
        if workers is not None and ray is None:
            raise UsageError("--ray-workers needs --ray")
        return command(*args, ray=Ray(ray, workers), **kwargs)

    for option in (
        click.option(
            "--ray-workers",
            "workers",
            type=int,
            metavar="N",
            help="Parts of the job that Ray does at a time; default: one a core.",
        ),
        click.option(
            "--ray",
            metavar="[ADDRESS]",
            is_flag=False,
            flag_value="local",
            help="Do parts of the job in several processes with Ray: on this machine, or on the cluster at ADDRESS "
            "(auto or HOST:PORT), whose machines see the same files (needs '.[ray]').",
        ),
    ):
        option(run)
    return cast(Command, run)


@dataclass(frozen=True, slots=True)
class Ray:
    """What `ray_options` reads from the command line."""

    address: str | None
    count: int | None

    @contextmanager
    def workers(self) -> Iterator[Workers | None]:
        """The workers within the block, None without --ray."""
        if self.address is None:
            yield None
            return
        from moe_surgery.distributed.ray_workers import RayWorkers

        with RayWorkers(self.address, self.count) as workers:
            yield workers
