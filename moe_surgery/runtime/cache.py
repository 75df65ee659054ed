"""The KV cache: all positions for full layers, a ring for sliding ones; rolled back by truncation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_surgery.errors import UsageError

__all__ = ["Cache"]

NOWHERE = -1  # position of a slot that holds nothing, or a padding token


class Cache:
    """Keys and values of one batch, allocated once.

    Tokens come in columns, the same for every sequence of the batch; a column's position in its
    sequence is its own (left padding has none). Full layers keep `context` columns; a sliding layer
    keeps a ring of its window plus `rollback`, so that up to `rollback` columns can be taken back.

    `keys[i]` and `values[i]` are [batch, kv_heads, slots of layer i, head_dim]; `positions[slots]`
    int64 [batch, slots] says which position each slot holds, -1 for none.
    """

    def __init__(
        self,
        batch: int,
        context: int,
        windows: Sequence[int | None],
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        rollback: int,
    ) -> None:
        self.batch, self.context, self.rollback = batch, context, rollback
        self.length = 0
        self._furthest = 0  # the greatest length so far; rings have lost what lies too far before it
        self._pads = torch.zeros(batch, dtype=torch.int64, device=device)
        self._new = self._pads[:, None]
        self.slots = [context if w is None else min(context, w + rollback) for w in windows]
        shapes = [(batch, kv_heads, slots, head_dim) for slots in self.slots]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.positions = {
            slots: torch.full((batch, slots), NOWHERE, dtype=torch.int64, device=device)
            for slots in set(self.slots)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def pads(self) -> Tensor:
        """Padding columns of each sequence, int64 [batch]; column c is at position c - pads."""
        return self._pads

    def advance(self, columns: int) -> None:
        """`columns` more are in the cache, positions included: a captured step has put them there."""
        self.length += columns
        self._furthest = max(self._furthest, self.length)

    def check_room(self, columns: int) -> None:
        """Raise UsageError where `columns` more do not fit the context."""
        if self.length + columns > self.context:
            raise UsageError(
                f"{self.length + columns} tokens do not fit the context of {self.context}; "
                "shorten the prompt or allocate a longer cache"
            )

    def begin(self, columns: int, mask: Tensor | None) -> Tensor:
        """Start a step of `columns` new columns: their positions, int64 [batch, columns].

        `mask` [batch, columns] is 0 at padding. Raises UsageError where they do not fit the context.
        """
        self.check_room(columns)
        steps = torch.arange(self.length, self.length + columns, device=self._pads.device)
        if mask is None:
            self._new = steps - self._pads[:, None]
        else:
            pads = self._pads[:, None] + (mask == 0).long().cumsum(dim=1)
            self._pads = pads[:, -1]
            self._new = torch.where(mask == 0, NOWHERE, steps - pads)
        for slots in self.positions:
            if self._overwrites_nothing_seen(slots, columns):
                self._store_positions(slots)
        return self._new

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep one layer's new columns [batch, kv_heads, columns, head_dim].

        Returns the keys, values and positions [batch, keys] that the new columns may attend to.
        """
        slots, columns = self.slots[layer], keys.shape[2]
        held = self.positions[slots]
        direct = self._overwrites_nothing_seen(slots, columns)
        if direct:
            seen = self.keys[layer], self.values[layer], held
        else:  # the ring would lose columns that the first of the new ones still see
            seen = (
                torch.cat((self.keys[layer], keys), dim=2),
                torch.cat((self.values[layer], values), dim=2),
                torch.cat((held, self._new), dim=1),
            )
        where, last = self._where(slots, columns)
        self.keys[layer][:, :, where] = keys[:, :, -last:]
        self.values[layer][:, :, where] = values[:, :, -last:]
        if direct and slots == self.context:
            # Rounded up, so that a captured step keeps its shapes for a while.
            used = min(slots, -(-(self.length + columns) // 64) * 64)
            return seen[0][:, :, :used], seen[1][:, :, :used], seen[2][:, :used]
        return seen

    def end(self) -> None:
        """All layers have been updated: the step's columns are part of the cache."""
        columns = self._new.shape[1]
        for slots in self.positions:
            if not self._overwrites_nothing_seen(slots, columns):
                self._store_positions(slots)
        self.advance(columns)

    def _overwrites_nothing_seen(self, slots: int, columns: int) -> bool:
        """Whether `columns` new ones can be stored before they attend: a ring has `rollback` to spare."""
        return slots == self.context or columns <= self.rollback + 1

    def _store_positions(self, slots: int) -> None:
        where, last = self._where(slots, self._new.shape[1])
        self.positions[slots][:, where] = self._new[:, -last:]

    def truncate(self, length: int) -> None:
        """Take back all columns from `length` on, to at most `rollback` before the longest it ever was.

        Raises UsageError where that is more than the rings still hold.
        """
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot truncate a cache of {self.length} columns to {length}")
        back = self._furthest - length
        if back > self.rollback and any(s < self.context for s in self.slots):
            raise UsageError(f"cannot take back {back} columns; this cache was made for {self.rollback}")
        for slots, held in self.positions.items():
            for column in range(max(length, self.length - slots), self.length):
                held[:, column % slots] = NOWHERE
        self.length = length
        self._pads = self._pads.clamp(max=length)

    def _where(self, slots: int, columns: int) -> tuple[Tensor, int]:
        """Slots of the last of `columns` new columns that a layer of `slots` keeps, and their number."""
        last = min(columns, slots)
        end = self.length + columns
        return torch.arange(end - last, end, device=self._pads.device) % slots, last
