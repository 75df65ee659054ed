"""The experts in memory: slots, what is in them, and what is read into them next."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from moe_surgery.runtime.residency.counts import Counts
from moe_surgery.runtime.residency.reads import AHEAD, FILL, URGENT, Load, Reads
from moe_surgery.runtime.residency.slots import ExpertFiles, Slot, Weights
from moe_surgery.runtime.residency.usage import Usage

__all__ = ["FEWEST_SLOTS", "ExpertPool", "Key", "Weights"]

FEWEST_SLOTS = 2
"""One expert is computed while the next is read."""
MOST_AHEAD = 8
"""Experts that are read before a layer asks for them, at most."""
PAYS = 0.5
"""The least share of a layer's guesses that must come true for them to be read: a wrong one, given up as soon as that
is known, costs about what a right one saves. The share is a moving average over some 1 / `SHARE_STEP` steps."""
SHARE_STEP = 0.05
MOST_COMING = 8
"""Experts that a layer waits for at a time: enough to keep the disk busy, few enough to leave the others in memory."""

Key = tuple[int, int]
"""Layer and stored expert."""


class _Entry:
    """An expert in a slot, or on its way into it."""

    __slots__ = ("ahead", "key", "load", "pinned", "slot")

    def __init__(self, key: Key, slot: Slot, load: Load) -> None:
        self.key, self.slot = key, slot
        self.load: Load | None = load  # None once it is there
        self.pinned = load.kind == URGENT  # the present call of `take` waits for it or computes with it
        self.ahead = load.kind == AHEAD  # its layer has not asked for it yet


class ExpertPool:
    """Up to `capacity` experts of all layers together.

    `take` hands out a layer's experts one by one, so two slots are enough for any layer. What is evicted is what
    `usage` scores lowest, but neither an expert that the present call needs nor, while another can go, one that
    was read ahead. For one thread at a time.
    """

    def __init__(
        self, files: ExpertFiles, reads: Reads, usage: Usage, capacity: int, *, pinned: bool = False
    ) -> None:
        """`pinned`: slots in memory that is pinned for copies to a CUDA device."""
        self.files, self.reads, self.usage, self.capacity = files, reads, usage, capacity
        self._pinned = pinned
        self.counts = Counts(len(files.weights))
        self._entries: dict[Key, _Entry] = {}
        self._loading: list[_Entry] = []
        self._ahead: list[_Entry] = []  # see `_read_ahead`
        self._guesses: dict[int, list[int]] = {}  # by layer, of experts that are not there
        self._came_true = np.ones(len(files.weights))  # by layer, the share of guesses
        self._cancelled: list[tuple[Load, Slot]] = []  # whose last pieces are being read
        self._needed: list[_Entry] = []  # by the present call of `take`
        self._evictable = np.zeros(usage.scores.shape, dtype=bool)
        self._free: list[Slot] = []
        self._made = 0
        self.close = weakref.finalize(self, reads.close)

    @property
    def resident(self) -> frozenset[Key]:
        """The experts that are in memory."""
        self._settle()
        return frozenset(key for key, entry in self._entries.items() if entry.load is None)

    def take(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Weights]]:
        """Each of `experts` (distinct) with its weights, as soon as they are there: those in memory first.

        Reads begin with the call. Weights are valid until the caller asks for the next; raises then as
        `DirectFile.read`.
        """
        for entry in self._needed:  # of a call that was interrupted
            self._release(entry)
        ready, coming, missing = self._demand(layer, experts)
        self._needed = [*ready, *coming]
        self._start(layer, coming, missing, wait=False)
        return self._hand_out(layer, ready, coming, missing)

    def _hand_out(
        self, layer: int, ready: list[_Entry], coming: list[_Entry], missing: list[int]
    ) -> Iterator[tuple[int, Weights]]:
        while ready or coming or missing:
            self._start(layer, coming, missing, wait=not (ready or coming))
            entry = ready.pop(0) if ready else self._arrived(coming)
            yield entry.key[1], entry.slot.weights
            self._release(entry)

    def _start(self, layer: int, coming: list[_Entry], missing: list[int], wait: bool) -> None:
        """Start reading what is missing, as far as there are slots."""
        while missing and len(coming) < MOST_COMING:
            entry = self._load((layer, missing[0]), URGENT, wait and not coming)
            if entry is None:
                break
            self._needed.append(entry)
            coming.append(entry)
            missing.pop(0)

    def read_ahead(self, layer: int, experts: Sequence[int]) -> None:
        """Start reading those of `experts` that are not there, the first first, behind reads that are waited for.

        What is being read ahead for this layer and is not among them is cancelled. Nothing is read for a layer while
        too few of its guesses come true.
        """
        self._settle()
        pending = 0
        for entry in self._read_ahead():
            if entry.key[0] != layer or entry.key[1] in experts or not self._cancel(entry):
                pending += 1
        guessed = [self._entries.get((layer, expert)) for expert in experts]
        self._guesses[layer] = [
            expert for expert, entry in zip(experts, guessed, strict=True) if entry is None or entry.ahead
        ]
        if self._came_true[layer] < PAYS:
            return
        for expert in experts:
            if pending >= min(MOST_AHEAD, self.capacity // 4):
                break
            if (layer, expert) not in self._entries and self._load((layer, expert), AHEAD) is not None:
                pending += 1

    def fill(self) -> None:
        """Read the experts that are expected to be used most into the slots that are still free, behind all else."""
        scores = self.usage.scores
        for flat in np.argsort(-scores, axis=None, kind="stable").tolist():
            key = divmod(flat, scores.shape[1])
            if len(self._entries) >= self.capacity or not scores[key]:
                break
            if key not in self._entries:
                self._load(key, FILL)

    def resize(self, capacity: int) -> None:
        """Hold up to `capacity` experts from now on; others are evicted, and their memory is freed."""
        self.capacity = capacity
        while self._made > capacity:
            if not self._free:
                slot = self._evict(urgent=True, wait=True)
                assert slot is not None, "experts are in use"
                self._free.append(slot)
            self._free.pop()
            self._made -= 1

    def _read_ahead(self) -> list[_Entry]:
        """What was read ahead, or is being read, and has not been asked for."""
        self._ahead = [e for e in self._ahead if e.ahead and self._entries.get(e.key) is e]
        return self._ahead

    def _demand(self, layer: int, experts: Sequence[int]) -> tuple[list[_Entry], list[_Entry], list[int]]:
        """The experts that are there, those on their way, and those that are neither; the first two are pinned."""
        self._settle()
        ready: list[_Entry] = []
        coming: list[_Entry] = []
        missing: list[int] = []
        counts = self.counts.layers[layer]
        for expert in experts:
            entry = self._entries.get((layer, expert))
            if entry is None:
                missing.append(expert)
                continue
            counts.ahead += entry.ahead or entry.load is not None
            counts.there += not entry.ahead and entry.load is None
            entry.pinned, entry.ahead = True, False
            self._evictable[entry.key] = False
            if entry.load is None:
                ready.append(entry)
            else:
                self.reads.hurry(entry.load)
                coming.append(entry)
        counts.missed += len(missing)
        if guess := self._guesses.pop(layer, None):
            share = sum(expert in experts for expert in guess) / len(guess)
            self._came_true[layer] += SHARE_STEP * (share - self._came_true[layer])
        for entry in self._read_ahead():
            if entry.key[0] == layer and not self._cancel(entry):
                entry.ahead = False  # not needed after all
                counts.wrong += 1
                self._evictable[entry.key] = entry.load is None
        return ready, coming, missing

    def _arrived(self, coming: list[_Entry]) -> _Entry:
        """The first of `coming` to be there, taken out of it."""
        loads = [entry.load for entry in coming]
        if None in loads:
            return coming.pop(loads.index(None))
        load = self.reads.wait([load for load in loads if load is not None])
        entry = coming.pop(loads.index(load))
        if load.error is not None:
            entry.pinned = False
            self._settle()
            raise load.error
        self._settle()
        return entry

    def _release(self, entry: _Entry) -> None:
        entry.pinned = False
        if self._entries.get(entry.key) is entry:
            self._evictable[entry.key] = entry.load is None

    def _settle(self) -> None:
        """Note the loads that have ended. What could not be read is forgotten, and read again when it is needed."""
        still = []
        for entry in self._loading:
            assert entry.load is not None
            failed = entry.load.error is not None
            if not entry.load.finished or (failed and entry.pinned):  # who waits for it raises the error
                still.append(entry)
                continue
            entry.load = None
            if failed:
                self._free.append(self._forget(entry))
            else:
                self._evictable[entry.key] = not (entry.pinned or entry.ahead)
        self._loading = still
        if self._cancelled:
            self._free += [slot for load, slot in self._cancelled if load.finished]
            self._cancelled = [(load, slot) for load, slot in self._cancelled if not load.finished]

    def _load(self, key: Key, kind: int, wait: bool = False) -> _Entry | None:
        """Start reading an expert; None where no slot can be had (with `wait`: without giving one back)."""
        slot = self._slot(kind == URGENT, wait)
        if slot is None:
            return None
        load = Load(slot.reads(self.files, *key), kind)
        entry = self._entries[key] = _Entry(key, slot, load)
        self._loading.append(entry)
        if entry.ahead:
            self._ahead.append(entry)
        self.counts.layers[key[0]].nbytes += load.nbytes
        self.reads.start(load)
        return entry

    def _slot(self, urgent: bool, wait: bool) -> Slot | None:
        self._settle()
        if self._free:
            return self._free.pop()
        if self._made < self.capacity:
            self._made += 1
            return Slot(self.files.slot_bytes, self._pinned)
        return self._evict(urgent, wait)

    def _evict(self, urgent: bool, wait: bool) -> Slot | None:
        """The slot of the expert with the lowest score; None where all are needed or on their way.

        If `urgent`, reads that nobody waits for are given up for it; with `wait` the end of one under way too.
        """
        scores = np.where(self._evictable, self.usage.scores, np.inf)
        lowest = divmod(int(scores.argmin()), scores.shape[1])
        if self._evictable[lowest]:
            return self._forget(self._entries[lowest])
        while urgent and not self._free:
            others = [e for e in self._entries.values() if not e.pinned]
            for entry in others:
                if entry.load is None:
                    return self._forget(entry)
                self._cancel(entry)
            loads = [e.load for e in self._entries.values() if e.load is not None and not e.pinned]
            loads += [load for load, _ in self._cancelled]
            if self._free or not (wait and loads):
                break
            self.reads.wait(loads)
            self._settle()
        return self._free.pop() if urgent and self._free else None

    def _cancel(self, entry: _Entry) -> bool:
        """Drop an entry that is not read to its end; False if all of it is there or being read."""
        if entry.load is None or not (dropped := self.reads.cancel(entry.load)):
            return False
        self.counts.layers[entry.key[0]].nbytes -= dropped
        self._loading.remove(entry)
        slot = self._forget(entry)
        if entry.load.finished:
            self._free.append(slot)
        else:
            self._cancelled.append((entry.load, slot))
        return True

    def _forget(self, entry: _Entry) -> Slot:
        del self._entries[entry.key]
        self._evictable[entry.key] = False
        return entry.slot
