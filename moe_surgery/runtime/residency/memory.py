"""A limit on memory, and what of it is left for experts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.errors import CheckpointWarning, UsageError
from moe_surgery.families.model_config import ModelConfig
from moe_surgery.runtime.residency.pool import FEWEST_SLOTS, ExpertPool
from moe_surgery.runtime.usage import process_memory
from moe_surgery.selection.arguments import parse_size

__all__ = ["Budget", "available_memory", "memory_limit", "warn_if_larger_than_memory"]

MARGIN_BYTES: Final = 96 << 20
"""For what the process takes later: code that is yet to be imported, threads, page tables, the allocator's gaps."""
STEP_TOKENS: Final = 512
"""A step of so many tokens takes no memory from the experts."""


@dataclass(slots=True)
class Budget:
    """Bytes: `limit` for the whole process, of which `process` and `dense` (weights that every token uses) are taken.

    An expert takes `slot` bytes, a token of a step `token`; there are `experts` in all. `taken` is what caches and
    long prompts have taken from the experts.
    """

    limit: int
    process: int
    dense: int
    slot: int
    token: int
    experts: int
    taken: int = 0

    @classmethod
    def of(cls, limit: int, dense: int, slot: int, config: ModelConfig, experts: int) -> Budget:
        """The budget of this process. Raises UsageError where the limit is below the least."""
        budget = cls(limit, process_memory() + MARGIN_BYTES, dense, slot, step_token_bytes(config), experts)
        if budget.slots < FEWEST_SLOTS:
            raise budget._too_small("this model")
        return budget

    @property
    def slots(self) -> int:
        """Experts that fit beside all else."""
        return min(self.experts, (self.limit - self._fixed - self.taken) // self.slot)

    @property
    def _fixed(self) -> int:
        return self.process + self.dense + STEP_TOKENS * self.token

    def take(self, nbytes: int, what: str, pool: ExpertPool) -> None:
        """Take memory from the experts in `pool`. Raises UsageError where too little is left for them."""
        self.taken += nbytes
        if self.slots < FEWEST_SLOTS:
            error = self._too_small(what)
            self.taken -= nbytes
            raise error
        pool.resize(self.slots)

    def give_back(self, nbytes: int, pool: ExpertPool) -> None:
        self.taken -= nbytes
        pool.resize(self.slots)

    def most_tokens(self) -> int:
        """Tokens of a step that leave half of the experts' memory to them."""
        return max(STEP_TOKENS, self.slots // 2 * self.slot // self.token)

    @contextmanager
    def borrowed(self, tokens: int, pool: ExpertPool) -> Iterator[None]:
        """Memory for a step of `tokens`, given back when the block ends."""
        extra = max(0, tokens - STEP_TOKENS) * self.token
        if extra:
            self.take(extra, f"a step of {tokens} tokens", pool)
        try:
            yield
        finally:
            if extra:
                self.give_back(extra, pool)

    def _too_small(self, what: str) -> UsageError:
        least = self._fixed + self.taken + FEWEST_SLOTS * self.slot
        parts = (
            f"{_gb(self.dense)} GB of weights that every token uses",
            f"{_gb(self.process)} GB for the process",
            f"{_gb(least - self.dense - self.process)} GB for caches, activations and {FEWEST_SLOTS} experts",
        )
        return UsageError(
            f"`memory` {_gb(self.limit)} GB: {what} needs at least {_gb(least, up=True)} GB: {', '.join(parts)}"
        )


def memory_limit(memory: int | str) -> int:
    """Bytes of a limit given as a number or a size. Raises UsageError for anything else."""
    try:
        nbytes = parse_size(memory) if isinstance(memory, str) else memory
    except ValueError as error:
        raise UsageError(f"`memory` {error}") from None
    if nbytes < 1:
        raise UsageError(f"`memory` {memory}: must be at least 1 byte")
    return nbytes


def warn_if_larger_than_memory(checkpoint: Checkpoint) -> None:
    """A CheckpointWarning where the weights do not fit the memory that is free."""
    free = available_memory()
    if free is not None and checkpoint.nbytes > free:
        warnings.warn(
            f"{printable_path(checkpoint.path)}: weights of {_gb(checkpoint.nbytes)} GB, {_gb(free)} GB of memory are "
            "free: the system reads parts from disk again and again; with `memory` it is planned, and faster",
            CheckpointWarning,
            stacklevel=3,
        )


def step_token_bytes(config: ModelConfig) -> int:
    """Most bytes of activations that a step holds for each of its tokens.

    Float32: hidden states and their norm, the outputs of each chosen expert, their sum and what one expert reads and
    writes if all tokens choose it; queries, keys and values before and after rotation, and what attention returns.
    """
    c = config
    moe = (6 + c.num_experts_per_tok) * c.hidden_size + 2 * c.intermediate_size
    attention = 4 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    return 4 * (moe + attention)


def available_memory() -> int | None:
    """Bytes that processes can still take here: of the machine, or of this process's memory cgroup; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):
            return None
    return min([free, *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    """The limits of this process's memory cgroup and of those around it, versions 1 and 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "memory":
            root, file = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        elif not controllers:
            root, file = Path("/sys/fs/cgroup"), "memory.max"
        else:
            continue
        inside = root / name.lstrip("/")
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(root):
                break
            try:
                yield int((folder / file).read_text())
            except (OSError, ValueError):  # "max", no such file
                continue


def _gb(nbytes: int, up: bool = False) -> str:
    tenths = -(-nbytes // 10**8) if up else round(nbytes / 10**8)
    return f"{tenths / 10:.1f}"
