"""The KV cache: all positions for full layers, a ring for sliding ones; rolled back by truncation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.kernels.interface import NOWHERE, LayerSlots

__all__ = ["Cache"]


class Cache:
    """Keys and values of one batch, allocated once.

    Tokens come in columns, as many for every sequence of the batch; a column's position in its
    sequence is its own (left padding has none). Columns can be taken back, from each sequence its own
    number: from then on sequences have different `lengths` and new columns go to different slots, so
    nothing is left behind in between. Full layers keep `context` columns; a sliding layer keeps a ring
    of its window plus `rollback`, so that up to `rollback` columns can be taken back.

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
        self._lengths = [0] * batch
        self._furthest = [0] * batch  # greatest lengths so far; rings have lost what lies too far before
        self._pads = torch.zeros(batch, dtype=torch.int64, device=device)
        self._new = self._pads[:, None]  # positions of the step's columns, [batch, columns]
        self._columns = self._new[0]  # which they are: [columns], or [batch, columns] where lengths differ
        self._places: dict[int, slice | Tensor] = {}  # where a layer of so many slots keeps them
        self.slots = [context if w is None else min(context, w + rollback) for w in windows]
        shapes = [(batch, kv_heads, slots, head_dim) for slots in self.slots]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.positions = {
            slots: torch.full((batch, slots), NOWHERE, dtype=torch.int64, device=device)
            for slots in set(self.slots)
        }

    @property
    def length(self) -> int:
        """Columns of the longest sequence."""
        return max(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Columns of each sequence, padding included."""
        return tuple(self._lengths)

    @property
    def ragged(self) -> bool:
        """Whether sequences have different lengths."""
        return min(self._lengths) < max(self._lengths)

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
        self._lengths = [length + columns for length in self._lengths]
        self._furthest = list(map(max, self._furthest, self._lengths))

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
        device = self._pads.device
        steps = torch.arange(columns, device=device)
        if self.ragged:
            self._columns = torch.tensor(self._lengths, device=device)[:, None] + steps
        else:
            self._columns = self.length + steps
        if mask is None:
            self._new = self._columns - self._pads[:, None]
        else:
            pads = self._pads[:, None] + (mask == 0).long().cumsum(dim=1)
            self._pads = pads[:, -1]
            self._new = torch.where(mask == 0, NOWHERE, self._columns - pads)
        self._places = {slots: self._place(slots, columns) for slots in self.positions}
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
        where = self._places[slots]
        _put(self.keys[layer], where, keys[:, :, -slots:])
        _put(self.values[layer], where, values[:, :, -slots:])
        if direct:
            used = self._used(slots, columns)
            return seen[0][:, :, :used], seen[1][:, :, :used], seen[2][:, :used]
        return seen

    def stores_before_reading(self, columns: int) -> bool:
        """Whether a step of `columns` may be stored in every layer before any of them attends."""
        return all(self._overwrites_nothing_seen(slots, columns) for slots in self.positions)

    def layer_slots(self) -> list[LayerSlots]:
        """What `update` would fill and return for each layer, for a step that the caller stores himself."""
        used = {slots: self._used(slots, self._new.shape[1]) for slots in self.positions}
        places = {slots: self._columns % slots for slots in self.positions}
        return [
            LayerSlots(k[:, :, : used[n]], v[:, :, : used[n]], self.positions[n], places[n])
            for k, v, n in zip(self.keys, self.values, self.slots, strict=True)
        ]

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

    def _used(self, slots: int, columns: int) -> int:
        """How many of a layer's slots hold anything with `columns` more; all of a ring's."""
        if slots < self.context:
            return slots
        # Rounded up, so that a captured step keeps its shapes for a while.
        return min(slots, -(-(self.length + columns) // 64) * 64)

    def _store_positions(self, slots: int) -> None:
        where, held, new = self._places[slots], self.positions[slots], self._new[:, -slots:]
        if isinstance(where, slice) or where.ndim == 1:
            held[:, where] = new
        else:
            held.scatter_(1, where, new)

    def truncate(self, length: int | Sequence[int]) -> None:
        """Take back all columns from `length` on, to at most `rollback` before the longest it ever was.

        A sequence of numbers gives each row its own length. A row taken back to 0 begins anew, however
        long it was. Raises UsageError where a length was never reached or the rings no longer hold it.
        """
        lengths = [length] * self.batch if isinstance(length, int) else list(length)
        if len(lengths) != self.batch:
            raise UsageError(f"{len(lengths)} lengths for a cache of {self.batch} sequences")
        rings = any(slots < self.context for slots in self.slots)
        for wanted, held, furthest in zip(lengths, self._lengths, self._furthest, strict=True):
            if not 0 <= wanted <= held:
                raise UsageError(f"cannot truncate a cache of {held} columns to {wanted}")
            if rings and 0 < wanted < furthest - self.rollback:
                raise UsageError(
                    f"cannot take back {furthest - wanted} columns; this cache was made for {self.rollback}"
                )
        kept = torch.tensor(lengths, device=self._pads.device)
        for positions in self.positions.values():
            positions.masked_fill_(positions >= (kept - self._pads)[:, None], NOWHERE)
        self._lengths = lengths
        self._furthest = [f if n else 0 for f, n in zip(self._furthest, lengths, strict=True)]
        self._pads = torch.minimum(self._pads, kept)

    def _place(self, slots: int, columns: int) -> slice | Tensor:
        """Slots of the last of the new columns that a layer of `slots` keeps: [kept], or [batch, kept].

        A slice where they follow one another and the host need not wait for a device to say so.
        """
        start = self.length % slots
        if self._pads.device.type == "cpu" and not self.ragged and start + columns <= slots:
            return slice(start, start + columns)
        return self._columns[..., -slots:] % slots


def _put(held: Tensor, where: slice | Tensor, new: Tensor) -> None:
    """Store new [batch, kv_heads, columns, head_dim] in the slots `where` of each row of `held`."""
    if isinstance(where, slice) or where.ndim == 1:
        held[:, :, where] = new
    else:
        held.scatter_(2, where[:, None, :, None].expand(new.shape), new)
