"""The KV cache: every token for full attention, a ring buffer for sliding windows; rolled back by truncation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.kernels.interface import EMPTY, LayerCache

__all__ = ["Cache"]


class Cache:
    """Keys and values of one batch, allocated once.

    Every step adds the same number of tokens to each sequence, padding included. Tokens are numbered from 0
    in each sequence; token i is at position i - pads (padding has none) and is in slot i % slots of a
    layer. `truncate` removes the last tokens, a different number from each sequence if need be: `lengths` then
    differ, and the next tokens go to different slots. A layer with full attention has `context` slots; one
    with a sliding window has a ring of the window plus `rollback` slots, so that up to `rollback` tokens can be
    removed.

    `keys[i]` and `values[i]` are [batch, num_kv_heads, slots of layer i, head_dim]; `positions[slots]` int64
    [batch, slots] holds the position of the token in each slot, EMPTY for none.
    """

    def __init__(
        self,
        batch: int,
        context: int,
        sliding_windows: Sequence[int | None],
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        rollback: int,
    ) -> None:
        self.batch, self.context, self.rollback = batch, context, rollback
        self._lengths = [0] * batch
        self._max_lengths = [0] * batch  # longest so far: rings have overwritten what is too far before
        self._pads = torch.zeros(batch, dtype=torch.int64, device=device)
        self._new = self._pads[:, None]  # positions of the step's tokens, [batch, tokens]
        self._indices = self._new[0]  # their numbers: [tokens], or [batch, tokens] where lengths differ
        self._slot_ids: dict[int, slice | Tensor] = {}  # by the slots of a layer, where the step's tokens go
        self.slots = [context if w is None else min(context, w + rollback) for w in sliding_windows]
        shapes = [(batch, num_kv_heads, slots, head_dim) for slots in self.slots]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.positions = {
            slots: torch.full((batch, slots), EMPTY, dtype=torch.int64, device=device)
            for slots in set(self.slots)
        }

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, padding included."""
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
        """Padding tokens of each sequence, int64 [batch]; token i is at position i - pads."""
        return self._pads

    def advance(self, tokens: int) -> None:
        """Count `tokens` more in each sequence; a captured step has stored them, positions included."""
        self._lengths = [length + tokens for length in self._lengths]
        self._max_lengths = list(map(max, self._max_lengths, self._lengths))

    def check_capacity(self, tokens: int) -> None:
        """Raise UsageError where `tokens` more do not fit the context."""
        if self.length + tokens > self.context:
            raise UsageError(
                f"{self.length + tokens} tokens do not fit the context of {self.context}; "
                "shorten the prompt or allocate a longer cache"
            )

    def begin(self, tokens: int, mask: Tensor | None) -> Tensor:
        """Start a step that adds `tokens` to each sequence: their positions, int64 [batch, tokens].

        `mask` [batch, tokens] is 0 at padding. Raises UsageError where they do not fit the context.
        """
        self.check_capacity(tokens)
        device = self._pads.device
        steps = torch.arange(tokens, device=device)
        if self.ragged:
            self._indices = torch.tensor(self._lengths, device=device)[:, None] + steps
        else:
            self._indices = self.length + steps
        if mask is None:
            self._new = self._indices - self._pads[:, None]
        else:
            pads = self._pads[:, None] + (mask == 0).long().cumsum(dim=1)
            self._pads = pads[:, -1]
            self._new = torch.where(mask == 0, EMPTY, self._indices - pads)
        self._slot_ids = {slots: self._slots_of_step(slots, tokens) for slots in self.positions}
        for slots in self.positions:
            if self._fits_in_place(slots, tokens):
                self._store_positions(slots)
        return self._new

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store one layer's new keys and values [batch, num_kv_heads, tokens, head_dim].

        Returns the keys, values and positions [batch, keys] that the new tokens may attend to.
        """
        slots, tokens = self.slots[layer], keys.shape[2]
        positions = self.positions[slots]
        in_place = self._fits_in_place(slots, tokens)
        if in_place:
            used = self._used(slots, tokens)
            visible = self.keys[layer][:, :, :used], self.values[layer][:, :, :used], positions[:, :used]
        else:  # the ring would lose tokens that the first of the new ones still attend to
            visible = (
                torch.cat((self.keys[layer], keys), dim=2),
                torch.cat((self.values[layer], values), dim=2),
                torch.cat((positions, self._new), dim=1),
            )
        slot_ids = self._slot_ids[slots]
        _write(self.keys[layer], slot_ids, keys[:, :, -slots:])
        _write(self.values[layer], slot_ids, values[:, :, -slots:])
        return visible

    def can_write_in_place(self, tokens: int) -> bool:
        """Whether a step of `tokens` can be stored in every layer before any of them attends."""
        return all(self._fits_in_place(slots, tokens) for slots in self.positions)

    def layer_caches(self) -> list[LayerCache]:
        """What `update` would fill and return for each layer, for a step whose keys the caller stores."""
        used = {slots: self._used(slots, self._new.shape[1]) for slots in self.positions}
        slot_ids = {slots: self._indices % slots for slots in self.positions}
        return [
            LayerCache(k[:, :, : used[n]], v[:, :, : used[n]], self.positions[n], slot_ids[n])
            for k, v, n in zip(self.keys, self.values, self.slots, strict=True)
        ]

    def end(self) -> None:
        """End a step after every layer's `update`: its tokens are now part of the cache."""
        tokens = self._new.shape[1]
        for slots in self.positions:
            if not self._fits_in_place(slots, tokens):
                self._store_positions(slots)
        self.advance(tokens)

    def _fits_in_place(self, slots: int, tokens: int) -> bool:
        """Whether `tokens` new ones overwrite no slot that they attend to: a ring has `rollback` to spare."""
        return slots == self.context or tokens <= self.rollback + 1

    def _used(self, slots: int, tokens: int) -> int:
        """How many of a layer's slots are in use with `tokens` more; all of a ring's."""
        if slots < self.context:
            return slots
        # Rounded up, so that a captured step keeps its shapes for a while.
        return min(slots, -(-(self.length + tokens) // 64) * 64)

    def _store_positions(self, slots: int) -> None:
        slot_ids, positions, new = self._slot_ids[slots], self.positions[slots], self._new[:, -slots:]
        if isinstance(slot_ids, slice) or slot_ids.ndim == 1:
            positions[:, slot_ids] = new
        else:
            positions.scatter_(1, slot_ids, new)

    def truncate(self, length: int | Sequence[int]) -> None:
        """Remove all tokens from number `length` on, down to at most `rollback` below the longest so far.

        A sequence gives each row its own length. A row truncated to 0 starts over, however long it was.
        Raises UsageError for a length that is above the current one, or that the rings no longer hold.
        """
        lengths = [length] * self.batch if isinstance(length, int) else list(length)
        if len(lengths) != self.batch:
            raise UsageError(f"{len(lengths)} lengths for a cache of {self.batch} sequences")
        rings = any(slots < self.context for slots in self.slots)
        for new, old, longest in zip(lengths, self._lengths, self._max_lengths, strict=True):
            if not 0 <= new <= old:
                raise UsageError(f"cannot truncate a cache of {old} tokens to {new}")
            if rings and 0 < new < longest - self.rollback:
                raise UsageError(
                    f"cannot roll back {longest - new} tokens: this cache was allocated with `rollback` "
                    f"{self.rollback}"
                )
        kept = torch.tensor(lengths, device=self._pads.device)
        for positions in self.positions.values():
            positions.masked_fill_(positions >= (kept - self._pads)[:, None], EMPTY)
        self._lengths = lengths
        self._max_lengths = [m if n else 0 for m, n in zip(self._max_lengths, lengths, strict=True)]
        self._pads = torch.minimum(self._pads, kept)

    def _slots_of_step(self, slots: int, tokens: int) -> slice | Tensor:
        """Where a layer of `slots` stores the step's last tokens: int64 [stored] or [batch, stored].

        A slice where they are contiguous and the host does not wait for a device to find out.
        """
        start = self.length % slots
        if self._pads.device.type == "cpu" and not self.ragged and start + tokens <= slots:
            return slice(start, start + tokens)
        return self._indices[..., -slots:] % slots


def _write(buffer: Tensor, slot_ids: slice | Tensor, new: Tensor) -> None:
    """Store new [batch, num_kv_heads, tokens, head_dim] in the slots `slot_ids` of each row of `buffer`."""
    if isinstance(slot_ids, slice) or slot_ids.ndim == 1:
        buffer[:, :, slot_ids] = new
    else:
        buffer.scatter_(2, slot_ids[:, None, :, None].expand(new.shape), new)
